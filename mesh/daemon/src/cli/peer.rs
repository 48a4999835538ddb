//! `peer add`, `config`, `list` and `remove`: machines with stock WireGuard, as Peer objects in Kubernetes.
//!
//! The key pair is made here. The object gets the public half; the private one is in the file that is printed, once, and
//! is kept nowhere. The controller gives the peer its address and signs what the serving node has to know.

mod cluster;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand};
use ipnet::IpNet;
use keystone_mesh_api::{Peer, PeerSpec};
use keystone_mesh_core::PrivateKey;
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::plain_peer::PlainPeer;
use keystone_mesh_core::relay::HostPort;
use zeroize::Zeroizing;

use self::cluster::Cluster;
use super::inspect;
use super::output::{print, print_json, table};
use crate::config::{DEFAULT_MTU, Places};
use crate::wg_quick::{Endpoint, WgQuick};

#[derive(Subcommand, Debug)]
pub(super) enum PeerCommand {
    /// Make a peer with a new key, and print its configuration for wg-quick or a WireGuard app
    Add(AddArgs),
    /// Print the configuration of a peer that exists
    Config(ConfigArgs),
    /// List peers with what the controller says of them
    List {
        #[command(flatten)]
        access: AccessArgs,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a peer: its key is refused at once
    Remove {
        /// The peer
        name: NodeName,
        #[command(flatten)]
        access: AccessArgs,
    },
}

#[derive(Args, Debug)]
pub(super) struct AccessArgs {
    /// Kubeconfig [default: $KUBECONFIG, then that of k3s or kubeadm on this host]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Namespace of Keystone Mesh [default: keystone-mesh]
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Option<String>,
}

#[derive(Args, Debug)]
pub(super) struct ShowArgs {
    /// MTU of the machine's interface [default: the mesh's as this host's daemon has it, else 1280]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1280..))]
    mtu: Option<u16>,
    /// Show a QR code also where standard error is no terminal
    #[arg(long)]
    qr: bool,
    /// Seconds to wait for the controller
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

#[derive(Args, Debug)]
pub(super) struct AddArgs {
    /// The peer's name, as names of nodes are
    name: NodeName,
    /// The node that serves it: one that the machine can reach [default: the control plane's]
    #[arg(long, value_name = "NODE")]
    node: Option<NodeName>,
    /// Where the machine is reached; without one it has to come first, as a phone does
    #[arg(long, value_name = "HOST:PORT")]
    endpoint: Option<HostPort>,
    /// A network behind the machine, as of another site; repeatable
    #[arg(long = "route", value_name = "CIDR")]
    routes: Vec<IpNet>,
    /// Seconds between keepalives that the serving node sends, 1 to 65535 [default: none]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u16).range(1..))]
    keepalive: Option<u16>,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    show: ShowArgs,
}

#[derive(Args, Debug)]
pub(super) struct ConfigArgs {
    /// The peer
    name: NodeName,
    /// File with the peer's private key, Base64: it is put into the configuration; `-` for standard input
    #[arg(long, value_name = "FILE", conflicts_with = "new_key")]
    private_key_file: Option<PathBuf>,
    /// Give the peer a new key; the old one is refused from then on
    #[arg(long)]
    new_key: bool,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    show: ShowArgs,
}

pub(super) async fn run(places: &Places, command: PeerCommand) -> anyhow::Result<()> {
    match command {
        PeerCommand::Add(args) => add(places, args).await,
        PeerCommand::Config(args) => config(places, args).await,
        PeerCommand::List { access, json } => list(&access, json).await,
        PeerCommand::Remove { name, access } => {
            connect(&access).await?.remove(&name).await?;
            print(&format!("peer `{name}` is removed; its addresses rest for a day before another gets them\n"))
        }
    }
}

async fn connect(access: &AccessArgs) -> anyhow::Result<Cluster> {
    Cluster::connect(access.kubeconfig.as_deref(), access.namespace.as_deref()).await.context(
        "plain peers of the network are objects in Kubernetes; where there is none, [[peer]] in the configuration of the \
         node that serves the machine does it (docs/configuration.md)",
    )
}

async fn add(places: &Places, args: AddArgs) -> anyhow::Result<()> {
    for route in &args.routes {
        ensure!(route.trunc() == *route, "--route {route} has host bits set; did you mean {}?", route.trunc());
    }
    let cluster = connect(&args.access).await?;
    let key = new_key()?;
    let spec = PeerSpec {
        public_key: key.public_key().to_string(),
        node: args.node.as_ref().map(ToString::to_string),
        endpoint: args.endpoint.as_ref().map(ToString::to_string),
        routes: args.routes.iter().map(ToString::to_string).collect(),
        persistent_keepalive: args.keepalive,
    };
    cluster.create(&args.name, spec).await?;
    let shown = async {
        let stated = cluster.stated(&args.name, Some(&key.public_key()), patience(&args.show)).await?;
        made(places, &cluster, &stated, &args.show).await
    };
    match shown.await {
        Ok(config) => show(&config, Some(&key), &args.show),
        // Nobody will ever see its key.
        Err(error) => {
            let left = match cluster.remove(&args.name).await {
                Ok(()) => "the peer was taken back".to_owned(),
                Err(left) => format!("and the peer could not be taken back: {left:#}"),
            };
            Err(error.context(format!("peer `{}` was not made; {left}", args.name)))
        }
    }
}

async fn config(places: &Places, args: ConfigArgs) -> anyhow::Result<()> {
    let given = args.private_key_file.as_deref().map(read_key).transpose()?;
    let cluster = connect(&args.access).await?;
    let key = match given {
        Some(key) => {
            let known = cluster.get(&args.name).await?.spec.public_key;
            ensure!(
                key.public_key().to_string() == known,
                "this is not the private key of peer `{}`: its public half is {}, the peer's {known}",
                args.name,
                key.public_key()
            );
            Some(key)
        }
        None if args.new_key => {
            let key = new_key()?;
            cluster.set_key(&args.name, &key.public_key()).await?;
            Some(key)
        }
        None => None,
    };
    let public = key.as_ref().map(PrivateKey::public_key);
    let stated = cluster.stated(&args.name, public.as_ref(), patience(&args.show)).await;
    let shown = async { made(places, &cluster, &stated?, &args.show).await };
    match (shown.await, args.new_key) {
        (Ok(config), _) => show(&config, key.as_ref(), &args.show),
        (Err(error), false) => Err(error),
        (Err(error), true) => Err(error.context(format!(
            "peer `{0}` has got a new key that nobody will see; run `keystone-mesh peer config {0} --new-key` again",
            args.name
        ))),
    }
}

async fn list(access: &AccessArgs, json: bool) -> anyhow::Result<()> {
    let peers = connect(access).await?.list().await?;
    if json {
        return print_json(&peers.iter().map(describe).collect::<Vec<_>>());
    }
    if peers.is_empty() {
        return print("no peers; make one with `keystone-mesh peer add NAME`\n");
    }
    let rows: Vec<Vec<String>> = peers.iter().map(row).collect();
    print(&table(&["PEER", "ADDRESS", "NODE", "READY", "WHY"], &rows))
}

fn describe(peer: &Peer) -> serde_json::Value {
    let ready = cluster::ready(peer);
    serde_json::json!({
        "name": peer.metadata.name,
        "public_key": peer.spec.public_key,
        "addresses": peer.status.as_ref().map(|status| &status.addresses),
        "routes": peer.spec.routes,
        "node": peer.status.as_ref().and_then(|status| status.node.as_ref()).or(peer.spec.node.as_ref()),
        "endpoint": peer.spec.endpoint,
        "ready": ready.map(|condition| &condition.status),
        "reason": ready.map(|condition| &condition.reason),
        "message": ready.map(|condition| &condition.message),
    })
}

fn row(peer: &Peer) -> Vec<String> {
    let dash = || "-".to_owned();
    let status = peer.status.clone().unwrap_or_default();
    let ready = cluster::ready(peer);
    let address = status.addresses.first().map(|net| net.split('/').next().unwrap_or(net).to_owned());
    let why = ready.filter(|condition| condition.status != "True");
    vec![
        peer.metadata.name.clone().unwrap_or_default(),
        address.unwrap_or_else(dash),
        status.node.or_else(|| peer.spec.node.clone()).unwrap_or_else(dash),
        ready.map_or_else(|| "Unknown".to_owned(), |condition| condition.status.clone()),
        match why {
            Some(condition) => format!("{}: {}", condition.reason, condition.message),
            None if ready.is_none() => "the controller has not seen it yet".to_owned(),
            None => String::new(),
        },
    ]
}

/// The configuration of a peer that the network has stated.
async fn made(places: &Places, cluster: &Cluster, stated: &PlainPeer, args: &ShowArgs) -> anyhow::Result<WgQuick> {
    let network = cluster.network().await?;
    if let Ok(Some(membership)) = crate::state::StateDir::read_only(&places.state_dir).membership()
        && membership.network != network.id
    {
        bail!("the cluster's network is {}, and this machine is in another one, {}", network.id, membership.network);
    }
    let entries = cluster.entries(network.id).await?;
    let mtu = match args.mtu {
        Some(mtu) => mtu,
        None => inspect::fetch(places).await.map_or(DEFAULT_MTU, |status| status.node.mtu),
    };
    Ok(WgQuick::make(&network, &entries, stated, mtu)?)
}

/// The file to standard output; to standard error what is to be said of it, and the QR code.
fn show(config: &WgQuick, key: Option<&PrivateKey>, args: &ShowArgs) -> anyhow::Result<()> {
    print(&config.file(key))?;
    let mut stderr = io::stderr().lock();
    if let Some(key) = key
        && (args.qr || stderr.is_terminal())
    {
        match config.qr_code(key, stderr.is_terminal()) {
            Ok(code) => write!(stderr, "\n{}", *code)?,
            Err(error) => writeln!(stderr, "\nno QR code: {error}")?,
        }
    }
    if key.is_some() {
        writeln!(stderr, "\nThe private key stands here and nowhere else: keep it, or make another with --new-key.")?;
    }
    match &config.endpoint {
        Endpoint::Known(_) => {}
        Endpoint::ThroughNat(at) => writeln!(
            stderr,
            "Node {0} is behind a NAT; {at} works if that lets strangers in. A port-forward of UDP to it does:\n  \
             kubectl annotate node {0} {PREFIX}force-endpoint=HOST:PORT",
            config.node
        )?,
        Endpoint::Unknown => writeln!(
            stderr,
            "Node {0} names no address that is reached from everywhere, so the configuration has no Endpoint. Either\n  \
             kubectl annotate node {0} {PREFIX}force-endpoint=HOST:PORT\nor serve the peer from another node.",
            config.node
        )?,
    }
    Ok(())
}

/// Before the annotations that people write.
const PREFIX: &str = keystone_mesh_core::annotations::PREFIX;

fn patience(args: &ShowArgs) -> Duration {
    Duration::from_secs(args.timeout)
}

fn new_key() -> anyhow::Result<PrivateKey> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(bytes.as_mut_slice()).context("no randomness")?;
    Ok(PrivateKey::from_bytes(*bytes))
}

fn read_key(path: &std::path::Path) -> anyhow::Result<PrivateKey> {
    let text = if path.as_os_str() == "-" {
        let mut text = Zeroizing::new(String::new());
        io::Read::read_to_string(&mut io::Read::take(io::stdin().lock(), 1024), &mut text)?;
        text
    } else {
        Zeroizing::new(std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?)
    };
    text.trim().parse().with_context(|| format!("{} holds no WireGuard private key", path.display()))
}

#[cfg(test)]
mod tests;
