//! What a node and the gateway (the control-plane host's daemon) say to each other.
//!
//! One stream is one session, authenticated at both ends: the node pinned the network key, the gateway learned the
//! node's identity from TLS. The node opens with [`ToGateway::Join`] (it has a token) or [`ToGateway::Attach`] (it has
//! been approved); after either the gateway sends a [`FromGateway::Snapshot`] and then every change, and the node
//! publishes its record whenever that changes. Frames are length-prefixed JSON ([`crate::wire`]).

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::network::SignedNetwork;
use crate::node::{Entry, NodeName, SignedApproval, SignedRecord};
use crate::plain_peer::SignedPlainPeer;
use crate::token::{TokenId, TokenSecret};

/// The version of this conversation. A gateway answers a higher one with what it knows; a lower one it still speaks.
pub const VERSION: u32 = 1;

/// From the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum ToGateway {
    /// Let me in.
    Join {
        /// [`VERSION`].
        version: u32,
        /// The token's id.
        token: TokenId,
        /// The token's secret.
        secret: TokenSecret,
        /// What the node says of itself.
        record: SignedRecord,
    },
    /// I am in; tell me of the others.
    Attach {
        /// [`VERSION`].
        version: u32,
        /// What the node says of itself.
        record: SignedRecord,
    },
    /// My record changed.
    Publish {
        /// The whole record.
        record: SignedRecord,
    },
    /// Forget me.
    Leave,
}

/// From the gateway.
#[expect(clippy::large_enum_variant, reason = "one at a time, on its way to or from the wire")]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum FromGateway {
    /// You are in.
    Joined {
        /// What the node is allowed.
        approval: SignedApproval,
    },
    /// Everything that is known; replaces what the node knew.
    Snapshot {
        /// The network's document.
        network: SignedNetwork,
        /// Every node.
        entries: Vec<Entry>,
        /// Every plain peer.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        peers: Vec<SignedPlainPeer>,
    },
    /// A node came or changed.
    Changed {
        /// The node.
        entry: Entry,
    },
    /// A node went.
    Removed {
        /// Its name.
        name: NodeName,
    },
    /// A plain peer came or changed.
    PeerChanged {
        /// The peer.
        peer: SignedPlainPeer,
    },
    /// A plain peer went.
    PeerRemoved {
        /// Its name.
        name: NodeName,
    },
    /// The network's document changed.
    Network {
        /// The document.
        network: SignedNetwork,
    },
    /// Your address as the gateway sees it, where the session runs straight over UDP: a reflexive candidate.
    Observed {
        /// Address and port.
        address: SocketAddr,
    },
    /// Your record is stored.
    Published {
        /// Its sequence number.
        seq: u64,
    },
    /// You are forgotten.
    Left,
    /// No.
    Refused(Refusal),
}

/// A refusal that a person can act on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} [{code}]")]
pub struct Refusal {
    /// Stable; for machines.
    pub code: String,
    /// A sentence with the remedy.
    pub message: String,
}
