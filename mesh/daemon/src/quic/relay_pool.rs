//! The relays of a node: what the data plane sends through, whichever relay a path goes by.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use keystone_mesh_core::NodeId;
use keystone_mesh_core::relay::RelayAddr;
use tokio::sync::watch;

use super::endpoint::QuicEndpoint;
use super::relay_client::{RelayClient, RelayClientConfig, RelayState};
use super::relay_server::{Deliver, RelayServer};
use super::splice::AcceptSpliced;

/// What a pool needs to know.
pub struct RelayPoolConfig {
    /// This node's approval, where there is one yet.
    pub credential: Option<Vec<u8>>,
    /// Makes this node's pauses differ from others'.
    pub seed: u64,
    /// Takes the packets that come through relays.
    pub receive: Deliver,
    /// Takes the streams that come through relays; only the control plane gets any.
    pub spliced: Option<Arc<dyn AcceptSpliced>>,
    /// The relay inside this node, if it is one: packets through it need no connection.
    pub local: Option<Arc<RelayServer>>,
}

/// The relays of a node.
pub struct RelayPool {
    endpoint: QuicEndpoint,
    config: RelayPoolConfig,
    credential: Mutex<Option<Vec<u8>>>,
    clients: ArcSwap<BTreeMap<NodeId, Arc<RelayClient>>>,
    changes: watch::Sender<()>,
}

impl RelayPool {
    /// A pool without relays.
    pub fn new(endpoint: QuicEndpoint, config: RelayPoolConfig) -> Self {
        let credential = Mutex::new(config.credential.clone());
        Self { endpoint, config, credential, clients: ArcSwap::default(), changes: watch::Sender::new(()) }
    }

    /// Makes these the node's relays: connects to the added ones, leaves the others alone or lets go of them. Call it
    /// within a tokio runtime, from one task at a time. The relay inside this node needs no connection and is skipped.
    pub fn set_relays(&self, relays: &[RelayAddr]) {
        let present = self.clients.load();
        let local = self.config.local.as_ref().map(|relay| relay.id());
        let desired = relays.iter().filter(|relay| Some(relay.id) != local).map(|relay| {
            let kept = present.get(&relay.id).filter(|client| client.relay() == relay).cloned();
            (relay.id, kept.unwrap_or_else(|| Arc::new(self.start(relay.clone()))))
        });
        self.clients.store(Arc::new(desired.collect()));
        self.changes.send_replace(());
    }

    /// Sends packets to the node `to` through a relay; returns how many were dropped, all where the relay is not one of
    /// the node's. Callable from any thread; never waits.
    pub fn send(&self, relay: NodeId, to: NodeId, packets: &mut dyn Iterator<Item = &[u8]>) -> usize {
        if let Some(local) = self.config.local.as_ref().filter(|local| local.id() == relay) {
            return local.send_from_local(to, packets);
        }
        match self.clients.load().get(&relay) {
            Some(client) => client.send(to, packets),
            None => packets.count(),
        }
    }

    /// One relay's client.
    pub fn client(&self, relay: NodeId) -> Option<Arc<RelayClient>> {
        self.clients.load().get(&relay).cloned()
    }

    /// The relay inside this node, if it is one.
    pub fn local(&self) -> Option<&RelayServer> {
        self.config.local.as_deref()
    }

    /// Every relay and how it is doing.
    pub fn states(&self) -> Vec<(NodeId, RelayState)> {
        self.clients.load().iter().map(|(id, client)| (*id, client.state().borrow().clone())).collect()
    }

    /// Changes whenever a relay's state or address does, or the set of relays.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// The machine's network changed.
    pub fn network_changed(&self) {
        self.clients.load().values().for_each(|client| client.network_changed());
    }

    /// Shows this approval to relays from now on; relays that know this node as a joiner are told at once.
    pub fn set_credential(&self, credential: Option<&[u8]>) {
        *self.credential.lock().unwrap_or_else(PoisonError::into_inner) = credential.map(<[u8]>::to_vec);
        self.clients.load().values().for_each(|client| client.set_credential(credential));
    }

    fn start(&self, relay: RelayAddr) -> RelayClient {
        // Each relay its own jitter, the same after each start with the same seed.
        let [a, b, c, d, e, f, g, h, ..] = *relay.id.as_bytes();
        let seed = self.config.seed ^ u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        let config = RelayClientConfig {
            credential: self.credential.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            seed,
            receive: self.config.receive.clone(),
            spliced: self.config.spliced.clone(),
            changes: Some(self.changes.clone()),
        };
        RelayClient::connect(self.endpoint.clone(), relay, config)
    }
}
