//! The far end of a datagram.

use std::net::{IpAddr, SocketAddr};

use keystone_mesh_core::{NodeId, Via};

/// Where a datagram comes from or goes to, complete: a [`Via`] and, through a relay, the node behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remote {
    Direct(SocketAddr),
    Relay { relay: NodeId, node: NodeId },
}

impl Remote {
    pub(crate) fn via(&self) -> Via {
        match self {
            Self::Direct(addr) => Via::Direct(*addr),
            Self::Relay { relay, .. } => Via::Relay(*relay),
        }
    }

    /// The node behind the relay.
    pub(crate) fn node(&self) -> Option<NodeId> {
        match self {
            Self::Direct(_) => None,
            Self::Relay { node, .. } => Some(*node),
        }
    }

    /// The address for cookies; a relay's clients have none.
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Direct(addr) => Some(addr.ip()),
            Self::Relay { .. } => None,
        }
    }
}
