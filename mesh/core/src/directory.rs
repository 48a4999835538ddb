//! What Kubernetes objects say, merged into what is known of every node.
//!
//! Whoever may patch Nodes can write or delete annotations. So nothing is taken back because an annotation is missing
//! or faulty: of two records the approved identity's with the higher sequence number counts, of two approvals the
//! network's with the higher serial, and a node goes only when its last object does. A fault is told beside the entry,
//! field by field, and disturbs no other node.

use std::collections::BTreeMap;

use crate::facts::Malformed;
use crate::key::NodeId;
use crate::node::{Entry, NodeName};
use crate::plain_peer::SignedPlainPeer;

/// Which kind of object carries annotations of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Carrier {
    /// A Node.
    Node,
    /// A Member: a machine that is no Node, or not yet.
    Member,
}

/// What changed for readers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A node came or changed.
    Changed(Box<Entry>),
    /// A node went.
    Removed(NodeName),
    /// A plain peer came or changed.
    Peer(Box<SignedPlainPeer>),
    /// A plain peer went.
    PeerRemoved(NodeName),
}

/// What is wrong with an object's annotations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The record does not read.
    Record(Malformed),
    /// The approval does not read.
    Approval(Malformed),
    /// The approval is another network's.
    ForeignApproval(NodeId),
    /// The record is signed by another identity than the approved one; the approved one's stays in force.
    OtherIdentity {
        /// Who is approved.
        approved: NodeId,
        /// Who signed.
        found: NodeId,
    },
    /// The plain peer's statement does not read.
    Peer(Malformed),
    /// The object's name is no node name.
    Name(String),
}

/// One object as it is watched: its name and its annotations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
}

/// The merged view.
#[derive(Clone, Debug)]
pub struct Directory {
    network: NodeId,
}

impl Directory {
    /// A directory of `network` that starts from what is known of old: a snapshot's entries and peers.
    pub fn new(network: NodeId, entries: Vec<Entry>, peers: Vec<SignedPlainPeer>) -> Self {
        let _ = (entries, peers);
        Self { network }
    }

    /// An object came or changed.
    pub fn handle_object(&mut self, carrier: Carrier, object: &Object) -> Vec<Change> {
        let _ = (carrier, object, self.network);
        todo!()
    }

    /// An object went.
    pub fn handle_deleted(&mut self, carrier: Carrier, name: &str) -> Vec<Change> {
        let _ = (carrier, name);
        todo!()
    }

    /// Every object of a kind, after a fresh list; what is not among them is gone.
    pub fn handle_listed(&mut self, carrier: Carrier, objects: &[Object]) -> Vec<Change> {
        let _ = (carrier, objects);
        todo!()
    }

    /// A Peer object came or changed.
    pub fn handle_peer(&mut self, object: &Object) -> Vec<Change> {
        let _ = object;
        todo!()
    }

    /// A Peer object went.
    pub fn handle_peer_deleted(&mut self, name: &str) -> Vec<Change> {
        let _ = name;
        todo!()
    }

    /// Every Peer object, after a fresh list.
    pub fn handle_peers_listed(&mut self, objects: &[Object]) -> Vec<Change> {
        let _ = objects;
        todo!()
    }

    /// Every node with a valid record, approved or not.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        std::iter::empty()
    }

    /// Every plain peer.
    pub fn peers(&self) -> impl Iterator<Item = &SignedPlainPeer> {
        std::iter::empty()
    }

    /// What is wrong, by object name.
    pub fn faults(&self) -> impl Iterator<Item = (&str, &[Fault])> {
        std::iter::empty()
    }
}
