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
//! Losing a watch tears nothing down: the view stays, says that it is stale, and is told whole again afterwards.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use keystone_mesh_api::{Member, NETWORK_CONFIG_MAP, Peer};
use keystone_mesh_core::backoff::Backoff;
use keystone_mesh_core::directory::{self, Carrier, Directory};
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::{Entry, NodeName, SignedRecord};
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use keystone_mesh_core::{NodeId, annotations};
use kube::Resource as _;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::desk::{Desk, Failure, Mender, Write};
use super::write;
use crate::kube_api::access::Access;
use crate::kube_api::watch::{self as collection, Collection, Object, Pace, Told};
use crate::registry::backend::{CHANGES, Change, Watched};
use crate::registry::{Faults, Writes};
use crate::status::NodeFault;

/// What watches tell and waits for the hub; a watch beyond waits at its stream.
const TOLD: usize = 256;
/// Writes under way at once.
const WRITES: usize = 16;

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

/// Which collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Nodes,
    Members,
    Peers,
    Network,
}

const KINDS: [Kind; 4] = [Kind::Nodes, Kind::Members, Kind::Peers, Kind::Network];

impl Kind {
    fn collection(self, namespace: &str) -> Collection {
        let all = |path| Collection { path, name: None, data: false };
        match self {
            Self::Nodes => all(Node::url_path(&(), None)),
            Self::Members => all(Member::url_path(&(), None)),
            Self::Peers => all(Peer::url_path(&(), None)),
            Self::Network => Collection {
                path: ConfigMap::url_path(&(), Some(namespace)),
                name: Some(NETWORK_CONFIG_MAP.into()),
                data: true,
            },
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Nodes => "Nodes",
            Self::Members => "Members",
            Self::Peers => "Peers",
            Self::Network => "the network's ConfigMap",
        }
    }
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
    nodes: std::collections::BTreeSet<String>,
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
            document: Document { wanted: None, there: None, mender: Mender::new(seed) },
            heard: KINDS.into_iter().map(|kind| (kind, Heard::Waiting)).collect(),
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

/// The network's ConfigMap.
#[derive(Debug)]
struct Document {
    wanted: Option<SignedNetwork>,
    there: Option<BTreeMap<String, String>>,
    mender: Mender,
}

impl Document {
    /// What is to be written, where it differs and it is time.
    fn due(&mut self, now: Instant) -> Option<(Instant, SignedNetwork)> {
        let wanted = self.wanted.as_ref()?;
        if self.there.as_ref() == Some(&wanted.to_map()) {
            self.mender.handle_settled();
            return None;
        }
        Some((self.mender.due(now)?, wanted.clone()))
    }
}

enum Done {
    Record(Write, Result<Object, Failure>),
    Document(Result<Object, Failure>),
}

struct Work {
    access: Access,
    id: NodeId,
    founder: bool,
    directory: Directory,
    desk: Desk,
    document: Document,
    heard: BTreeMap<Kind, Heard>,
    view: Arc<Mutex<View>>,
    changes: broadcast::Sender<Change>,
    tell_heard: watch::Sender<Heard>,
    orders: Arc<Mutex<Orders>>,
    writes: JoinSet<Done>,
}

impl Work {
    async fn start(mut self, first: Option<First>, pace: Pace, seed: u64, ordered: Arc<Notify>) {
        if let Some(first) = first {
            let mut backoff = Backoff::new(seed);
            while let Err(why) = first().await {
                self.access.renew();
                let lost = Heard::Lost(format!("the registry is not moved to Kubernetes yet: {why}"));
                self.tell_heard.send_if_modified(|known| std::mem::replace(known, lost.clone()) != lost);
                tokio::time::sleep_until(backoff.handle_failure(Instant::now()).into()).await;
            }
        }
        let (tell, told) = mpsc::channel(TOLD);
        let mut watches = JoinSet::new();
        for (number, kind) in (0..).zip(KINDS) {
            let collection = kind.collection(self.access.namespace());
            let seed = seed.wrapping_add(number);
            watches.spawn(collection::run(self.access.clone(), collection, pace.clone(), seed, kind, tell.clone()));
        }
        self.run(told, &ordered).await;
    }

    async fn run(&mut self, mut told: mpsc::Receiver<(Kind, Told)>, ordered: &Notify) {
        loop {
            let next = self.begin_writes();
            let pause = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some((kind, told)) = told.recv() => self.told(kind, told),
                () = ordered.notified() => self.take_orders(),
                Some(Ok(done)) = self.writes.join_next() => self.written(done),
                () = pause => {}
            }
        }
    }

    // --- what is heard ---

    fn told(&mut self, kind: Kind, told: Told) {
        let heard = match told {
            Told::Lost(why) => Heard::Lost(format!("{}: {why}", kind.label())),
            Told::Unauthorized(why) => Heard::Unauthorized(format!("{}: {why}", kind.label())),
            Told::Absent => {
                self.listed(kind, &[]);
                Heard::Current
            }
            Told::Listed(objects) => {
                self.listed(kind, &objects);
                Heard::Current
            }
            Told::Resumed => Heard::Current,
            Told::Changed(object) => {
                self.changed(kind, &object);
                return;
            }
            Told::Deleted(object) => {
                self.deleted(kind, &object);
                return;
            }
        };
        if self.heard.insert(kind, heard.clone()).as_ref() != Some(&heard) {
            self.tell_heard();
        }
    }

    /// Lost is what any is; waiting what any is; the network's document has to be known in any case.
    fn tell_heard(&mut self) {
        let lost = self.heard.values().find(|heard| matches!(heard, Heard::Lost(_) | Heard::Unauthorized(_)));
        let waiting = self.heard.values().any(|heard| *heard == Heard::Waiting);
        let unknown = self.view().network.is_none();
        let heard = match lost {
            Some(lost) => lost.clone(),
            None if waiting => Heard::Waiting,
            None if unknown => Heard::Lost(format!(
                "there is no ConfigMap {}/{NETWORK_CONFIG_MAP} with the document of network {} yet; the control-plane host's \
                 daemon writes it",
                self.access.namespace(),
                self.id
            )),
            None => Heard::Current,
        };
        self.tell_heard.send_if_modified(|known| std::mem::replace(known, heard.clone()) != heard);
    }

    fn listed(&mut self, kind: Kind, objects: &[Object]) {
        let changes = match kind {
            Kind::Nodes | Kind::Members => {
                let carrier = if kind == Kind::Nodes { Carrier::Node } else { Carrier::Member };
                self.desk.handle_listed(carrier, objects);
                if kind == Kind::Nodes {
                    self.view().nodes = objects.iter().map(|object| object.name.clone()).collect();
                }
                self.directory.handle_listed(carrier, &objects.iter().map(plain).collect::<Vec<_>>())
            }
            Kind::Peers => self.directory.handle_peers_listed(&objects.iter().map(plain).collect::<Vec<_>>()),
            Kind::Network => {
                self.document.there = None;
                objects.iter().for_each(|object| self.network(object));
                Vec::new()
            }
        };
        self.take(changes);
    }

    fn changed(&mut self, kind: Kind, object: &Object) {
        let changes = match kind {
            Kind::Nodes => {
                self.desk.handle_object(Carrier::Node, object);
                self.view().nodes.insert(object.name.clone());
                self.directory.handle_object(Carrier::Node, &plain(object))
            }
            Kind::Members => {
                self.desk.handle_object(Carrier::Member, object);
                self.directory.handle_object(Carrier::Member, &plain(object))
            }
            Kind::Peers => self.directory.handle_peer(&plain(object)),
            Kind::Network => {
                self.network(object);
                Vec::new()
            }
        };
        self.take(changes);
    }

    fn deleted(&mut self, kind: Kind, object: &Object) {
        let changes = match kind {
            Kind::Nodes => {
                self.desk.handle_deleted(Carrier::Node, &object.name);
                self.view().nodes.remove(&object.name);
                self.directory.handle_deleted(Carrier::Node, &object.name)
            }
            Kind::Members => {
                self.desk.handle_deleted(Carrier::Member, &object.name);
                self.directory.handle_deleted(Carrier::Member, &object.name)
            }
            Kind::Peers => self.directory.handle_peer_deleted(&object.name),
            Kind::Network => {
                // What is known of the network stays: without it nothing could be reached.
                self.document.there = None;
                Vec::new()
            }
        };
        self.take(changes);
    }

    /// The network's document, as anybody may have written it: only what the network key signed counts, and only forwards.
    fn network(&mut self, object: &Object) {
        self.document.there = Some(object.data.clone());
        if self.founder {
            return;
        }
        match SignedNetwork::from_map(&object.data) {
            Ok(network) if network.get().id != self.id => {
                tracing::error!(found = %network.get().id, "the ConfigMap {NETWORK_CONFIG_MAP} is another network's");
            }
            Ok(network) => self.set_network(network),
            Err(error) => tracing::error!(%error, "the ConfigMap {NETWORK_CONFIG_MAP} does not read"),
        }
    }

    fn set_network(&mut self, network: SignedNetwork) {
        let mut view = self.view();
        let newer = view.network.as_ref().is_none_or(|known| known.get().serial < network.get().serial);
        if newer {
            view.network = Some(network.clone());
            let _ = self.changes.send(Change::Network(Box::new(network)));
            drop(view);
            self.tell_heard();
        }
    }

    /// Changes become visible in the order in which they are told.
    fn take(&mut self, changes: Vec<directory::Change>) {
        let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let faults = self.directory.faults().flat_map(|(name, faults)| faults.iter().map(move |fault| (name, fault)));
        view.faults = Faults::of(faults.map(|(name, fault)| NodeFault::of_object(name, fault)));
        for change in changes {
            let change = match change {
                directory::Change::Changed(entry) => {
                    // The node speaks for itself meanwhile: what was wanted for it is out of date.
                    let (name, found) = (entry.name(), entry.record.get());
                    let wanted = self.desk.wanted(name).map(SignedRecord::get);
                    if wanted.is_some_and(|wanted| wanted.identity == found.identity && wanted.seq < found.seq) {
                        self.desk.forget(name);
                    }
                    view.entries.insert(name.clone(), (*entry).clone());
                    Change::Node(entry)
                }
                directory::Change::Removed(name) => {
                    view.entries.remove(&name);
                    Change::Removed(name)
                }
                directory::Change::Peer(peer) => {
                    view.peers.insert(peer.get().name.clone(), (*peer).clone());
                    Change::Peer(peer)
                }
                directory::Change::PeerRemoved(name) => {
                    view.peers.remove(&name);
                    Change::PeerRemoved(name)
                }
            };
            // No receiver is no error: then nobody watches.
            let _ = self.changes.send(change);
        }
    }

    // --- what is done ---

    fn take_orders(&mut self) {
        let orders = std::mem::take(&mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner));
        for (name, record) in orders.records {
            match record {
                Some(record) => {
                    self.mirror(&name, &record);
                    self.desk.want(record);
                }
                None => self.desk.forget(&name),
            }
        }
        if let Some(network) = orders.document {
            self.document.wanted = Some(network.clone());
            self.document.mender.handle_wanted();
            self.set_network(network);
        }
    }

    /// A record is its node's word whoever carries it: readers hear it at once, whether or not the API server answers.
    fn mirror(&mut self, name: &NodeName, record: &SignedRecord) {
        let known = [Carrier::Node, Carrier::Member].into_iter().find(|carrier| self.desk.is_there(*carrier, name));
        let Some(carrier) = known else { return };
        let object = directory::Object { name: name.to_string(), annotations: annotations::of_record(record) };
        let changes = self.directory.handle_object(carrier, &object);
        self.take(changes);
    }

    /// Starts what is due, and says when something is next.
    fn begin_writes(&mut self) -> Option<Instant> {
        let now = Instant::now();
        while self.writes.len() < WRITES
            && let Some(write) = self.desk.poll(now)
        {
            let access = self.access.clone();
            self.writes.spawn(async move {
                let done = write::record(&access, &write).await;
                Done::Record(write, done)
            });
        }
        // Only once it was seen what is there: a write that changes nothing is a write all the same.
        let seen = self.heard.get(&Kind::Network).is_some_and(|heard| *heard != Heard::Waiting);
        let document = self.document.due(now).filter(|_| seen);
        let document_at = match document {
            Some((at, network)) if at <= now => {
                self.document.mender.handle_started();
                let access = self.access.clone();
                self.writes.spawn(async move { Done::Document(write::document(&access, &network).await) });
                None
            }
            Some((at, _)) => Some(at),
            None => None,
        };
        let desk_at = if self.writes.len() < WRITES { self.desk.next_at(now) } else { None };
        self.tell_warnings();
        desk_at.into_iter().chain(document_at).min()
    }

    fn written(&mut self, done: Done) {
        let now = Instant::now();
        let failed = match &done {
            Done::Record(_, answer) => answer.is_err(),
            Done::Document(answer) => answer.is_err(),
        };
        let mut view = self.view();
        *if failed { &mut view.writes.failed } else { &mut view.writes.done } += 1;
        drop(view);
        match done {
            Done::Record(write, answer) => {
                if let Err(failure) = &answer {
                    tracing::debug!(name = %write.name, ?failure, "the record is not written");
                }
                self.desk.handle_written(&write, answer.as_ref(), now);
            }
            Done::Document(answer) => {
                self.document.mender.handle_done(answer.as_ref().map(|_| ()), now);
                if let Ok(object) = answer {
                    self.document.there = Some(object.data);
                }
            }
        }
    }

    fn tell_warnings(&self) {
        let records = self.desk.troubles().map(|(name, why)| format!("the record of `{name}` is not written: {why}"));
        let document = self.document.mender.why();
        let document = document.map(|why| format!("the ConfigMap {NETWORK_CONFIG_MAP} is not written: {why}"));
        let warnings: Vec<String> = records.chain(document).collect();
        let mut view = self.view();
        for warning in warnings.iter().filter(|warning| !view.warnings.contains(warning)) {
            tracing::warn!("{warning}");
        }
        view.warnings = warnings;
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn plain(object: &Object) -> directory::Object {
    directory::Object { name: object.name.clone(), annotations: object.annotations.clone() }
}
