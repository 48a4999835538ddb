//! The command line. Every flag has an environment variable, which is what a Deployment sets.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use keystone_mesh_api::NAMESPACE;
use keystone_mesh_core::key::Identity;
use zeroize::Zeroizing;

use crate::view::{Policy, Settings};

/// Where Kubernetes tells a pod its namespace.
const POD_NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// Approves the nodes of a Keystone Mesh, gives out addresses and cleans up
#[derive(Parser, Debug)]
#[command(
    name = "keystone-controller",
    version,
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    max_term_width = 110
)]
pub struct Cli {
    /// What to do; without one, run
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The flags of `run`, for when it is left out
    #[command(flatten)]
    pub run: RunArgs,
}

/// What the program does.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the controller, until SIGTERM
    Run(RunArgs),
    /// Print the CustomResourceDefinitions, for `kubectl apply --server-side -f -`
    Crds {
        /// Write them into this directory, a file each, instead
        #[arg(long, value_name = "DIRECTORY")]
        directory: Option<PathBuf>,
    },
}

/// Flags of `run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// The network key, as the Secret of `keystone-mesh kubernetes secret` has it
    #[arg(
        long,
        env = "KEYSTONE_CONTROLLER_NETWORK_KEY_FILE",
        default_value = "/etc/keystone-controller/network.key",
        value_name = "FILE"
    )]
    pub network_key_file: PathBuf,
    /// The namespace of the network's ConfigMaps and of the lease; default: the pod's own, else `keystone-mesh`
    #[arg(long, env = "KEYSTONE_CONTROLLER_NAMESPACE")]
    pub namespace: Option<String>,
    /// This replica's name in the lease; default: the host name
    #[arg(long, env = "KEYSTONE_CONTROLLER_NAME", value_name = "NAME")]
    pub name: Option<String>,
    /// How to reach the API server outside a pod; default: KUBECONFIG, else ~/.kube/config, else the pod's own account
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// Who approves a Node's first record: only a join by token or a person, or also the kubelet's registration
    #[arg(long, env = "KEYSTONE_CONTROLLER_APPROVAL", value_enum, default_value_t = Approval::Member)]
    pub approval: Approval,
    /// Networks that any Node may be the way to when it or a person asks
    #[arg(long, env = "KEYSTONE_CONTROLLER_ALLOWED_ROUTES", value_delimiter = ',', value_name = "CIDR")]
    pub allowed_routes: Vec<IpNet>,
    /// Networks inside which Nodes' podCIDRs have to be; default: private space (RFC 1918, RFC 6598, RFC 4193)
    #[arg(long, env = "KEYSTONE_CONTROLLER_POD_CIDRS", value_delimiter = ',', value_name = "CIDR")]
    pub pod_cidrs: Vec<IpNet>,
    /// Initialise Nodes (provider ID, topology labels, addresses, the uninitialized taint), where no cloud controller does
    #[arg(long, env = "KEYSTONE_CONTROLLER_NODE_INIT")]
    pub node_init: bool,
    /// Put the taint readiness.k8s.io/keystone-mesh on fresh Nodes until the mesh reaches them
    #[arg(
        long,
        env = "KEYSTONE_CONTROLLER_STARTUP_TAINT",
        default_value_t = true,
        num_args = 0..=1,
        default_missing_value = "true",
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub startup_taint: bool,

    /// The port of the daemons' status listeners, which are asked whom they reach
    #[arg(long, env = "KEYSTONE_CONTROLLER_REPORT_PORT", default_value_t = 51842, value_name = "PORT")]
    pub report_port: u16,
    /// Seconds between two questions
    #[arg(
        long,
        env = "KEYSTONE_CONTROLLER_REPORT_INTERVAL",
        default_value_t = 5,
        value_parser = clap::value_parser!(u64).range(1..=60),
        value_name = "SECONDS"
    )]
    pub report_interval: u64,

    /// Seconds after which a watch is resumed; one that is silent for longer is opened again
    #[arg(
        long,
        env = "KEYSTONE_CONTROLLER_WATCH_LIFE",
        default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(1..=300),
        value_name = "SECONDS",
        hide = true
    )]
    pub watch_life: u32,

    /// Where to serve /metrics, /healthz and /readyz
    #[arg(long, env = "KEYSTONE_CONTROLLER_METRICS_LISTEN", default_value = "[::]:51843", value_name = "ADDRESS:PORT")]
    pub metrics_listen: SocketAddr,
    /// What is logged, to standard error: error, warn, info, debug, trace, or as in `info,keystone_controller=debug`
    #[arg(long, env = "KEYSTONE_CONTROLLER_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// How it is logged
    #[arg(long, env = "KEYSTONE_CONTROLLER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Who approves a Node's first record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Approval {
    /// A join by token, or a person
    Member,
    /// Besides, whoever registers a Node
    Auto,
}

/// How it is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

impl RunArgs {
    /// What decisions depend on.
    pub fn settings(&self) -> Settings {
        Settings {
            policy: match self.approval {
                Approval::Member => Policy::Member,
                Approval::Auto => Policy::Auto,
            },
            allowed_routes: self.allowed_routes.clone(),
            pod_cidrs: self.pod_cidrs.clone(),
            node_init: self.node_init,
            startup_taint: self.startup_taint,
            ..Settings::default()
        }
    }

    /// The namespace: the flag's, else the pod's, else the one that the chart installs into.
    pub fn namespace(&self) -> String {
        let of_pod = || std::fs::read_to_string(POD_NAMESPACE).ok().map(|text| text.trim().to_owned());
        self.namespace.clone().or_else(of_pod).unwrap_or_else(|| NAMESPACE.to_owned())
    }

    /// Between two questions to reporters.
    pub fn report_interval(&self) -> Duration {
        Duration::from_secs(self.report_interval)
    }
}

/// Why the network key could not be read.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// No such file, or no permission.
    #[error(
        "the network key {path} cannot be read: {source}; on the control-plane host run `keystone-mesh kubernetes secret \
         | kubectl apply -f -`, and mount the Secret or name the file with --network-key-file"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not the Base64 of 32 bytes.
    #[error(
        "{path} holds no network key: expected 44 characters of Base64, 32 bytes, as `keystone-mesh kubernetes secret` \
         writes them"
    )]
    NoKey {
        /// The file.
        path: PathBuf,
    },
}

/// Reads the network key: the Base64 of [`Identity::seed`].
pub fn read_key(path: &Path) -> Result<Identity, KeyFileError> {
    let text = std::fs::read(path).map_err(|source| KeyFileError::Unreadable { path: path.to_owned(), source })?;
    let text = Zeroizing::new(text);
    let no_key = || KeyFileError::NoKey { path: path.to_owned() };
    let seed = Zeroizing::new(STANDARD.decode(text.trim_ascii()).map_err(|_| no_key())?);
    let seed: &[u8; 32] = seed.as_slice().try_into().map_err(|_| no_key())?;
    Ok(Identity::from_seed(seed))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use keystone_mesh_core::key::Secret;

    use super::*;

    fn run(flags: &[&str]) -> RunArgs {
        Cli::try_parse_from(std::iter::once("keystone-controller").chain(flags.iter().copied())).unwrap().run
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_become_settings() {
        let settings =
            run(&["--approval", "auto", "--allowed-routes", "10.1.0.0/16,fd00::/64", "--node-init"]).settings();
        assert_eq!(settings.policy, Policy::Auto);
        assert_eq!(settings.allowed_routes.len(), 2);
        assert!(settings.node_init && settings.startup_taint);
        assert!(!run(&["--startup-taint=false"]).settings().startup_taint);
        assert!(run(&["--startup-taint"]).settings().startup_taint);
    }

    #[test]
    fn a_key_file_is_read_and_a_bad_one_says_what_to_do() {
        let path = std::env::temp_dir().join(format!("keystone-controller-key-{}", std::process::id()));
        let identity = Secret::from_bytes([7; 32]).identity();
        std::fs::write(&path, STANDARD.encode(identity.seed().as_slice()) + "\n").unwrap();
        assert_eq!(read_key(&path).unwrap().id(), identity.id());
        for bad in ["", "AAAA", "not base64!", &"A".repeat(100)] {
            std::fs::write(&path, bad).unwrap();
            let error = read_key(&path).unwrap_err().to_string();
            assert!(error.contains("keystone-mesh kubernetes secret") && !error.contains("AAAA"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(read_key(&path).unwrap_err().to_string().contains("--network-key-file"));
    }
}
