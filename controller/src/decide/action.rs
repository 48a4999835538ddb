//! What there is to do: the vocabulary between the decisions and the driver.
//!
//! Every action is level-based: it says how a part of one object is to be, not what happened. An action that failed or
//! was lost is decided again from the next view, so the driver may drop any of them at any time.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeAddress, NodeCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use keystone_mesh_api::{JoinTokenStatus, MemberStatus, PeerStatus};
use keystone_mesh_core::directory::Carrier;
use keystone_mesh_core::ledger::PageEdit;
use keystone_mesh_core::node::{Approval, NodeName};
use keystone_mesh_core::plain_peer::PlainPeer;

use super::conditions;

/// What to do, why, and what to tell people once it is done.
#[derive(Clone, Debug, PartialEq)]
pub struct Action {
    /// The change of one object.
    pub effect: Effect,
    /// For logs: why.
    pub reason: String,
    /// Published when the effect was acknowledged, and only then, so that nothing is told twice.
    pub events: Vec<Event>,
}

/// An object that is changed: its name, and the uid without which a successor of the same name would be hit.
///
/// A patch carries the uid (`metadata.uid`, which the API server checks); a deletion carries it as a precondition.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.uid`.
    pub uid: String,
}

/// The change of one object.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Writes a page of the address ledger: `data` as a whole.
    Ledger {
        /// The page and its content.
        edit: PageEdit,
        /// What the page was when this was decided: the update carries it (compare and swap). None: the page does not
        /// exist and is created.
        resource_version: Option<String>,
    },
    /// Signs an approval and applies its annotations (server-side apply, controller's field manager, forced).
    Approve {
        /// Whether a Node or a Member carries it.
        carrier: Carrier,
        /// The object.
        target: Target,
        /// What is to be signed.
        approval: Box<Approval>,
    },
    /// Signs a plain peer's statement and applies its annotations to the Peer.
    StatePeer {
        /// The Peer.
        target: Target,
        /// What is to be signed. Without addresses it takes back an earlier one.
        peer: Box<PlainPeer>,
    },
    /// Replaces a Member's status.
    MemberStatus {
        /// The Member.
        target: Target,
        /// The whole status.
        status: MemberStatus,
    },
    /// Replaces a Peer's status.
    PeerStatus {
        /// The Peer.
        target: Target,
        /// The whole status.
        status: PeerStatus,
    },
    /// Replaces a JoinToken's status, under compare and swap: uses are counted here.
    TokenStatus {
        /// `metadata.name`.
        name: String,
        /// What the token was when this was decided; the update carries it.
        resource_version: String,
        /// The whole status.
        status: JoinTokenStatus,
    },
    /// Sets our conditions in a Node's status (server-side apply, controller's field manager, forced), in one write;
    /// others stay.
    NodeConditions {
        /// The Node.
        target: Target,
        /// All of ours, also those that stay as they are.
        conditions: Vec<NodeCondition>,
    },
    /// Replaces a Node's taints, if they still are what was seen (JSON patch: `test`, then `replace`).
    NodeTaints {
        /// The Node.
        target: Target,
        /// What is there; empty also where `spec.taints` is absent.
        seen: Vec<Taint>,
        /// What is to be there.
        wanted: Vec<Taint>,
    },
    /// Initialises a Node (merge patch): labels that are absent, and the provider ID where it is empty.
    NodeInit {
        /// The Node.
        target: Target,
        /// Labels to add.
        labels: BTreeMap<String, String>,
        /// `spec.providerID`; it can be set once.
        provider_id: Option<String>,
    },
    /// Replaces `status.addresses` of a Node (merge patch of the status subresource).
    NodeAddresses {
        /// The Node.
        target: Target,
        /// All of them.
        addresses: Vec<NodeAddress>,
    },
    /// Deletes a Member.
    DeleteMember {
        /// The Member.
        target: Target,
    },
}

impl Effect {
    /// Whether it asks for the same as another one, whatever version it was decided from and when.
    pub fn asks_the_same_as(&self, other: &Self) -> bool {
        self.timeless() == other.timeless()
    }

    fn timeless(&self) -> Self {
        let mut effect = self.clone();
        match &mut effect {
            Self::Ledger { resource_version, .. } => *resource_version = None,
            Self::TokenStatus { resource_version, .. } => resource_version.clear(),
            Self::Approve { approval, .. } => approval.serial = 0,
            Self::StatePeer { peer, .. } => peer.serial = 0,
            Self::MemberStatus { status, .. } => status.conditions.iter_mut().for_each(forget_time),
            Self::PeerStatus { status, .. } => status.conditions.iter_mut().for_each(forget_time),
            Self::NodeConditions { conditions, .. } => {
                for condition in conditions {
                    (condition.last_transition_time, condition.last_heartbeat_time) = (None, None);
                }
            }
            Self::NodeTaints { .. }
            | Self::NodeInit { .. }
            | Self::NodeAddresses { .. }
            | Self::DeleteMember { .. } => {}
        }
        effect
    }
}

fn forget_time(condition: &mut Condition) {
    condition.last_transition_time = conditions::time(0);
}

/// Which kind of object an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Regarding {
    /// A Node.
    Node,
    /// A Member.
    Member,
    /// A Peer.
    Peer,
    /// A JoinToken.
    JoinToken,
}

/// A Kubernetes Event for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What kind of object it is about.
    pub regarding: Regarding,
    /// The object's name.
    pub name: String,
    /// The object's uid.
    pub uid: String,
    /// Whether somebody should look (`Warning`) or not (`Normal`).
    pub warning: bool,
    /// CamelCase, stable.
    pub reason: &'static str,
    /// For people: what happened, and what to do. At most 1024 bytes.
    pub note: String,
}

/// What the metrics show of a view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Nodes and Members by what was decided of their admission (label `state`): every state is there, also at 0.
    pub machines: BTreeMap<&'static str, u64>,
    /// Nodes by the status of `MeshReady` (`true`, `false`, `unknown`).
    pub ready: BTreeMap<&'static str, u64>,
    /// Peers by readiness (`true`, `false`).
    pub peers: BTreeMap<&'static str, u64>,
    /// Join tokens by state (`usable`, `expired`, `used-up`, `revoked`).
    pub tokens: BTreeMap<&'static str, u64>,
    /// Addresses that are held.
    pub addresses_held: u64,
    /// Addresses that there are.
    pub addresses_total: u64,
    /// Routes that were asked for and are not given.
    pub routes_refused: u64,
    /// Objects with something that does not read, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Members that are no Nodes and were absent for a day or longer.
    pub members_absent: u64,
}

/// What [`reconcile`](super::reconcile) finds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// What to do, in this order; none where everything is as it should be. No action waits for another of the same
    /// decision: what needs an acknowledgement first is decided from the view that shows it.
    pub actions: Vec<Action>,
    /// What the metrics show.
    pub gauges: Gauges,
    /// When to decide again though nothing came: time alone will have changed the answer.
    pub again_at: Option<crate::view::Now>,
}
