//! The annotation contract: how records and approvals stand on Kubernetes objects.
//!
//! One readable annotation per fact, under [`PREFIX`]. The object's own name is the node's name and is not repeated. A
//! record and an approval are each verified on their own, so that a fault in one says nothing about the other; what
//! people write is unsigned, and the controller folds it into the approval that it signs. docs/annotations.md has the
//! table, which a test holds to [`KEYS`].

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::facts::{FieldError, Malformed};
use crate::key::NodeId;
use crate::node::{NodeName, SignedApproval, SignedRecord};
use crate::relay::address::HostPort;

/// Before every annotation's key.
pub const PREFIX: &str = "mesh.keystone.cluster/";

/// Who writes an annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Writer {
    /// The node's own daemon, or the gateway for a node without credentials. Covered by the node's signature.
    Node,
    /// The controller. Covered by the network key's signature.
    Controller,
    /// A person. Not signed: the controller checks it and folds it into the approval.
    Person,
}

/// One annotation of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Without [`PREFIX`].
    pub name: &'static str,
    /// Who writes it.
    pub writer: Writer,
}

/// What people ask for on a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// `force-endpoint`: where the node is reached, whatever it says itself; at most 4.
    pub endpoints: Vec<HostPort>,
    /// `relay-force`: the relays that the node has to listen on; at most 4.
    pub relays: Vec<NodeId>,
    /// `routes-extra`: networks behind the node.
    pub routes: Vec<IpNet>,
    /// `location`: where the node stands.
    pub location: Option<crate::node::Location>,
}

/// What an object's annotations say. Each part is there, absent (`Ok(None)`), or faulty by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// The node's word.
    pub record: Result<Option<SignedRecord>, Malformed>,
    /// The network's word. Whether it is our network's is the caller's question.
    pub approval: Result<Option<SignedApproval>, Malformed>,
    /// People's wishes, without the faulty ones.
    pub wishes: Wishes,
    /// What was wrong with the others.
    pub wish_faults: Vec<FieldError>,
}

/// Reads the annotations of the object `name`; keys without [`PREFIX`] and unknown ones are ignored.
pub fn decode(name: &NodeName, annotations: &BTreeMap<String, String>) -> Decoded {
    let _ = (name, annotations);
    todo!()
}

/// A record as annotations, with [`PREFIX`].
pub fn of_record(record: &SignedRecord) -> BTreeMap<String, String> {
    let _ = record;
    todo!()
}

/// An approval as annotations, with [`PREFIX`].
pub fn of_approval(approval: &SignedApproval) -> BTreeMap<String, String> {
    let _ = approval;
    todo!()
}
