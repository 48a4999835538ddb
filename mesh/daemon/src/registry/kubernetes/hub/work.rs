//! The hub's task: what the watches tell becomes the view, and each change is told on.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use keystone_mesh_api::{Member, NETWORK_CONFIG_MAP, Peer};
use keystone_mesh_core::NodeId;
use keystone_mesh_core::backoff::Backoff;
use keystone_mesh_core::directory::{self, Carrier, Directory};
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::SignedRecord;
use kube::Resource as _;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio::task::JoinSet;

use super::writing::{Document, Done};
use super::{First, Heard, Orders, View};
use crate::kube_api::access::Access;
use crate::kube_api::watch::{self as collection, Collection, Object, Pace, Told};
use crate::registry::Faults;
use crate::registry::backend::Change;
use crate::registry::kubernetes::desk::Desk;
use crate::status::NodeFault;

/// What watches tell and waits for the hub; a watch beyond waits at its stream.
const TOLD: usize = 256;

pub(super) struct Work {
    pub(super) access: Access,
    pub(super) id: NodeId,
    pub(super) founder: bool,
    pub(super) directory: Directory,
    pub(super) desk: Desk,
    pub(super) document: Document,
    pub(super) heard: BTreeMap<Kind, Heard>,
    pub(super) view: Arc<Mutex<View>>,
    pub(super) changes: broadcast::Sender<Change>,
    pub(super) tell_heard: watch::Sender<Heard>,
    pub(super) orders: Arc<Mutex<Orders>>,
    pub(super) writes: JoinSet<Done>,
}

/// What was heard of each collection before anything was.
pub(super) fn nothing_heard() -> BTreeMap<Kind, Heard> {
    KINDS.into_iter().map(|kind| (kind, Heard::Waiting)).collect()
}

impl Work {
    pub(super) async fn start(mut self, first: Option<First>, pace: Pace, seed: u64, ordered: Arc<Notify>) {
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
                self.document.set_there(None);
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
                self.document.set_there(None);
                Vec::new()
            }
        };
        self.take(changes);
    }

    /// The network's document, as anybody may have written it: only what the network key signed counts, and only forwards.
    fn network(&mut self, object: &Object) {
        self.document.set_there(Some(object.data.clone()));
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

    pub(super) fn set_network(&mut self, network: SignedNetwork) {
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
    pub(super) fn take(&mut self, changes: Vec<directory::Change>) {
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

    pub(super) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
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

fn plain(object: &Object) -> directory::Object {
    directory::Object { name: object.name.clone(), annotations: object.annotations.clone() }
}
