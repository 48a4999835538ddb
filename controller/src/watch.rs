//! The watches: one task per kind of object, whose changes all go into one bounded channel.
//!
//! kube's watcher lists in pages, then watches with bookmarks, and lists again after a 410. Here is added what it leaves
//! to its user: a watch that goes silent is opened again (every watch is asked to end by itself after `life`, and one that
//! says nothing for 5 s more, not even that, is dead),
//! errors are paused over, an object that does not read is told and skipped, and after errors in a row the whole list
//! is read afresh, since an API server that came back from a backup has versions that the old ones say nothing about.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use keystone_mesh_api::{JoinToken, LEDGER_LABEL, Member, NETWORK_CONFIG_MAP, Peer};
use keystone_mesh_core::backoff::Backoff;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::core::DeserializeGuard;
use kube::runtime::watcher::{self, Config, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::index::key_of;
use crate::metrics::{self, ErrorLabels, Metrics};
use crate::slim::SlimNode;
use crate::view::{CloudKind, Kind};
use keystone_mesh_api::errors::words;

/// Objects per page of a list: some 15 KB each, as Nodes are, make 3 MB.
const PAGE_SIZE: u32 = 200;
/// After so many errors in a row nothing is resumed, everything is listed.
const ERRORS_BEFORE_LIST: u32 = 5;
/// Changes that wait for the index; watches pause beyond, and the API server keeps what they did not read.
const CHANNEL: usize = 512;
/// Between two looks whether an optional resource exists.
const DISCOVERY: Duration = Duration::from_secs(180);

/// An object as it was read.
#[derive(Clone, Debug)]
pub enum Object {
    /// A Node.
    Node(Box<SlimNode>),
    /// A Member.
    Member(Box<Member>),
    /// A Peer.
    Peer(Box<Peer>),
    /// A JoinToken.
    Token(Box<JoinToken>),
    /// A page of the ledger.
    Page(Box<ConfigMap>),
    /// The network's document.
    Network(Box<ConfigMap>),
    /// A NodeClaim or Machine.
    Claim(CloudKind, Box<DynamicObject>),
}

/// What a watch saw.
#[derive(Clone, Debug)]
pub enum Change {
    /// A fresh list begins; what follows up to [`Change::Listed`] is all there is.
    Listing,
    /// An object is as this.
    Set(Object),
    /// An object went.
    Deleted {
        /// Its name, with its namespace before it where the kind has one that matters.
        name: String,
    },
    /// The list is complete.
    Listed,
    /// An object does not read.
    Malformed {
        /// Its name.
        name: String,
        /// Why not.
        why: String,
    },
}

/// A change of one kind of object.
#[derive(Clone, Debug)]
pub struct Update {
    /// The kind.
    pub kind: Kind,
    /// What was seen.
    pub change: Change,
}

/// Starts every watch; the API server ends each after `life` seconds, and it is resumed where it was. They all end when the returned set is dropped.
pub fn start(client: &Client, namespace: &str, life: u32, metrics: &Metrics) -> (JoinSet<()>, mpsc::Receiver<Update>) {
    let (updates, receiver) = mpsc::channel(CHANNEL);
    let mut tasks = JoinSet::new();
    let all = Config::default().timeout(life).page_size(PAGE_SIZE);
    let watch = |kind| Watch { kind, updates: updates.clone(), metrics: metrics.clone() };

    let nodes = Api::<SlimNode>::all(client.clone());
    tasks.spawn(watch(Kind::Node).run(nodes, all.clone(), |node| Ok(Object::Node(Box::new(node)))));
    let members = Api::<DeserializeGuard<Member>>::all(client.clone());
    tasks.spawn(watch(Kind::Member).run(members, all.clone(), |read| Ok(Object::Member(Box::new(unguard(read)?)))));
    let peers = Api::<DeserializeGuard<Peer>>::all(client.clone());
    tasks.spawn(watch(Kind::Peer).run(peers, all.clone(), |read| Ok(Object::Peer(Box::new(unguard(read)?)))));
    let tokens = Api::<DeserializeGuard<JoinToken>>::all(client.clone());
    tasks.spawn(watch(Kind::JoinToken).run(tokens, all.clone(), |read| Ok(Object::Token(Box::new(unguard(read)?)))));
    let maps = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let ledger = all.clone().labels(LEDGER_LABEL);
    tasks.spawn(watch(Kind::LedgerPage).run(maps.clone(), ledger, |map| Ok(Object::Page(Box::new(map)))));
    let network = all.clone().fields(&format!("metadata.name={NETWORK_CONFIG_MAP}"));
    tasks.spawn(watch(Kind::Network).run(maps, network, |map| Ok(Object::Network(Box::new(map)))));

    tasks.spawn(optional(client.clone(), watch(Kind::NodeClaim), all.clone(), CloudKind::NodeClaim));
    tasks.spawn(optional(client.clone(), watch(Kind::Machine), all, CloudKind::Machine));
    (tasks, receiver)
}

fn unguard<K>(DeserializeGuard(read): DeserializeGuard<K>) -> Result<K, String> {
    read.map_err(|invalid| invalid.error)
}

/// Watches NodeClaims or Machines while the API server has the resource; a cluster without is the usual one.
async fn optional(client: Client, watch: Watch, config: Config, cloud: CloudKind) {
    let (group, kind) = match cloud {
        CloudKind::NodeClaim => ("karpenter.sh", "NodeClaim"),
        CloudKind::Machine => ("cluster.x-k8s.io", "Machine"),
    };
    loop {
        match discover(&client, group, kind).await {
            Ok(Some(resource)) => {
                tracing::info!(resource = %format!("{}.{}", resource.plural, resource.group), "watching machines of an autoscaler");
                let api = Api::<DynamicObject>::all_with(client.clone(), &resource);
                let read = move |object| Ok(Object::Claim(cloud, Box::new(object)));
                watch.clone().run(api, config.clone(), read).await;
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(error = words(&error), group, "could not ask which resources the API server has");
            }
        }
        tokio::time::sleep(DISCOVERY).await;
    }
}

async fn discover(client: &Client, group: &str, kind: &str) -> kube::Result<Option<ApiResource>> {
    let groups = client.list_api_groups().await?;
    let Some(found) = groups.groups.iter().find(|found| found.name == group) else { return Ok(None) };
    let Some(version) = found.preferred_version.as_ref().or(found.versions.first()) else { return Ok(None) };
    let resources = client.list_api_group_resources(&version.group_version).await?;
    let found = resources.resources.iter().find(|resource| resource.kind == kind && !resource.name.contains('/'));
    let gvk = GroupVersionKind::gvk(group, &version.version, kind);
    Ok(found.map(|resource| ApiResource::from_gvk_with_plural(&gvk, &resource.name)))
}

/// One kind's watch.
#[derive(Clone)]
struct Watch {
    kind: Kind,
    updates: mpsc::Sender<Update>,
    metrics: Metrics,
}

impl Watch {
    /// Watches until the receiver is gone, or the resource is: a 404.
    async fn run<K>(self, api: Api<K>, config: Config, read: impl Fn(K) -> Result<Object, String>)
    where
        K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
    {
        let mut backoff = Backoff::new(seed());
        let named = |object: &K| key_of(self.kind, object.meta());
        loop {
            let mut stream = std::pin::pin!(watcher(api.clone(), config.clone()));
            let mut errors = 0;
            while errors < ERRORS_BEFORE_LIST {
                let Some(event) = stream.next().await else { break };
                let change = match event {
                    Ok(Event::Init) => Change::Listing,
                    Ok(Event::InitDone) => Change::Listed,
                    Ok(Event::Delete(object)) => Change::Deleted { name: named(&object) },
                    Ok(Event::InitApply(object) | Event::Apply(object)) => {
                        let name = named(&object);
                        read(object).map_or_else(|why| Change::Malformed { name, why }, Change::Set)
                    }
                    Err(error) => {
                        errors += 1;
                        let code = code_of(&error);
                        self.note(&error, code.as_deref());
                        if code.as_deref() == Some("404") && !Kind::REQUIRED.contains(&self.kind) {
                            return;
                        }
                        let pause = backoff.handle_failure(Instant::now());
                        tokio::time::sleep_until(pause.into()).await;
                        continue;
                    }
                };
                if !matches!(change, Change::Listing) {
                    errors = 0;
                    backoff.handle_network_change();
                }
                if self.updates.send(Update { kind: self.kind, change }).await.is_err() {
                    return;
                }
            }
        }
    }

    fn note(&self, error: &watcher::Error, code: Option<&str>) {
        let resource = self.kind.label();
        let code = code.unwrap_or("none");
        let error = words_of(error);
        self.metrics.watch_restarts.get_or_create(&metrics::Resource::of(resource)).inc();
        self.metrics.api_errors.get_or_create(&ErrorLabels { during: "watch", code: code.to_owned() }).inc();
        match code {
            // The usual end of a watch that was away for long.
            "410" => tracing::debug!(resource, "the watch is too old; listing again"),
            "401" | "403" => tracing::error!(
                resource,
                error,
                "the controller may not list and watch this; are its ServiceAccount and ClusterRole installed?"
            ),
            "404" => tracing::error!(
                resource,
                error,
                "the API server does not have this resource; apply the output of `keystone-controller crds`"
            ),
            _ => tracing::warn!(resource, error, "the watch failed; opening it again"),
        }
    }
}

/// In one line, with its causes and what to do.
fn words_of(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(cause)
        | watcher::Error::WatchStartFailed(cause)
        | watcher::Error::WatchFailed(cause) => words(cause),
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => error.to_string(),
    }
}

fn code_of(error: &watcher::Error) -> Option<String> {
    match error {
        watcher::Error::WatchError(status) => Some(status.code.to_string()),
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => Some(status.code.to_string()),
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => None,
    }
}

/// Spreads the watches' pauses; no secret.
fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}
