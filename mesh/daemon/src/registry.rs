//! Where records are published and watched: one small interface, several implementations.
//!
//! * [`embedded`]: the control-plane host reads and writes its own store.
//! * [`kubernetes`]: annotations of Nodes and Members.
//! * [`client`]: every other node has a session with the gateway, which [`server`] serves from either ([`backend`]).
//!
//! Losing a registry freezes what is known, says so, and tears nothing down.

pub mod backend;
pub mod client;
pub mod counts;
pub mod embedded;
pub mod handover;
pub mod kubernetes;
pub mod server;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;

use futures_util::FutureExt as _;
use keystone_mesh_core::gateway::Refusal;
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::{Entry, NodeName, SignedApproval, SignedRecord};
use keystone_mesh_core::plain_peer::SignedPlainPeer;

use crate::status::{Condition, NodeFault};

/// What a registry tells.
#[derive(Clone, Debug)]
pub enum Event {
    /// The node was let in.
    Joined(SignedApproval),
    /// Everything that is known; replaces what was known before.
    Snapshot {
        /// The network's document.
        network: SignedNetwork,
        /// Every node.
        entries: Vec<Entry>,
        /// Every plain peer.
        peers: Vec<SignedPlainPeer>,
    },
    /// A node came or changed.
    Changed(Box<Entry>),
    /// A node went.
    Removed(NodeName),
    /// A plain peer came or changed.
    PeerChanged(Box<SignedPlainPeer>),
    /// A plain peer went.
    PeerRemoved(NodeName),
    /// The network's document changed.
    Network(SignedNetwork),
    /// This node's address as the gateway sees it.
    Observed(SocketAddr),
    /// The registry cannot be heard; what is known stays in force. Followed by a snapshot once it can.
    Stale {
        /// In words.
        why: String,
    },
    /// The registry will not have this node: token refused, or removed from the network.
    Refused(Refusal),
}

/// What is wrong with others' records, approvals and statements.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// How many, by [`NodeFault::CODES`].
    pub counts: BTreeMap<&'static str, u64>,
    /// The first of them, [`MAX_FAULTS`] at most.
    pub first: Vec<NodeFault>,
}

/// Faults that are kept to be shown: whoever may patch Nodes can make as many as there are Nodes.
pub const MAX_FAULTS: usize = 64;

impl Faults {
    /// Counts every fault and keeps the first ones.
    pub fn of(faults: impl IntoIterator<Item = NodeFault>) -> Self {
        let mut all = Self::default();
        for fault in faults {
            if let Some(code) = NodeFault::CODES.into_iter().find(|code| *code == fault.code) {
                *all.counts.entry(code).or_default() += 1;
            }
            if all.first.len() < MAX_FAULTS {
                all.first.push(fault);
            }
        }
        all
    }
}

/// What a registry has written since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Writes {
    /// Writes that were acknowledged.
    pub done: u64,
    /// Writes that failed, and are tried again.
    pub failed: u64,
}

/// A future of a registry.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Publishes this node's record and watches the others'.
pub trait Registry: Send {
    /// Makes `record` this node's word. The latest one counts; it is published again after every loss of the registry.
    fn publish(&mut self, record: SignedRecord);

    /// The next event. Cancel-safe.
    fn next(&mut self) -> Answer<'_, Event>;

    /// Takes this node out of the network. Waits for the answer, a few seconds at most.
    fn leave(&mut self) -> Answer<'_, Result<(), String>>;

    /// Its kind, for status: `embedded`, `gateway` or `kubernetes`.
    fn kind(&self) -> &'static str;

    /// Itself, where it takes access to Kubernetes that is handed to it.
    fn handover(&mut self) -> Option<&mut handover::Handover> {
        None
    }

    /// The host's network changed: what failed may work.
    fn network_changed(&mut self) {}

    /// What is not as it should be, a sentence each.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// What is wrong with what it reads of others; nothing where somebody else has read and checked it before.
    fn faults(&self) -> Faults {
        Faults::default()
    }

    /// What the controller says of this node; none where there is no controller to ask for.
    fn conditions(&self) -> Option<Answer<'static, Result<Vec<Condition>, String>>> {
        None
    }

    /// What it has written; none where it writes nothing itself.
    fn writes(&self) -> Option<Writes> {
        None
    }
}

/// The next event, where one waits at this moment.
pub fn waiting(registry: &mut dyn Registry) -> Option<Event> {
    // Unconstrained: tokio's budget would make events look absent that are there.
    tokio::task::unconstrained(registry.next()).now_or_never()
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    struct Told(mpsc::Receiver<Event>);

    impl Registry for Told {
        fn publish(&mut self, _: SignedRecord) {}

        fn next(&mut self) -> Answer<'_, Event> {
            Box::pin(async { self.0.recv().await.expect("the test keeps the sender") })
        }

        fn leave(&mut self) -> Answer<'_, Result<(), String>> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn kind(&self) -> &'static str {
            "told"
        }
    }

    #[tokio::test]
    async fn a_thousand_events_that_wait_are_had_without_waiting() {
        let (tell, told) = mpsc::channel(1000);
        for n in 0..1000 {
            tell.try_send(Event::Removed(format!("n{n}").parse().unwrap())).unwrap();
        }
        let mut registry = Told(told);
        let mut had = 0;
        while waiting(&mut registry).is_some() {
            had += 1;
        }
        assert_eq!(had, 1000);
        tell.try_send(Event::Stale { why: "later".into() }).unwrap();
        assert!(waiting(&mut registry).is_some(), "and nothing is lost afterwards");
    }
}
