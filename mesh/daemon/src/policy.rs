//! NetworkPolicies: heard from Kubernetes, compiled, and kept in the kernel.
//!
//! ```text
//!   pods ─────────┐
//!   namespaces ───┤                       ┌─ settled for a moment ─┐
//!   policies ─────┼─► Store (cut down) ──►│ compile (core), apply  │──► table inet keystone-policy
//!   own Node ─────┘                       └────────────────────────┘
//!        ▲
//!     access, while there is some
//! ```
//!
//! Nothing is written before all four were heard once, and nothing is taken away when they are lost: what the kernel has
//! stays in force while the API server is away, while the daemon is restarted, and after it was killed. A daemon that
//! comes back reads what is there and changes what differs.

mod objects;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use keystone_mesh_core::policy::{self, Cluster, Compiled, compile};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use self::objects::{NamespaceObject, NodeObject, PodObject, PolicyObject, Store, first_faults};
use crate::kube_api::access::Access;
use crate::kube_api::watch::{self as collection, Collection, Pace, Told};
use crate::nftables::{Applied, KernelTable, NftError};
use crate::status::NetworkPolicy;

/// How long changes are collected before they are applied: those of one deployment come together.
const SETTLE: Duration = Duration::from_millis(20);
/// How often it is looked whether somebody else changed the packet filter. Costs one system call.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// After the kernel refused: the first pause, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Events that wait; a watch that has more waits with them at its socket.
const EVENTS: usize = 256;
/// Faults of policies that are told each.
const MAX_FAULTS: usize = 16;

/// What an enforcer needs.
#[derive(Debug)]
pub struct Start {
    /// The Node whose pods are here.
    pub node: String,
    /// Access to Kubernetes, while there is some.
    pub access: watch::Receiver<Option<Access>>,
    /// How patient the watches are.
    pub pace: Pace,
    /// Different daemons take different seeds.
    pub seed: u64,
    /// What still takes the table of an earlier enforcer away; nothing is written before its end.
    pub after: Option<JoinHandle<()>>,
}

/// Keeps the kernel's table as the cluster's policies say, until it is stopped or dropped. The table stays.
#[derive(Debug)]
pub struct Enforcer {
    task: JoinHandle<()>,
    stop: Arc<Notify>,
    said: Arc<Mutex<Said>>,
}

/// What it says of itself.
#[derive(Clone, Debug, Default)]
struct Said {
    status: NetworkPolicy,
    faults: Vec<String>,
    /// Why it cannot hear, by collection.
    lost: BTreeMap<&'static str, String>,
    /// What the kernel said last, where it refused.
    refused: Option<String>,
    applied: Option<Instant>,
}

impl Enforcer {
    /// Starts to hear and to enforce.
    pub fn start(start: Start) -> Self {
        let said = Arc::new(Mutex::new(Said::default()));
        let stop = Arc::<Notify>::default();
        let Start { node, access, pace, seed, after } = start;
        let work = Work {
            node,
            pace,
            seed,
            said: said.clone(),
            store: Arc::default(),
            compile,
            own: Vec::new(),
            kernel: None,
            heard: Heard::default(),
            changed: false,
            due: None,
            failures: 0,
        };
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            if let Some(after) = after {
                let _ = after.await;
            }
            work.run(access, &stopped).await;
        });
        Self { task, stop, said }
    }

    /// Ends it. A round that is under way comes to its end first, so that nothing is written afterwards.
    pub async fn stop(mut self) {
        self.stop.notify_one();
        if let Err(error) = (&mut self.task).await {
            tracing::error!(%error, "network policies were not kept to the end");
        }
    }

    /// How it is.
    pub fn status(&self, now: Instant) -> NetworkPolicy {
        let said = self.said();
        let last_applied_s = said.applied.map(|at| now.saturating_duration_since(at).as_secs_f64());
        NetworkPolicy { last_applied_s, ..said.status.clone() }
    }

    /// What is not as it should be, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let said = self.said();
        let lost = said.lost.iter().map(|(what, why)| format!("network policies: {what} are not heard: {why}"));
        let mut warnings: Vec<String> = said.refused.clone().into_iter().chain(lost).collect();
        warnings.extend(said.faults.iter().cloned());
        warnings
    }

    fn said(&self) -> std::sync::MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Enforcer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes the policies' table away, where there is one. Blocks.
pub fn remove() -> Result<bool, NftError> {
    KernelTable::open(policy::TABLE)?.remove()
}

/// Takes the policies' table away once an enforcer has written it for the last time.
pub fn take_away(enforcer: Option<Enforcer>) -> JoinHandle<()> {
    tokio::spawn(async move {
        if let Some(enforcer) = enforcer {
            enforcer.stop().await;
        }
        match tokio::task::spawn_blocking(remove).await {
            Ok(Ok(true)) => tracing::info!("network policies are not enforced here; their table was taken away"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the table of network policies may be left"),
            Err(error) => tracing::error!(%error, "the table of network policies may be left"),
        }
    })
}

/// The collections, as they are told in words.
const PODS: &str = "pods";
const NAMESPACES: &str = "namespaces";
const POLICIES: &str = "network policies";
const NODE: &str = "this Node";

/// Which collections were heard whole.
#[derive(Clone, Copy, Debug, Default)]
struct Heard {
    pods: bool,
    namespaces: bool,
    policies: bool,
    node: bool,
}

impl Heard {
    fn all(self) -> bool {
        self.pods && self.namespaces && self.policies && self.node
    }
}

/// Something that a watch told.
enum Input {
    Pods(Told<PodObject>),
    Namespaces(Told<NamespaceObject>),
    Policies(Told<PolicyObject>),
    Node(Told<NodeObject>),
}

/// The watches of one access.
struct Feeds {
    pods: mpsc::Receiver<((), Told<PodObject>)>,
    namespaces: mpsc::Receiver<((), Told<NamespaceObject>)>,
    policies: mpsc::Receiver<((), Told<PolicyObject>)>,
    node: mpsc::Receiver<((), Told<NodeObject>)>,
    /// Their end is the watches' end.
    _tasks: JoinSet<()>,
}

impl Feeds {
    fn open(access: &Access, node: &str, pace: &Pace, seed: u64) -> Self {
        let mut opened = Opening { access, pace, seed, tasks: JoinSet::new() };
        Self {
            pods: opened.watch("/api/v1/pods", None),
            namespaces: opened.watch("/api/v1/namespaces", None),
            policies: opened.watch("/apis/networking.k8s.io/v1/networkpolicies", None),
            node: opened.watch("/api/v1/nodes", Some(node)),
            _tasks: opened.tasks,
        }
    }

    /// Cancel-safe.
    async fn next(&mut self) -> Option<Input> {
        Some(tokio::select! {
            told = self.pods.recv() => Input::Pods(told?.1),
            told = self.namespaces.recv() => Input::Namespaces(told?.1),
            told = self.policies.recv() => Input::Policies(told?.1),
            told = self.node.recv() => Input::Node(told?.1),
        })
    }
}

struct Opening<'a> {
    access: &'a Access,
    pace: &'a Pace,
    seed: u64,
    tasks: JoinSet<()>,
}

impl Opening<'_> {
    fn watch<O: DeserializeOwned + Clone + Send + 'static>(
        &mut self,
        path: &str,
        name: Option<&str>,
    ) -> mpsc::Receiver<((), Told<O>)> {
        let (tell, told) = mpsc::channel(EVENTS);
        let collection = Collection { path: path.to_owned(), name: name.map(str::to_owned), data: true };
        self.seed = self.seed.wrapping_add(1);
        self.tasks.spawn(collection::run(self.access.clone(), collection, self.pace.clone(), self.seed, (), tell));
        told
    }
}

/// How a node's table is made: by [`compile`].
type Compile = fn(&Cluster, &str, &[IpNet]) -> Compiled;

/// What a round of compiling and applying has achieved: what changed, and how many pods are isolated and how many wait.
type Done = (Applied, (usize, usize));

struct Work {
    node: String,
    pace: Pace,
    seed: u64,
    said: Arc<Mutex<Said>>,
    /// Shared with the round that is under way, and with nobody else: whatever becomes of that, this stays.
    store: Arc<Store>,
    compile: Compile,
    /// The prefixes of this node's pods.
    own: Vec<IpNet>,
    kernel: Option<KernelTable>,
    heard: Heard,
    /// Whether something was heard that the kernel does not have yet.
    changed: bool,
    due: Option<Instant>,
    /// How often the kernel refused, one after the other.
    failures: u32,
}

impl Work {
    async fn run(mut self, mut access: watch::Receiver<Option<Access>>, stop: &Notify) {
        let mut feeds = self.feeds(&mut access);
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            let input = async {
                match &mut feeds {
                    Some(feeds) => feeds.next().await,
                    None => std::future::pending().await,
                }
            };
            let due = async {
                match self.due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            let other_access = async {
                // A daemon with access of its own keeps it.
                if access.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = stop.notified() => return,
                () = other_access => feeds = self.feeds(&mut access),
                input = input => match input {
                    Some(input) => self.hear(input),
                    None => feeds = None,
                },
                () = due => self.enforce().await,
                _ = look.tick() => self.look(),
            }
        }
    }

    fn feeds(&mut self, access: &mut watch::Receiver<Option<Access>>) -> Option<Feeds> {
        let access = access.borrow_and_update().clone();
        match access {
            Some(access) => {
                self.say(|said| said.lost.clear());
                Some(Feeds::open(&access, &self.node, &self.pace, self.seed))
            }
            None => {
                self.say(|said| {
                    said.lost = BTreeMap::from([(POLICIES, "there is no access to Kubernetes".to_owned())]);
                });
                None
            }
        }
    }

    fn hear(&mut self, input: Input) {
        let changed = match input {
            Input::Pods(told) => {
                let heard = self.told(PODS, &told);
                self.heard.pods |= heard;
                match told {
                    Told::Listed(pods) => {
                        self.store().pods(pods);
                        true
                    }
                    Told::Changed(pod) => self.store().pod(pod),
                    Told::Deleted(pod) => self.store().pod_gone(&pod),
                    Told::Absent | Told::Resumed | Told::Lost(_) | Told::Unauthorized(_) => false,
                }
            }
            Input::Namespaces(told) => {
                let heard = self.told(NAMESPACES, &told);
                self.heard.namespaces |= heard;
                match told {
                    Told::Listed(namespaces) => {
                        self.store().namespaces(namespaces);
                        true
                    }
                    Told::Changed(namespace) => self.store().namespace(namespace),
                    Told::Deleted(namespace) => self.store().namespace_gone(&namespace),
                    Told::Absent | Told::Resumed | Told::Lost(_) | Told::Unauthorized(_) => false,
                }
            }
            Input::Policies(told) => {
                let heard = self.told(POLICIES, &told);
                self.heard.policies |= heard;
                match told {
                    Told::Listed(policies) => {
                        self.store().policies(policies);
                        true
                    }
                    Told::Changed(policy) => self.store().policy(policy),
                    Told::Deleted(policy) => self.store().policy_gone(&policy),
                    Told::Absent | Told::Resumed | Told::Lost(_) | Told::Unauthorized(_) => false,
                }
            }
            Input::Node(told) => {
                let heard = self.told(NODE, &told);
                self.heard.node |= heard;
                match told {
                    Told::Listed(nodes) => self.own(nodes.into_iter().flat_map(NodeObject::pod_cidrs).collect()),
                    Told::Changed(node) => self.own(node.pod_cidrs()),
                    // Its pods may still be here.
                    Told::Deleted(_) | Told::Absent | Told::Resumed | Told::Lost(_) | Told::Unauthorized(_) => false,
                }
            }
        };
        self.changed |= changed;
        if self.changed && self.heard.all() && self.due.is_none() {
            self.due = Some(Instant::now() + SETTLE);
        }
    }

    fn store(&mut self) -> &mut Store {
        Arc::make_mut(&mut self.store)
    }

    fn own(&mut self, prefixes: Vec<IpNet>) -> bool {
        let changed = self.own != prefixes;
        self.own = prefixes;
        changed
    }

    /// Whether a collection was heard whole with this word; and whether it can be heard is told.
    fn told<O>(&self, what: &'static str, told: &Told<O>) -> bool {
        let why = match told {
            Told::Changed(_) | Told::Deleted(_) => return false,
            Told::Listed(_) | Told::Resumed => None,
            Told::Absent => Some("the API server has no such thing".to_owned()),
            Told::Lost(why) | Told::Unauthorized(why) => Some(why.clone()),
        };
        self.say(|said| match why {
            None => drop(said.lost.remove(what)),
            Some(why) => {
                if said.lost.insert(what, why.clone()).is_none() {
                    tracing::warn!(why, "{what} are not heard; the policies in force stay");
                }
            }
        });
        matches!(told, Told::Listed(_))
    }

    /// Looks whether the kernel still has what was applied.
    fn look(&mut self) {
        self.store().forget_unused();
        let touched = self.kernel.as_mut().is_some_and(|kernel| !kernel.is_untouched());
        if touched && self.heard.all() && self.due.is_none() {
            self.due = Some(Instant::now());
        }
    }

    async fn enforce(&mut self) {
        let began = Instant::now();
        let repair = !std::mem::take(&mut self.changed);
        let (store, kernel, compile) = (self.store.clone(), self.kernel.take(), self.compile);
        let (node, own) = (self.node.clone(), self.own.clone());
        // Milliseconds, and in a large cluster some hundred of them: not for a thread that others wait for.
        let working = tokio::task::spawn_blocking(move || {
            let compiled = compile(&store.cluster, &node, &own);
            apply(compiled, kernel)
        });
        let done = match working.await {
            Ok((kernel, done)) => {
                self.kernel = kernel;
                done.map_err(|error| error.to_string())
            }
            // A fault of ours. What was heard is still here and the kernel has what it had.
            Err(error) => Err(format!("network policies cannot be compiled: {error}")),
        };
        match done {
            Ok((applied, pods)) => {
                (self.due, self.failures) = (None, 0);
                self.applied(applied, pods, repair, began);
            }
            Err(error) => self.failed(error),
        }
    }

    fn failed(&mut self, error: String) {
        self.changed = true;
        let pause = PAUSE.0.saturating_mul(1 << self.failures.min(5)).min(PAUSE.1);
        self.failures += 1;
        self.due = Some(Instant::now() + pause);
        tracing::error!(error, "the policies are not in force as they should be; trying again");
        self.say(|said| {
            said.status.errors += 1;
            said.refused = Some(error);
        });
    }

    fn applied(&self, applied: Applied, (isolated, waiting): (usize, usize), repair: bool, began: Instant) {
        let took = began.elapsed();
        if applied.changes > 0 {
            tracing::debug!(?took, changes = applied.changes, bytes = applied.bytes, "network policies applied");
        }
        let policies = self.store.cluster.policies.len();
        let (faulty, faults) = first_faults(&self.store.cluster, MAX_FAULTS);
        self.say(|said| {
            let status = &mut said.status;
            status.policies = policies;
            status.faulty_policies = faulty;
            status.isolated_pods = isolated;
            status.waiting_pods = waiting;
            status.applies += u64::from(applied.changes > 0);
            status.repairs += u64::from(repair && applied.changes > 0);
            status.apply_ms = Some(took.as_secs_f64() * 1e3);
            said.faults = faults;
            said.refused = None;
            said.applied = Some(Instant::now());
        });
    }

    fn say(&self, change: impl FnOnce(&mut Said)) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut said);
        let (state, reason) = match (said.applied, said.lost.values().next()) {
            (_, _) if said.refused.is_some() => ("failed", said.refused.clone()),
            (None, lost) => ("waiting", lost.cloned()),
            (Some(_), Some(why)) => ("stale", Some(why.clone())),
            (Some(_), None) => ("current", None),
        };
        (said.status.state, said.status.reason) = (state.to_owned(), reason);
    }
}

/// Gives the kernel what was compiled. Blocks. The handle comes back for the next round.
fn apply(compiled: Compiled, kernel: Option<KernelTable>) -> (Option<KernelTable>, Result<Done, NftError>) {
    let Compiled { table, isolated, waiting } = compiled;
    match kernel.map_or_else(|| KernelTable::open(policy::TABLE), Ok) {
        Ok(mut kernel) => {
            let applied = kernel.apply(table);
            (Some(kernel), applied.map(|applied| (applied, (isolated, waiting))))
        }
        Err(error) => (None, Err(error)),
    }
}

#[cfg(test)]
mod tests;
