//! What the cluster looks like to the controller.
//!
//! The driver feeds objects as the watches bring them; each is parsed once, here, and signatures are verified once. An
//! object that does not read is a typed fault beside the view and stops no other. A view decides nothing; it is also no
//! cache of whole objects, but what decisions need of them.

mod border;
mod cloud;
mod node;
mod reports;
mod resources;
mod settings;

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use keystone_mesh_api::{JoinToken, LEDGER_PREFIX, Member, Peer};
use keystone_mesh_core::NodeId;
use keystone_mesh_core::annotations::Decoded;
use keystone_mesh_core::directory::{Carrier, Directory, Object};
use keystone_mesh_core::facts::{FieldError, Malformed};
use keystone_mesh_core::ledger::{Holder, Ledger};
use keystone_mesh_core::network::{Network, SignedNetwork};
use keystone_mesh_core::node::NodeName;

use self::border::{Meta, identity_of, page_number, statement_faults};
pub(crate) use border::millis;
pub use cloud::{CloudClaim, CloudKind};
pub use node::NodeView;
pub(crate) use node::{INSTANCE_TYPE, REGION, ZONE};
pub(crate) use reports::Evidence;
pub use reports::{Reach, Report, Reporter};
pub use resources::{MemberView, PeerView, PlainSpec, TokenView};
pub(crate) use resources::{NODE as NODE_CONDITION, REACHED as REACHED_CONDITION};
pub use settings::{Policy, Settings};

/// The Node condition that says whether peers reach the node.
pub use keystone_mesh_api::READY_CONDITION;
/// The Node condition that says whether the node is in the network, and why (not).
pub const APPROVED_CONDITION: &str = "MeshApproved";
/// The Node condition that says which of the wanted routes are not given; absent where none ever was refused.
pub const ROUTES_CONDITION: &str = "MeshRoutes";
/// The Node condition that says which annotations of people have no effect; absent where all had.
pub const WISHES_CONDITION: &str = "MeshWishes";

/// One watch may be behind another for so long, in milliseconds: the API server ends one that is silent, and a bookmark
/// comes every minute; a healthy one is behind by less than a second.
const WATCH_LAG: u64 = 30_000;

/// A cloud claim that is gone is remembered for so long, in milliseconds: its Node lingers for minutes, not hours.
const CLAIM_MEMORY: u64 = 3_600_000;

/// Wall-clock time in milliseconds since 1970.
pub type Now = u64;

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
    /// The highest serial of an approval of ours that was ever seen: what is signed next is later than all of them.
    last_serial: u64,
    /// Holders of addresses whose last object was seen to go.
    seen_off: BTreeSet<Holder>,
    reports: reports::Reports,
    caught_up_at: Now,
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
            last_serial: 0,
            seen_off: BTreeSet::new(),
            reports: reports::Reports::default(),
            caught_up_at: 0,
        }
    }

    /// A Node came or changed.
    pub fn handle_node(&mut self, node: &Node) {
        let Some((meta, object)) = self.open(Kind::Node, &node.metadata) else { return };
        let name = meta.name.clone();
        if self.nodes.get(&name).is_some_and(|known| known.uid != meta.uid) {
            self.node_departed(&name);
        }
        let (parsed, mut faults) = NodeView::parse(meta, node);
        faults.extend(statement_faults(&parsed.mesh, self.network_id));
        let returned = |id: &mut NodeId| identity_of(&parsed.mesh) == Some(*id);
        if self.departed.get_mut(&name).is_some_and(returned) {
            self.departed.remove(&name);
        }
        self.count_serial(&parsed.mesh);
        self.directory.handle_object(Carrier::Node, &object);
        self.note(Kind::Node, object.name, faults);
        self.nodes.insert(name, parsed);
    }

    /// A Member came or changed.
    pub fn handle_member(&mut self, member: &Member) {
        let Some((meta, object)) = self.open(Kind::Member, &member.metadata) else { return };
        let name = meta.name.clone();
        match MemberView::parse(meta, member) {
            Ok((parsed, mut faults)) => {
                faults.extend(statement_faults(&parsed.mesh, self.network_id));
                self.count_serial(&parsed.mesh);
                self.directory.handle_object(Carrier::Member, &object);
                self.note(Kind::Member, object.name, faults);
                self.members.insert(name, parsed);
            }
            Err(fault) => self.note(Kind::Member, object.name, vec![fault]),
        }
    }

    /// A Peer came or changed.
    pub fn handle_peer(&mut self, peer: &Peer) {
        let Some((meta, object)) = self.open(Kind::Peer, &peer.metadata) else { return };
        let name = meta.name.clone();
        let known = self.peers.get(&name).filter(|known| known.uid == meta.uid).and_then(|known| known.stated.clone());
        let (parsed, faults) = PeerView::parse(meta, peer, self.network_id, known);
        self.note(Kind::Peer, object.name, faults);
        self.peers.insert(name, parsed);
    }

    /// A JoinToken came or changed. One that does not read lets nobody in.
    pub fn handle_token(&mut self, token: &JoinToken) {
        let name = token.metadata.name.clone().unwrap_or_default();
        match TokenView::parse(token) {
            Ok(parsed) => {
                self.note(Kind::JoinToken, name.clone(), Vec::new());
                self.tokens.insert(name, parsed);
            }
            Err(fault) => {
                self.tokens.remove(&name);
                self.note(Kind::JoinToken, name, vec![fault]);
            }
        }
    }

    /// A NodeClaim or Machine came or changed; see [`CloudClaim::parse`].
    pub fn handle_claim(&mut self, claim: CloudClaim) {
        self.claims.insert((claim.kind, claim.name.clone()), claim);
    }

    /// A page of the ledger came or changed, by a watch or as the answer to a write. An older version than the one
    /// that is known must not be fed.
    pub fn handle_page(&mut self, page: &ConfigMap) {
        let name = page.metadata.name.clone().unwrap_or_default();
        let Some(number) = page_number(&name) else {
            let fault = format!("`{name}` is no page of the ledger; expected {LEDGER_PREFIX}NUMBER");
            return self.note(Kind::LedgerPage, name, vec![ObjectFault::Object(fault)]);
        };
        let faults = self.ledger.handle_page(number, page.data.as_ref().unwrap_or(&BTreeMap::new()));
        self.pages.insert(number, page.metadata.resource_version.clone().unwrap_or_default());
        self.note(Kind::LedgerPage, name, faults.into_iter().map(ObjectFault::from).collect());
        let ledger = &self.ledger;
        self.departed.retain(|name, id| ledger.pinned(name).is_some_and(|(_, pinned)| pinned == *id));
        self.seen_off.retain(|holder| ledger.held_by(holder).is_some());
    }

    /// The network's document came or changed. The last good one stays.
    pub fn handle_network(&mut self, document: &ConfigMap) {
        let read = SignedNetwork::from_map(document.data.as_ref().unwrap_or(&BTreeMap::new()));
        let faults = match read {
            Ok(signed) if signed.get().id == self.network_id => {
                if self.network.as_ref().is_none_or(|known| known.serial <= signed.get().serial) {
                    self.network = Some(signed.get().clone());
                }
                Vec::new()
            }
            Ok(signed) => vec![ObjectFault::OtherNetwork { found: signed.get().id, ours: self.network_id }],
            Err(malformed) => vec![malformed.into()],
        };
        self.note(Kind::Network, document.metadata.name.clone().unwrap_or_default(), faults);
    }

    /// An object went. Cloud claims have their namespace before their name (`NAMESPACE/NAME`), as [`CloudClaim::name`].
    pub fn handle_deleted(&mut self, kind: Kind, name: &str, now: Now) {
        self.faults.remove(&(kind, name.to_owned()));
        match kind {
            Kind::Node => {
                if let Ok(name) = name.parse() {
                    self.node_departed(&name);
                    self.nodes.remove(&name);
                    self.see_off(&name);
                }
            }
            Kind::Member => {
                self.directory.handle_deleted(Carrier::Member, name);
                if let Ok(name) = name.parse() {
                    self.members.remove(&name);
                    self.see_off(&name);
                }
            }
            Kind::Peer => {
                if let Ok(name) = name.parse::<NodeName>() {
                    self.peers.remove(&name);
                    self.seen_off
                        .extend(Some(Holder::Peer(name)).filter(|holder| self.ledger.held_by(holder).is_some()));
                }
            }
            Kind::JoinToken => drop(self.tokens.remove(name)),
            Kind::LedgerPage => {
                if let Some(number) = page_number(name) {
                    self.ledger.handle_page(number, &BTreeMap::new());
                    self.pages.remove(&number);
                }
            }
            // Members keep the network that they know; so does the controller.
            Kind::Network => {}
            Kind::NodeClaim => self.claim_gone(CloudKind::NodeClaim, name, now),
            Kind::Machine => self.claim_gone(CloudKind::Machine, name, now),
        }
    }

    /// Every object of a kind was fed after a fresh list; what is not among `names` is gone. Required kinds decide
    /// nothing before this; for an optional kind whose resource does not exist it need not be called.
    pub fn handle_listed(&mut self, kind: Kind, names: &BTreeSet<String>, now: Now) {
        let known: Vec<String> = match kind {
            Kind::Node => self.nodes.keys().map(ToString::to_string).collect(),
            Kind::Member => self.members.keys().map(ToString::to_string).collect(),
            Kind::Peer => self.peers.keys().map(ToString::to_string).collect(),
            Kind::JoinToken => self.tokens.keys().cloned().collect(),
            Kind::LedgerPage => self.pages.keys().map(|page| format!("{LEDGER_PREFIX}{page}")).collect(),
            Kind::Network => Vec::new(),
            Kind::NodeClaim => self.live_claims(CloudKind::NodeClaim),
            Kind::Machine => self.live_claims(CloudKind::Machine),
        };
        for name in known.iter().filter(|name| !names.contains(*name)) {
            self.handle_deleted(kind, name, now);
        }
        self.faults.retain(|(of, name), _| *of != kind || names.contains(name));
        self.listed.insert(kind);
    }

    /// This controller has become the leader. What its predecessor saw may still be on its way here, so for a little while
    /// nothing counts as gone that was never seen; what was reported to it before counts no more, and a node that nobody
    /// reports on is called Unknown only a report's life after this.
    pub fn handle_leading(&mut self, now: Now) {
        self.caught_up_at = now.saturating_add(WATCH_LAG);
        self.reports = reports::Reports::since(now);
    }

    /// A reporter answered.
    pub fn handle_report(&mut self, report: Report) {
        self.reports.handle(report);
    }

    /// Reads what every named object has. One with a name that no node can have is noted and has no further use.
    fn open(&mut self, kind: Kind, meta: &ObjectMeta) -> Option<(Meta, Object)> {
        match Meta::parse(meta) {
            Ok(parsed) => {
                let annotations = meta.annotations.clone().unwrap_or_default();
                let object = Object { name: parsed.name.to_string(), annotations };
                Some((parsed, object))
            }
            Err(fault) => {
                self.note(kind, meta.name.clone().unwrap_or_default(), vec![fault]);
                None
            }
        }
    }

    fn count_serial(&mut self, mesh: &Decoded) {
        if let Ok(Some(approval)) = &mesh.approval
            && approval.get().network == self.network_id
        {
            self.last_serial = self.last_serial.max(approval.get().serial);
        }
    }

    /// Remembers that the claim of this name belongs to a Node that went: a successor with another identity is no
    /// impostor.
    fn node_departed(&mut self, name: &NodeName) {
        self.directory.handle_deleted(Carrier::Node, name.as_str());
        if let Some((_, pinned)) = self.ledger.pinned(name) {
            self.departed.insert(name.clone(), pinned);
        }
    }

    /// Remembers who held an address under this name, for the pass that gives it back.
    fn see_off(&mut self, name: &NodeName) {
        self.seen_off.extend(self.ledger.pinned(name).map(|(_, id)| Holder::Node(name.clone(), id)));
    }

    fn claim_gone(&mut self, kind: CloudKind, name: &str, now: Now) {
        if let Some(claim) = self.claims.get_mut(&(kind, name.to_owned())) {
            claim.gone.get_or_insert(now);
        }
        self.claims.retain(|_, claim| claim.gone.is_none_or(|gone| now.saturating_sub(gone) < CLAIM_MEMORY));
    }

    fn live_claims(&self, kind: CloudKind) -> Vec<String> {
        let live = self.claims.values().filter(|claim| claim.kind == kind && claim.gone.is_none());
        live.map(|claim| claim.name.clone()).collect()
    }

    fn note(&mut self, kind: Kind, name: String, faults: Vec<ObjectFault>) {
        if faults.is_empty() {
            self.faults.remove(&(kind, name));
        } else {
            self.faults.insert((kind, name), faults);
        }
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

    /// Every Node.
    pub fn nodes(&self) -> &BTreeMap<NodeName, NodeView> {
        &self.nodes
    }

    /// Every Member.
    pub fn members(&self) -> &BTreeMap<NodeName, MemberView> {
        &self.members
    }

    /// Every Peer.
    pub fn peers(&self) -> &BTreeMap<NodeName, PeerView> {
        &self.peers
    }

    /// Every JoinToken that reads.
    pub fn tokens(&self) -> &BTreeMap<String, TokenView> {
        &self.tokens
    }

    /// Every cloud claim, those that went lately too.
    pub fn claims(&self) -> impl Iterator<Item = &CloudClaim> {
        self.claims.values()
    }

    /// The address ledger as acknowledged.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The version of a page of the ledger, where there is one.
    pub fn page_version(&self, page: u32) -> Option<&str> {
        self.pages.get(&page).map(String::as_str)
    }

    /// What is known of every node's record and approval, whatever its objects carry at this moment.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The highest serial of an approval that was ever seen.
    pub(crate) fn last_serial(&self) -> u64 {
        self.last_serial
    }

    /// The identity that was pinned to this name when the Node of this name went, where its claim is still held.
    pub(crate) fn departed(&self, name: &NodeName) -> Option<NodeId> {
        self.departed.get(name).copied()
    }

    /// Whether an object of this holder was seen to go.
    pub(crate) fn was_seen_off(&self, holder: &Holder) -> bool {
        self.seen_off.contains(holder)
    }

    /// When this view shows everything that the leader before saw: until then, what is absent may be late.
    pub(crate) fn caught_up_at(&self) -> Now {
        self.caught_up_at
    }

    pub(crate) fn reports(&self) -> &reports::Reports {
        &self.reports
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
