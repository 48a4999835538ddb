//! Keeps what a node's kernel does for pods beside routing: masquerade of what leaves the cluster, and forwarding.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use keystone_mesh_core::pods;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::sysctl::{self, Needs};
use super::tell;
use crate::nftables::{KernelTable, NftError};

/// How often it is looked whether somebody else changed anything. Costs a few system calls.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What is wanted of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// It stays as it is: nobody has said yet.
    #[default]
    AsItIs,
    /// Nothing of ours.
    Nothing,
    /// Pods have their network from the mesh.
    Pods {
        /// This node's pods.
        own: Vec<IpNet>,
        /// The pods of all nodes.
        pods: Vec<IpNet>,
        /// What pods reach with their own address: the mesh and all pods.
        cluster: Vec<IpNet>,
        /// The mesh's interface.
        interface: String,
    },
}

/// The keeper's handle. When it is dropped everything stays as it is.
#[derive(Debug)]
pub struct PodKernel {
    wanted: watch::Sender<Wanted>,
    problems: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Drop for PodKernel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl PodKernel {
    /// Starts, and changes nothing yet.
    pub fn start() -> Self {
        let (wanted, follow) = watch::channel(Wanted::AsItIs);
        let problems = Arc::<Mutex<Vec<String>>>::default();
        let task = tokio::spawn(run(follow, problems.clone()));
        Self { wanted, problems, task }
    }

    /// Makes this what is wanted.
    pub fn set(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|known| {
            let changed = *known != wanted;
            *known = wanted;
            changed
        });
    }

    /// What is not as it should be, a sentence each.
    pub fn problems(&self) -> Vec<String> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Takes the table away, where there is one. Blocks.
pub fn remove() -> Result<bool, NftError> {
    KernelTable::open(pods::TABLE)?.remove()
}

async fn run(mut follow: watch::Receiver<Wanted>, problems: Arc<Mutex<Vec<String>>>) {
    let mut table = None;
    loop {
        let wanted = follow.borrow_and_update().clone();
        let round = tokio::task::spawn_blocking(move || {
            let said = make_so(&wanted, &mut table);
            (table, said)
        });
        let said;
        // It runs to its end, or the process ends.
        let Ok(done) = round.await else { return };
        (table, said) = done;
        tell(&problems, said);
        tokio::select! {
            changed = follow.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

fn make_so(wanted: &Wanted, table: &mut Option<KernelTable>) -> Vec<String> {
    match wanted {
        Wanted::AsItIs => Vec::new(),
        Wanted::Nothing => {
            *table = None;
            // A kernel without nftables has no table either.
            if let Err(error) = remove() {
                tracing::debug!(%error, "no table of pods is taken away");
            }
            Vec::new()
        }
        Wanted::Pods { own, pods: all, cluster, interface } => {
            let of = |family: fn(&IpNet) -> bool| own.iter().any(family);
            let (ipv4, ipv6) = (of(|net| matches!(net, IpNet::V4(_))), of(|net| matches!(net, IpNet::V6(_))));
            let mut said = sysctl::apply(&Needs { interface, ipv4, ipv6 });
            let applied = opened(table).and_then(|table| table.apply(pods::masquerade(all, cluster, interface)));
            match applied {
                Ok(applied) if applied.changes > 0 => tracing::info!(changes = applied.changes, "masquerade applied"),
                Ok(_) => {}
                Err(error) => {
                    said.push(format!("packets of pods that leave the cluster keep their own address: {error}"));
                }
            }
            said
        }
    }
}

fn opened(table: &mut Option<KernelTable>) -> Result<&mut KernelTable, NftError> {
    let open = match table.take() {
        Some(open) => open,
        None => KernelTable::open(pods::TABLE)?,
    };
    Ok(table.insert(open))
}
