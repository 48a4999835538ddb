//! Authenticated byte streams to the control plane, whichever way they go.
//!
//! ```text
//!   direct    dialler ══ QUIC, keystone-gateway/1, network key pinned ══ control plane
//!   relayed   dialler ══ QUIC, keystone-relay/1 ══ relay ══ QUIC ══ control plane
//!                     └────── TLS, keystone-gateway/1, network key pinned ──────┘
//! ```
//!
//! Both kinds end in a [`GatewayStream`]: bytes, and a peer that has proved its identity. A dialler tries every
//! rendezvous at once and takes the first that answers as the network.

use std::any::Any;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use keystone_mesh_core::relay::Rendezvous;
use keystone_mesh_core::relay::message::CloseCode;
use keystone_mesh_core::{Identity, NodeId};
use quinn::ConnectionError;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::endpoint::{Authenticated, ConnectionHandler, QuicEndpoint};
use super::reach::{self, ReachError};
use super::relay_session::{RelayError, RelaySession};
use super::splice::{AcceptSpliced, ByteStream, SplicedStream};
use super::tls::{self, Protocol};

/// How long TLS over a splice may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// TLS handshakes over splices at once.
const HANDSHAKES: usize = 256;
/// How long a direct connection may take to open its stream.
const STREAM_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last bytes to a dialler may take to arrive after its streams are done with.
const LINGER: Duration = Duration::from_secs(10);

/// Which way a stream goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamVia {
    /// Straight.
    Direct,
    /// Through the relay with this identity.
    Relay(NodeId),
}

impl fmt::Display for StreamVia {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str("direct"),
            Self::Relay(id) => write!(f, "relay {}", id.short()),
        }
    }
}

/// A byte stream between the control plane and someone who has proved an identity.
///
/// A dialler that drops it closes the way under it at once: what it wrote last counts as sent once an answer was read.
/// The control plane may write and drop.
pub struct GatewayStream {
    io: Box<dyn ByteStream>,
    /// Who is at the other end.
    pub peer: NodeId,
    /// Which way the stream goes.
    pub via: StreamVia,
    /// The dialler's address as the far side of its NAT sees it. To the control plane: as itself or the relay sees it.
    /// To a dialler: as the relay sees it; a direct stream does not tell.
    pub observed: Option<SocketAddr>,
    /// What must live as long as the stream: the session with the relay, or a word to the acceptor on drop.
    _held: Option<Box<dyn Any + Send + Sync>>,
}

/// Why the control plane was not reached. Displays every attempt.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nothing to try.
    #[error("no rendezvous is given: name the control plane's address or a relay")]
    NoRendezvous,
    /// All that was tried failed.
    #[error("the control plane was not reached: {}", Attempts(.0))]
    AllFailed(Vec<(Rendezvous, AttemptError)>),
}

/// Why one rendezvous did not lead to the control plane.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// No direct connection.
    #[error(transparent)]
    Reach(#[from] ReachError),
    /// The connection broke at once.
    #[error("the connection ended: {0}")]
    Connection(#[from] ConnectionError),
    /// The relay is of no use.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// The far end of the splice is not the network.
    #[error("the far end of the relay is {actual}, but the network key is {expected}: the relay misdirects")]
    WrongKey {
        /// The pinned key.
        expected: NodeId,
        /// The key that was shown.
        actual: NodeId,
    },
    /// TLS through the relay failed.
    #[error("TLS through the relay: {0}")]
    Tls(#[source] io::Error),
    /// Not finished when the time was over.
    #[error("no answer in time")]
    TimedOut,
}

struct Attempts<'a>(&'a [(Rendezvous, AttemptError)]);

impl fmt::Display for Attempts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (rendezvous, error)) in self.0.iter().enumerate() {
            let between = if index == 0 { "" } else { "; " };
            match rendezvous {
                Rendezvous::Gateway(addr) => write!(f, "{between}directly at {addr}: {error}")?,
                Rendezvous::Relay(relay) => {
                    let addr = relay.addrs.first().map_or_else(String::new, ToString::to_string);
                    write!(f, "{between}through relay {} at {addr}: {error}", relay.id.short())?;
                }
            }
        }
        Ok(())
    }
}

/// Opens a stream to the control plane, whose key is `network`, by whichever rendezvous answers first, within
/// `patience`. `credential` is the approval to show to relays, where there is one.
pub async fn dial(
    endpoint: &QuicEndpoint,
    network: NodeId,
    rendezvous: &[Rendezvous],
    credential: Option<&[u8]>,
    patience: Duration,
) -> Result<GatewayStream, DialError> {
    if rendezvous.is_empty() {
        return Err(DialError::NoRendezvous);
    }
    let mut attempts = JoinSet::new();
    for place in rendezvous.iter().cloned() {
        let (endpoint, credential) = (endpoint.clone(), credential.map(<[u8]>::to_vec));
        attempts.spawn(async move {
            let attempt = attempt(&endpoint, network, &place, credential);
            let result = tokio::time::timeout(patience, attempt).await;
            result.unwrap_or(Err(AttemptError::TimedOut)).map_err(|error| (place, error))
        });
    }
    let mut failed = Vec::new();
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(failure)) => failed.push(failure),
            Err(error) => tracing::error!(%error, "a dial attempt did not end by itself"),
        }
    }
    failed.sort_by(|(a, _), (b, _)| a.cmp(b));
    Err(DialError::AllFailed(failed))
}

/// Speaks TLS over a splice to the network key, as the dialler.
pub async fn over_splice(
    identity: &Identity,
    network: NodeId,
    relay: NodeId,
    splice: Box<dyn ByteStream>,
) -> Result<GatewayStream, AttemptError> {
    let pinned = tls::client(identity, network, Protocol::Gateway);
    let connecting = TlsConnector::from(pinned.config.clone()).connect(tls::server_name(), splice);
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await.map_err(|_| AttemptError::TimedOut)?;
    let stream = stream.map_err(|error| match pinned.shown() {
        Some(actual) if actual != network => AttemptError::WrongKey { expected: network, actual },
        Some(_) | None => AttemptError::Tls(error),
    })?;
    Ok(GatewayStream { io: Box::new(stream), peer: network, via: StreamVia::Relay(relay), observed: None, _held: None })
}

async fn attempt(
    endpoint: &QuicEndpoint,
    network: NodeId,
    place: &Rendezvous,
    credential: Option<Vec<u8>>,
) -> Result<GatewayStream, AttemptError> {
    match place {
        Rendezvous::Gateway(host) => {
            let hosts = std::slice::from_ref(host);
            let connection = reach::connect_any(endpoint, hosts, network, Protocol::Gateway).await?.connection;
            let (send, receive) = connection.open_bi().await?;
            let io = Box::new(tokio::io::join(receive, send));
            Ok(GatewayStream { io, peer: network, via: StreamVia::Direct, observed: None, _held: None })
        }
        Rendezvous::Relay(relay) => {
            let session = RelaySession::open(endpoint, relay, credential, false).await?;
            let splice = session.splice(network).await?;
            let stream = over_splice(endpoint.identity(), network, relay.id, splice).await?;
            Ok(GatewayStream { observed: Some(session.observed), _held: Some(Box::new(session)), ..stream })
        }
    }
}

/// The control plane's end: turns direct connections and splices into streams.
pub struct GatewayAcceptor {
    tls: TlsAcceptor,
    streams: mpsc::Sender<GatewayStream>,
    handshakes: Semaphore,
    counters: AcceptorCounters,
}

/// What became of streams that reached an acceptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AcceptorSnapshot {
    /// Handed over.
    pub accepted: u64,
    /// Failed before they were streams: no stream opened, or TLS through a relay failed.
    pub failed: u64,
    /// Refused because too many waited.
    pub refused: u64,
}

#[derive(Default)]
struct AcceptorCounters {
    accepted: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
}

impl GatewayAcceptor {
    /// An acceptor and its streams, `capacity` of which may wait to be taken; one more is refused.
    pub fn new(identity: &Identity, capacity: usize) -> (Arc<Self>, mpsc::Receiver<GatewayStream>) {
        let (streams, incoming) = mpsc::channel(capacity);
        let acceptor = Self {
            tls: TlsAcceptor::from(tls::server(identity, &[Protocol::Gateway])),
            streams,
            handshakes: Semaphore::new(HANDSHAKES),
            counters: AcceptorCounters::default(),
        };
        (Arc::new(acceptor), incoming)
    }

    /// What became of streams so far.
    pub fn counters(&self) -> AcceptorSnapshot {
        let AcceptorCounters { accepted, failed, refused } = &self.counters;
        let [accepted, failed, refused] = [accepted, failed, refused].map(|counter| counter.load(Ordering::Relaxed));
        AcceptorSnapshot { accepted, failed, refused }
    }

    fn hand_over(&self, stream: GatewayStream) {
        let counter = match self.streams.try_send(stream) {
            Ok(()) => &self.counters.accepted,
            Err(_) => &self.counters.refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    async fn accept_direct(self: Arc<Self>, connection: Authenticated) {
        let observed = Some(connection.remote_address());
        let Authenticated { connection, peer } = connection;
        let Ok(Ok((send, receive))) = tokio::time::timeout(STREAM_TIMEOUT, connection.accept_bi()).await else {
            self.counters.failed.fetch_add(1, Ordering::Relaxed);
            return connection.close(CloseCode::Timeout.number().into(), b"no stream was opened");
        };
        let (held, mut done) = mpsc::channel::<Infallible>(1);
        let io = Box::new(tokio::io::join(receive, send));
        self.hand_over(GatewayStream { io, peer, via: StreamVia::Direct, observed, _held: Some(Box::new(held)) });
        // Nothing is ever sent: the channel closes when the stream is dropped.
        let _ = done.recv().await;
        // What was written last is still under way; the dialler closes when it has it.
        let _ = tokio::time::timeout(LINGER, connection.closed()).await;
        connection.close(CloseCode::Done.number().into(), b"done");
    }

    async fn accept_over_splice(self: Arc<Self>, spliced: SplicedStream) {
        let Ok(_permit) = self.handshakes.try_acquire() else {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let SplicedStream { relay, from, addr, io } = spliced;
        let accepting = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.tls.accept(io)).await;
        let error = match accepting {
            Ok(Ok(stream)) => match tls::peer_identity(stream.get_ref().1.peer_certificates().unwrap_or_default()) {
                Some(peer) if peer == from => {
                    let (via, observed) = (StreamVia::Relay(relay), Some(addr));
                    return self.hand_over(GatewayStream { io: Box::new(stream), peer, via, observed, _held: None });
                }
                Some(peer) => format!("the relay announced {} but {} is there", from.short(), peer.short()),
                None => "no identity was shown".into(),
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".into(),
        };
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(relay = %relay.short(), from = %from.short(), %error, "TLS through a relay failed");
    }
}

impl ConnectionHandler for GatewayAcceptor {
    fn serve(self: Arc<Self>, connection: Authenticated) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.accept_direct(connection))
    }
}

impl AcceptSpliced for GatewayAcceptor {
    fn accept_spliced(self: Arc<Self>, stream: SplicedStream) {
        tokio::spawn(self.accept_over_splice(stream));
    }
}

impl fmt::Debug for GatewayStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GatewayStream({} via {})", self.peer.short(), self.via)
    }
}

impl AsyncRead for GatewayStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for GatewayStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
