//! Machines with stock WireGuard (a laptop, a phone, another site) that a node of the mesh serves.
//!
//! The serving node has the peer in its data plane; for every other node the peer's addresses are among the serving
//! node's approved routes. The statement is signed by the network key and stands in the annotations of a Peer object.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::facts::{Malformed, serde_as_facts};
use crate::key::{Identity, NodeId, PublicKey, Signature};
use crate::node::NodeName;
use crate::relay::address::HostPort;

/// What the network says of a plain peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainPeer {
    /// The network that approves; its key signs.
    pub network: NodeId,
    /// The peer's name.
    pub name: NodeName,
    /// The node that serves it.
    pub node: NodeName,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// Its mesh addresses, each a full-length prefix.
    pub addresses: Vec<IpNet>,
    /// Networks behind it.
    pub routes: Vec<IpNet>,
    /// Where it is reached; none: it has to come first.
    pub endpoint: Option<HostPort>,
    /// Seconds between keepalives from the serving node.
    pub persistent_keepalive: Option<u16>,
    /// Grows with every change.
    pub serial: u64,
}

impl PlainPeer {
    /// Signs the statement with the network key.
    pub fn sign(self, network: &Identity) -> SignedPlainPeer {
        let _ = network;
        todo!()
    }
}

/// A statement whose signature was verified against the network that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedPlainPeer {
    peer: PlainPeer,
    signature: Signature,
}

impl SignedPlainPeer {
    /// What is stated.
    pub fn get(&self) -> &PlainPeer {
        &self.peer
    }

    /// The facts with their signature, as stored and sent.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        let _ = &self.signature;
        todo!()
    }

    /// Reads and verifies [`SignedPlainPeer::to_map`]'s form.
    pub fn from_map(map: &BTreeMap<String, String>) -> Result<Self, Malformed> {
        let _ = map;
        todo!()
    }

    /// As annotations of the Peer object, with the prefix; the name is the object's.
    pub fn to_annotations(&self) -> BTreeMap<String, String> {
        todo!()
    }

    /// Reads [`SignedPlainPeer::to_annotations`]' form; none where the object carries no statement yet.
    pub fn from_annotations(
        name: &NodeName,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, Malformed> {
        let _ = (name, annotations);
        todo!()
    }
}

serde_as_facts!(SignedPlainPeer);
