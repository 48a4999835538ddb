//! The QUIC endpoint: client and server at once, on the socket that it is given.
//!
//! Strangers are bounded at every step: a handshake that is not validated costs a Retry once many are pending, an
//! address may have so many connections, all together so many, and a handshake so much time.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use keystone_mesh_core::relay::admission::Occupancy;
use keystone_mesh_core::relay::message::CloseCode;
use keystone_mesh_core::{Identity, NodeId};
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{
    AsyncUdpSocket, Connection, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, Incoming, MtuDiscoveryConfig,
    Runtime, ServerConfig, TokioRuntime, TransportConfig, VarInt,
};
use rustls::pki_types::CertificateDer;
use tokio::task::JoinSet;

use super::tls::{self, Protocol};

/// NATs forget UDP mappings after 30 s at the earliest (RFC 4787 asks for 2 minutes, many do not listen).
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Two keep-alives may be lost.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// The least that QUIC asks of a path; what is more is found out.
const INITIAL_MTU: u16 = 1200;
/// 1500 minus IPv6 and UDP headers; also what quinn takes as the largest useful on the internet.
const MTU_UPPER_BOUND: u16 = 1452;
/// Datagrams that wait for a reader, in bytes: about 700 packets.
const DATAGRAM_RECEIVE_BUFFER: usize = 1 << 20;
/// Datagrams that wait for the congestion window, in bytes: three full batches, and a fifth of a second on a home's
/// uplink of 10 Mb/s. More would only be delay.
const DATAGRAM_SEND_BUFFER: usize = 256 * 1024;
/// What an endpoint of its own asks the kernel to buffer, in bytes; the kernel gives what `net.core.rmem_max` allows.
const SOCKET_BUFFER: usize = 4 << 20;
/// Bytes that one stream's reader may leave unread.
const STREAM_WINDOW: u32 = 128 * 1024;
/// Bytes that all streams of a connection may leave unread.
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Streams that the other side may have open: a relay's client has its control stream and a few splices. Who expects
/// more raises it for that connection.
const STREAMS: u32 = 8;
/// What the round trip is taken for before it is known. The 333 ms of RFC 9002 make a lost first packet cost a second;
/// on slower paths than this one packet too many is sent.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// A handshake that takes longer is not worth its place: five attempts of the first packet fit in.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Bounds on what strangers may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointLimits {
    /// Accepted connections at once.
    pub connections: usize,
    /// Accepted connections at once from one address (an IPv6 /64 counts as one). Many nodes may share a NAT.
    pub connections_per_address: usize,
    /// Handshakes at once.
    pub handshakes: usize,
    /// From this many pending handshakes on, clients must prove their address first (QUIC Retry).
    pub retry_above: usize,
}

impl Default for EndpointLimits {
    fn default() -> Self {
        Self { connections: 8192, connections_per_address: 512, handshakes: 512, retry_above: 64 }
    }
}

/// What became of incoming connection attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndpointCounters {
    /// Handshakes that finished.
    pub accepted: u64,
    /// Attempts that were asked to prove their address.
    pub retried: u64,
    /// Attempts refused because a limit was reached.
    pub refused: u64,
    /// Handshakes that failed or took too long.
    pub failed: u64,
}

/// A connection whose other end has proved its identity.
#[derive(Clone, Debug)]
pub struct Authenticated {
    /// The connection.
    pub connection: Connection,
    /// Who is at the other end.
    pub peer: NodeId,
}

impl Authenticated {
    /// The other end's address; IPv4 is never written as IPv4-mapped IPv6.
    pub fn remote_address(&self) -> SocketAddr {
        canonical(self.connection.remote_address())
    }
}

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Someone else answers at this address.
    #[error("{addr} is {actual}, but {expected} was expected: wrong address, or not the machine it claims to be")]
    WrongKey {
        /// Where.
        addr: SocketAddr,
        /// The pinned key.
        expected: NodeId,
        /// The key that was shown.
        actual: NodeId,
    },
    /// The address cannot be used on this socket, or the endpoint is closed.
    #[error("cannot connect to {addr}: {source}")]
    Unusable {
        /// Where.
        addr: SocketAddr,
        /// Why.
        source: quinn::ConnectError,
    },
    /// No answer in time, or a refusal.
    #[error("no connection to {addr}: {source}")]
    Failed {
        /// Where.
        addr: SocketAddr,
        /// Why.
        source: ConnectionError,
    },
    /// The handshake did not end in time.
    #[error("no answer from {addr} within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    TimedOut {
        /// Where.
        addr: SocketAddr,
    },
}

/// Takes over accepted connections of one protocol.
pub trait ConnectionHandler: Send + Sync + 'static {
    /// Serves a connection until it ends.
    fn serve(self: Arc<Self>, connection: Authenticated) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// A QUIC endpoint with an identity. Clones share it.
#[derive(Clone, Debug)]
pub struct QuicEndpoint(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    endpoint: Endpoint,
    identity: Identity,
    client_transport: Arc<TransportConfig>,
    server_transport: Arc<TransportConfig>,
    limits: EndpointLimits,
    handshakes: AtomicUsize,
    connections: Mutex<Occupancy>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    retried: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
}

impl QuicEndpoint {
    /// An endpoint on `socket`. Call it within a tokio runtime. It refuses connections until [`QuicEndpoint::serve`].
    pub fn new(socket: Arc<dyn AsyncUdpSocket>, identity: Identity, limits: EndpointLimits) -> io::Result<Self> {
        let mut config = EndpointConfig::default();
        // First bytes of 0x40 and above only: the port is shared with WireGuard, STUN and probes (RFC 9443).
        config.grease_quic_bit(false);
        let endpoint = Endpoint::new_with_abstract_socket(config, None, socket, Arc::new(TokioRuntime))?;
        Ok(Self(Arc::new(Inner {
            endpoint,
            identity,
            // Whoever sits behind the NAT keeps its mapping alive; an answer is owed to each.
            client_transport: Arc::new(transport(Some(KEEP_ALIVE))),
            server_transport: Arc::new(transport(None)),
            limits,
            handshakes: AtomicUsize::new(0),
            connections: Mutex::new(Occupancy::new(limits.connections, limits.connections_per_address)),
            counters: Counters::default(),
        })))
    }

    /// An endpoint on a UDP socket of its own: for a relay alone, and for tests.
    pub fn bind(addr: SocketAddr, identity: Identity, limits: EndpointLimits) -> io::Result<Self> {
        let domain = socket2::Domain::for_address(addr);
        let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        // Less is slower under bursts, and no reason not to start.
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
        socket.bind(&addr.into())?;
        Self::new(TokioRuntime.wrap_udp_socket(socket.into())?, identity, limits)
    }

    /// This end's identity.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// The socket's address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.endpoint.local_addr()
    }

    /// What became of incoming connection attempts.
    pub fn counters(&self) -> EndpointCounters {
        let Counters { accepted, retried, refused, failed } = &self.0.counters;
        let [accepted, retried, refused, failed] =
            [accepted, retried, refused, failed].map(|counter| counter.load(Ordering::Relaxed));
        EndpointCounters { accepted, retried, refused, failed }
    }

    /// Connects to the holder of the key `server` at `addr`.
    pub async fn connect(
        &self,
        addr: SocketAddr,
        server: NodeId,
        protocol: Protocol,
    ) -> Result<Authenticated, ConnectError> {
        let pinned = tls::client(&self.0.identity, server, protocol);
        let crypto = QuicClientConfig::try_from(pinned.config.clone()).expect("ring has QUIC's initial cipher suite");
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(self.0.client_transport.clone());
        let connecting = self
            .0
            .endpoint
            .connect_with(config, addr, tls::SERVER_NAME)
            .map_err(|source| ConnectError::Unusable { addr, source })?;
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(Authenticated { connection, peer: server }),
            Ok(Err(source)) => Err(match pinned.shown() {
                Some(actual) if actual != server => ConnectError::WrongKey { addr, expected: server, actual },
                Some(_) | None => ConnectError::Failed { addr, source },
            }),
            Err(_) => Err(ConnectError::TimedOut { addr }),
        }
    }

    /// Accepts connections and gives each to the handler of its protocol, until the endpoint is closed.
    /// Protocols without a handler are refused in the TLS handshake. Dropping the future ends the connections.
    pub async fn serve(&self, handlers: Vec<(Protocol, Arc<dyn ConnectionHandler>)>) {
        let protocols: Vec<_> = handlers.iter().map(|(protocol, _)| *protocol).collect();
        self.0.endpoint.set_server_config(Some(self.server_config(&protocols)));
        let handlers: Arc<[_]> = handlers.into();
        let mut tasks = JoinSet::new();
        while let Some(incoming) = self.0.endpoint.accept().await {
            while tasks.try_join_next().is_some() {}
            if let Some((incoming, place)) = self.admit(incoming) {
                let (this, handlers) = (self.clone(), handlers.clone());
                tasks.spawn(async move { this.handle(incoming, place, &handlers).await });
            }
        }
    }

    /// Goes on with another socket; connections migrate to it.
    pub fn rebind(&self, socket: Arc<dyn AsyncUdpSocket>) -> io::Result<()> {
        self.0.endpoint.rebind_abstract(socket)
    }

    /// Closes all connections; [`QuicEndpoint::serve`] returns.
    pub async fn close(&self) {
        self.0.endpoint.close(CloseCode::Done.number().into(), b"shutting down");
        // Lets the farewells leave; the other ends time out where one is lost.
        let _ = tokio::time::timeout(Duration::from_millis(500), self.0.endpoint.wait_idle()).await;
    }

    fn server_config(&self, protocols: &[Protocol]) -> ServerConfig {
        let crypto = QuicServerConfig::try_from(tls::server(&self.0.identity, protocols));
        let mut config = ServerConfig::with_crypto(Arc::new(crypto.expect("ring has QUIC's initial cipher suite")));
        config.transport_config(self.0.server_transport.clone());
        // What waits for a decision is decided at once; these only bound a burst.
        config.max_incoming(self.0.limits.handshakes).incoming_buffer_size(16 * 1024);
        config.incoming_buffer_size_total(4 << 20);
        config
    }

    /// Decides about an attempt before any cryptography is spent on it.
    fn admit(&self, incoming: Incoming) -> Option<(Incoming, Place)> {
        let (inner, counters) = (&self.0, &self.0.counters);
        let pending = inner.handshakes.load(Ordering::Relaxed);
        if pending >= inner.limits.retry_above && !incoming.remote_address_validated() {
            counters.retried.fetch_add(1, Ordering::Relaxed);
            // It may: an address that is not validated has not been asked yet.
            let _ = incoming.retry();
            return None;
        }
        let from = incoming.remote_address().ip();
        let entered = pending < inner.limits.handshakes
            && inner.connections.lock().unwrap_or_else(PoisonError::into_inner).enter(from).is_ok();
        if !entered {
            counters.refused.fetch_add(1, Ordering::Relaxed);
            incoming.refuse();
            return None;
        }
        inner.handshakes.fetch_add(1, Ordering::Relaxed);
        Some((incoming, Place { endpoint: self.0.clone(), from, handshaking: true }))
    }

    async fn handle(&self, incoming: Incoming, mut place: Place, handlers: &[(Protocol, Arc<dyn ConnectionHandler>)]) {
        let from = canonical(incoming.remote_address());
        let connection = match tokio::time::timeout(HANDSHAKE_TIMEOUT, incoming.into_future()).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                tracing::debug!(%from, %error, "QUIC handshake failed");
                self.0.counters.failed.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Err(_) => {
                self.0.counters.failed.fetch_add(1, Ordering::Relaxed);
                return;
            }
        };
        place.handshake_is_over();
        let (Some(peer), Some(protocol)) = (peer_of(&connection), protocol_of(&connection)) else {
            connection.close(CloseCode::Malformed.number().into(), b"no identity or protocol");
            self.0.counters.failed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.0.counters.accepted.fetch_add(1, Ordering::Relaxed);
        if let Some((_, handler)) = handlers.iter().find(|(served, _)| *served == protocol) {
            handler.clone().serve(Authenticated { connection, peer }).await;
        }
    }
}

/// A connection's place among those of its address; given back on drop.
struct Place {
    endpoint: Arc<Inner>,
    from: IpAddr,
    handshaking: bool,
}

impl Place {
    fn handshake_is_over(&mut self) {
        if std::mem::take(&mut self.handshaking) {
            self.endpoint.handshakes.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.handshake_is_over();
        self.endpoint.connections.lock().unwrap_or_else(PoisonError::into_inner).leave(self.from);
    }
}

/// Congestion control is quinn's Cubic. Sender, relay and receiver on one busy machine with two cores moved 0.5 to
/// 1.3 Gb/s of 1312-byte packets with it, at about 8 CPU seconds per GiB for the three; with quinn's BBR 0.3 to 0.4 Gb/s
/// at 12 to 18. More seldom acknowledgements or a larger initial window made no difference beyond the noise.
fn transport(keep_alive: Option<Duration>) -> TransportConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(MTU_UPPER_BOUND);
    let mut config = TransportConfig::default();
    config
        .keep_alive_interval(keep_alive)
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE_TIMEOUT).expect("30 s fit a varint of milliseconds")))
        .initial_rtt(INITIAL_RTT)
        .initial_mtu(INITIAL_MTU)
        .mtu_discovery_config(Some(discovery))
        .datagram_receive_buffer_size(Some(DATAGRAM_RECEIVE_BUFFER))
        .datagram_send_buffer_size(DATAGRAM_SEND_BUFFER)
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(CONNECTION_WINDOW.into())
        .max_concurrent_bidi_streams(STREAMS.into())
        .max_concurrent_uni_streams(VarInt::from_u32(0));
    config
}

fn peer_of(connection: &Connection) -> Option<NodeId> {
    let certificates = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    tls::peer_identity(&certificates)
}

fn protocol_of(connection: &Connection) -> Option<Protocol> {
    let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    Protocol::from_alpn(data.protocol.as_deref()?)
}

/// IPv4 as IPv4, also on a socket that serves both families.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
