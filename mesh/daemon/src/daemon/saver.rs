//! Writes the snapshot, at most once a second, off the driver's task: a slow disk must not delay probes.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::state::{Snapshot, StateDir};

/// Between two writes: a burst of joins is one write.
const PAUSE: Duration = Duration::from_secs(1);

/// The saver's handle.
#[derive(Debug)]
pub(super) struct Saver {
    latest: watch::Sender<Option<Snapshot>>,
    task: JoinHandle<()>,
}

impl Saver {
    pub(super) fn start(state: Arc<StateDir>) -> Self {
        let (latest, snapshots) = watch::channel(None);
        Self { latest, task: tokio::spawn(run(state, snapshots)) }
    }

    /// Keeps this, soon.
    pub(super) fn save(&self, snapshot: Snapshot) {
        self.latest.send_replace(Some(snapshot));
    }

    /// Writes what is left to write.
    pub(super) async fn finish(self) {
        drop(self.latest);
        let _ = tokio::time::timeout(Duration::from_secs(5), self.task).await;
    }
}

async fn run(state: Arc<StateDir>, mut snapshots: watch::Receiver<Option<Snapshot>>) {
    let mut open = true;
    let mut written = None;
    while open {
        open = snapshots.changed().await.is_ok();
        let Some(snapshot) = snapshots.borrow_and_update().clone() else { continue };
        if written.as_ref() == Some(&snapshot) {
            continue;
        }
        let (directory, value) = (state.clone(), snapshot.clone());
        match tokio::task::spawn_blocking(move || directory.set_snapshot(&value)).await {
            Ok(Ok(())) => written = Some(snapshot),
            // The old file is whole; the next change tries again.
            Ok(Err(error)) => tracing::error!(%error, "the snapshot is not kept"),
            Err(error) => tracing::error!(%error, "the snapshot is not kept"),
        }
        if open {
            // The first write is at once: a machine that joins and loses power has its peers. An end cuts the pause short.
            let _ = tokio::time::timeout(PAUSE, snapshots.wait_for(|_| false)).await;
            snapshots.mark_changed();
        }
    }
}
