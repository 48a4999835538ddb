//! Relays and nodes on loopback, and patience with a deadline.

use std::fmt::Debug;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use keystone_mesh::quic::relay_client::RelayClientConfig;
use keystone_mesh::quic::relay_server::{Deliver, Verify};
use keystone_mesh::quic::{
    AcceptSpliced, EndpointLimits, Protocol, QuicEndpoint, RelayClient, RelayServer, RelayServerConfig, RelayState,
};
use keystone_mesh_core::key::Secret;
use keystone_mesh_core::relay::{Code, Refusal, RelayAddr};
use keystone_mesh_core::{Identity, NodeId};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Far more than anything here takes, also on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
/// Whose key is the network key.
pub(crate) const NETWORK: u8 = 200;
/// Whose key relays have.
pub(crate) const RELAY: u8 = 100;

pub(crate) fn identity(byte: u8) -> Identity {
    Secret::from_bytes([byte; 32]).identity()
}

pub(crate) fn id(byte: u8) -> NodeId {
    identity(byte).id()
}

pub(crate) fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

pub(crate) fn endpoint(byte: u8) -> QuicEndpoint {
    QuicEndpoint::bind(loopback(), identity(byte), EndpointLimits::default()).unwrap()
}

/// What passes for an approval of a node here.
pub(crate) fn approval(byte: u8) -> Vec<u8> {
    [b"approved ", id(byte).as_bytes().as_slice()].concat()
}

pub(crate) fn verify() -> Verify {
    Arc::new(|credential, client| match credential.strip_prefix(b"approved ") {
        Some(named) if named == client.as_bytes() => Ok(()),
        Some(_) | None => {
            let message = "the approval is for another node".into();
            Err(Refusal { code: Code::BadCredential, message })
        }
    })
}

/// A relay at work.
pub(crate) struct Relay {
    pub(crate) endpoint: QuicEndpoint,
    pub(crate) server: Arc<RelayServer>,
    pub(crate) at: SocketAddr,
    serving: JoinHandle<()>,
}

impl Relay {
    pub(crate) fn start() -> Self {
        Self::with(loopback(), RELAY, RelayServerConfig::standalone(id(NETWORK), verify()))
    }

    pub(crate) fn with(at: SocketAddr, key: u8, config: RelayServerConfig) -> Self {
        let endpoint = QuicEndpoint::bind(at, identity(key), EndpointLimits::default()).unwrap();
        Self::on(endpoint, config)
    }

    pub(crate) fn on(endpoint: QuicEndpoint, config: RelayServerConfig) -> Self {
        let server = RelayServer::new(endpoint.identity().id(), config);
        let (serving, handler) = (endpoint.clone(), server.clone());
        let serving = tokio::spawn(async move { serving.serve(vec![(Protocol::Relay, handler)]).await });
        Self { at: endpoint.local_addr().unwrap(), endpoint, server, serving }
    }

    pub(crate) fn addr(&self) -> RelayAddr {
        RelayAddr { id: self.server.id(), addrs: vec![self.at.into()] }
    }

    /// Ends it and waits until its port is free.
    pub(crate) async fn stop(self) {
        self.endpoint.close().await;
        self.serving.await.unwrap();
        let at = self.at;
        drop((self.endpoint, self.server));
        eventually("the port is free", || std::net::UdpSocket::bind(at).is_ok()).await;
    }
}

/// A client of a relay, and what it received.
pub(crate) struct Client {
    pub(crate) client: RelayClient,
    pub(crate) endpoint: QuicEndpoint,
    pub(crate) inbox: mpsc::UnboundedReceiver<(NodeId, Bytes)>,
}

impl Client {
    /// An approved node.
    pub(crate) fn node(relay: &Relay, byte: u8) -> Self {
        Self::with(endpoint(byte), relay.addr(), Some(approval(byte)), None)
    }

    pub(crate) fn with(
        endpoint: QuicEndpoint,
        relay: RelayAddr,
        credential: Option<Vec<u8>>,
        spliced: Option<Arc<dyn AcceptSpliced>>,
    ) -> Self {
        let (receive, inbox) = inbox();
        let config = RelayClientConfig { credential, seed: 1, receive, spliced, changes: None };
        Self { client: RelayClient::connect(endpoint.clone(), relay, config), endpoint, inbox }
    }

    /// Waits until it is up; gives its state.
    pub(crate) async fn up(&self) -> RelayState {
        self.reaches(|state| matches!(state, RelayState::Up { .. })).await
    }

    /// Waits for a state.
    pub(crate) async fn reaches(&self, wanted: impl FnMut(&RelayState) -> bool) -> RelayState {
        let mut state = self.client.state();
        let reached = tokio::time::timeout(DEADLINE, state.wait_for(wanted)).await;
        match reached {
            Ok(state) => state.unwrap().clone(),
            Err(_) => panic!("the relay client is still {:?}", self.client.state().borrow().clone()),
        }
    }

    pub(crate) fn send(&self, to: u8, packets: &[&[u8]]) -> usize {
        self.client.send(id(to), &mut packets.iter().copied())
    }

    pub(crate) async fn receive(&mut self) -> (NodeId, Bytes) {
        within("a packet", self.inbox.recv()).await.unwrap()
    }
}

pub(crate) fn inbox() -> (Deliver, mpsc::UnboundedReceiver<(NodeId, Bytes)>) {
    let (into, inbox) = mpsc::unbounded_channel();
    let deliver: Deliver = Arc::new(move |_relay, from, packets| {
        for packet in packets {
            let _ = into.send((from, packet));
        }
    });
    (deliver, inbox)
}

/// Waits for something, with a deadline.
pub(crate) async fn within<T>(what: &str, waiting: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, waiting).await {
        Ok(came) => came,
        Err(_) => panic!("{what} did not come within {DEADLINE:?}"),
    }
}

/// Waits for a condition, with a deadline.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    within(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A socket with a switch: hears and says nothing while off; also loses datagrams larger than its path takes.
#[derive(Debug)]
pub(crate) struct BadSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    off: AtomicBool,
    largest: usize,
    /// Smallest first byte that was sent.
    first_byte: AtomicUsize,
}

impl BadSocket {
    pub(crate) fn bind(largest: usize) -> Arc<Self> {
        let socket = std::net::UdpSocket::bind(loopback()).unwrap();
        let inner = TokioRuntime.wrap_udp_socket(socket).unwrap();
        Arc::new(Self { inner, off: AtomicBool::new(false), largest, first_byte: AtomicUsize::new(256) })
    }

    pub(crate) fn endpoint(self: &Arc<Self>, byte: u8) -> QuicEndpoint {
        QuicEndpoint::new(self.clone(), identity(byte), EndpointLimits::default()).unwrap()
    }

    pub(crate) fn switch_off(&self) {
        self.off.store(true, Ordering::Relaxed);
    }

    pub(crate) fn smallest_first_byte(&self) -> usize {
        self.first_byte.load(Ordering::Relaxed)
    }
}

impl AsyncUdpSocket for BadSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let size = transmit.segment_size.unwrap_or(transmit.contents.len());
        for datagram in transmit.contents.chunks(size) {
            self.first_byte.fetch_min(datagram[0].into(), Ordering::Relaxed);
        }
        if self.off.load(Ordering::Relaxed) || size > self.largest { Ok(()) } else { self.inner.try_send(transmit) }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.inner.poll_recv(cx, bufs, meta) {
                Poll::Ready(Ok(count)) => {
                    let lost = |meta: &RecvMeta| meta.stride > self.largest;
                    if !self.off.load(Ordering::Relaxed) && !meta[..count].iter().any(lost) {
                        return Poll::Ready(Ok(count));
                    }
                }
                other @ (Poll::Ready(Err(_)) | Poll::Pending) => return other,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
