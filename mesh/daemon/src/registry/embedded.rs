//! The control-plane host's own registry: its store, without a wire between.

use std::sync::Arc;

use keystone_mesh_core::NodeId;
use keystone_mesh_core::gateway::Refusal;
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::{NodeName, SignedApproval, SignedRecord};
use keystone_mesh_core::token::{TokenId, TokenRecord, TokenSecret};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::backend::{Backend, Change, Watched};
use super::{Answer, Event, Registry};
use crate::clock::unix_now;
use crate::store::{Store, StoreError, TokenTerms};

/// Reads and writes the store directly.
#[derive(Debug)]
pub struct EmbeddedRegistry {
    store: Arc<Store>,
    changes: broadcast::Receiver<Change>,
    told_everything: bool,
}

impl EmbeddedRegistry {
    /// A registry on this store.
    pub fn new(store: Arc<Store>) -> Self {
        let changes = store.watch().changes;
        Self { store, changes, told_everything: false }
    }

    fn everything(&mut self) -> Event {
        let Watched { network, entries, peers, changes } = self.store.watch();
        self.changes = changes;
        self.told_everything = true;
        Event::Snapshot { network, entries, peers }
    }
}

impl Registry for EmbeddedRegistry {
    fn kind(&self) -> &'static str {
        "embedded"
    }

    fn publish(&mut self, record: SignedRecord) {
        if let Err(error) = self.store.publish_own(record, unix_now()) {
            tracing::error!(%error, "this node's own record is not stored");
        }
    }

    fn next(&mut self) -> Answer<'_, Event> {
        Box::pin(async {
            if !self.told_everything {
                return self.everything();
            }
            match self.changes.recv().await {
                Ok(Change::Node(entry)) => Event::Changed(entry),
                Ok(Change::Removed(name)) => Event::Removed(name),
                Ok(Change::Peer(peer)) => Event::PeerChanged(peer),
                Ok(Change::PeerRemoved(name)) => Event::PeerRemoved(name),
                Ok(Change::Network(network)) => Event::Network(*network),
                Err(RecvError::Lagged(_) | RecvError::Closed) => self.everything(),
            }
        })
    }

    fn leave(&mut self) -> Answer<'_, Result<(), String>> {
        // The control plane does not leave its own network; with its state the network ends.
        Box::pin(std::future::ready(Ok(())))
    }
}

/// The store answers at once: its disk is the only thing that is waited for.
fn at_once<'a, T: Send + 'a>(answer: T) -> Answer<'a, T> {
    Box::pin(std::future::ready(answer))
}

impl Backend for Store {
    fn watch(&self) -> Watched {
        self.watch()
    }

    fn network(&self) -> SignedNetwork {
        self.network()
    }

    fn join<'a>(
        &'a self,
        client: NodeId,
        record: SignedRecord,
        token: TokenId,
        secret: &'a TokenSecret,
    ) -> Answer<'a, Result<SignedApproval, Refusal>> {
        at_once(self.join(client, record, token, secret, unix_now()).map_err(|error| refusal(&error)))
    }

    fn publish(&self, client: NodeId, record: SignedRecord) -> Answer<'_, Result<(), Refusal>> {
        at_once(self.publish(client, record).map_err(|error| refusal(&error)))
    }

    fn leave<'a>(&'a self, client: NodeId, name: &'a NodeName) -> Answer<'a, Result<(), Refusal>> {
        let own = self.entry(name).is_some_and(|entry| entry.record.get().identity == client);
        let removed = if own { self.remove(name, unix_now()) } else { Ok(()) };
        at_once(removed.map_err(|error| refusal(&error)))
    }

    fn remove<'a>(&'a self, name: &'a NodeName) -> Answer<'a, Result<(), String>> {
        at_once(self.remove(name, unix_now()).map_err(|error| error.to_string()))
    }

    fn create_token<'a>(
        &'a self,
        id: TokenId,
        secret: &'a TokenSecret,
        terms: TokenTerms,
    ) -> Answer<'a, Result<TokenRecord, String>> {
        at_once(self.create_token(id, secret, terms, unix_now()).map_err(|error| error.to_string()))
    }

    fn tokens(&self) -> Answer<'_, Result<Vec<TokenRecord>, String>> {
        at_once(self.tokens().map_err(|error| error.to_string()))
    }

    fn revoke_token(&self, id: TokenId) -> Answer<'_, Result<(), String>> {
        at_once(self.revoke_token(id).map_err(|error| error.to_string()))
    }
}

fn refusal(error: &StoreError) -> Refusal {
    let code = match error {
        StoreError::Join(refusal) => refusal.code(),
        StoreError::Publish(refusal) => refusal.code(),
        StoreError::NoSuchNode(_) => "not-member",
        StoreError::OwnNode(_) => "control-plane",
        StoreError::Open { .. }
        | StoreError::Empty
        | StoreError::Damaged { .. }
        | StoreError::Write(_)
        | StoreError::Network(_)
        | StoreError::NoSuchToken(_) => {
            tracing::error!(%error, "the registry cannot answer");
            "registry-unavailable"
        }
    };
    Refusal { code: code.into(), message: error.to_string() }
}
