//! One view of the mesh out of all that is watched, and one hand that writes.
//!
//! ```text
//!   Nodes ───────┐                                      ┌──> view, changes ──> own registry, sessions of the gateway
//!   Members ─────┤   Directory: what is known            │
//!   Peers ───────┼──>                          hub task ─┼──> Desk ──> server-side apply onto Nodes and Members
//!   network ─────┘   Desk: what is to be written         │
//!   records, wanted ─────────────────────────────────────┘
//! ```
//!
//! The handle and the view are here; `work` follows what is heard, `writing` is the hand.
//!
//! Losing a watch tears nothing down: the view stays, says that it is stale, and is told whole again afterwards.

mod work;
mod writing;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keystone_mesh_core::NodeId;
use keystone_mesh_core::directory::Directory;
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::{Entry, NodeName, SignedRecord};
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use tokio::sync::{Notify, broadcast, watch};
use tokio::task::{JoinHandle, JoinSet};

use self::work::Work;
use self::writing::Document;
use super::desk::Desk;
use crate::kube_api::access::Access;
use crate::kube_api::watch::Pace;
use crate::registry::backend::{CHANGES, Change, Watched};
use crate::registry::{Faults, Writes};

/// What has to be done before anything is watched; an error is told and it is tried again.
pub type First = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send>;

/// What a hub is started with.
pub struct Start {
    /// How the API server is reached.
    pub access: Access,
    /// The network key, pinned.
    pub network: NodeId,
    /// What is known of old.
    pub known: Known,
    /// Whether this host has the network key: then the network's document is written, not read.
    pub founder: bool,
    /// What has to be done first. Until then all that is known of old stays so.
    pub first: Option<First>,
    /// How patient watches are.
    pub pace: Pace,
    /// Different daemons take different seeds.
    pub seed: u64,
}

/// What is known of old: the last good state, as it is kept on disk.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The network's document.
    pub network: Option<SignedNetwork>,
    /// Every node.
    pub entries: Vec<Entry>,
    /// Every plain peer.
    pub peers: Vec<SignedPlainPeer>,
}

/// Whether Kubernetes is heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Not yet.
    Waiting,
    /// All of it.
    Current,
    /// Not all of it, for this reason.
    Lost(String),
    /// Not all of it, because the credentials are not accepted.
    Unauthorized(String),
}

/// What the hub is told to do. Of each name only the latest counts, so that it cannot grow beyond the mesh.
#[derive(Debug, Default)]
struct Orders {
    /// Records that are wanted; none: nothing more under that name.
    records: BTreeMap<NodeName, Option<SignedRecord>>,
    document: Option<SignedNetwork>,
}

/// The view that all share.
#[derive(Debug, Default)]
struct View {
    network: Option<SignedNetwork>,
    entries: BTreeMap<NodeName, Entry>,
    peers: BTreeMap<NodeName, SignedPlainPeer>,
    warnings: Vec<String>,
    faults: Faults,
    writes: Writes,
    nodes: BTreeSet<String>,
}

/// The hub's handle. Dropping the last one ends it.
#[derive(Debug)]
pub struct Hub {
    access: Access,
    id: NodeId,
    view: Arc<Mutex<View>>,
    changes: broadcast::Sender<Change>,
    heard: watch::Receiver<Heard>,
    orders: Arc<Mutex<Orders>>,
    ordered: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Hub {
    /// Starts to watch. Everything that is known of old is in the view from the beginning.
    pub fn start(start: Start) -> Self {
        let Start { access, network: id, known, founder, first, pace, seed } = start;
        let network = known.network.filter(|network| network.get().id == id);
        let directory = Directory::new(id, known.entries, known.peers);
        let view = View {
            network,
            entries: directory.entries().map(|entry| (entry.name().clone(), entry.clone())).collect(),
            peers: directory.peers().map(|peer| (peer.get().name.clone(), peer.clone())).collect(),
            ..View::default()
        };
        let view = Arc::new(Mutex::new(view));
        let (changes, _) = broadcast::channel(CHANGES);
        let (tell_heard, heard) = watch::channel(Heard::Waiting);
        let (orders, ordered) = (Arc::new(Mutex::new(Orders::default())), Arc::new(Notify::new()));
        let work = Work {
            access: access.clone(),
            id,
            founder,
            directory,
            desk: Desk::new(seed),
            document: Document::new(seed),
            heard: work::nothing_heard(),
            view: view.clone(),
            changes: changes.clone(),
            tell_heard,
            orders: orders.clone(),
            writes: JoinSet::new(),
        };
        let task = tokio::spawn(work.start(first, pace, seed, ordered.clone()));
        Self { access, id, view, changes, heard, orders, ordered, task }
    }

    /// How the API server is reached.
    pub fn access(&self) -> &Access {
        &self.access
    }

    /// The network key.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Whether Kubernetes is heard.
    pub fn heard(&self) -> watch::Receiver<Heard> {
        self.heard.clone()
    }

    /// Everything that is known, where at least the network's document is, and the changes from then on.
    pub fn watch(&self) -> Option<Watched> {
        let view = self.view();
        Some(Watched {
            network: view.network.clone()?,
            entries: view.entries.values().cloned().collect(),
            peers: view.peers.values().cloned().collect(),
            changes: self.changes.subscribe(),
        })
    }

    /// Looks at what is known. Not to be held for long: the hub waits meanwhile.
    pub fn look<T>(&self, at: impl FnOnce(Option<&SignedNetwork>, &BTreeMap<NodeName, Entry>) -> T) -> T {
        let view = self.view();
        at(view.network.as_ref(), &view.entries)
    }

    /// Whether there is a Node of this name, as far as is known.
    pub fn is_node(&self, name: &NodeName) -> bool {
        self.view().nodes.contains(name.as_str())
    }

    /// What is not as it should be, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        self.view().warnings.clone()
    }

    /// What is wrong with what objects say.
    pub fn faults(&self) -> Faults {
        self.view().faults.clone()
    }

    /// What was written.
    pub fn writes(&self) -> Writes {
        self.view().writes
    }

    /// The changes from this moment on.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Wants this record on the Node or Member of its name, until a newer one is wanted or found there.
    pub fn want(&self, record: SignedRecord) {
        self.order(|orders| drop(orders.records.insert(record.get().name.clone(), Some(record))));
    }

    /// Wants nothing more of this name.
    pub fn forget(&self, name: NodeName) {
        self.order(|orders| drop(orders.records.insert(name, None)));
    }

    /// Wants this document in the network's ConfigMap; only where this host has the network key.
    pub fn set_document(&self, network: SignedNetwork) {
        self.order(|orders| orders.document = Some(network));
    }

    fn order(&self, give: impl FnOnce(&mut Orders)) {
        give(&mut self.orders.lock().unwrap_or_else(PoisonError::into_inner));
        self.ordered.notify_one();
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.task.abort();
    }
}
