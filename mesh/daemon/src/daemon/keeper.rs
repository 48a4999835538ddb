//! Keeps the kernel's state as the machine wants it, also after somebody else changed it; tells the host's addresses.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use keystone_mesh_core::kernel::Desired;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::kernel::{Applied, KernelState};

/// The keeper's handle; the task ends when it is dropped.
#[derive(Debug)]
pub(super) struct Keeper {
    desired: watch::Sender<Option<Desired>>,
    excluded: watch::Sender<Vec<IpNet>>,
    addresses: watch::Receiver<Option<Vec<IpAddr>>>,
    warnings: Arc<Mutex<Vec<String>>>,
    counts: Arc<KernelCounts>,
    applied: watch::Receiver<u64>,
    task: JoinHandle<()>,
}

/// What the keeper counts.
#[derive(Debug, Default)]
pub(super) struct KernelCounts {
    repairs: AtomicU64,
    errors: AtomicU64,
}

impl KernelCounts {
    /// Addresses, routes and rules put right after somebody else changed them.
    pub(super) fn repairs(&self) -> u64 {
        self.repairs.load(Ordering::Relaxed)
    }

    /// Those that the kernel refused, and rounds that failed as a whole.
    pub(super) fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

/// What the keeper tells.
#[derive(Debug)]
pub(super) enum KeeperEvent {
    /// The host's own addresses, first and after every change.
    HostAddresses(Vec<IpAddr>),
    /// The desired state was applied: the addresses are on the interface.
    Applied,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Keeper {
    /// Makes this the desired state.
    pub(super) fn set_desired(&self, desired: Desired) {
        self.desired.send_replace(Some(desired));
    }

    /// Prefixes whose addresses are not the host's own to offer: the mesh's.
    pub(super) fn set_excluded(&self, prefixes: Vec<IpNet>) {
        self.excluded.send_if_modified(|now| {
            let changed = *now != prefixes;
            *now = prefixes;
            changed
        });
    }

    /// The next event. Cancel-safe.
    pub(super) async fn next(&mut self) -> KeeperEvent {
        loop {
            let alive = tokio::select! {
                changed = self.addresses.changed() => changed.is_ok(),
                changed = self.applied.changed() => match changed {
                    Ok(()) => return KeeperEvent::Applied,
                    Err(_) => false,
                },
            };
            if !alive {
                std::future::pending::<()>().await;
            }
            if let Some(addresses) = self.addresses.borrow_and_update().clone() {
                return KeeperEvent::HostAddresses(addresses);
            }
        }
    }

    /// What is not as it should be.
    pub(super) fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What it has counted.
    pub(super) fn counts(&self) -> &KernelCounts {
        &self.counts
    }
}

/// Starts the keeper of an interface.
pub(super) fn start(interface: &str) -> anyhow::Result<Keeper> {
    let kernel = KernelState::new(interface)?;
    let changes = kernel.watch()?;
    let (desired, wanted) = watch::channel(None);
    let (excluded, exclusions) = watch::channel(Vec::new());
    let (tell_addresses, addresses) = watch::channel(None);
    let (tell_applied, applied) = watch::channel(0);
    let warnings = Arc::new(Mutex::new(Vec::new()));
    let counts = Arc::<KernelCounts>::default();
    let work = Work {
        kernel,
        wanted,
        exclusions,
        tell_addresses,
        tell_applied,
        warnings: warnings.clone(),
        counts: counts.clone(),
    };
    let task = tokio::spawn(work.run(changes));
    Ok(Keeper { desired, excluded, addresses, warnings, counts, applied, task })
}

/// Takes interface, addresses, routes and rules away from the kernel.
pub(super) async fn remove(interface: &str) -> anyhow::Result<()> {
    let applied = KernelState::new(interface)?.remove().await?;
    match applied.failures.into_iter().next() {
        Some(failure) => Err(failure.into()),
        None => Ok(()),
    }
}

/// Takes away what the packet filter does for pods.
pub(super) async fn remove_tables() {
    // A kernel without nftables has no tables to take away either.
    for remove in [crate::policy::remove, crate::cni::kernel::remove] {
        if let Ok(Err(error)) = tokio::task::spawn_blocking(remove).await {
            tracing::warn!(%error, "a table of the packet filter may be left");
        }
    }
}

struct Work {
    kernel: KernelState,
    wanted: watch::Receiver<Option<Desired>>,
    exclusions: watch::Receiver<Vec<IpNet>>,
    tell_addresses: watch::Sender<Option<Vec<IpAddr>>>,
    tell_applied: watch::Sender<u64>,
    warnings: Arc<Mutex<Vec<String>>>,
    counts: Arc<KernelCounts>,
}

impl Work {
    async fn run(mut self, mut changes: crate::kernel::Changes) {
        let mut round = 0;
        // What differs although nothing else is wanted than before was changed by somebody else.
        let mut repair = false;
        loop {
            self.look_around().await;
            if self.apply(repair).await {
                round += 1;
                self.tell_applied.send_replace(round);
            }
            repair = false;
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                changed = self.exclusions.changed() => if changed.is_err() { return },
                changed = changes.changed() => match changed {
                    Ok(()) => repair = true,
                    Err(error) => {
                        tracing::warn!(%error, "the kernel's changes cannot be heard; looking again in a second");
                        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                    }
                },
            }
        }
    }

    async fn look_around(&mut self) {
        let excluded = self.exclusions.borrow_and_update().clone();
        match self.kernel.host_addresses(&excluded).await {
            Ok(found) => drop(self.tell_addresses.send_if_modified(|known| {
                let changed = known.as_ref() != Some(&found);
                *known = Some(found);
                changed
            })),
            Err(error) => tracing::warn!(%error, "this host's own addresses are not known"),
        }
    }

    /// Whether there was anything to make so, and it is.
    async fn apply(&mut self, repair: bool) -> bool {
        let repair = repair && !self.wanted.has_changed().unwrap_or(false);
        let Some(desired) = self.wanted.borrow_and_update().clone() else { return false };
        match self.kernel.apply(&desired).await {
            Ok(applied) => {
                if repair {
                    self.counts.repairs.fetch_add(applied.changes as u64, Ordering::Relaxed);
                }
                self.counts.errors.fetch_add(applied.failures.len() as u64, Ordering::Relaxed);
                self.report(&applied);
                applied.failures.is_empty()
            }
            Err(error) => {
                self.counts.errors.fetch_add(1, Ordering::Relaxed);
                tracing::error!(%error, "the kernel's state is not kept");
                self.set_warnings(vec![error.to_string()]);
                false
            }
        }
    }

    fn report(&self, applied: &Applied) {
        if applied.changes > 0 {
            tracing::debug!(changes = applied.changes, "kernel state applied");
        }
        for warning in &applied.warnings {
            tracing::warn!("{warning}");
        }
        for failure in &applied.failures {
            tracing::error!("{failure}");
        }
        let mut all: Vec<String> = applied.failures.iter().map(ToString::to_string).collect();
        all.extend(applied.warnings.iter().map(ToString::to_string));
        if applied.changes > 0 || !all.is_empty() {
            self.set_warnings(all);
        }
    }

    fn set_warnings(&self, warnings: Vec<String>) {
        *self.warnings.lock().unwrap_or_else(PoisonError::into_inner) = warnings;
    }
}
