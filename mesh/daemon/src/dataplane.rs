//! The data plane: TUN to UDP and back, in batches, on threads of its own.
//!
//! ```text
//!             egress thread of a shard: block, drain, send
//!   TUN  ---> super packet -> one lookup -> cut, seal -> run of datagrams ---> UDP socket, or relay
//!
//!             ingress thread of a shard: block, drain, write
//!   TUN  <--- super packet <- put together <- source check <- open <- run <--- UDP socket, or relay
//!                                              | QUIC       -> quinn
//!                                              | probes     -> control side (DataEvent)
//!                                              | handshakes -> keeper
//!
//!   keeper thread: handshakes, sessions, keepalives; sleeps while no peer has a tunnel
//! ```
//!
//! * The threads block in poll(2) and carry a batch from end to end: no channel, no await, no allocation per packet.
//!   Batches come from load alone; nothing waits to make one larger.
//! * A peer belongs to a shard, whose number is part of the index that the peer repeats in each message
//!   (`table::PeerIndex`). A peer has one lock, taken once per batch.
//! * Lookups read a `table::Table` that the control side replaces as a whole.
//! * The control side decides which way a peer's packets go ([`DataPlane::set_path`]). The data plane reports
//!   ([`DataEvent`]) and never chooses; only an answer to a handshake goes back the way the question came.
//! * Every queue is bounded and every drop is counted by its reason.

mod batch;
mod counters;
mod egress;
mod inbox;
mod ingress;
mod keeper;
mod peer;
mod pending;
mod remote;
mod shared;
mod table;
mod wg;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use arc_swap::ArcSwap;
use keystone_mesh_core::io::{PeerConfig, PeerOp};
use keystone_mesh_core::{DropReason, NodeId, PrivateKey, PublicKey, Via};
use tokio::sync::mpsc;

use crate::sys::eventfd::EventFd;
use crate::tun::TunQueue;
use crate::udp::UdpSocket;
use crate::udp::quic::QuicSocket;
use counters::Counters;
use egress::Egress;
use inbox::Inbox;
pub use inbox::PacketBatch;
use ingress::Ingress;
use keeper::{Job, Keeper};
use peer::PeerCell;
use remote::Remote;
use shared::Shared;
pub use shared::{NoRelays, RelaySink};
use table::{Roster, Table};
use wg::Engine;

/// How many shards there can be.
pub const MAX_SHARDS: usize = table::MAX_SHARDS;
/// Every thread's name begins so: for accounts of what the data plane costs.
pub const THREAD_PREFIX: &str = "ks-";

/// What the data plane tells the control side. When the control side is too slow, events are dropped and counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataEvent {
    /// A probe came, by this way; through a relay, from this node.
    Probe {
        /// The way.
        via: Via,
        /// The node behind the relay; none for a direct probe, whose sender is yet to be authenticated.
        from: Option<NodeId>,
        /// The datagram.
        bytes: Vec<u8>,
    },
    /// A packet wants to leave, and its peer has no path or no session. At most once a second for each peer.
    Demand {
        /// The peer.
        peer: PublicKey,
    },
    /// An authentic packet came by another way than the peer's path. At most once a second for each peer.
    Roamed {
        /// The peer.
        peer: PublicKey,
        /// The way it came.
        via: Via,
    },
    /// A session was established and has proven itself.
    Handshake {
        /// The peer.
        peer: PublicKey,
    },
    /// The TUN device is gone: somebody deleted the interface. Nothing leaves any more.
    TunLost,
}

/// What a data plane is made of.
pub struct Config {
    /// The TUN queues, one per shard.
    pub tun: Vec<TunQueue>,
    /// The UDP sockets, one per shard, all of one port.
    pub sockets: Vec<Arc<UdpSocket>>,
    /// Our WireGuard key.
    pub private_key: PrivateKey,
    /// Takes packets whose path is a relay.
    pub relay: Arc<dyn RelaySink>,
    /// Takes events.
    pub events: mpsc::Sender<DataEvent>,
}

/// Why a data plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The numbers of TUN queues and sockets are not one number between 1 and [`MAX_SHARDS`].
    #[error("{tun} TUN queues and {sockets} sockets: there must be as many of one as of the other, 1 to {MAX_SHARDS}")]
    Shards {
        /// TUN queues given.
        tun: usize,
        /// Sockets given.
        sockets: usize,
    },
    /// The system is out of threads or descriptors.
    #[error("cannot start the data plane's threads: {0}")]
    Io(#[from] io::Error),
}

/// What a peer did.
#[derive(Clone, Debug)]
pub struct PeerStats {
    /// The peer.
    pub key: PublicKey,
    /// Its path.
    pub via: Option<Via>,
    /// Bytes of WireGuard messages received, as `wg show` counts them.
    pub rx_bytes: u64,
    /// Bytes of WireGuard messages sent.
    pub tx_bytes: u64,
    /// When the last handshake was completed.
    pub last_handshake: Option<Instant>,
    /// When the last authentic packet came.
    pub last_received: Option<Instant>,
    /// Which way it came.
    pub received_via: Option<Via>,
    /// Whether packets can be sealed at once.
    pub has_session: bool,
}

/// What the data plane did.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Every peer, by key.
    pub peers: Vec<PeerStats>,
    /// Peers with a session.
    pub live_sessions: usize,
    /// Data messages opened.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// WireGuard messages that the kernel or a relay took.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Initiations sent, repetitions included.
    pub handshakes_started: u64,
    /// Sessions established and proven.
    pub handshakes_completed: u64,
    /// Handshakes given up without an answer.
    pub handshakes_failed: u64,
    /// How many packets were dropped, for every reason.
    pub drops: Vec<(DropReason, u64)>,
}

/// A running data plane. Dropping it stops it.
pub struct DataPlane {
    shared: Arc<Shared>,
    inboxes: Vec<Arc<Inbox>>,
    roster: Mutex<Roster>,
    threads: Vec<JoinHandle<()>>,
}

impl DataPlane {
    /// Starts the threads: two for each shard, and the keeper.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let Config { tun, sockets, private_key, relay, events } = config;
        let shards = tun.len();
        let Some(first) = sockets.first().filter(|_| shards == sockets.len() && shards <= MAX_SHARDS) else {
            return Err(StartError::Shards { tun: shards, sockets: sockets.len() });
        };
        let quic = Arc::new(QuicSocket::new(Arc::clone(first)));
        let (jobs, job_queue) = sync_channel(keeper::MAX_JOBS);
        let shared = Arc::new(Shared {
            table: ArcSwap::from_pointee(Table::default()),
            engine: Engine::new(&private_key),
            sockets,
            relay,
            quic,
            events,
            jobs,
            counters: Counters::new(),
            stop: EventFd::new()?,
        });
        let inboxes = (0..shards).map(|_| Inbox::new().map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        let mut plane = Self {
            shared: Arc::clone(&shared),
            inboxes: inboxes.clone(),
            roster: Mutex::new(Roster::new(shards)),
            threads: Vec::new(),
        };
        let keeper = Keeper::new(Arc::clone(&shared), job_queue);
        plane.spawn(format!("{THREAD_PREFIX}keeper"), move || keeper.run())?;
        for (shard, (queue, inbox)) in tun.into_iter().zip(inboxes).enumerate() {
            let queue = Arc::new(queue);
            let egress = Egress::new(Arc::clone(&shared), shard, Arc::clone(&queue));
            plane.spawn(format!("{THREAD_PREFIX}egress-{shard}"), move || egress.run())?;
            let ingress = Ingress::new(Arc::clone(&shared), shard, queue, inbox);
            plane.spawn(format!("{THREAD_PREFIX}ingress-{shard}"), move || ingress.run())?;
        }
        Ok(plane)
    }

    /// Changes the peers, all at once for the threads.
    pub fn apply(&self, ops: &[PeerOp]) {
        let mut roster = self.roster.lock().unwrap_or_else(PoisonError::into_inner);
        let mut started = Vec::new();
        for op in ops {
            match op {
                PeerOp::Set(config) => started.extend(self.set_peer(&mut roster, config)),
                PeerOp::Remove(key) => {
                    if let Some(cell) = roster.remove(key) {
                        cell.lock().remove();
                    }
                }
            }
        }
        self.shared.table.store(Arc::new(roster.build()));
        for peer in started {
            self.shared.job(Job::Initiate { peer, again: false });
        }
    }

    /// Sets the way to a peer. What has waited for a path goes at once; so does a handshake that is missing or on its
    /// way by another path. False if there is no such peer.
    pub fn set_path(&self, key: &PublicKey, via: Option<Via>) -> bool {
        let table = self.shared.table.load();
        let Some(cell) = table.by_key(key) else { return false };
        let mut peer = cell.lock();
        if !peer.set_via(via) || via.is_none() {
            return true;
        }
        let job = if peer.wants_session() {
            Some(Job::Initiate { peer: Arc::clone(cell), again: true })
        } else if peer.has_session() {
            Some(Job::Flush { peer: Arc::clone(cell) })
        } else {
            None
        };
        drop(peer);
        // Should the keeper be too busy, the next packet asks again.
        job.map(|job| self.shared.job(job));
        true
    }

    /// Starts a handshake with a peer at once, whether it has a session or not. False if there is no such peer, or the
    /// keeper has too much to do.
    pub fn start_handshake(&self, key: &PublicKey) -> bool {
        let table = self.shared.table.load();
        let Some(peer) = table.by_key(key) else { return false };
        self.shared.job(Job::Initiate { peer: Arc::clone(peer), again: true })
    }

    /// Sends a probe straight to an address. Probes through a relay go by the relay's own connection.
    pub fn send_probe(&self, to: SocketAddr, bytes: &[u8]) {
        self.shared.send(0, &Remote::Direct(to), bytes, bytes.len(), false);
    }

    /// Takes packets that a relay brought from `from`. They are handled as datagrams from the socket are; their answers
    /// go through the same relay. What does not fit the queue is counted and dropped.
    pub fn inject(&self, relay: NodeId, from: NodeId, batch: PacketBatch) {
        let count = batch.0.len();
        // All packets of a node on one thread, so that they stay in order.
        let shard = usize::from(from.as_bytes()[0]) % self.inboxes.len();
        if !self.inboxes[shard].push(Remote::Relay { relay, node: from }, batch) {
            self.shared.counters.drop(DropReason::RelayQueueFull, count);
        }
    }

    /// QUIC's share of the socket, for `quinn::Endpoint::new_with_abstract_socket`.
    pub fn quic_socket(&self) -> Arc<dyn quinn::AsyncUdpSocket> {
        Arc::clone(&self.shared.quic) as _
    }

    /// Counts a datagram that the control side has dropped.
    pub fn count_drop(&self, reason: DropReason) {
        self.shared.counters.drop(reason, 1);
    }

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        let table = self.shared.table.load();
        let peers: Vec<_> = table.peers().map(|cell| PeerStats::of(cell)).collect();
        let counters = &self.shared.counters;
        Stats {
            live_sessions: peers.iter().filter(|peer| peer.has_session).count(),
            peers,
            rx_packets: counters.rx_packets.load(Ordering::Relaxed),
            rx_bytes: counters.rx_bytes.load(Ordering::Relaxed),
            tx_packets: counters.tx_packets.load(Ordering::Relaxed),
            tx_bytes: counters.tx_bytes.load(Ordering::Relaxed),
            handshakes_started: counters.handshakes_started.load(Ordering::Relaxed),
            handshakes_completed: counters.handshakes_completed.load(Ordering::Relaxed),
            handshakes_failed: counters.handshakes_failed.load(Ordering::Relaxed),
            drops: counters.drops(),
        }
    }

    /// Stops the threads and waits for them.
    pub fn stop(self) {
        drop(self);
    }

    /// The peer's cell, configured; given if the peer is to have a session without being asked.
    fn set_peer(&self, roster: &mut Roster, config: &PeerConfig) -> Option<Arc<PeerCell>> {
        let cell = roster.upsert(config.key, config.allowed_ips.clone())?;
        let mut peer = cell.lock();
        peer.configure(config);
        let starts = peer.wants_session() && peer.has_path();
        drop(peer);
        starts.then_some(cell)
    }

    fn spawn(&mut self, name: String, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(thread::Builder::new().name(name).spawn(run)?);
        Ok(())
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        self.shared.stop.raise();
        // The keeper empties its queue, so this waits a moment at most.
        let _ = self.shared.jobs.send(Job::Stop);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for DataPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataPlane").field("shards", &self.inboxes.len()).finish_non_exhaustive()
    }
}

impl Stats {
    /// How many packets were dropped for a reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops.iter().find(|(of, _)| *of == reason).map_or(0, |(_, count)| *count)
    }
}

impl PeerStats {
    fn of(cell: &PeerCell) -> Self {
        let peer::Snapshot { via, rx_bytes, tx_bytes, last_handshake, last_received, received_via, has_session } =
            cell.lock().snapshot();
        Self { key: cell.key, via, rx_bytes, tx_bytes, last_handshake, last_received, received_via, has_session }
    }
}
