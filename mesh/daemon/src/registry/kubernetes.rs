//! Kubernetes as the registry: records and approvals stand in annotations of Nodes and Members.
//!
//! [`hub`] watches and writes; [`desk`] decides what is written and when; a [`KubernetesRegistry`] is one node's part of
//! it. Kubernetes is a carrier: everything is verified where it is read, and its absence takes nothing away.

mod conditions;
pub mod desk;
pub mod gateway;
pub mod hub;
pub mod members;
pub mod moving;
mod write;

use std::sync::Arc;

use keystone_mesh_core::NodeId;
use keystone_mesh_core::node::{NodeName, SignedRecord};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};

use self::hub::{Heard, Hub};
use super::backend::{Change, Watched};
use super::{Answer, Event, Faults, Registry, Writes};
use crate::status::Condition;

/// One node's registry in Kubernetes.
#[derive(Debug)]
pub struct KubernetesRegistry {
    hub: Arc<Hub>,
    own: (NodeName, NodeId),
    heard: watch::Receiver<Heard>,
    changes: broadcast::Receiver<Change>,
}

impl KubernetesRegistry {
    /// The part of the node with this name and identity.
    pub fn new(hub: Arc<Hub>, name: NodeName, identity: NodeId) -> Self {
        let mut heard = hub.heard();
        // What was heard before this moment is to be told too.
        heard.mark_changed();
        Self { changes: hub.changes(), own: (name, identity), heard, hub }
    }

    fn everything(&mut self) -> Option<Event> {
        let Watched { network, entries, peers, changes } = self.hub.watch()?;
        self.changes = changes;
        Some(Event::Snapshot { network, entries, peers })
    }

    async fn event(&mut self) -> Event {
        loop {
            let event = tokio::select! {
                biased;
                Ok(()) = self.heard.changed() => {
                    let heard = self.heard.borrow_and_update().clone();
                    match heard {
                        Heard::Waiting => None,
                        Heard::Current => self.everything(),
                        Heard::Lost(why) | Heard::Unauthorized(why) => Some(Event::Stale { why }),
                    }
                }
                change = self.changes.recv() => match change {
                    Ok(Change::Node(entry)) => Some(Event::Changed(entry)),
                    Ok(Change::Removed(name)) => Some(Event::Removed(name)),
                    Ok(Change::Peer(peer)) => Some(Event::PeerChanged(peer)),
                    Ok(Change::PeerRemoved(name)) => Some(Event::PeerRemoved(name)),
                    Ok(Change::Network(network)) => Some(Event::Network(*network)),
                    Err(RecvError::Lagged(_)) => self.everything(),
                    Err(RecvError::Closed) => std::future::pending().await,
                },
            };
            if let Some(event) = event {
                return event;
            }
        }
    }
}

impl Registry for KubernetesRegistry {
    fn kind(&self) -> &'static str {
        "kubernetes"
    }

    fn publish(&mut self, record: SignedRecord) {
        self.hub.want(record);
    }

    fn next(&mut self) -> Answer<'_, Event> {
        Box::pin(self.event())
    }

    fn leave(&mut self) -> Answer<'_, Result<(), String>> {
        let (name, identity) = &self.own;
        Box::pin(members::leave(&self.hub, name, *identity))
    }

    fn warnings(&self) -> Vec<String> {
        self.hub.warnings()
    }

    fn faults(&self) -> Faults {
        self.hub.faults()
    }

    fn conditions(&self) -> Option<Answer<'static, Result<Vec<Condition>, String>>> {
        let (access, name) = (self.hub.access().clone(), self.own.0.clone());
        Some(Box::pin(async move { conditions::of(&access, &name).await }))
    }

    fn writes(&self) -> Option<Writes> {
        Some(self.hub.writes())
    }
}
