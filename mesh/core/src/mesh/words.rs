//! What goes into the [machine](super) and what comes out of it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Instant;

use ipnet::IpNet;

use crate::io::{PeerOp, Via};
use crate::kernel::Route;
use crate::key::{NodeId, PrivateKey, PublicKey};
use crate::node::{Location, NodeName, NodeRecord};
use crate::path::{self, TimeoutReason};
use crate::probe;
use crate::relay::{HostPort, RelayAddr};

/// Who this node is, and what does not change while it runs.
#[derive(Clone, Debug)]
pub struct Own {
    /// Its identity.
    pub identity: NodeId,
    /// Its WireGuard key.
    pub key: PrivateKey,
    /// Its name; none for a node with plain peers alone, which publishes nothing.
    pub name: Option<NodeName>,
    /// Relays that it listens on while the network's document is not known yet: a joiner's, from its token.
    pub relays: Vec<NodeId>,
    /// MTU inside the mesh, bytes.
    pub mtu: u16,
    /// Networks behind this node for which it asks to be the way.
    pub routes: Vec<IpNet>,
    /// Whether packets to pods go through the mesh; otherwise another pod network carries them.
    pub pod_routes: bool,
    /// Whether pods of nodes of the same location are reached plainly, over the network that both hosts are on.
    pub lan_routes: bool,
    /// Addresses on the interface beside those of the network, for plain peers.
    pub addresses: Vec<IpNet>,
    /// Fresh randomness of this start of the daemon.
    pub seed: [u8; 32],
}

/// What the driver is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Change the data plane's peers.
    Peers(Vec<PeerOp>),
    /// Make the interface's addresses and the mesh's routes so.
    Kernel {
        /// Addresses of the interface.
        addresses: Vec<IpNet>,
        /// What is reached through it, or plainly through a neighbour.
        routes: Vec<Route>,
    },
    /// Keep connections to these relays, and to no others.
    Relays(Vec<RelayAddr>),
    /// Keep these host names resolved, and no others: the answer is
    /// [`Mesh::handle_resolved`](super::Mesh::handle_resolved), whenever it changes.
    Names(BTreeSet<HostPort>),
    /// Send the peer's packets this way; none: nowhere.
    SetPath {
        /// The peer.
        peer: PublicKey,
        /// The way.
        via: Option<Via>,
    },
    /// Begin a handshake at once: the peer may still use a session that this node has lost.
    StartHandshake(PublicKey),
    /// Send a datagram.
    SendProbe {
        /// The peer's identity, for relays.
        to: Option<NodeId>,
        /// Which way.
        via: Via,
        /// The datagram.
        bytes: Vec<u8>,
    },
    /// Sign this and publish it. Its sequence number is to be set: higher than any before.
    Publish(NodeRecord),
    /// What is known changed: keep it on disk.
    Save,
    /// Drained. Call [`Mesh::handle_timeout`](super::Mesh::handle_timeout) then.
    Timeout {
        /// When.
        at: Instant,
        /// What for.
        reason: TimeoutReason,
    },
    /// Drained. Nothing to do until the next input.
    Idle,
}

/// What the data plane counted of one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// The peer.
    pub peer: PublicKey,
    /// What was sent so far; bytes will do.
    pub sent: u64,
    /// What authenticated packets brought so far; bytes will do.
    pub received: u64,
    /// Where the latest of them came from.
    pub received_via: Option<Via>,
}

/// A peer for people and JSON.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// Its identity; none for a plain WireGuard peer.
    pub identity: Option<NodeId>,
    /// Its WireGuard key.
    pub key: PublicKey,
    /// Its mesh addresses.
    pub addresses: Vec<IpNet>,
    /// Networks behind it.
    pub routes: Vec<IpNet>,
    /// Networks of its pods.
    pub pod_cidrs: Vec<IpNet>,
    /// Where people say that it stands.
    pub location: Option<Location>,
    /// Its path.
    pub path: path::Status,
}

/// What a restarted node does better for having: see [`Mesh::hints`](super::Mesh::hints).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// The peer.
    pub peer: PublicKey,
    /// Where it was last reached directly.
    pub direct: Option<SocketAddr>,
}

/// Why a datagram that looked like a probe was dropped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeRefusal {
    /// It does not decode or authenticate.
    #[error(transparent)]
    Bad(#[from] probe::ProbeError),
    /// Nobody has the key that it names.
    #[error("a probe of a node that is no peer")]
    UnknownSender,
    /// The relay names another sender than the one that made it.
    #[error("a probe that a relay says is another node's")]
    OtherSender,
}
