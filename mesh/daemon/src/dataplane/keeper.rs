//! Handshakes and time: one thread for all shards.
//!
//! A handshake costs some 370 us, as much as four super packets, so it does not happen on the threads that carry data.
//! They hand over the message (MACs checked) or the wish for a session; the keeper makes tunnels, answers, sends, and
//! every 250 ms lets time pass in the peers for which time means anything. While there are none it sleeps without a
//! timeout.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use keystone_mesh_core::DropReason;

use super::DataEvent;
use super::batch::Runs;
use super::peer::{PeerCell, Sealing, Ticked};
use super::remote::Remote;
use super::shared::Shared;
use super::wg::{self, Message};

/// Jobs that wait, at most: more than a thousand peers that ask at once.
pub(crate) const MAX_JOBS: usize = 2048;

/// What boringtun's timers are made for.
const TICK: Duration = Duration::from_millis(250);

/// Something for the keeper to do.
pub(crate) enum Job {
    /// A handshake message whose MACs are right.
    Handshake { from: Remote, shard: usize, message: Box<[u8]> },
    /// Start a handshake; `again` even if one is on its way or a session exists.
    Initiate { peer: Arc<PeerCell>, again: bool },
    /// Send what has waited.
    Flush { peer: Arc<PeerCell> },
    /// End.
    Stop,
}

pub(crate) struct Keeper {
    shared: Arc<Shared>,
    jobs: Receiver<Job>,
    runs: Runs,
    now: Instant,
    out: [u8; wg::INITIATION_LEN],
}

impl Keeper {
    pub(crate) fn new(shared: Arc<Shared>, jobs: Receiver<Job>) -> Self {
        Self { shared, jobs, runs: Runs::new(), now: Instant::now(), out: [0; wg::INITIATION_LEN] }
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        let mut next_tick: Option<Instant> = None;
        loop {
            let job = match next_tick {
                None => self.jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => self.jobs.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            self.now = Instant::now();
            match job {
                Ok(Job::Handshake { from, shard, message }) => self.handshake(&from, shard, &message),
                Ok(Job::Initiate { peer, again }) => self.initiate(&peer, again),
                Ok(Job::Flush { peer }) => self.flush_pending(&peer),
                Ok(Job::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if next_tick.is_none_or(|at| self.now >= at) {
                let any = self.tick();
                next_tick = any.then(|| self.now + TICK);
            }
        }
    }

    fn handshake(&mut self, from: &Remote, shard: usize, message: &[u8]) {
        let result = match Message::parse(message) {
            Some(Message::Initiation) => self.answer(from, shard, message),
            Some(Message::Response(index) | Message::CookieReply(index)) => {
                match self.shared.table.load().peer(index).map(Arc::clone) {
                    Some(peer) => self.finish(&peer, from, message),
                    None => Err(DropReason::UnknownSession),
                }
            }
            Some(Message::Data(_)) | None => Err(DropReason::MalformedWireGuard),
        };
        if let Err(reason) = result {
            self.shared.counters.drop(reason, 1);
        }
    }

    /// Answers an initiation, the way it came.
    fn answer(&mut self, from: &Remote, shard: usize, message: &[u8]) -> Result<(), DropReason> {
        let key = self.shared.engine.initiator(message)?;
        let table = self.shared.table.load();
        let cell = table.by_key(&key).ok_or(DropReason::UnknownPeer)?;
        let answer = cell.lock().answer(&self.shared.engine, cell, message, &mut self.out)?;
        if let Some(len) = answer {
            self.shared.send(shard, from, &self.out[..len], len, false);
        }
        Ok(())
    }

    /// Takes the answer to an initiation of ours, and sends what has waited for it.
    fn finish(&mut self, cell: &Arc<PeerCell>, from: &Remote, message: &[u8]) -> Result<(), DropReason> {
        let mut peer = cell.lock();
        let Some(len) = peer.finish(message, self.now, &mut self.out)? else { return Ok(()) };
        let received = peer.received(message.len(), wg::receiver(message), from, self.now);
        let to = peer.remote().unwrap_or(*from);
        drop(peer);
        self.shared.send(cell.index.shard(), &to, &self.out[..len], len, false);
        self.shared.proven(cell.key);
        if received.roamed {
            self.shared.event(DataEvent::Roamed { peer: cell.key, via: from.via() });
        }
        self.flush_pending(cell);
        Ok(())
    }

    fn initiate(&mut self, cell: &Arc<PeerCell>, again: bool) {
        let mut peer = cell.lock();
        if peer.has_session() && !again {
            drop(peer);
            return self.flush_pending(cell);
        }
        let Some(to) = peer.remote() else { return };
        let message = peer.initiate(&self.shared.engine, cell, again, self.now, &mut self.out);
        drop(peer);
        if let Some(len) = message {
            self.shared.counters.handshake_started();
            self.shared.send(cell.index.shard(), &to, &self.out[..len], len, false);
        }
    }

    fn flush_pending(&mut self, cell: &Arc<PeerCell>) {
        let shard = cell.index.shard();
        let max_datagrams = self.shared.sockets[shard].max_segments();
        loop {
            let sealing = cell.lock().seal_pending(&mut self.runs, max_datagrams, self.now);
            self.runs.drain(|to, run, stride| self.shared.send(shard, to, run, stride, false));
            if sealing != Sealing::RunsFull {
                return;
            }
        }
    }

    /// Lets time pass; whether any peer will want to know again.
    fn tick(&mut self) -> bool {
        let table = self.shared.table.load();
        let mut any = false;
        for cell in table.peers().filter(|cell| cell.is_active()) {
            let mut peer = cell.lock();
            let Ticked { message, lost, gave_up } = peer.tick(&self.shared.engine, cell, self.now, &mut self.out);
            let to = peer.remote();
            drop(peer);
            self.shared.counters.drop(DropReason::NoPath, lost);
            if gave_up {
                self.shared.counters.handshake_failed();
            }
            if let (Some(len), Some(to)) = (message, to) {
                if wg::is_initiation(&self.out[..len]) {
                    self.shared.counters.handshake_started();
                }
                self.shared.send(cell.index.shard(), &to, &self.out[..len], len, false);
            }
            any |= cell.is_active();
        }
        any
    }
}
