//! The daemon's configuration: one TOML file, environment variables and flags.
//!
//! A flag wins over its environment variable, that over the file, and the file over the default. `keystone-mesh up
//! --help` and `docs/configuration.md` describe every field; a test holds the page to this file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use ipnet::IpNet;
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::relay::address::{HostPort, RelayAddr};
use keystone_mesh_core::{NodeId, PeerConfig, PresharedKey, PrivateKey, PublicKey};
use serde::{Deserialize, Serialize};

use crate::cni::facts::FILE as FACTS;
use crate::cni::installer;
use crate::cni::layout::Mode;
use crate::http::listen::{self, ListenAt};
use crate::kube_api::access::ServiceAccount;

/// Default UDP port. 51820, 51821, 51871 and 8472 belong to WireGuard, flannel, Cilium and VXLAN.
pub const DEFAULT_PORT: u16 = 51840;
/// Default interface.
pub const DEFAULT_INTERFACE: &str = "ksmesh0";
/// Default MTU inside the mesh: IPv6's minimum (RFC 8200), which with WireGuard, UDP and IP around it passes every
/// underlay from 1360 bytes up.
pub const DEFAULT_MTU: u16 = 1280;
/// Default of `metrics_peers`: 100 nodes that each have 100 peers are some 50,000 series, which a small Prometheus holds.
pub const DEFAULT_METRICS_PEERS: usize = 100;

/// Where container runtimes look for CNI configurations, unless they are told otherwise.
pub const DEFAULT_CNI_CONF_DIR: &str = "/etc/cni/net.d";
/// And for plugins.
pub const DEFAULT_CNI_BIN_DIR: &str = "/opt/cni/bin";

/// Where state and control socket are; every command takes these.
#[derive(Args, Clone, Debug)]
pub struct Places {
    /// Directory of the node's secret and state (0700)
    #[arg(
        long,
        env = "KEYSTONE_MESH_STATE_DIR",
        default_value = "/var/lib/keystone-mesh",
        value_name = "DIR",
        global = true
    )]
    pub state_dir: PathBuf,
    /// Directory of the daemon's control socket
    #[arg(
        long,
        env = "KEYSTONE_MESH_RUN_DIR",
        default_value = "/run/keystone-mesh",
        value_name = "DIR",
        global = true
    )]
    pub run_dir: PathBuf,
}

impl Places {
    /// The daemon's control socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("control.sock")
    }

    /// What the CNI plugin has to know, as the daemon writes it.
    pub fn facts(&self) -> PathBuf {
        self.run_dir.join(FACTS)
    }
}

/// The fields of the configuration as flags and as TOML, each optional: what is not given falls to the next source.
#[derive(Args, Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// This node's name in the mesh, a Kubernetes Node name [default: the host name]
    #[arg(long, env = "KEYSTONE_MESH_NAME", value_name = "NAME")]
    pub name: Option<NodeName>,
    /// Name of the TUN interface, at most 15 characters [default: ksmesh0]
    #[arg(long, env = "KEYSTONE_MESH_INTERFACE", value_name = "IF")]
    pub interface: Option<String>,
    /// UDP port of WireGuard, relay, gateway and probes; 0 lets the system choose [default: 51840]
    #[arg(long, env = "KEYSTONE_MESH_LISTEN_PORT", value_name = "PORT")]
    pub listen_port: Option<u16>,
    /// MTU of the interface, 1280 to 65503 [default: 1280]
    #[arg(long, env = "KEYSTONE_MESH_MTU", value_name = "BYTES")]
    pub mtu: Option<u16>,
    /// Worker pairs of the data plane; each has its own TUN queue and UDP socket [default: 1]
    #[arg(long, env = "KEYSTONE_MESH_SHARDS", value_name = "N")]
    pub shards: Option<u8>,
    /// A public address of this node that peers can try, as behind a port-forward; repeatable
    #[arg(long = "endpoint", env = "KEYSTONE_MESH_ENDPOINTS", value_delimiter = ',', value_name = "HOST:PORT")]
    pub endpoints: Vec<HostPort>,
    /// A network behind this node for which it asks to be the way; repeatable
    #[arg(long = "route", env = "KEYSTONE_MESH_ROUTES", value_delimiter = ',', value_name = "CIDR")]
    pub routes: Vec<IpNet>,
    /// Control plane: a relay for the network; repeatable
    #[arg(long = "relay", env = "KEYSTONE_MESH_RELAYS", value_delimiter = ' ', value_name = "KEY@HOST:PORT")]
    pub relays: Vec<RelayAddr>,
    /// Control plane: where this host is reachable from outside; repeatable
    #[arg(long = "gateway", env = "KEYSTONE_MESH_GATEWAYS", value_delimiter = ',', value_name = "HOST:PORT")]
    pub gateways: Vec<HostPort>,
    /// Also serve as a relay for the network: for nodes with a public address [default: false]
    #[arg(long, env = "KEYSTONE_MESH_SERVE_RELAY", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub serve_relay: Option<bool>,
    /// Where records are published and watched [default: embedded on the control plane, else gateway]
    #[arg(long, env = "KEYSTONE_MESH_REGISTRY", value_enum, value_name = "WHERE")]
    pub registry: Option<RegistryKind>,
    /// Access to Kubernetes [default: the pod's service account, $KUBECONFIG, k3s' or kubeadm's administrator's]
    #[arg(long, env = "KEYSTONE_MESH_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of the mesh's objects in Kubernetes [default: keystone-mesh]
    #[arg(long, env = "KEYSTONE_MESH_NAMESPACE", value_name = "NAME")]
    pub namespace: Option<String>,
    /// The network key, for a Node that joins by its approval in Kubernetes and has no token
    #[arg(long, env = "KEYSTONE_MESH_NETWORK", value_name = "KEY")]
    pub network: Option<NodeId>,
    /// What a stop leaves: `keep` leaves the interface, so that a restart drops nothing; `remove` takes it away [default: keep]
    #[arg(long, env = "KEYSTONE_MESH_ON_STOP", value_enum, value_name = "WHAT")]
    pub on_stop: Option<OnStop>,
    /// Serve metrics, health and status over HTTP: a port for loopback and this node's mesh addresses, or ADDRESS:PORT;
    /// repeatable [default: nowhere]
    #[arg(long, env = "KEYSTONE_MESH_STATUS_LISTEN", value_delimiter = ',', value_name = "WHERE")]
    #[serde(deserialize_with = "listen::one_or_many")]
    pub status_listen: Vec<ListenAt>,
    /// Peers up to which each has metrics of its own; with more there are totals alone, with 0 always [default: 100]
    #[arg(long, env = "KEYSTONE_MESH_METRICS_PEERS", value_name = "N")]
    pub metrics_peers: Option<usize>,
    /// How pods get their network: the mesh is it, our plugin helps another's, another's runs on the mesh, or `none`, which takes
    /// away what an earlier mode left [default: the CNI directories are not touched]
    #[arg(long, env = "KEYSTONE_MESH_CNI_MODE", value_enum, value_name = "MODE")]
    pub cni_mode: Option<Mode>,
    /// Where the container runtime looks for CNI configurations [default: /etc/cni/net.d]
    #[arg(long, env = "KEYSTONE_MESH_CNI_CONF_DIR", value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Where it looks for CNI plugins [default: /opt/cni/bin]
    #[arg(long, env = "KEYSTONE_MESH_CNI_BIN_DIR", value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// The plugin's program, which is copied there [default: keystone-cni beside this program]
    #[arg(long, env = "KEYSTONE_MESH_CNI_PLUGIN", value_name = "FILE")]
    pub cni_plugin: Option<PathBuf>,
    /// Where the plugin finds pods.json on the host, in a pod that has the run directory from elsewhere [default: in the run directory]
    #[arg(long, env = "KEYSTONE_MESH_CNI_FACTS", value_name = "FILE")]
    pub cni_facts: Option<PathBuf>,
    /// Whether packets to pods go through the mesh [default: false with the modes helper and underlay, else true]
    #[arg(long, env = "KEYSTONE_MESH_POD_ROUTES", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub pod_routes: Option<bool>,
    /// Reach pods of nodes of the same location over the network that both hosts are on, without encryption [default: false]
    #[arg(long, env = "KEYSTONE_MESH_LAN_ROUTES", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub lan_routes: Option<bool>,
    /// Enforce Kubernetes' network policies for the pods of this node, by nftables [default: false]
    #[arg(long, env = "KEYSTONE_MESH_NETWORK_POLICY", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub network_policy: Option<bool>,
    /// Own addresses on the interface beside those of the network, for plain WireGuard peers (file only)
    #[arg(skip)]
    pub addresses: Vec<IpNet>,
    /// File with a WireGuard private key to use instead of the derived one, for plain WireGuard peers (file only)
    #[arg(skip)]
    pub private_key_file: Option<PathBuf>,
    /// Plain WireGuard peers (file only)
    #[arg(skip)]
    pub peer: Vec<StaticPeer>,
}

/// Where records are published and watched.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegistryKind {
    /// The control plane's own store: for networks without Kubernetes.
    Embedded,
    /// The control plane's gateway.
    Gateway,
    /// Annotations of Kubernetes' Nodes and Members.
    Kubernetes,
}

/// What a stop leaves of the kernel's state.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnStop {
    /// Interface, addresses and routes stay: connections survive a restart.
    #[default]
    Keep,
    /// Everything goes.
    Remove,
}

/// A peer with stock WireGuard and a fixed configuration.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StaticPeer {
    /// A name for status.
    pub name: Option<String>,
    /// Its WireGuard public key, Base64.
    pub public_key: PublicKey,
    /// File with the preshared key, Base64.
    pub preshared_key_file: Option<PathBuf>,
    /// Where it is; without one it has to come first.
    pub endpoint: Option<HostPort>,
    /// What may be sent to it and come from it.
    pub allowed_ips: Vec<IpNet>,
    /// Seconds between keepalives, 1 to 65535.
    pub persistent_keepalive: Option<u16>,
}

/// A plain peer, ready for the data plane.
#[derive(Clone, Debug)]
pub struct PlainPeer {
    /// A name for status.
    pub name: String,
    /// What the data plane needs.
    pub config: PeerConfig,
    /// Where it is, if that is known.
    pub endpoint: Option<HostPort>,
}

/// The validated configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name, where one was given.
    pub name: Option<NodeName>,
    /// Name of the TUN interface.
    pub interface: String,
    /// UDP port of WireGuard, relay, gateway and probes.
    pub listen_port: u16,
    /// MTU of the interface.
    pub mtu: u16,
    /// Worker pairs.
    pub shards: u8,
    /// Configured endpoints of this node.
    pub endpoints: Vec<HostPort>,
    /// Networks behind this node.
    pub routes: Vec<IpNet>,
    /// Relays that the control plane lists.
    pub relays: Vec<RelayAddr>,
    /// Gateways that the control plane lists.
    pub gateways: Vec<HostPort>,
    /// Whether this node serves as a relay.
    pub serve_relay: bool,
    /// Where records are published and watched; none: as the node's part in the network says.
    pub registry: Option<RegistryKind>,
    /// Access to Kubernetes, where it is named.
    pub kubeconfig: Option<PathBuf>,
    /// The service account to use, in an agent's pod.
    pub service_account: Option<ServiceAccount>,
    /// The namespace of the mesh's objects, where it is named.
    pub namespace: Option<String>,
    /// The network key, where it is given beforehand.
    pub network: Option<NodeId>,
    /// What a stop leaves.
    pub on_stop: OnStop,
    /// Where status is served.
    pub status_listen: Vec<ListenAt>,
    /// Peers up to which each has metrics of its own.
    pub metrics_peers: usize,
    /// What is kept in the node's CNI directories.
    pub cni: installer::Settings,
    /// Whether packets to pods go through the mesh.
    pub pod_routes: bool,
    /// Whether pods of nodes of the same location are reached without the mesh.
    pub lan_routes: bool,
    /// Whether network policies are enforced here.
    pub network_policy: bool,
    /// Own addresses for plain WireGuard peers.
    pub addresses: Vec<IpNet>,
    /// WireGuard key to use instead of the derived one.
    pub private_key: Option<PrivateKey>,
    /// Plain WireGuard peers.
    pub plain_peers: Vec<PlainPeer>,
}

impl Config {
    /// Merges flags and environment (already merged by clap) over the file, and validates.
    pub fn load(flags: Options, file: Option<&Path>) -> anyhow::Result<Self> {
        let base = match file {
            None => Options::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                toml::from_str(&text).with_context(|| format!("{} is not a valid configuration", path.display()))?
            }
        };
        Self::validate(merge(flags, base))
    }

    fn validate(options: Options) -> anyhow::Result<Self> {
        let interface = options.interface.unwrap_or_else(|| DEFAULT_INTERFACE.to_owned());
        // IFNAMSIZ is 16 with the closing zero byte (netdevice(7)).
        let sane = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%';
        if interface.is_empty() || interface.len() > 15 || !interface.bytes().all(sane) {
            bail!("interface `{interface}`: a name has 1 to 15 characters, without spaces, `/`, `:` and `%`");
        }
        if let Some(namespace) = &options.namespace
            && (namespace.contains('.') || namespace.parse::<NodeName>().is_err())
        {
            bail!("namespace `{namespace}`: 1 to 63 characters a-z, 0-9 and `-`");
        }
        let mtu = options.mtu.unwrap_or(DEFAULT_MTU);
        if !(1280..=65_503).contains(&mtu) {
            bail!("mtu {mtu}: IPv6 needs at least 1280, and WireGuard leaves at most 65503 of a datagram");
        }
        let shards = options.shards.unwrap_or(1);
        if !(1..=64).contains(&shards) {
            bail!("shards {shards}: use 1 to 64, at most one for each core");
        }
        for net in options.routes.iter().chain(options.peer.iter().flat_map(|peer| &peer.allowed_ips)) {
            if net.trunc() != *net {
                bail!("{net} has host bits set; did you mean {}?", net.trunc());
            }
        }
        let private_key = match &options.private_key_file {
            None => None,
            Some(path) => Some(read_key::<PrivateKey>(path)?),
        };
        Ok(Self {
            name: options.name,
            interface,
            listen_port: options.listen_port.unwrap_or(DEFAULT_PORT),
            mtu,
            shards,
            endpoints: options.endpoints,
            routes: options.routes,
            relays: options.relays,
            gateways: options.gateways,
            serve_relay: options.serve_relay.unwrap_or(false),
            registry: options.registry,
            kubeconfig: options.kubeconfig,
            service_account: None,
            namespace: options.namespace,
            network: options.network,
            on_stop: options.on_stop.unwrap_or_default(),
            status_listen: options.status_listen,
            metrics_peers: options.metrics_peers.unwrap_or(DEFAULT_METRICS_PEERS),
            pod_routes: options.pod_routes.unwrap_or_else(|| options.cni_mode.unwrap_or_default().routes_pods()),
            cni: installer::Settings {
                mode: options.cni_mode,
                conf_dir: options.cni_conf_dir.unwrap_or_else(|| DEFAULT_CNI_CONF_DIR.into()),
                bin_dir: options.cni_bin_dir.unwrap_or_else(|| DEFAULT_CNI_BIN_DIR.into()),
                plugin: options.cni_plugin,
                facts: options.cni_facts,
            },
            lan_routes: options.lan_routes.unwrap_or(false),
            network_policy: options.network_policy.unwrap_or(false),
            addresses: options.addresses,
            private_key,
            plain_peers: plain_peers(&options.peer)?,
        })
    }
}

fn merge(over: Options, base: Options) -> Options {
    fn list<T>(over: Vec<T>, base: Vec<T>) -> Vec<T> {
        if over.is_empty() { base } else { over }
    }
    Options {
        name: over.name.or(base.name),
        interface: over.interface.or(base.interface),
        listen_port: over.listen_port.or(base.listen_port),
        mtu: over.mtu.or(base.mtu),
        shards: over.shards.or(base.shards),
        endpoints: list(over.endpoints, base.endpoints),
        routes: list(over.routes, base.routes),
        relays: list(over.relays, base.relays),
        gateways: list(over.gateways, base.gateways),
        serve_relay: over.serve_relay.or(base.serve_relay),
        registry: over.registry.or(base.registry),
        kubeconfig: over.kubeconfig.or(base.kubeconfig),
        namespace: over.namespace.or(base.namespace),
        network: over.network.or(base.network),
        on_stop: over.on_stop.or(base.on_stop),
        status_listen: list(over.status_listen, base.status_listen),
        metrics_peers: over.metrics_peers.or(base.metrics_peers),
        cni_mode: over.cni_mode.or(base.cni_mode),
        cni_conf_dir: over.cni_conf_dir.or(base.cni_conf_dir),
        cni_bin_dir: over.cni_bin_dir.or(base.cni_bin_dir),
        cni_plugin: over.cni_plugin.or(base.cni_plugin),
        cni_facts: over.cni_facts.or(base.cni_facts),
        pod_routes: over.pod_routes.or(base.pod_routes),
        lan_routes: over.lan_routes.or(base.lan_routes),
        network_policy: over.network_policy.or(base.network_policy),
        addresses: base.addresses,
        private_key_file: base.private_key_file,
        peer: base.peer,
    }
}

fn plain_peers(peers: &[StaticPeer]) -> anyhow::Result<Vec<PlainPeer>> {
    let mut plain = Vec::with_capacity(peers.len());
    let mut owners: BTreeMap<IpNet, PublicKey> = BTreeMap::new();
    for peer in peers {
        let key = peer.public_key;
        if plain.iter().any(|other: &PlainPeer| other.config.key == key) {
            bail!("peer {key} stands twice in the configuration");
        }
        for net in &peer.allowed_ips {
            if let Some(other) = owners.insert(*net, key) {
                bail!("allowed_ips {net} stands at two peers, {other} and {key}; each network has one way");
            }
        }
        if peer.persistent_keepalive == Some(0) {
            bail!("peer {key}: persistent_keepalive is 1 to 65535 seconds; leave it out for none");
        }
        let preshared_key = peer.preshared_key_file.as_deref().map(read_key::<PresharedKey>).transpose()?;
        let config = PeerConfig {
            key,
            identity: None,
            preshared_key,
            persistent_keepalive: peer.persistent_keepalive,
            allowed_ips: peer.allowed_ips.clone(),
        };
        let name = peer.name.clone().unwrap_or_else(|| key.to_string().chars().take(8).collect());
        plain.push(PlainPeer { name, config, endpoint: peer.endpoint.clone() });
    }
    Ok(plain)
}

fn read_key<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.trim().parse().with_context(|| format!("{} holds no key", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<Config> {
        Config::validate(merge(Options::default(), toml::from_str(text)?))
    }

    #[test]
    fn defaults_hold_without_a_file() {
        let config = Config::load(Options::default(), None).unwrap();
        assert_eq!((config.interface.as_str(), config.mtu, config.shards), ("ksmesh0", 1280, 1));
        assert_eq!(config.listen_port, 51840);
        assert_eq!(config.on_stop, OnStop::Keep);
    }

    #[test]
    fn flags_win_over_the_file() {
        let file: Options = toml::from_str("mtu = 1400\nlisten_port = 1\nroutes = ['10.42.0.0/24']").unwrap();
        let flags = Options { mtu: Some(1300), ..Options::default() };
        let config = Config::validate(merge(flags, file)).unwrap();
        assert_eq!((config.mtu, config.listen_port, config.routes.len()), (1300, 1, 1));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("mtu = 1000", "1280"),
            ("interface = 'a-name-that-is-too-long'", "15 characters"),
            ("routes = ['10.42.0.1/24']", "10.42.0.0/24"),
            ("registry = 'etcd'", "kubernetes"),
            ("namespace = 'a.b'", "a-z"),
            ("shards = 0", "1 to 64"),
            ("listen_prot = 1", "listen_prot"),
            ("status_listen = 'everywhere'", "51842"),
            ("relays = ['relay.example.org:1']", "KEY@HOST:PORT"),
            ("name = 'Upper'", "not a node name"),
            ("cni_mode = 'overlay'", "pod-network"),
            ("[[peer]]\npublic_key = 'AAAA'\nallowed_ips = []", "truncated"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn pods_are_routed_unless_another_network_carries_them() {
        for (text, routed) in [
            ("", true),
            ("cni_mode = 'none'", true),
            ("cni_mode = 'pod-network'", true),
            ("cni_mode = 'helper'", false),
            ("cni_mode = 'underlay'", false),
            ("cni_mode = 'underlay'\npod_routes = true", true),
            ("pod_routes = false", false),
        ] {
            assert_eq!(parse(text).unwrap().pod_routes, routed, "{text}");
        }
    }

    #[test]
    fn one_network_is_not_given_to_two_plain_peers() {
        let key = |byte: u8| PublicKey::from_bytes([byte; 32]);
        let text = format!(
            "[[peer]]\npublic_key = '{}'\nallowed_ips = ['10.1.0.0/24']\n[[peer]]\npublic_key = '{}'\nallowed_ips = ['10.1.0.0/24']",
            key(1),
            key(2)
        );
        assert!(parse(&text).unwrap_err().to_string().contains("two peers"));
    }

    #[test]
    fn the_page_describes_every_field_and_flag() {
        use clap::{Args as _, Command};
        let page = include_str!("../../../docs/configuration.md");
        let options = serde_json::to_value(Options::default()).unwrap();
        for field in options.as_object().unwrap().keys() {
            assert!(page.contains(&format!("| `{field}` |")), "docs/configuration.md has no row for `{field}`");
        }
        for flag in Options::augment_args(Command::new("up")).get_arguments() {
            let long = flag.get_long().unwrap();
            assert!(page.contains(&format!("`--{long}`")), "docs/configuration.md does not name --{long}");
            let env = flag.get_env().unwrap().to_str().unwrap();
            assert!(page.contains(&format!("`{env}`")), "docs/configuration.md does not name {env}");
        }
    }
}
