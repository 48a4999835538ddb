//! The control-plane host's own registry: its store, without a wire between.

use std::sync::Arc;

use keystone_mesh_core::node::SignedRecord;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::{Answer, Event, Registry};
use crate::clock::unix_now;
use crate::store::{Change, Store};

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
        let (_, _, changes) = store.watch();
        Self { store, changes, told_everything: false }
    }

    fn everything(&mut self) -> Event {
        let (network, entries, changes) = self.store.watch();
        self.changes = changes;
        self.told_everything = true;
        Event::Snapshot { network, entries, peers: Vec::new() }
    }
}

impl Registry for EmbeddedRegistry {
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
