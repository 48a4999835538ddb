//! The command line.

mod agent;
mod bench;
mod doctor;
mod inspect;
mod kubernetes;
mod member;
mod output;
mod peer;
mod token;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use keystone_mesh_core::NodeId;
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::relay::address::{HostPort, RelayAddr};

use crate::config::{Options, Places};

/// Joins machines behind NAT into one network: userspace WireGuard, direct where possible and relayed where not
#[derive(Parser, Debug)]
#[command(
    name = "keystone-mesh",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    max_term_width = 110
)]
pub struct Cli {
    #[command(flatten)]
    places: Places,
    /// What is logged, to standard error: error, warn, info, debug, trace, or as in `info,keystone_mesh::relay=debug`
    #[arg(
        long,
        env = "KEYSTONE_MESH_LOG",
        default_value = "info",
        value_name = "FILTER",
        global = true,
        hide_default_value = true
    )]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Make a network: this host becomes its control plane
    Init(InitArgs),
    /// Make, list and revoke join tokens (on the control plane)
    #[command(subcommand)]
    Token(TokenCommand),
    /// Join a network with a token; `up` then runs the daemon
    Join(JoinArgs),
    /// Run the daemon, in the foreground
    Up(Box<UpArgs>),
    /// Serve this Node from a DaemonSet's pod: give the host's daemon access to Kubernetes, or run it here
    Agent(Box<AgentArgs>),
    /// Let a Node that waits into the network (with an administrator's access to Kubernetes)
    Approve(ApproveArgs),
    /// What Kubernetes needs to know of the network (on the control plane)
    #[command(subcommand)]
    Kubernetes(KubernetesCommand),
    /// Run a relay alone, as on a small public server: no interface, no privileges
    Relay(RelayArgs),
    /// Show this node, its relays, its registry and its peers
    Status(ReadArgs),
    /// Show every peer with its path, and every address that was tried
    Peers(ReadArgs),
    /// Measure the round trip to a node through the mesh
    Ping(PingArgs),
    /// Measure throughput both ways, latency, path, MTU and CPU cost to a node through the mesh
    Bench(BenchArgs),
    /// Take another node out of the network (on the control plane)
    Remove {
        /// The node
        name: NodeName,
    },
    /// Leave the network: forget this node everywhere and take its state away
    Leave {
        /// Clean up here even where the control plane cannot be told
        #[arg(long)]
        force: bool,
        /// The interface to take away where no daemon runs that knows it
        #[arg(long, env = "KEYSTONE_MESH_INTERFACE", default_value = crate::config::DEFAULT_INTERFACE, value_name = "IF")]
        interface: String,
        /// The CNI configurations to take ours away from where no daemon runs that knows it
        #[arg(long, env = "KEYSTONE_MESH_CNI_CONF_DIR", default_value = crate::config::DEFAULT_CNI_CONF_DIR, value_name = "DIR")]
        cni_conf_dir: PathBuf,
    },
    /// Make, show, list and remove plain WireGuard peers: a laptop, a phone, another site (with Kubernetes)
    #[command(subcommand)]
    Peer(peer::PeerCommand),
    /// Check what the daemon needs on this host, and say why peers are not direct
    Doctor(ReadArgs),
    /// Print a completion script
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Write man pages
    Man {
        /// Into this directory
        directory: PathBuf,
    },
}

#[derive(clap::Args, Debug)]
struct InitArgs {
    /// This node's name [default: the host name]
    #[arg(long, env = "KEYSTONE_MESH_NAME")]
    name: Option<NodeName>,
    /// IPv4 prefix of the mesh
    #[arg(long, default_value = keystone_mesh_core::network::DEFAULT_IPV4, value_name = "CIDR")]
    ipv4: ipnet::Ipv4Net,
    /// IPv6 prefix of the mesh [default: a unique local /48 made from the network key]
    #[arg(long, value_name = "CIDR")]
    ipv6: Option<ipnet::Ipv6Net>,
    /// A relay for the network; repeatable
    #[arg(long = "relay", value_name = "KEY@HOST:PORT")]
    relays: Vec<RelayAddr>,
    /// Where this host is reachable from outside, as behind a port-forward; repeatable
    #[arg(long = "gateway", value_name = "HOST:PORT")]
    gateways: Vec<HostPort>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand, Debug)]
enum TokenCommand {
    /// Make a token and show it, once
    Create {
        /// How long it is good for, as in `30m`, `24h`, `7d`; `never` for no end
        #[arg(long, default_value = "1h", value_name = "TIME")]
        ttl: String,
        /// How many nodes may join with it; 0 for any number
        #[arg(long, default_value_t = 1, value_name = "N")]
        uses: u32,
        /// Which node names it is good for; `*` and `?` stand for characters
        #[arg(long, value_name = "PATTERN")]
        name_pattern: Option<keystone_mesh_core::token::NamePattern>,
        /// A network that its nodes may be the way to; repeatable
        #[arg(long = "route", value_name = "CIDR")]
        routes: Vec<ipnet::IpNet>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List tokens; their secrets are kept nowhere
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Take a token back; nodes that joined with it stay
    Revoke {
        /// Its id, as `list` shows
        id: keystone_mesh_core::token::TokenId,
    },
}

#[derive(clap::Args, Clone, Debug, Default)]
struct TokenArgs {
    /// File with the join token; `-` for standard input
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The join token. In the environment only: arguments can be read by every process
    #[arg(long = "token-from-environment", env = "KEYSTONE_MESH_TOKEN", hide = true, hide_env_values = true)]
    token: Option<String>,
}

#[derive(clap::Args, Debug)]
struct JoinArgs {
    #[command(flatten)]
    token: TokenArgs,
    /// This node's name [default: the host name]
    #[arg(long, env = "KEYSTONE_MESH_NAME")]
    name: Option<NodeName>,
    /// A network behind this node for which it asks to be the way; repeatable
    #[arg(long = "route", value_name = "CIDR")]
    routes: Vec<ipnet::IpNet>,
    /// Seconds until the attempt is given up
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    timeout: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
struct UpArgs {
    #[command(flatten)]
    options: Options,
    /// Configuration file (TOML)
    #[arg(long, env = "KEYSTONE_MESH_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    token: TokenArgs,
}

#[derive(clap::Args, Debug)]
struct AgentArgs {
    #[command(flatten)]
    options: Options,
    /// Configuration file (TOML)
    #[arg(long, env = "KEYSTONE_MESH_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of the pod's service account
    #[arg(long, default_value = crate::kube_api::access::SERVICE_ACCOUNT_DIR, value_name = "DIR")]
    service_account: PathBuf,
    /// Seconds for which the host's daemon is waited for before it is run here
    #[arg(long, default_value_t = 30, env = "KEYSTONE_MESH_HOST_PATIENCE", value_name = "SECONDS")]
    host_patience: u64,
}

#[derive(clap::Args, Debug)]
struct ApproveArgs {
    /// The Node, or the machine that is to be one
    name: NodeName,
    /// The identity that is let in, or how it begins (8 characters and more); anything else there is refused
    #[arg(long, value_name = "FINGERPRINT")]
    identity: Option<String>,
    /// A network that it may be the way to; repeatable
    #[arg(long = "route", value_name = "CIDR")]
    routes: Vec<ipnet::IpNet>,
    /// Access to Kubernetes [default: $KUBECONFIG, ~/.kube/config, k3s' or kubeadm's administrator's]
    #[arg(long, env = "KEYSTONE_MESH_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand, Debug)]
enum KubernetesCommand {
    /// Print a Namespace and a Secret with the network's signing key, for `kubectl apply --filename -`
    Secret {
        /// The namespace of the mesh's objects
        #[arg(long, env = "KEYSTONE_MESH_NAMESPACE", default_value = keystone_mesh_api::NAMESPACE, value_name = "NAME")]
        namespace: String,
    },
}

#[derive(clap::Args, Debug)]
struct RelayArgs {
    /// The network key, as `init` prints it: whom the relay serves
    #[arg(long, env = "KEYSTONE_MESH_NETWORK", required_unless_present = "print_key")]
    network: Option<NodeId>,
    /// Address and port to bind
    #[arg(long, default_value = "[::]:51840", env = "KEYSTONE_MESH_RELAY_LISTEN", value_name = "ADDRESS:PORT")]
    listen: std::net::SocketAddr,
    /// Serve metrics and health over HTTP: a port for loopback, or ADDRESS:PORT; repeatable [default: nowhere]
    #[arg(long, env = "KEYSTONE_MESH_STATUS_LISTEN", value_delimiter = ',', value_name = "WHERE")]
    status_listen: Vec<crate::http::listen::ListenAt>,
    /// Print the relay's key, making it where there is none, and exit
    #[arg(long)]
    print_key: bool,
}

#[derive(clap::Args, Clone, Copy, Debug)]
struct ReadArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
struct PingArgs {
    /// The node
    node: String,
    /// How many
    #[arg(long, short, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Milliseconds between them, and the longest wait for an answer
    #[arg(long, short, default_value_t = 1000, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    interval: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
struct BenchArgs {
    /// The node
    node: String,
    /// Seconds for each direction, 1 to 60
    #[arg(long, default_value_t = 5, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Parses the command line, runs the command, and tells errors as a person reads them.
pub fn main() -> ExitCode {
    crate::sys::memory::give_back_large_blocks();
    let cli = Cli::parse();
    // Everything that this program makes is its user's alone.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    output::start_log(&cli.log);
    match run(cli) {
        Ok(code) => code,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let Cli { places, command, .. } = cli;
    // Two workers: the control side has little to do, and the data plane has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let done = match command {
            Command::Init(args) => member::init(&places, args),
            Command::Token(command) => token::run(&places, command).await,
            Command::Join(args) => member::join(&places, args).await,
            Command::Up(args) => member::up(&places, *args).await,
            Command::Agent(args) => agent::run(&places, *args).await,
            Command::Approve(args) => kubernetes::approve(&args).await,
            Command::Kubernetes(KubernetesCommand::Secret { namespace }) => kubernetes::secret(&places, &namespace),
            Command::Relay(args) => member::relay(&places, &args).await,
            Command::Status(args) => inspect::status(&places, args.json).await,
            Command::Peers(args) => inspect::peers(&places, args.json).await,
            Command::Ping(args) => return bench::ping(&places, &args).await,
            Command::Bench(args) => bench::bench(&places, &args).await,
            Command::Remove { name } => member::remove(&places, name).await,
            Command::Leave { force, interface, cni_conf_dir } => {
                member::leave(&places, &interface, &cni_conf_dir, force).await
            }
            Command::Peer(command) => peer::run(&places, command).await,
            Command::Doctor(args) => return doctor::run(&places, args.json).await,
            Command::Completions { shell } => completions(shell),
            Command::Man { directory } => man(&directory),
        };
        done.map(|()| ExitCode::SUCCESS)
    })
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "keystone-mesh", &mut script);
    output::print(&String::from_utf8_lossy(&script))
}

fn man(directory: &std::path::Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Cli::command(), directory)?;
    output::print(&format!("man pages written to {}\n", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_secret_can_be_an_argument_by_its_usual_name() {
        assert!(Cli::try_parse_from(["keystone-mesh", "join", "--token", "ksm1abc"]).is_err());
    }

    #[test]
    fn every_command_and_flag_is_described() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
                assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
