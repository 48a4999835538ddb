//! What the cluster looks like to the controller.
//!
//! The driver feeds objects as the watches bring them; each is parsed once, here, and signatures are verified once. An
//! object that does not read is a typed fault beside the view and stops no other. A view decides nothing; it is also no
//! cache of whole objects, but what decisions need of them.

mod cloud;
mod node;
mod reports;
mod resources;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use keystone_mesh_api::{JoinToken, Member, Peer};
use keystone_mesh_core::NodeId;
use keystone_mesh_core::directory::{Carrier, Directory, Object};
use keystone_mesh_core::facts::{FieldError, Malformed};
use keystone_mesh_core::ledger::Ledger;
use keystone_mesh_core::network::{Network, SignedNetwork};
use keystone_mesh_core::node::NodeName;

pub use cloud::{CloudClaim, CloudKind};
pub use node::NodeView;
pub use reports::{Reach, Report, Reporter};
pub use resources::{MemberView, PeerView, TokenView};

/// Wall-clock time in milliseconds since 1970.
pub type Now = u64;

/// Who approves a Node's first record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Only a Member of the same identity: made by a join with a token, or by a person (`keystone-mesh approve`).
    #[default]
    Member,
    /// Besides, the first record of every Node is approved, and its identity pinned.
    Auto,
}

/// What people set, by flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who approves a Node's first record.
    pub policy: Policy,
    /// Networks that any Node may be the way to when it (`routes-wanted`) or a person (`routes-extra`) asks.
    pub allowed_routes: Vec<IpNet>,
    /// Networks inside which `spec.podCIDRs` must be; empty: anywhere.
    pub pod_cidrs: Vec<IpNet>,
    /// Whether to initialise Nodes: provider ID, topology labels, addresses, the cloud provider's taint. For clusters
    /// whose cloud controller is off.
    pub node_init: bool,
    /// Whether to put the startup taint on fresh Nodes. Lifting it is always done.
    pub startup_taint: bool,
    /// A Node gets the startup taint only up to this age, in milliseconds.
    pub fresh: u64,
    /// How long a Node has to be out of reach before `MeshReady` turns False, in milliseconds.
    pub unready_after: u64,
    /// How long a Node that was out of reach has to be reached before `MeshReady` turns True again, in milliseconds.
    pub ready_after: u64,
    /// How long a report counts, in milliseconds; without any, `MeshReady` turns Unknown.
    pub report_life: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            allowed_routes: Vec::new(),
            pod_cidrs: Vec::new(),
            node_init: false,
            startup_taint: true,
            fresh: 10 * 60_000,
            // A node controller calls a silent kubelet unready after 40 s; the mesh should not be quicker to judge.
            unready_after: 40_000,
            ready_after: 10_000,
            report_life: 180_000,
        }
    }
}

/// Which objects are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Nodes.
    Node,
    /// Members.
    Member,
    /// Peers.
    Peer,
    /// JoinTokens.
    JoinToken,
    /// The ledger's ConfigMaps, by label.
    LedgerPage,
    /// The one ConfigMap with the network's document.
    Network,
    /// karpenter.sh NodeClaims; need not exist.
    NodeClaim,
    /// cluster.x-k8s.io Machines; need not exist.
    Machine,
}

impl Kind {
    /// Those without which nothing is decided: what was not listed yet would look as if it were gone.
    pub const REQUIRED: [Self; 6] =
        [Self::Node, Self::Member, Self::Peer, Self::JoinToken, Self::LedgerPage, Self::Network];

    /// The label in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Member => "member",
            Self::Peer => "peer",
            Self::JoinToken => "jointoken",
            Self::LedgerPage => "ledger",
            Self::Network => "network",
            Self::NodeClaim => "nodeclaim",
            Self::Machine => "machine",
        }
    }
}

/// What does not read, or is another's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectFault {
    /// The object as a whole has no use: a name that no node can have, a field that is missing.
    #[error("{0}")]
    Object(String),
    /// One of its fields.
    #[error("{0}")]
    Field(#[from] FieldError),
    /// A signed statement in it.
    #[error("{0}")]
    Statement(#[from] Malformed),
    /// It speaks for another network.
    #[error("this is of network {found}, not of {ours}")]
    OtherNetwork {
        /// Whose it is.
        found: NodeId,
        /// Ours.
        ours: NodeId,
    },
}

/// The cluster as far as the controller has to know it.
#[derive(Clone, Debug)]
pub struct ClusterView {
    // What was set.
    network_id: NodeId,
    settings: Settings,

    // What the watches brought.
    network: Option<Network>,
    nodes: BTreeMap<NodeName, NodeView>,
    members: BTreeMap<NodeName, MemberView>,
    peers: BTreeMap<NodeName, PeerView>,
    tokens: BTreeMap<String, TokenView>,
    claims: BTreeMap<(CloudKind, String), CloudClaim>,
    listed: BTreeSet<Kind>,
    faults: BTreeMap<(Kind, String), Vec<ObjectFault>>,

    // The ledger as acknowledged, and which version each page is.
    ledger: Ledger,
    pages: BTreeMap<u32, String>,

    // What is known of nodes beyond what their objects carry at this moment.
    directory: Directory,
    departed: BTreeMap<NodeName, NodeId>,
    reports: reports::Reports,
}

impl ClusterView {
    /// An empty view of the network with this key. Nothing is decided before every required kind was listed.
    pub fn new(network: NodeId, settings: Settings) -> Self {
        Self {
            network_id: network,
            settings,
            network: None,
            nodes: BTreeMap::new(),
            members: BTreeMap::new(),
            peers: BTreeMap::new(),
            tokens: BTreeMap::new(),
            claims: BTreeMap::new(),
            listed: BTreeSet::new(),
            faults: BTreeMap::new(),
            ledger: Ledger::default(),
            pages: BTreeMap::new(),
            directory: Directory::new(network, Vec::new(), Vec::new()),
            departed: BTreeMap::new(),
            reports: reports::Reports::default(),
        }
    }

    /// A Node came or changed.
    pub fn handle_node(&mut self, node: &Node) {
        let _ = (node, Carrier::Node, Object { name: String::new(), annotations: BTreeMap::new() });
        todo!()
    }

    /// A Member came or changed.
    pub fn handle_member(&mut self, member: &Member) {
        let _ = member;
        todo!()
    }

    /// A Peer came or changed.
    pub fn handle_peer(&mut self, peer: &Peer) {
        let _ = peer;
        todo!()
    }

    /// A JoinToken came or changed.
    pub fn handle_token(&mut self, token: &JoinToken) {
        let _ = token;
        todo!()
    }

    /// A NodeClaim or Machine came or changed; see [`CloudClaim::parse`].
    pub fn handle_claim(&mut self, claim: CloudClaim) {
        let _ = claim;
        todo!()
    }

    /// A page of the ledger came or changed, by a watch or as the answer to a write. An older version than the one
    /// that is known must not be fed.
    pub fn handle_page(&mut self, page: &ConfigMap) {
        let _ = page;
        todo!()
    }

    /// The network's document came or changed.
    pub fn handle_network(&mut self, document: &ConfigMap) {
        let _ = (document, SignedNetwork::from_map);
        todo!()
    }

    /// An object went.
    pub fn handle_deleted(&mut self, kind: Kind, name: &str, now: Now) {
        let _ = (kind, name, now);
        todo!()
    }

    /// Every object of a kind was fed after a fresh list; what is not among `names` is gone. Required kinds decide
    /// nothing before this; for an optional kind whose resource does not exist it need not be called.
    pub fn handle_listed(&mut self, kind: Kind, names: &BTreeSet<String>, now: Now) {
        let _ = (kind, names, now);
        todo!()
    }

    /// A reporter answered.
    pub fn handle_report(&mut self, report: Report) {
        self.reports.handle(report);
    }

    /// What people set.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Our network's key.
    pub fn network_id(&self) -> NodeId {
        self.network_id
    }

    /// The network's document, where there is a valid one of ours.
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// Whether every required kind was listed.
    pub fn is_complete(&self) -> bool {
        Kind::REQUIRED.iter().all(|kind| self.listed.contains(kind))
    }

    /// What does not read, by kind and object name.
    pub fn faults(&self) -> impl Iterator<Item = (Kind, &str, &[ObjectFault])> {
        self.faults.iter().map(|((kind, name), faults)| (*kind, name.as_str(), faults.as_slice()))
    }
}
