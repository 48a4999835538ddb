//! Access to the API server: where it is, and with which credentials.
//!
//! Credentials come from a pod's service account, from a kubeconfig, or are granted to a running daemon over its control
//! socket. All of them change while the daemon runs (tokens rotate, k3s renews its certificates), so a client is made
//! afresh from its source whenever the API server refuses the old one.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use keystone_mesh_api::errors;
use kube::client::ClientBuilder;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use zeroize::Zeroizing;

/// Where a pod finds its service account.
pub const SERVICE_ACCOUNT_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Where distributions leave their administrator's kubeconfig: k3s, then kubeadm.
const ADMIN_KUBECONFIGS: [&str; 2] = ["/etc/rancher/k3s/k3s.yaml", "/etc/kubernetes/admin.conf"];
/// How long a connection may take to stand; the API server may be at the far end of a relay.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no access.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Nothing was found.
    #[error(
        "no access to Kubernetes was found (looked for a pod's service account{}); name a kubeconfig with --kubeconfig",
        listed(.0)
    )]
    NotFound(Vec<PathBuf>),
    /// A kubeconfig cannot be used.
    #[error("the kubeconfig {path} cannot be used: {why}", path = path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// A service account cannot be used.
    #[error("the service account in {path} cannot be used: {why}", path = path.display())]
    ServiceAccount {
        /// The directory.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// What was granted cannot be used.
    #[error("the access that was granted cannot be used: {0}")]
    Grant(String),
    /// No client can be made of it.
    #[error("cannot make a client of the Kubernetes API: {0}")]
    Client(String),
}

/// Access that the DaemonSet's pod hands to the daemon on its host.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Grant {
    /// The API server's URL.
    pub server: String,
    /// Certificates of its authority, PEM.
    pub ca: String,
    /// The bearer token; secret.
    pub token: Zeroizing<String>,
    /// Until when the token is good, in seconds since 1970; none where it does not say.
    pub expires: Option<u64>,
    /// The namespace of our objects.
    pub namespace: String,
    /// The Node that the pod runs on.
    pub node: String,
}

impl Grant {
    fn credentials(&self) -> (&str, &str, &str) {
        (&self.server, &self.ca, &self.token)
    }
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant")
            .field("server", &self.server)
            .field("expires", &self.expires)
            .field("namespace", &self.namespace)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// A pod's service account.
#[derive(Clone, Debug)]
pub struct ServiceAccount {
    /// The API server's URL.
    pub server: String,
    /// The directory with `ca.crt`, `namespace` and `token`.
    pub dir: PathBuf,
}

impl ServiceAccount {
    /// The one of the pod that this process runs in, if any.
    pub fn of_this_pod() -> Option<Self> {
        Self::in_directory(Path::new(SERVICE_ACCOUNT_DIR)).ok().filter(|account| account.dir.join("token").exists())
    }

    /// One whose files are in `dir`; the API server is named in the environment, as in every pod.
    pub fn in_directory(dir: &Path) -> Result<Self, AccessError> {
        let [host, port] = ["KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"].map(|name| {
            let why = format!("{name} is not set, which names the API server in every pod");
            std::env::var(name).map_err(|_| AccessError::ServiceAccount { path: dir.to_owned(), why })
        });
        let (host, port) = (host?, port?);
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        Ok(Self { server: format!("https://{host}:{port}"), dir: dir.to_owned() })
    }

    /// What it grants at this moment.
    pub fn grant(&self, node: String) -> Result<Grant, AccessError> {
        let [ca, namespace, token] = ["ca.crt", "namespace", "token"].map(|name| self.read(name));
        let token = Zeroizing::new(token?.trim().to_owned());
        let namespace = namespace?.trim().to_owned();
        Ok(Grant { server: self.server.clone(), ca: ca?, expires: expiry(&token), token, namespace, node })
    }

    fn read(&self, name: &str) -> Result<String, AccessError> {
        let path = self.dir.join(name);
        std::fs::read_to_string(&path).map_err(|why| AccessError::ServiceAccount { path, why: why.to_string() })
    }
}

#[derive(Clone, Debug)]
enum Source {
    /// The file that is named.
    Kubeconfig(PathBuf),
    /// The first kubeconfig that is there when a client is made: k3s writes its own only once it runs.
    AnyKubeconfig,
    ServiceAccount(ServiceAccount),
    Granted(watch::Receiver<Grant>),
}

/// Access to one API server. Clones share their client.
#[derive(Clone)]
pub struct Access(Arc<Inner>);

struct Inner {
    source: Source,
    namespace: String,
    made: Mutex<Option<(Client, Option<Grant>)>>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Access").field(&self.0.source).finish()
    }
}

impl Access {
    /// The kubeconfig that is named, or else the first that is there of: this pod's service account, `$KUBECONFIG`, k3s'
    /// and kubeadm's administrator's. `namespace`: none takes the service account's, or the chart's default.
    pub fn find(kubeconfig: Option<&Path>, namespace: Option<&str>) -> Result<Self, AccessError> {
        let source = match (kubeconfig, ServiceAccount::of_this_pod()) {
            (Some(path), _) => Source::Kubeconfig(path.to_owned()),
            (None, Some(account)) => Source::ServiceAccount(account),
            (None, None) => Source::AnyKubeconfig,
        };
        let namespace = match (namespace, &source) {
            (Some(namespace), _) => namespace.to_owned(),
            (None, Source::ServiceAccount(account)) => account.read("namespace")?.trim().to_owned(),
            (None, Source::Kubeconfig(_) | Source::AnyKubeconfig | Source::Granted(_)) => {
                keystone_mesh_api::NAMESPACE.to_owned()
            }
        };
        Ok(Self::new(source, namespace))
    }

    /// With a service account.
    pub fn service_account(account: ServiceAccount, namespace: Option<&str>) -> Result<Self, AccessError> {
        let namespace = match namespace {
            Some(namespace) => namespace.to_owned(),
            None => account.read("namespace")?.trim().to_owned(),
        };
        Ok(Self::new(Source::ServiceAccount(account), namespace))
    }

    /// With the credentials that were granted last.
    pub fn granted(grants: watch::Receiver<Grant>) -> Self {
        let namespace = grants.borrow().namespace.clone();
        Self::new(Source::Granted(grants), namespace)
    }

    fn new(source: Source, namespace: String) -> Self {
        Self(Arc::new(Inner { source, namespace, made: Mutex::default() }))
    }

    /// The namespace of our objects.
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// A client with credentials that were good when it was made.
    pub async fn client(&self) -> Result<Client, AccessError> {
        let granted = match &self.0.source {
            Source::Granted(grants) => Some(grants.borrow().clone()),
            Source::Kubeconfig(_) | Source::AnyKubeconfig | Source::ServiceAccount(_) => None,
        };
        if let Some((client, with)) = &*self.made()
            && with.as_ref().map(Grant::credentials) == granted.as_ref().map(Grant::credentials)
        {
            return Ok(client.clone());
        }
        let mut config = self.config(granted.as_ref()).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        // Whoever asks has a backoff of its own, and says why it waits.
        config.default_retry = false;
        let server = config.cluster_url.to_string();
        let naming = errors::naming(server.trim_end_matches('/').to_owned());
        let builder = ClientBuilder::try_from(config).map_err(|error| AccessError::Client(errors::chain(&error)))?;
        let client = builder.with_layer(&naming).build();
        *self.made() = Some((client.clone(), granted));
        Ok(client)
    }

    /// The credentials or the connection failed: the next client is made afresh from its source.
    pub fn renew(&self) {
        *self.made() = None;
    }

    fn made(&self) -> std::sync::MutexGuard<'_, Option<(Client, Option<Grant>)>> {
        self.0.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn config(&self, granted: Option<&Grant>) -> Result<Config, AccessError> {
        match (&self.0.source, granted) {
            (Source::Kubeconfig(path), _) => from_kubeconfig(path).await,
            (Source::AnyKubeconfig, _) => from_kubeconfig(&find_kubeconfig()?).await,
            (Source::ServiceAccount(account), _) => {
                let grant = account.grant(String::new())?;
                let token_file = Some(account.dir.join("token").to_string_lossy().into_owned());
                let mut config = from_grant(&grant)?;
                config.auth_info = AuthInfo { token_file, ..AuthInfo::default() };
                Ok(config)
            }
            (Source::Granted(_), Some(grant)) => from_grant(grant),
            (Source::Granted(_), None) => Err(AccessError::Grant("it was withdrawn".into())),
        }
    }
}

fn find_kubeconfig() -> Result<PathBuf, AccessError> {
    let from_environment = std::env::var_os("KUBECONFIG").unwrap_or_default();
    let candidates = std::env::split_paths(&from_environment)
        .filter(|path| !path.as_os_str().is_empty())
        .chain(ADMIN_KUBECONFIGS.iter().map(PathBuf::from));
    let mut looked = Vec::new();
    for path in candidates {
        if path.exists() {
            return Ok(path);
        }
        looked.push(path);
    }
    Err(AccessError::NotFound(looked))
}

async fn from_kubeconfig(path: &Path) -> Result<Config, AccessError> {
    let error = |error: kube::config::KubeconfigError| AccessError::Kubeconfig {
        path: path.to_owned(),
        why: errors::chain(&error),
    };
    let kubeconfig = Kubeconfig::read_from(path).map_err(error)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(error)
}

fn from_grant(grant: &Grant) -> Result<Config, AccessError> {
    let server = grant.server.parse().map_err(|error| AccessError::Grant(format!("`{}`: {error}", grant.server)))?;
    let mut config = Config::new(server);
    let authorities: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(grant.ca.as_bytes()).collect();
    let authorities = authorities.map_err(|error| AccessError::Grant(format!("its authority: {error}")))?;
    config.root_cert = Some(authorities.iter().map(|authority| authority.to_vec()).collect());
    config.auth_info = AuthInfo { token: Some(grant.token.as_str().to_owned().into()), ..AuthInfo::default() };
    Ok(config)
}

/// When a service account token (a JWT, RFC 7519) ends. The signature is the API server's business.
fn expiry(token: &str) -> Option<u64> {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    let claims = token.split('.').nth(1)?;
    let claims = base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, claims).ok()?;
    serde_json::from_slice::<Claims>(&claims).ok().map(|claims| claims.exp)
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| format!(", {}", path.display())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_does_not_show_its_token() {
        let grant = Grant {
            server: "https://10.96.0.1:443".into(),
            ca: String::new(),
            token: Zeroizing::new("secret-token".into()),
            expires: Some(1),
            namespace: "keystone-mesh".into(),
            node: "worker-1".into(),
        };
        let shown = format!("{grant:?}");
        assert!(!shown.contains("secret") && shown.contains("worker-1"), "{shown}");
    }

    #[test]
    fn a_tokens_end_is_read_and_nonsense_has_none() {
        let claims = base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, r#"{"exp":1764000000}"#);
        assert_eq!(expiry(&format!("e30.{claims}.sig")), Some(1_764_000_000));
        for nonsense in ["", "a.b.c", "no-dots", "..", "a.e30.c"] {
            assert_eq!(expiry(nonsense), None, "{nonsense}");
        }
    }
}
