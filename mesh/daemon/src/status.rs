//! What the daemon says about itself: the value behind `status`, `peers`, `ping` and `doctor`, and their `--json`.

use std::collections::BTreeMap;

use ipnet::IpNet;
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::{NodeId, PublicKey};
use serde::{Deserialize, Serialize};

/// The whole state of one daemon.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Status {
    /// This node.
    pub node: Node,
    /// The relays it listens on.
    pub relays: Vec<Relay>,
    /// Where it publishes and watches records.
    pub registry: Registry,
    /// Every peer, by name.
    pub peers: Vec<Peer>,
    /// The data plane's totals.
    pub data_plane: DataPlane,
    /// What is not as it should be, a sentence each.
    pub warnings: Vec<String>,
}

/// This node.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Node {
    /// Its name; none for a daemon with plain peers alone.
    pub name: Option<NodeName>,
    /// The network key; none for a daemon with plain peers alone.
    pub network: Option<NodeId>,
    /// Its identity.
    pub identity: NodeId,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// Its mesh addresses.
    pub addresses: Vec<IpNet>,
    /// Whether it is the control plane's host.
    pub control_plane: bool,
    /// The TUN interface.
    pub interface: String,
    /// The interface's MTU in bytes.
    pub mtu: u16,
    /// The UDP port.
    pub listen_port: u16,
    /// Where it says it may be reached.
    pub endpoints: Vec<String>,
    /// The NAT in front of it.
    pub nat: Nat,
    /// The daemon's version.
    pub version: String,
    /// The daemon's process id.
    pub pid: u32,
    /// Seconds since the daemon started.
    pub uptime_s: f64,
}

/// One relay connection.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Relay {
    /// The relay's identity.
    pub id: NodeId,
    /// Where it listens.
    pub address: String,
    /// `connecting`, `up` or `down`.
    pub state: String,
    /// Round trip in milliseconds.
    pub rtt_ms: Option<f64>,
    /// This node's address as the relay sees it.
    pub observed: Option<String>,
    /// Why it is down.
    pub reason: Option<String>,
}

/// The registry.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Registry {
    /// `embedded`, `gateway` or `none`.
    pub kind: String,
    /// `current`, `stale` or `none`.
    pub state: String,
    /// Why it is stale.
    pub reason: Option<String>,
}

/// One peer.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its identity; none for a plain WireGuard peer.
    pub identity: Option<NodeId>,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// Its mesh addresses.
    pub addresses: Vec<IpNet>,
    /// Networks behind it.
    pub routes: Vec<IpNet>,
    /// `direct`, `relayed`, `none` or `idle`.
    pub path: String,
    /// The address or relay in use.
    pub via: Option<String>,
    /// Round trip of that path in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Seconds since the last handshake.
    pub last_handshake_s: Option<f64>,
    /// Bytes received inside the tunnel.
    pub rx_bytes: u64,
    /// Bytes sent inside the tunnel.
    pub tx_bytes: u64,
    /// Why the path is not direct, in words.
    pub reason: Option<String>,
    /// Addresses that were tried, and with what result.
    pub tried: Vec<String>,
}

/// The data plane's totals.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct DataPlane {
    /// Peers with a session.
    pub live_sessions: usize,
    /// Packets dropped, by reason; reasons that did not occur are left out.
    pub drops: BTreeMap<String, u64>,
    /// CPU seconds that the workers have used.
    pub cpu_s: f64,
}
