//! One peer: its tunnel, its path, what waits for it, and its counters.
//!
//! All of it is behind one lock, taken once per batch. A peer without traffic is a few hundred bytes; the tunnel is
//! made by the keeper when the first packet or initiation comes, and dropped when it has expired.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use keystone_mesh_core::io::PeerConfig;
use keystone_mesh_core::{DropReason, NodeId, PresharedKey, PublicKey, Via};

use super::batch::Runs;
use super::pending::{Budget, Pending};
use super::remote::Remote;
use super::table::PeerIndex;
use super::wg::{self, Engine, Tunnel};
use crate::tun::split::Segments;

/// The least time between two events of one kind about one peer.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);
/// The least time between two requests for a session. The keeper repeats an initiation by itself.
const REQUEST_INTERVAL: Duration = Duration::from_millis(250);

/// A handshake is repeated every 5 s and a little (WireGuard's paper, section 6.4): after a pause of this it is over.
const STILL_TRYING: Duration = Duration::from_secs(10);

/// A peer and its lock.
pub(crate) struct PeerCell {
    pub(crate) key: PublicKey,
    pub(crate) index: PeerIndex,
    /// Whether time means anything to the peer: it has a tunnel, or is to have one.
    active: AtomicBool,
    state: Mutex<Peer>,
}

/// A peer, locked.
pub(crate) struct Peer {
    // Told by the control side.
    identity: Option<NodeId>,
    preshared_key: Option<PresharedKey>,
    keepalive: Option<Duration>,
    via: Option<Via>,
    removed: bool,

    // The engine, and what waits for it.
    tunnel: Option<Tunnel>,
    pending: Pending,
    /// The index of a session that we answered for. It counts from its first packet on: only that proves the other
    /// end live, an initiation may be a replay.
    unconfirmed: Option<[u8; 4]>,

    // What stats show.
    rx_bytes: u64,
    tx_bytes: u64,
    last_handshake: Option<Instant>,
    last_received: Option<Instant>,
    received_via: Option<Via>,

    // When things were done last, to be done again or not yet.
    last_sent: Option<Instant>,
    last_attempt: Option<Instant>,
    last_initiation: Option<Instant>,
    last_request: Option<Instant>,
    last_demand: Option<Instant>,
    last_roamed: Option<Instant>,
}

/// How far a batch could be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sealing {
    /// All of it.
    Done,
    /// Up to here; send the runs and go on.
    RunsFull,
    /// No further: there is no session, or no path.
    NotReady,
}

/// What the first authentic packets of a batch mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Received {
    /// They prove a session that we answered for.
    pub(crate) confirmed: bool,
    /// They came another way than ours go.
    pub(crate) roamed: bool,
    /// Something has waited and can go.
    pub(crate) unblocked: bool,
}

/// What became of a peer with the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticked {
    /// The length of a message to send, if there is one.
    pub(crate) message: Option<usize>,
    /// How many waiting packets were given up.
    pub(crate) lost: usize,
    /// Whether a handshake was given up that nobody answered.
    pub(crate) gave_up: bool,
}

/// What stats show of a peer.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) via: Option<Via>,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) last_handshake: Option<Instant>,
    pub(crate) last_received: Option<Instant>,
    pub(crate) received_via: Option<Via>,
    pub(crate) has_session: bool,
}

impl PeerCell {
    pub(crate) fn new(key: PublicKey, index: PeerIndex, budget: Arc<Budget>) -> Self {
        Self { key, index, active: AtomicBool::new(false), state: Mutex::new(Peer::new(budget)) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Peer> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    pub(crate) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Relaxed);
    }
}

/// The control side's part.
impl Peer {
    fn new(budget: Arc<Budget>) -> Self {
        Self {
            identity: None,
            preshared_key: None,
            keepalive: None,
            via: None,
            removed: false,
            tunnel: None,
            pending: Pending::new(budget),
            unconfirmed: None,
            rx_bytes: 0,
            tx_bytes: 0,
            last_handshake: None,
            last_received: None,
            received_via: None,
            last_sent: None,
            last_attempt: None,
            last_initiation: None,
            last_request: None,
            last_demand: None,
            last_roamed: None,
        }
    }

    /// Takes over a configuration. The sessions go on unless the preshared key differs.
    pub(crate) fn configure(&mut self, config: &PeerConfig) {
        if self.preshared_key != config.preshared_key {
            self.tunnel = None;
            self.preshared_key.clone_from(&config.preshared_key);
        }
        self.identity = config.identity;
        self.keepalive = config.persistent_keepalive.map(|seconds| Duration::from_secs(seconds.max(1).into()));
    }

    /// Changes the path and says whether it is a change.
    pub(crate) fn set_via(&mut self, via: Option<Via>) -> bool {
        std::mem::replace(&mut self.via, via) != via
    }

    /// Ends the peer; a thread that still finds it in an older table gets nothing from it.
    pub(crate) fn remove(&mut self) {
        self.removed = true;
        self.tunnel = None;
        self.pending.clear();
    }

    /// Whether a session is missing that somebody waits for: packets, a keepalive interval or a handshake on its way.
    pub(crate) fn wants_session(&self) -> bool {
        !self.has_session() && (self.tunnel.is_some() || !self.pending.is_empty() || self.keepalive.is_some())
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot {
            via: self.via,
            rx_bytes: self.rx_bytes,
            tx_bytes: self.tx_bytes,
            last_handshake: self.last_handshake,
            last_received: self.last_received,
            received_via: self.received_via,
            has_session: self.has_session(),
        }
    }
}

/// The data threads' part.
impl Peer {
    /// Where packets go: none without a path, or through a relay to a peer whose identity is unknown.
    pub(crate) fn remote(&self) -> Option<Remote> {
        match self.via? {
            Via::Direct(addr) => Some(Remote::Direct(addr)),
            Via::Relay(relay) => self.identity.map(|node| Remote::Relay { relay, node }),
        }
    }

    pub(crate) fn has_session(&self) -> bool {
        self.tunnel.as_ref().is_some_and(Tunnel::has_session)
    }

    pub(crate) fn has_path(&self) -> bool {
        self.via.is_some()
    }

    /// Seals segments for the peer's path, behind what has waited. `max_datagrams` is what one send takes.
    pub(crate) fn seal(
        &mut self,
        segments: &mut Segments<'_>,
        runs: &mut Runs,
        max_datagrams: usize,
        now: Instant,
    ) -> Sealing {
        let waited = self.seal_pending(runs, max_datagrams, now);
        if waited != Sealing::Done {
            return waited;
        }
        let (Some(to), Some(tunnel)) = (self.remote(), &mut self.tunnel) else { return Sealing::NotReady };
        while let Some(len) = segments.next_len() {
            let Some(room) = runs.reserve(to, len + wg::OVERHEAD, max_datagrams) else { return Sealing::RunsFull };
            let Some(segment) = segments.next_segment() else { break };
            let sealed = tunnel.seal(segment, room).unwrap_or(0);
            runs.commit(sealed);
            self.tx_bytes += sealed as u64;
        }
        Sealing::Done
    }

    /// Seals what has waited.
    pub(crate) fn seal_pending(&mut self, runs: &mut Runs, max_datagrams: usize, now: Instant) -> Sealing {
        if !self.has_session() {
            return Sealing::NotReady;
        }
        let (Some(to), Some(tunnel)) = (self.remote(), &mut self.tunnel) else { return Sealing::NotReady };
        self.last_sent = Some(now);
        while let Some(packet) = self.pending.first() {
            let Some(room) = runs.reserve(to, packet.len() + wg::OVERHEAD, max_datagrams) else {
                return Sealing::RunsFull;
            };
            let sealed = tunnel.seal(packet, room).unwrap_or(0);
            runs.commit(sealed);
            self.tx_bytes += sealed as u64;
            self.pending.pop();
        }
        Sealing::Done
    }

    /// Keeps segments until there is a session and a path; gives how many packets were lost for it.
    pub(crate) fn hold(&mut self, segments: &mut Segments<'_>) -> usize {
        let mut lost = 0;
        while let Some(segment) = segments.next_segment() {
            lost += if self.removed { 1 } else { self.pending.push(segment) };
        }
        lost
    }

    /// Whether to ask the keeper for a session.
    pub(crate) fn request_is_due(&mut self, now: Instant) -> bool {
        !self.removed && self.has_path() && is_due(&mut self.last_request, now, REQUEST_INTERVAL)
    }

    /// The request did not reach the keeper; the next packet asks again.
    pub(crate) fn withdraw_request(&mut self) {
        self.last_request = None;
    }

    /// Whether to tell the control side that a packet wants to leave.
    pub(crate) fn demand_is_due(&mut self, now: Instant) -> bool {
        is_due(&mut self.last_demand, now, EVENT_INTERVAL)
    }

    /// Opens a data message.
    pub(crate) fn open(&mut self, message: &[u8], out: &mut [u8]) -> wg::Opened {
        match &mut self.tunnel {
            Some(tunnel) => tunnel.open(message, out),
            None => wg::Opened::Refused(DropReason::UnknownSession),
        }
    }

    /// Notes authentic packets of one sender, the last for the session of this index.
    pub(crate) fn received(&mut self, bytes: usize, session: [u8; 4], from: &Remote, now: Instant) -> Received {
        self.rx_bytes += bytes as u64;
        self.last_received = Some(now);
        self.received_via = Some(from.via());
        let confirmed = self.unconfirmed == Some(session);
        if confirmed {
            self.unconfirmed = None;
            self.last_handshake = Some(now);
        }
        let roamed = self.via != Some(from.via()) && is_due(&mut self.last_roamed, now, EVENT_INTERVAL);
        let unblocked = !self.pending.is_empty() && self.has_path() && self.has_session();
        Received { confirmed, roamed, unblocked }
    }
}

/// The keeper's part: handshakes and time.
impl Peer {
    /// The tunnel, which is made if there is none: 100 us and 11 KiB, so never on a thread that carries data. None for
    /// a peer that is removed.
    pub(crate) fn tunnel_or_new(&mut self, engine: &Engine, cell: &PeerCell) -> Option<&mut Tunnel> {
        if self.removed {
            return None;
        }
        cell.set_active(true);
        let psk = self.preshared_key.as_ref();
        Some(self.tunnel.get_or_insert_with(|| engine.tunnel(&cell.key, psk, cell.index)))
    }

    /// Writes an initiation; with one on its way already, only if `again`.
    pub(crate) fn initiate(
        &mut self,
        engine: &Engine,
        cell: &PeerCell,
        again: bool,
        now: Instant,
        out: &mut [u8],
    ) -> Option<usize> {
        let len = self.tunnel_or_new(engine, cell)?.initiate(out, again)?;
        self.last_attempt = Some(now);
        self.last_initiation = Some(now);
        Some(len)
    }

    /// Takes an initiation of the peer.
    pub(crate) fn answer(&mut self, engine: &Engine, cell: &PeerCell, message: &[u8], out: &mut [u8]) -> wg::Answer {
        let Some(tunnel) = self.tunnel_or_new(engine, cell) else { return Ok(None) };
        let answer = tunnel.handshake(message, out)?;
        // The response's sender index is the receiver index of what the peer sends next.
        self.unconfirmed = out.get(4..).and_then(|rest| rest.first_chunk()).copied();
        Ok(answer)
    }

    /// Takes a response to our initiation, or a cookie. An answer is the packet that confirms the session.
    pub(crate) fn finish(&mut self, message: &[u8], now: Instant, out: &mut [u8]) -> wg::Answer {
        let Some(tunnel) = &mut self.tunnel else {
            return Err(DropReason::UnknownSession);
        };
        let answer = tunnel.handshake(message, out)?;
        if let Some(len) = answer {
            self.last_handshake = Some(now);
            self.last_sent = Some(now);
            self.tx_bytes += len as u64;
        }
        Ok(answer)
    }

    /// Lets time pass.
    pub(crate) fn tick(&mut self, engine: &Engine, cell: &PeerCell, now: Instant, out: &mut [u8]) -> Ticked {
        let (mut lost, mut gave_up) = (0, false);
        let mut message = None;
        if let Some(tunnel) = &mut self.tunnel {
            match tunnel.tick(out) {
                wg::Tick::Idle => {}
                wg::Tick::Send(len) => message = Some(len),
                wg::Tick::Expired => {
                    self.tunnel = None;
                    lost = self.pending.clear();
                    // Keys that only grew too old had their last handshake long ago.
                    gave_up = self.last_initiation.is_some_and(|at| now.duration_since(at) < STILL_TRYING);
                }
            }
        }
        if message.is_none() {
            message = self.keep_alive(engine, cell, now, out);
        }
        if let Some(len) = message {
            self.last_sent = Some(now);
            if wg::is_initiation(&out[..len]) {
                self.last_initiation = Some(now);
            }
        }
        cell.set_active(self.tunnel.is_some() || (self.keepalive.is_some() && self.has_path() && !self.removed));
        Ticked { message, lost, gave_up }
    }

    /// Persistent keepalive: a packet whenever the line has been silent for the interval, a session if there is none.
    fn keep_alive(&mut self, engine: &Engine, cell: &PeerCell, now: Instant, out: &mut [u8]) -> Option<usize> {
        let interval = self.keepalive.filter(|_| self.has_path())?;
        if self.has_session() {
            let silent = self.last_sent.is_none_or(|sent| now.duration_since(sent) >= interval);
            return silent.then(|| self.tunnel.as_mut()?.seal(&[], out)).flatten();
        }
        let due = self.last_attempt.is_none_or(|attempt| now.duration_since(attempt) >= interval);
        due.then(|| self.initiate(engine, cell, false, now, out)).flatten()
    }
}

/// Whether `interval` has passed since `last`, which is then now.
fn is_due(last: &mut Option<Instant>, now: Instant, interval: Duration) -> bool {
    let due = last.is_none_or(|last| now.duration_since(last) >= interval);
    if due {
        *last = Some(now);
    }
    due
}
