//! What the daemon says about itself: the value behind `status`, `peers`, `ping`, `doctor` and their `--json`, and behind
//! the pages of the status listener, metrics included.

use std::collections::BTreeMap;

use ipnet::IpNet;
use keystone_mesh_core::node::{self, Location, NodeName};
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::{NodeId, PublicKey, directory, plan};
use serde::{Deserialize, Serialize};

use crate::quic::relay_server::RelaySnapshot;
use crate::registry::counts::GatewaySnapshot;

/// The whole state of one daemon.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Status {
    /// This node.
    pub node: Node,
    /// What the controller says of this node; only where it was asked for, and the registry is Kubernetes.
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// The relays it listens on.
    pub relays: Vec<Relay>,
    /// Where it publishes and watches records.
    pub registry: Registry,
    /// Every peer, by name.
    pub peers: Vec<Peer>,
    /// The network's plain WireGuard peers, whichever node serves them.
    #[serde(default)]
    pub plain_peers: Vec<PlainPeer>,
    /// Nodes that are left out, wholly or in part, because of what their records or approvals say; the first ones.
    pub faults: Vec<NodeFault>,
    /// How many such faults there are, by code; codes that do not occur are left out.
    pub fault_counts: BTreeMap<String, u64>,
    /// The data plane's totals.
    pub data_plane: DataPlane,
    /// What the control side did.
    pub counts: Counts,
    /// Network policies, where this node enforces them.
    #[serde(default)]
    pub network_policy: Option<NetworkPolicy>,
    /// The gateway, on the control plane.
    pub gateway: Option<GatewaySnapshot>,
    /// The relay inside this node, where it serves as one.
    pub relay_server: Option<RelaySnapshot>,
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
    /// Networks of its pods.
    pub pod_cidrs: Vec<IpNet>,
    /// The mesh's own prefixes; none while the network is not known.
    pub mesh_cidrs: Vec<IpNet>,
    /// Whether it is the control plane's host.
    pub control_plane: bool,
    /// Whether the network has let it in.
    pub approval: Approval,
    /// Why it is not let in, and what to do; none where it is.
    pub approval_reason: Option<String>,
    /// Where it stands, as people named it.
    pub location: Option<Location>,
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

/// A condition of this node's object in Kubernetes.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// Its type, such as `MeshReady`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// Why, for programs.
    pub reason: String,
    /// Why, for people.
    pub message: String,
}

/// What the network says of a node.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Approval {
    /// It is in.
    Approved,
    /// It waits.
    Pending,
    /// It was in, and was put out.
    Revoked,
    /// There is nobody to ask: a daemon with plain peers alone.
    None,
}

impl Approval {
    /// Every state, in order of declaration.
    pub const ALL: [Self; 4] = [Self::Approved, Self::Pending, Self::Revoked, Self::None];

    /// The word in tables, JSON and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Approved => "approved",
            Self::Pending => "pending",
            Self::Revoked => "revoked",
            Self::None => "none",
        }
    }

    /// What the network's last word, if any, means for the machine `name` with this identity; and where that is not yes,
    /// what to do.
    pub fn of(name: &NodeName, identity: NodeId, said: Option<&node::Approval>) -> (Self, Option<String>) {
        match said {
            None => {
                let why =
                    format!("nobody has approved it yet; run `keystone-mesh approve {name}` on the control plane");
                (Self::Pending, Some(why))
            }
            Some(said) if said.identity != identity => {
                let why = format!(
                    "another machine ({}) is approved under its name; if this one takes its place, run `keystone-mesh \
                     approve {name} --identity {identity}` on the control plane",
                    said.identity.short()
                );
                (Self::Pending, Some(why))
            }
            Some(said) if said.is_revoked() => {
                let why = format!(
                    "it was put out of the network; `keystone-mesh approve {name}` on the control plane lets it in again"
                );
                (Self::Revoked, Some(why))
            }
            Some(_) => (Self::Approved, None),
        }
    }
}

/// A node that is left out.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct NodeFault {
    /// The node, or the Kubernetes object.
    pub node: String,
    /// A stable word for machines.
    pub code: String,
    /// A sentence for people.
    pub says: String,
}

impl NodeFault {
    /// Every code there is.
    pub const CODES: [&str; 11] = [
        "not_approved",
        "shared_key",
        "overlap",
        "not_routed",
        "record",
        "approval",
        "foreign_approval",
        "replayed_approval",
        "other_identity",
        "peer",
        "name",
    ];

    /// What the plan leaves out.
    pub fn of_plan(fault: &plan::Fault) -> Self {
        let (node, code) = match fault {
            plan::Fault::NotApproved { name } => (name, "not_approved"),
            plan::Fault::SharedKey { name, .. } => (name, "shared_key"),
            plan::Fault::Overlap { name, .. } => (name, "overlap"),
            plan::Fault::NotRouted { peer, .. } => (peer, "not_routed"),
        };
        Self { node: node.to_string(), code: code.to_owned(), says: fault.to_string() }
    }

    /// What is wrong with the annotations of an object of this name.
    pub fn of_object(name: &str, fault: &directory::Fault) -> Self {
        let code = match fault {
            directory::Fault::Record(_) => "record",
            directory::Fault::Approval(_) => "approval",
            directory::Fault::ForeignApproval(_) => "foreign_approval",
            directory::Fault::ReplayedApproval { .. } => "replayed_approval",
            directory::Fault::OtherIdentity { .. } => "other_identity",
            directory::Fault::Peer(_) => "peer",
            directory::Fault::Name(_) => "name",
        };
        // A name may be anything that Kubernetes takes, and no more than 253 characters.
        Self { node: name.to_owned(), code: code.to_owned(), says: format!("{name}: {fault}") }
    }
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
    /// `kubernetes`, `gateway`, `embedded` or `none`.
    pub kind: String,
    /// `connecting`, `current`, `stale` or `none`.
    pub state: String,
    /// Why it is stale.
    pub reason: Option<String>,
    /// Seconds for which it has been in this state.
    pub since_s: f64,
    /// What the mesh is made from: `registry` once that was heard, `snapshot` of an earlier run, or `none`.
    pub known_from: String,
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
    /// Networks of its pods.
    pub pod_cidrs: Vec<IpNet>,
    /// Where it stands, as people named it.
    pub location: Option<Location>,
    /// The node that serves it; none for a node of the mesh, or a plain peer of this node's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served_by: Option<NodeName>,
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

/// A plain WireGuard peer of the network.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct PlainPeer {
    /// Its name.
    pub name: NodeName,
    /// The node that serves it.
    pub served_by: NodeName,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// Its mesh addresses.
    pub addresses: Vec<IpNet>,
    /// Networks behind it.
    pub routes: Vec<IpNet>,
}

impl Peer {
    /// Every word for a path.
    pub const PATHS: [&str; 4] = ["direct", "relayed", "none", "idle"];
}

/// The data plane's totals.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct DataPlane {
    /// Whether addresses and routes are on the interface.
    pub up: bool,
    /// Peers with a session.
    pub live_sessions: usize,
    /// Data messages opened.
    pub rx_datagrams: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// WireGuard messages and probes that the kernel or a relay took.
    pub tx_datagrams: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Handshakes.
    pub handshakes: Handshakes,
    /// Packets dropped, by reason; reasons that did not occur are left out.
    pub drops: BTreeMap<String, u64>,
    /// CPU seconds that the workers have used.
    pub cpu_s: f64,
}

/// WireGuard handshakes since the daemon started.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Handshakes {
    /// Initiations sent, repetitions included.
    pub started: u64,
    /// Sessions that were established and proven, whoever began.
    pub completed: u64,
    /// Attempts given up after 90 s without an answer.
    pub failed: u64,
}

/// What the control side did since the daemon started.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Changes of a peer's path.
    pub path_changes: u64,
    /// Probes sent.
    pub probes_sent: u64,
    /// Authentic probes received.
    pub probes_received: u64,
    /// Records written: for Kubernetes what the API server has acknowledged, else what was handed to the registry.
    pub registry_writes: u64,
    /// Writes that failed.
    pub registry_write_errors: u64,
    /// Times that the registry was lost.
    pub registry_losses: u64,
    /// Addresses, routes and rules put right after somebody else changed them.
    pub kernel_repairs: u64,
    /// Addresses, routes and rules that the kernel refused.
    pub kernel_errors: u64,
}

/// The enforcement of Kubernetes' network policies.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct NetworkPolicy {
    /// `waiting` (nothing was applied yet), `current`, `stale` (what was heard last stays in force) or `failed`.
    pub state: String,
    /// Why it is not current.
    pub reason: Option<String>,
    /// Policies of the cluster.
    pub policies: usize,
    /// Those of them that could be read in part only.
    pub faulty_policies: usize,
    /// Pods of this node that policies isolate.
    pub isolated_pods: usize,
    /// Those of them that have no address yet.
    pub waiting_pods: usize,
    /// Transactions that the kernel took.
    pub applies: u64,
    /// Those that it refused.
    pub errors: u64,
    /// Those of them that put right what somebody else had changed.
    pub repairs: u64,
    /// How long the last took, in milliseconds, with what led to it.
    pub apply_ms: Option<f64>,
    /// Seconds since the kernel was last known to have what it should.
    pub last_applied_s: Option<f64>,
}

impl NetworkPolicy {
    /// Every word for a state.
    pub const STATES: [&str; 4] = ["waiting", "current", "stale", "failed"];
}

/// What `/v1/peers` says.
#[derive(Clone, Debug, Serialize)]
pub struct PeersPage<'a> {
    /// The node that says it.
    pub node: Option<&'a NodeName>,
    /// Its peers.
    pub peers: &'a [Peer],
}

impl Status {
    /// Why this node does not carry traffic of the mesh yet; none where it does.
    pub fn not_ready(&self) -> Option<String> {
        let reason = |registry: &Registry| registry.reason.as_ref().map_or(String::new(), |why| format!(" ({why})"));
        if self.node.name.is_some() && self.registry.known_from == "none" {
            let registry = &self.registry;
            return Some(format!(
                "the {} registry has not been heard{}, and there is no snapshot of an earlier run",
                registry.kind,
                reason(registry)
            ));
        }
        match self.node.approval {
            Approval::Approved | Approval::None => {}
            Approval::Pending | Approval::Revoked => {
                let why = self.node.approval_reason.as_deref().unwrap_or("the network has not approved it");
                return Some(format!("this node is {}: {why}", self.node.approval.label()));
            }
        }
        (!self.data_plane.up).then(|| {
            let why = self.warnings.first().map_or(String::new(), |warning| format!(": {warning}"));
            format!("addresses and routes are not on {} yet{why}", self.node.interface)
        })
    }

    /// The page of peers.
    pub fn peers_page(&self) -> PeersPage<'_> {
        PeersPage { node: self.node.name.as_ref(), peers: &self.peers }
    }
}

#[cfg(test)]
pub(crate) mod tests;
