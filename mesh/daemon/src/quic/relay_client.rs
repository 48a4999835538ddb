//! A client's connection to one relay, kept for ever.
//!
//! ```text
//!   Connecting ──► Up ──► Down ── pause (core::backoff) ──► Connecting
//!                   │      ▲ └── network changed, or a credential came: at once
//!                   └──────┘ closed, idle, or no answer after the network changed
//! ```
//!
//! Sending works from any thread and never waits: while the relay is not up, or its queue is full, packets are
//! dropped and counted.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use keystone_mesh_core::NodeId;
use keystone_mesh_core::backoff::Backoff;
use keystone_mesh_core::relay::frame::RELAY_ID;
use keystone_mesh_core::relay::message::{ClientMessage, CloseCode, MAX_MESSAGE, RelayMessage};
use keystone_mesh_core::relay::{Frame, Reassembly, RelayAddr, Role};
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::datagrams;
use super::endpoint::{QuicEndpoint, canonical};
use super::frames;
use super::relay_server::Deliver;
use super::relay_session::{self, RelayError, RelaySession, why_closed};
use super::splice::{AcceptSpliced, ByteStream, SplicedStream};

/// How long a relay may take to answer after the network changed, before the connection is given up.
const CHECK_TIMEOUT: Duration = Duration::from_secs(3);
/// Streams that a relay may open towards the control plane: its joiners, and a few per node.
const CONTROL_PLANE_STREAMS: u32 = 1024;
/// How long a relay may take to say whose stream it opens.
const INCOMING_TIMEOUT: Duration = Duration::from_secs(5);

/// How a relay is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayState {
    /// An attempt is under way.
    Connecting,
    /// Connected and admitted.
    Up {
        /// Since when.
        since: Instant,
        /// This node's address as the relay sees it: its reflexive candidate.
        observed: SocketAddr,
        /// Round trip when last looked at; [`RelayClient::rtt`] is current.
        rtt: Duration,
        /// What this node is to the relay.
        role: Role,
    },
    /// Not connected.
    Down {
        /// Why, in words.
        why: String,
        /// When it is tried again.
        retry_at: Instant,
    },
}

/// What a client needs besides its endpoint and relay.
#[derive(Clone)]
pub struct RelayClientConfig {
    /// The approval, where there is one.
    pub credential: Option<Vec<u8>>,
    /// Makes this client's pauses differ from others'.
    pub seed: u64,
    /// Takes the packets that come through the relay.
    pub receive: Deliver,
    /// Takes the streams that come through the relay; only the control plane gets any.
    pub spliced: Option<Arc<dyn AcceptSpliced>>,
    /// Told whenever the state changes; for a driver that watches many relays.
    pub changes: Option<watch::Sender<()>>,
}

/// Packets that a client dropped or refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayClientCounters {
    /// Packets handed to the connection.
    pub sent: u64,
    /// Packets dropped because the relay was not up.
    pub not_connected: u64,
    /// Packets dropped because the connection's queue was full.
    pub queue_full: u64,
    /// Packets dropped because they are too large, or the connection takes no datagrams.
    pub unsendable: u64,
    /// Packets received.
    pub received: u64,
    /// Datagrams received that were no frames.
    pub malformed: u64,
}

/// A connection to a relay that is kept until this is dropped.
pub struct RelayClient {
    shared: Arc<Shared>,
    _task: JoinSet<()>,
}

struct Shared {
    endpoint: QuicEndpoint,
    relay: RelayAddr,
    config: RelayClientConfig,
    credential: Mutex<Option<Vec<u8>>>,
    state: watch::Sender<RelayState>,
    /// Present while up.
    connection: ArcSwapOption<Connection>,
    /// Present while up and datagrams are allowed.
    outlet: ArcSwapOption<Connection>,
    network_changed: Notify,
    credential_changed: Notify,
    next_id: AtomicU16,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    not_connected: AtomicU64,
    queue_full: AtomicU64,
    unsendable: AtomicU64,
    received: AtomicU64,
    malformed: AtomicU64,
}

impl RelayClient {
    /// Starts connecting. Call it within a tokio runtime.
    pub fn connect(endpoint: QuicEndpoint, relay: RelayAddr, config: RelayClientConfig) -> Self {
        let shared = Arc::new(Shared {
            endpoint,
            relay,
            credential: Mutex::new(config.credential.clone()),
            config,
            state: watch::Sender::new(RelayState::Connecting),
            connection: ArcSwapOption::empty(),
            outlet: ArcSwapOption::empty(),
            network_changed: Notify::new(),
            credential_changed: Notify::new(),
            next_id: AtomicU16::new(0),
            counters: Counters::default(),
        });
        let mut task = JoinSet::new();
        task.spawn(shared.clone().keep_connected());
        Self { shared, _task: task }
    }

    /// The relay.
    pub fn relay(&self) -> &RelayAddr {
        &self.shared.relay
    }

    /// The state, to watch.
    pub fn state(&self) -> watch::Receiver<RelayState> {
        self.shared.state.subscribe()
    }

    /// The present round trip, while up.
    pub fn rtt(&self) -> Option<Duration> {
        self.shared.connection.load().as_ref().map(|connection| connection.rtt())
    }

    /// What was sent, received and dropped.
    pub fn counters(&self) -> RelayClientCounters {
        let Counters { sent, not_connected, queue_full, unsendable, received, malformed } = &self.shared.counters;
        let [sent, not_connected, queue_full, unsendable, received, malformed] =
            [sent, not_connected, queue_full, unsendable, received, malformed].map(|c| c.load(Ordering::Relaxed));
        RelayClientCounters { sent, not_connected, queue_full, unsendable, received, malformed }
    }

    /// Sends packets to the node `to`; returns how many were dropped. Callable from any thread; never waits.
    pub fn send(&self, to: NodeId, packets: &mut dyn Iterator<Item = &[u8]>) -> usize {
        let counters = &self.shared.counters;
        let outlet = self.shared.outlet.load();
        let Some(connection) = outlet.as_ref() else {
            let dropped = packets.count();
            counters.not_connected.fetch_add(dropped as u64, Ordering::Relaxed);
            return dropped;
        };
        let mut max_datagram = datagrams::max_datagram_size(connection);
        let (mut sent, mut dropped) = (0, 0);
        for packet in packets {
            let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed) & !RELAY_ID;
            match datagrams::send(connection, Frame::Data { peer: to, packet }, id, &mut max_datagram) {
                Ok(()) => sent += 1,
                Err(not_sent) => {
                    dropped += 1;
                    let counter = match not_sent {
                        datagrams::NotSent::QueueFull => &counters.queue_full,
                        datagrams::NotSent::Unsendable => &counters.unsendable,
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        counters.sent.fetch_add(sent, Ordering::Relaxed);
        dropped
    }

    /// Opens a byte stream to the network key through the relay; TLS comes next
    /// ([`gateway::over_splice`](super::gateway::over_splice)).
    pub async fn open_gateway_stream(&self, network: NodeId) -> Result<Box<dyn ByteStream>, RelayError> {
        let connection = self.shared.connection.load_full();
        let connection = connection.ok_or(RelayError::Closed(ConnectionError::LocallyClosed))?;
        relay_session::splice(&connection, network).await
    }

    /// The machine's network changed: asks the relay for a sign of life if up, connects at once if not.
    pub fn network_changed(&self) {
        self.shared.network_changed.notify_one();
    }

    /// Shows this approval from the next connection on, which is made at once unless the present one is good already.
    pub fn set_credential(&self, credential: Option<&[u8]>) {
        *self.shared.credential.lock().unwrap_or_else(PoisonError::into_inner) = credential.map(<[u8]>::to_vec);
        self.shared.credential_changed.notify_one();
    }
}

impl Drop for RelayClient {
    fn drop(&mut self) {
        if let Some(connection) = self.shared.connection.swap(None) {
            connection.close(CloseCode::Done.number().into(), b"done");
        }
        self.shared.outlet.store(None);
    }
}

/// Why an attempt or a connection came to an end.
enum End {
    Failed(String),
    Displaced(String),
    CredentialChanged,
}

impl Shared {
    async fn keep_connected(self: Arc<Self>) {
        let mut backoff = Backoff::new(self.config.seed);
        loop {
            self.set_state(RelayState::Connecting);
            let credential = self.credential.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let end = match RelaySession::open(&self.endpoint, &self.relay, credential, true).await {
                Ok(session) => {
                    backoff.handle_connected(Instant::now());
                    self.run(session).await
                }
                Err(error) => End::Failed(error.to_string()),
            };
            self.connection.store(None);
            self.outlet.store(None);
            let why = match end {
                End::CredentialChanged => continue,
                End::Failed(why) => why,
                End::Displaced(why) => {
                    backoff.handle_displaced();
                    why
                }
            };
            tracing::info!(relay = %self.relay.id.short(), %why, "relay down");
            let retry_at = backoff.handle_failure(Instant::now());
            self.set_state(RelayState::Down { why, retry_at });
            tokio::select! {
                () = tokio::time::sleep_until(retry_at.into()) => {}
                () = self.network_changed.notified() => backoff.handle_network_change(),
                () = self.credential_changed.notified() => backoff.handle_network_change(),
            }
        }
    }

    async fn run(&self, session: RelaySession) -> End {
        let RelaySession { connection, mut control, mut answers, observed, role } = session;
        if role == Role::Network {
            connection.set_max_concurrent_bi_streams(CONTROL_PLANE_STREAMS.into());
        }
        let shared = Arc::new(connection.clone());
        self.connection.store(Some(shared.clone()));
        self.outlet.store((role != Role::Joiner).then_some(shared));
        let since = Instant::now();
        self.set_state(RelayState::Up { since, observed, rtt: connection.rtt(), role });
        tracing::info!(relay = %self.relay.id.short(), ?role, %observed, "relay up");
        let answered = Notify::new();
        let why = tokio::select! {
            error = connection.closed() => return closed(&error),
            error = self.receive(&connection) => return closed(&error),
            error = self.accept_spliced(&connection) => return closed(&error),
            why = self.listen(&connection, &mut answers, &answered) => why,
            why = self.check(&mut control, &answered) => why,
            () = self.better_credential(role) => {
                connection.close(CloseCode::Done.number().into(), b"coming back with a credential");
                return End::CredentialChanged;
            }
        };
        // The reason of a closed connection says more than that of the stream that broke with it.
        if let Some(error) = connection.close_reason() {
            return closed(&error);
        }
        connection.close(CloseCode::Done.number().into(), why.as_bytes());
        End::Failed(why)
    }

    async fn receive(&self, connection: &Connection) -> ConnectionError {
        let mut reassembly = Reassembly::new();
        let mut batch = Vec::with_capacity(datagrams::BATCH);
        loop {
            if let Err(error) = datagrams::receive_batch(connection, &mut batch).await {
                return error;
            }
            self.deliver(&batch, &mut reassembly);
            tokio::task::coop::consume_budget().await;
        }
    }

    /// Hands packets over in runs of the same sender.
    fn deliver(&self, batch: &[Bytes], reassembly: &mut Reassembly) {
        let now = Instant::now();
        let mut run: Option<(NodeId, Vec<Bytes>)> = None;
        let hand_over = |(from, packets): (NodeId, Vec<Bytes>)| {
            self.counters.received.fetch_add(packets.len() as u64, Ordering::Relaxed);
            (self.config.receive)(self.relay.id, from, packets);
        };
        for datagram in batch {
            let (from, packet) = match Frame::decode(datagram) {
                Ok(Frame::Data { peer, packet }) => (peer, datagram.slice_ref(packet)),
                Ok(Frame::Fragment { peer, place, part }) => {
                    let Some(packet) = reassembly.handle_fragment(peer, place, part, now) else { continue };
                    (peer, packet.into())
                }
                Err(_) => {
                    self.counters.malformed.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
            };
            match &mut run {
                Some((present, packets)) if *present == from => packets.push(packet),
                Some(_) | None => {
                    run.replace((from, vec![packet])).map(hand_over);
                }
            }
        }
        run.map(hand_over);
    }

    async fn accept_spliced(&self, connection: &Connection) -> ConnectionError {
        let mut tasks = JoinSet::new();
        loop {
            let (send, receive) = match connection.accept_bi().await {
                Ok(stream) => stream,
                Err(error) => return error,
            };
            while tasks.try_join_next().is_some() {}
            // Without an acceptor the stream ends here.
            if let Some(acceptor) = &self.config.spliced {
                tasks.spawn(introduce(acceptor.clone(), self.relay.id, send, receive));
            }
        }
    }

    /// Follows what the relay says of this node's address; returns why it said no more.
    async fn listen(&self, connection: &Connection, answers: &mut RecvStream, answered: &Notify) -> String {
        loop {
            let addr = match frames::read(answers, MAX_MESSAGE).await {
                Ok(RelayMessage::Observed { addr }) => canonical(addr),
                Ok(RelayMessage::Refused(refusal)) => return refusal.to_string(),
                Ok(RelayMessage::Welcome { .. } | RelayMessage::Spliced {} | RelayMessage::Incoming { .. }) => {
                    return "the relay said something on the control stream that does not belong there".into();
                }
                Err(error) => return format!("on the control stream: {error}"),
            };
            answered.notify_one();
            self.state.send_if_modified(|state| {
                let RelayState::Up { observed, rtt, .. } = state else { return false };
                *rtt = connection.rtt();
                std::mem::replace(observed, addr) != addr
            });
            self.tell_change();
        }
    }

    /// Asks for a sign of life whenever the network changed; returns when none came.
    async fn check(&self, control: &mut SendStream, answered: &Notify) -> String {
        loop {
            self.network_changed.notified().await;
            // An answer to an earlier question is none to this one.
            let _ = tokio::time::timeout(Duration::ZERO, answered.notified()).await;
            if let Err(error) = frames::write(control, &ClientMessage::CheckAddress {}, MAX_MESSAGE).await {
                return format!("on the control stream: {error}");
            }
            if tokio::time::timeout(CHECK_TIMEOUT, answered.notified()).await.is_err() {
                return "no answer after the network changed".into();
            }
        }
    }

    /// Returns when there is a credential and the connection was made without one.
    async fn better_credential(&self, role: Role) {
        loop {
            self.credential_changed.notified().await;
            let present = self.credential.lock().unwrap_or_else(PoisonError::into_inner).is_some();
            if role == Role::Joiner && present {
                return;
            }
        }
    }

    fn set_state(&self, state: RelayState) {
        self.state.send_replace(state);
        self.tell_change();
    }

    fn tell_change(&self) {
        if let Some(changes) = &self.config.changes {
            changes.send_replace(());
        }
    }
}

async fn introduce(acceptor: Arc<dyn AcceptSpliced>, relay: NodeId, send: SendStream, mut receive: RecvStream) {
    match frames::read_within(&mut receive, MAX_MESSAGE, INCOMING_TIMEOUT).await {
        Ok(RelayMessage::Incoming { from, addr }) => {
            let io = Box::new(tokio::io::join(receive, send));
            acceptor.accept_spliced(SplicedStream { relay, from, addr: canonical(addr), io });
        }
        Ok(
            RelayMessage::Welcome { .. }
            | RelayMessage::Observed { .. }
            | RelayMessage::Spliced {}
            | RelayMessage::Refused(_),
        ) => tracing::warn!(relay = %relay.short(), "a stream from the relay does not begin with Incoming"),
        Err(error) => tracing::warn!(relay = %relay.short(), %error, "a stream from the relay brings no Incoming"),
    }
}

fn closed(error: &ConnectionError) -> End {
    let why = why_closed(error);
    let replaced = u64::from(CloseCode::Replaced.number());
    match error {
        ConnectionError::ApplicationClosed(close) if close.error_code.into_inner() == replaced => End::Displaced(why),
        ConnectionError::ApplicationClosed(_)
        | ConnectionError::VersionMismatch
        | ConnectionError::TransportError(_)
        | ConnectionError::ConnectionClosed(_)
        | ConnectionError::Reset
        | ConnectionError::TimedOut
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => End::Failed(why),
    }
}
