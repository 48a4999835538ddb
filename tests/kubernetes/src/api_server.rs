//! etcd and kube-apiserver: started, watched, killed and started again with the same data.

use std::fmt::Debug;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use keystone_lab::{Host, Process, sandbox, tool, wait};
use kube::api::{Api, PostParams};
use nix::sys::signal::Signal;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::pki::{Authority, write_token_keys};
use crate::{Access, Assets, Metrics, etcd};

/// TCP port of the API server.
pub const PORT: u16 = 6443;

/// How long it may take until it is ready: some seconds on an idle machine, more when many start together.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// How often it is asked whether it is.
const POLL: Duration = Duration::from_millis(100);

/// Lines of a log that an error quotes.
const QUOTED_LINES: usize = 20;

/// Addresses of Services, and of pods where the controller manager gives them out, unless the test says otherwise.
const SERVICE_CIDR: &str = "10.96.0.0/16";
const POD_CIDR: &str = "10.201.0.0/16";

/// Longer than any measurement; nobody renews these tokens.
const TOKEN_SECONDS: i64 = 6 * 3600;

/// How an API server is run. Authorization is always by Node and RBAC; ValidatingAdmissionPolicies are on, as they are by
/// default.
#[derive(Clone)]
pub struct Options {
    /// The machine on which it runs; None for the loopback of the sandbox.
    pub host: Option<Host>,
    /// Further addresses by which clients come: the certificate names them, besides `advertise`, that of `host` and those
    /// of the Service `kubernetes`.
    pub addresses: Vec<IpAddr>,
    /// The address in the endpoints of the Service `kubernetes`; None for that of `host`.
    pub advertise: Option<IpAddr>,
    /// Where Services have their addresses, as `--service-cluster-ip-range` takes it: one prefix, or one of each family.
    pub services: String,
    /// Where pods have theirs, likewise; each Node is given a /24 and a /64.
    pub pods: String,
    /// Admission plugins besides those that are on by default.
    pub admission_plugins: Vec<String>,
    /// Who issues the tokens of ServiceAccounts, and their audience.
    pub issuer: String,
    /// Distance of etcd's compactions, which make old resource versions answer 410 Gone; None for never, but for
    /// [`ApiServer::compact`].
    pub compaction: Option<Duration>,
    /// Keep a record of every request, for [`ApiServer::audit`].
    pub audit: bool,
    /// Further arguments of kube-apiserver, such as `--watch-cache=false`.
    pub arguments: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            host: None,
            addresses: Vec::new(),
            advertise: None,
            services: SERVICE_CIDR.to_owned(),
            pods: POD_CIDR.to_owned(),
            admission_plugins: vec!["NodeRestriction".to_owned()],
            issuer: "https://kubernetes.default.svc".to_owned(),
            compaction: None,
            audit: false,
            arguments: Vec::new(),
        }
    }
}

/// A running API server with its etcd. Both end with this value.
pub struct ApiServer {
    assets: Assets,
    options: Options,
    folder: PathBuf,
    authority: Authority,
    admin: Access,
    kubectl_config: PathBuf,
    helpers: Vec<Process>,
    api_server: Option<Process>,
    etcd: Option<Process>,
}

impl ApiServer {
    /// Starts both and waits until they are ready. Only inside a [`sandbox`], so that nothing can be left behind.
    pub fn start(options: Options) -> Result<Self> {
        ensure!(sandbox::is_inside(), "an API server runs inside a sandbox only");
        let assets = Assets::find()?;
        let folder = match &options.host {
            Some(host) => host.folder()?,
            None => PathBuf::from(sandbox::SCRATCH),
        };
        let folder = folder.join("kubernetes");
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let authority = Authority::new()?;
        let own = options.host.as_ref().map(|host| IpAddr::V4(host.v4()));
        let addresses: Vec<IpAddr> =
            options.addresses.iter().copied().chain([advertised(&options)]).chain(own).collect();
        let addresses = [addresses, first_addresses(&options.services)?].concat();
        authority.server("kube-apiserver", &addresses)?.write(&folder, "server")?;
        authority.certificate().write(&folder, "ca")?;
        write_token_keys(&folder, "tokens")?;
        if options.audit {
            let policy =
                json!({ "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{ "level": "Metadata" }] });
            fs::write(folder.join("audit-policy"), policy.to_string()).context("write the audit policy")?;
        }
        let certificate = authority.client("admin", Some("system:masters"))?;
        certificate.write(&folder, "admin")?;
        let admin = Access::by_certificate(local_url(), &authority.certificate().chain, certificate);
        let kubectl_config = folder.join("admin.kubeconfig");
        admin.write_kubeconfig(&kubectl_config)?;
        let mut server = Self {
            assets,
            options,
            folder,
            authority,
            admin,
            kubectl_config,
            helpers: Vec::new(),
            api_server: None,
            etcd: None,
        };
        server.start_etcd()?;
        server.start_api_server()?;
        server.wait_ready()?;
        Ok(server)
    }

    //
    // Who speaks
    //

    /// Of a person who may do everything.
    pub fn admin(&self) -> &Access {
        &self.admin
    }

    /// Of any user, by a client certificate. Without a group it has no rights but those of `system:authenticated`. A
    /// kubelet is `system:node:NAME` in `system:nodes`.
    pub fn user(&self, name: &str, group: Option<&str>) -> Result<Access> {
        let certificate = self.authority.client(name, group)?;
        Ok(Access::by_certificate(local_url(), self.authority(), certificate))
    }

    /// Of a ServiceAccount, by a token that is bound to nothing. Namespace and account are made if they are missing.
    pub fn service_account(&self, namespace: &str, account: &str) -> Result<Access> {
        let token = self.with_client(&self.admin, async |client| {
            make_account(&client, namespace, account).await?;
            request_token(&client, namespace, account, None).await
        })?;
        Ok(Access::by_token(local_url(), self.authority(), token))
    }

    /// Of a ServiceAccount in a pod on `node`, by a token bound to that pod: the API server sees the node's name in
    /// `authentication.kubernetes.io/node-name`. Node, namespace, account and pod are made if they are missing; the pod is
    /// called `ACCOUNT-NODE`, and never runs. The token ends with the pod, some seconds after it is deleted.
    pub fn service_account_on(&self, node: &str, namespace: &str, account: &str) -> Result<Access> {
        let pod = format!("{account}-{node}");
        let token = self.with_client(&self.admin, async |client| {
            make_account(&client, namespace, account).await?;
            make_missing::<Node>(&Api::all(client.clone()), json!({ "metadata": { "name": node } })).await?;
            let object = json!({
                "metadata": { "name": pod },
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": account,
                    "automountServiceAccountToken": false,
                    "containers": [{ "name": "agent", "image": "never-pulled" }],
                },
            });
            let pods = Api::<Pod>::namespaced(client.clone(), namespace);
            make_missing(&pods, object).await?;
            let uid = pods.get_metadata(&pod).await?.metadata.uid;
            let bound = BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: Some(pod),
                uid,
            };
            request_token(&client, namespace, account, Some(bound)).await
        })?;
        Ok(Access::by_token(local_url(), self.authority(), token))
    }

    /// Makes the certificate of a server called `name` at `address`: `FILE.crt` and `FILE.key` in `folder`, with the
    /// authority's `ca.crt`.
    pub fn write_server_certificate(&self, folder: &Path, file: &str, name: &str, address: IpAddr) -> Result<()> {
        self.authority.server(name, &[address])?.write(folder, file)?;
        fs::write(folder.join("ca.crt"), self.authority()).with_context(|| format!("write into {}", folder.display()))
    }

    /// The authority's certificate in PEM.
    pub fn authority(&self) -> &str {
        &self.authority.certificate().chain
    }

    /// Runs `work` with a client of `access`, on a thread in the network of the API server's machine.
    pub fn with_client<R: Send>(
        &self,
        access: &Access,
        work: impl AsyncFnOnce(kube::Client) -> Result<R> + Send,
    ) -> Result<R> {
        let config = access.config()?;
        self.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.context("start a runtime")?.block_on(async {
                let client = kube::Client::try_from(config).context("make a client")?;
                work(client).await
            })
        })
    }

    //
    // What an administrator does
    //

    /// Runs kubectl and returns its output.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_with(arguments, "")
    }

    /// As [`Self::kubectl`], with `input` for `--filename -`.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.kubectl_command(arguments);
        self.enter(|| tool::feed(&mut command, input)).with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    /// kubectl, to be started on the API server's machine, where it goes on for a while.
    pub fn kubectl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.assets.program("kubectl"));
        // Its cache of what the API server can do goes to the home.
        command.env("HOME", &self.folder).arg("--kubeconfig").arg(&self.kubectl_config).args(arguments);
        command
    }

    /// Server-side apply of manifests, YAML or JSON.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        self.kubectl_with(&["apply", "--server-side", "--force-conflicts", "--filename", "-"], manifests).map(drop)
    }

    /// The answer to a plain GET, such as of `/readyz?verbose`.
    pub fn get(&self, path: &str) -> Result<String> {
        let request = http::Request::get(path).body(Vec::new()).with_context(|| format!("ask for {path}"))?;
        self.with_client(&self.admin, async |client| Ok(client.request_text(request).await?))
            .with_context(|| format!("GET {path}"))
    }

    /// What the API server counts.
    pub fn metrics(&self) -> Result<Metrics> {
        self.get("/metrics").map(|text| Metrics::parse(&text))
    }

    /// Every request that has been answered, in the form of audit.k8s.io/v1 Event. Needs [`Options::audit`].
    pub fn audit(&self) -> Result<Vec<Value>> {
        ensure!(self.options.audit, "this API server keeps no audit");
        let text = fs::read_to_string(self.audit_file()).context("read the audit")?;
        // The last line may be half written.
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Makes etcd forget its history: a watch cannot be continued from before. The API server's own watch cache still has
    /// it, until [`Self::restart`].
    pub fn compact(&self) -> Result<()> {
        self.enter(|| etcd::compact(etcd::revision()?))
    }

    //
    // What happens to it
    //

    /// Process id of kube-apiserver, to see what it uses.
    pub fn id(&self) -> Option<u32> {
        self.api_server.as_ref().map(Process::id)
    }

    /// SIGKILL to the API server; etcd goes on.
    pub fn kill(&mut self) -> Result<()> {
        self.api_server.take().map_or(Ok(()), Process::kill)
    }

    /// SIGKILL to etcd; the API server goes on without it.
    pub fn kill_etcd(&mut self) -> Result<()> {
        self.etcd.take().map_or(Ok(()), Process::kill)
    }

    /// Starts what has been killed, with the data of before, and waits until it is ready.
    pub fn restart(&mut self) -> Result<()> {
        if self.etcd.is_none() {
            self.start_etcd()?;
        }
        if self.api_server.is_none() {
            self.start_api_server()?;
        }
        self.wait_ready()
    }

    /// From some moments on it shows a certificate that has ended, and nobody speaks with it any more.
    pub fn let_certificate_end(&self) -> Result<()> {
        let (chain, key) = self.authority.ended("kube-apiserver")?.write(&self.folder, "ended")?;
        // It watches its files, and reads them when another one takes their place.
        for (from, to) in [(chain, "server.crt"), (key, "server.key")] {
            fs::rename(from, self.folder.join(to)).with_context(|| format!("replace {to}"))?;
        }
        Ok(())
    }

    /// The API server stands still with all its connections open, and says nothing.
    pub fn freeze(&self) -> Result<()> {
        let Some(process) = &self.api_server else { return Ok(()) };
        process.signal(Signal::SIGSTOP)?;
        // Threads stop one after the other, and until then one may still answer.
        let tasks = format!("/proc/{}/task", process.id());
        wait::until("all threads of the API server stand still", START_PATIENCE, Duration::from_millis(1), || {
            let threads = fs::read_dir(&tasks).context("list the threads of the API server")?.flatten();
            let mut states = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
            let stopped = |status: String| status.lines().any(|line| line.starts_with("State:\tT"));
            Ok(states.all(stopped).then_some(()))
        })
    }

    /// Ends [`Self::freeze`].
    pub fn thaw(&self) -> Result<()> {
        self.api_server.as_ref().map_or(Ok(()), |process| process.signal(Signal::SIGCONT))
    }

    /// Starts kube-controller-manager: pod CIDRs for Nodes, garbage collection, default ServiceAccounts, taints of Nodes
    /// that went silent. Needs [`Assets::find_for_cluster`].
    pub fn start_controller_manager(&mut self) -> Result<()> {
        let mut command = Command::new(Assets::find_for_cluster()?.program("kube-controller-manager"));
        command.arg("--kubeconfig").arg(&self.kubectl_config).arg("--cert-dir").arg(&self.folder);
        self.file_argument(&mut command, "service-account-private-key-file", "tokens.key");
        self.file_argument(&mut command, "root-ca-file", "ca.crt");
        self.file_argument(&mut command, "cluster-signing-cert-file", "ca.crt");
        self.file_argument(&mut command, "cluster-signing-key-file", "ca.key");
        command.args(["--use-service-account-credentials", "--leader-elect=false", "--allocate-node-cidrs=true"]);
        command.arg(format!("--cluster-cidr={}", self.options.pods));
        // A Node that went silent counts as gone after 16 s instead of 40 s.
        command.arg("--node-monitor-grace-period=16s");
        let process = self.spawn("kube-controller-manager", &mut command)?;
        self.helpers.push(process);
        Ok(())
    }

    /// Starts kube-scheduler. Needs [`Assets::find_for_cluster`].
    pub fn start_scheduler(&mut self) -> Result<()> {
        let mut command = Command::new(Assets::find_for_cluster()?.program("kube-scheduler"));
        command.arg("--kubeconfig").arg(&self.kubectl_config).arg("--cert-dir").arg(&self.folder);
        command.arg("--leader-elect=false");
        let process = self.spawn("kube-scheduler", &mut command)?;
        self.helpers.push(process);
        Ok(())
    }

    /// How the API server's log ends.
    pub fn log_tail(&self, lines: usize) -> String {
        self.api_server.as_ref().map(|process| process.log_tail(lines)).unwrap_or_default()
    }

    fn start_etcd(&mut self) -> Result<()> {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let mut command = Command::new(self.assets.program("etcd"));
        command.arg("--data-dir").arg(self.folder.join("etcd"));
        command.arg(format!("--listen-client-urls={}", url(etcd::PORT)));
        command.arg(format!("--advertise-client-urls={}", url(etcd::PORT)));
        command.arg(format!("--listen-peer-urls={}", url(etcd::PORT + 1)));
        // The data is gone with the sandbox in any case.
        command.args(["--unsafe-no-fsync", "--log-level=warn"]);
        self.etcd = Some(self.spawn("etcd", &mut command)?);
        Ok(())
    }

    fn start_api_server(&mut self) -> Result<()> {
        let mut command = Command::new(self.assets.program("kube-apiserver"));
        let options = &self.options;
        command.arg(format!("--etcd-servers=http://127.0.0.1:{}", etcd::PORT));
        command.arg(format!("--etcd-compaction-interval={}s", options.compaction.unwrap_or_default().as_secs()));
        command.arg(format!("--secure-port={PORT}")).arg(format!("--advertise-address={}", advertised(options)));
        command.arg("--cert-dir").arg(&self.folder);
        self.file_argument(&mut command, "tls-cert-file", "server.crt");
        self.file_argument(&mut command, "tls-private-key-file", "server.key");
        self.file_argument(&mut command, "client-ca-file", "ca.crt");
        self.file_argument(&mut command, "service-account-key-file", "tokens.pub");
        self.file_argument(&mut command, "service-account-signing-key-file", "tokens.key");
        command.arg(format!("--service-account-issuer={0}", options.issuer));
        command.arg(format!("--api-audiences={}", options.issuer));
        command.args(["--authorization-mode=Node,RBAC", "--allow-privileged=true"]);
        command.arg(format!("--enable-admission-plugins={}", options.admission_plugins.join(",")));
        command.arg(format!("--service-cluster-ip-range={}", options.services));
        self.file_argument(&mut command, "kubelet-client-certificate", "admin.crt");
        self.file_argument(&mut command, "kubelet-client-key", "admin.key");
        command.arg("--kubelet-preferred-address-types=InternalIP");
        if options.audit {
            self.file_argument(&mut command, "audit-policy-file", "audit-policy");
            command.arg("--audit-log-path").arg(self.audit_file());
        }
        command.args(&options.arguments);
        self.api_server = Some(self.spawn("kube-apiserver", &mut command)?);
        Ok(())
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn kubectl_config(&self) -> &Path {
        &self.kubectl_config
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.assets.program(name)
    }

    fn file_argument(&self, command: &mut Command, flag: &str, file: &str) {
        command.arg(format!("--{flag}")).arg(self.folder.join(file));
    }

    fn audit_file(&self) -> PathBuf {
        self.folder.join("audit.log")
    }

    /// Starts a program on the API server's machine.
    pub(crate) fn spawn(&self, name: &str, command: &mut Command) -> Result<Process> {
        match &self.options.host {
            Some(host) => host.spawn(name, command),
            None => Process::start(command, &Path::new(sandbox::SCRATCH).join(format!("{name}.log"))),
        }
    }

    fn wait_ready(&mut self) -> Result<()> {
        wait::until("the API server is ready", START_PATIENCE, POLL, || {
            for process in [&mut self.etcd, &mut self.api_server].into_iter().flatten() {
                if let Some(status) = process.ended()? {
                    anyhow::bail!("it ended ({status}):\n{}", process.log_tail(QUOTED_LINES));
                }
            }
            Ok(self.get("/readyz").ok())
        })
        .map(drop)
        .with_context(|| format!("the log of the API server ends:\n{}", self.log_tail(QUOTED_LINES)))
    }

    fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.options.host {
            Some(host) => host.enter(work),
            None => work(),
        }
    }
}

fn local_url() -> String {
    format!("https://127.0.0.1:{PORT}")
}

/// The address in the endpoints of the Service `kubernetes`.
fn advertised(options: &Options) -> IpAddr {
    let host = options.host.as_ref().map(|host| IpAddr::V4(host.v4()));
    options.advertise.or(host).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

/// Of each prefix the first address: in those of Services it is that of the API server's own.
fn first_addresses(prefixes: &str) -> Result<Vec<IpAddr>> {
    let first = |prefix: &str| {
        let net: IpNet = prefix.parse().with_context(|| format!("parse {prefix:?}"))?;
        Ok(match net.network() {
            IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits() + 1).into(),
            IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits() + 1).into(),
        })
    };
    prefixes.split(',').map(first).collect()
}

async fn make_account(client: &kube::Client, namespace: &str, account: &str) -> Result<()> {
    make_missing::<Namespace>(&Api::all(client.clone()), json!({ "metadata": { "name": namespace } })).await?;
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
    make_missing(&accounts, json!({ "metadata": { "name": account } })).await
}

async fn make_missing<K>(api: &Api<K>, object: Value) -> Result<()>
where
    K: Clone + Debug + DeserializeOwned + Serialize,
{
    let object = serde_json::from_value(object).context("an object of the harness is well formed")?;
    match api.create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        Err(err) => Err(err.into()),
        Ok(_made) => Ok(()),
    }
}

async fn request_token(
    client: &kube::Client,
    namespace: &str,
    account: &str,
    bound_object_ref: Option<BoundObjectReference>,
) -> Result<String> {
    let spec = TokenRequestSpec { expiration_seconds: Some(TOKEN_SECONDS), bound_object_ref, ..Default::default() };
    let request = TokenRequest { spec, ..Default::default() };
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
    let answer = accounts.create_token_request(account, &PostParams::default(), &request).await?;
    answer.status.map(|status| status.token).context("the answer has no token")
}
