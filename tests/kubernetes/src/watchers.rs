//! Many agents' watches at once: each has a connection of its own and receives what a real agent receives, but only looks
//! for the sequence number of the record in it. A thousand of them cost less than ten real agents.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{AsyncBufReadExt, StreamExt, TryStreamExt, stream};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::Access;

/// What stands before a record's sequence number in an event.
const SEQUENCE: &[u8] = br#""mesh.keystone.cluster/seq":""#;

/// What an agent asks for: the metadata alone.
const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";

/// Connections that are made at a time.
const PARALLEL: usize = 16;

/// Watches of all Nodes.
pub struct Watchers {
    count: usize,
    seen: mpsc::UnboundedReceiver<(u64, Instant)>,
    early: BTreeMap<u64, Vec<Instant>>,
    bytes: Arc<AtomicU64>,
    tasks: Vec<AbortHandle>,
}

impl Watchers {
    /// `count` watches that begin after `resource_version`. Returns when all are established.
    pub async fn start(access: &Access, resource_version: &str, count: usize) -> Result<Self> {
        allow_many_files()?;
        let (tell, seen) = mpsc::unbounded_channel();
        let bytes = Arc::new(AtomicU64::new(0));
        let path = format!("/api/v1/nodes?watch=true&allowWatchBookmarks=true&resourceVersion={resource_version}");
        let starts = stream::iter(0..count).map(|_| async {
            let client = kube::Client::try_from(access.config()?).context("make a client")?;
            let request = http::Request::get(&path).header(http::header::ACCEPT, METADATA_ONLY).body(Vec::new());
            let events = client.request_stream(request.context("ask for a watch")?).await.context("start a watch")?;
            let task = read(client, events, tell.clone(), Arc::clone(&bytes));
            anyhow::Ok(tokio::spawn(task).abort_handle())
        });
        let tasks = starts.buffer_unordered(PARALLEL).try_collect().await?;
        Ok(Self { count, seen, early: BTreeMap::new(), bytes, tasks })
    }

    /// When each watcher heard of the record with this sequence number. Fails if one does not within `patience`.
    pub async fn heard(&mut self, seq: u64, patience: Duration) -> Result<Vec<Instant>> {
        let deadline = Instant::now() + patience;
        let mut times = self.early.remove(&seq).unwrap_or_default();
        while times.len() < self.count {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = timeout(left, self.seen.recv()).await;
            let missing = || format!("{} of {} watches do not hear of {seq}", self.count - times.len(), self.count);
            match next.with_context(missing)? {
                Some((found, at)) if found == seq => times.push(at),
                Some((other, at)) => self.early.entry(other).or_default().push(at),
                None => ensure!(false, "all watches have ended"),
            }
        }
        Ok(times)
    }

    /// Bytes of events that all of them have received, before TLS.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Watchers {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

async fn read(
    // The connection ends with its client.
    _client: kube::Client,
    events: impl futures_util::AsyncBufRead,
    tell: mpsc::UnboundedSender<(u64, Instant)>,
    bytes: Arc<AtomicU64>,
) {
    let mut events = Box::pin(events);
    let mut line = Vec::new();
    while events.read_until(b'\n', &mut line).await.is_ok_and(|length| length > 0) {
        bytes.fetch_add(line.len() as u64, Ordering::Relaxed);
        if let Some(seq) = sequence_in(&line) {
            let _nobody_waits = tell.send((seq, Instant::now()));
        }
        line.clear();
    }
}

fn sequence_in(event: &[u8]) -> Option<u64> {
    let at = event.windows(SEQUENCE.len()).position(|window| window == SEQUENCE)? + SEQUENCE.len();
    let digits = event[at..].split(|byte| *byte == b'"').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The usual soft limit of 1024 is too low for a thousand connections.
fn allow_many_files() -> Result<()> {
    let (_soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise the limit of open files")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_number_is_found_wherever_it_stands() {
        let event = br#"{"object":{"metadata":{"annotations":{"a":"b","mesh.keystone.cluster/seq":"417","z":"1"}}}}"#;
        assert_eq!(sequence_in(event), Some(417));
        assert_eq!(sequence_in(b"{}"), None);
    }
}
