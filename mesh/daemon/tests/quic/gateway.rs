//! Streams to the control plane, directly and through relays.

use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use keystone_mesh::quic::gateway::{AcceptorSnapshot, AttemptError, DialError, StreamVia, over_splice};
use keystone_mesh::quic::splice::ByteStream;
use keystone_mesh::quic::{
    AcceptSpliced, GatewayAcceptor, GatewayStream, Protocol, QuicEndpoint, RelayServerConfig, SplicedStream, dial,
    frames,
};
use keystone_mesh_core::relay::Rendezvous;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::mpsc;

use crate::world::{Client, NETWORK, RELAY, Relay, endpoint, id, identity, loopback, verify, within};

const MARKER: &str = "a secret that no relay may read";
const PATIENCE: Duration = Duration::from_secs(10);

/// A control plane that takes direct connections.
struct ControlPlane {
    endpoint: QuicEndpoint,
    acceptor: Arc<GatewayAcceptor>,
    streams: mpsc::Receiver<GatewayStream>,
}

impl ControlPlane {
    fn start() -> Self {
        let endpoint = endpoint(NETWORK);
        let (acceptor, streams) = GatewayAcceptor::new(&identity(NETWORK), 8);
        let (serving, handler) = (endpoint.clone(), acceptor.clone());
        tokio::spawn(async move { serving.serve(vec![(Protocol::Gateway, handler)]).await });
        Self { endpoint, acceptor, streams }
    }

    fn address(&self) -> Rendezvous {
        Rendezvous::Gateway(self.endpoint.local_addr().unwrap().into())
    }

    /// Its connection to a relay.
    async fn at_relay(&self, relay: &Relay) -> Client {
        let client = Client::with(self.endpoint.clone(), relay.addr(), None, Some(self.acceptor.clone()));
        client.up().await;
        client
    }

    async fn next(&mut self) -> GatewayStream {
        within("a stream", self.streams.recv()).await.unwrap()
    }
}

/// Says a message, and answers it at the other end by writing and dropping the stream at once.
async fn converse(mut dialler: GatewayStream, plane: &mut ControlPlane) -> GatewayStream {
    frames::write(&mut dialler, &MARKER, 1000).await.unwrap();
    let mut accepted = plane.next().await;
    assert_eq!(frames::read::<String>(&mut accepted, 1000).await.unwrap(), MARKER);
    frames::write(&mut accepted, &"x".repeat(100_000), 1 << 20).await.unwrap();
    let (peer, via, observed) = (accepted.peer, accepted.via, accepted.observed);
    drop(accepted);
    let answer = within("the answer", frames::read::<String>(&mut dialler, 1 << 20)).await.unwrap();
    assert_eq!(answer.len(), 100_000);
    assert!(matches!(
        frames::read::<String>(&mut dialler, 1000).await,
        Err(frames::StreamError::Closed | frames::StreamError::Io(_))
    ));
    assert_eq!((peer, via), (id(1), dialler.via));
    assert_eq!(dialler.peer, id(NETWORK));
    assert_eq!(observed.unwrap().ip(), loopback().ip());
    dialler
}

fn silent() -> (UdpSocket, Rendezvous) {
    let socket = UdpSocket::bind(loopback()).unwrap();
    let rendezvous = Rendezvous::Gateway(socket.local_addr().unwrap().into());
    (socket, rendezvous)
}

#[tokio::test]
async fn a_direct_stream_carries_messages_both_ways() {
    let mut plane = ControlPlane::start();
    let node = endpoint(1);
    let stream = dial(&node, id(NETWORK), &[plane.address()], None, PATIENCE).await.unwrap();
    let stream = converse(stream, &mut plane).await;
    assert_eq!(stream.via, StreamVia::Direct);
}

#[tokio::test]
async fn a_stream_through_a_relay_carries_messages_both_ways() {
    let (relay, mut plane) = (Relay::start(), ControlPlane::start());
    let _connection = plane.at_relay(&relay).await;
    let node = endpoint(1);
    let stream = dial(&node, id(NETWORK), &[Rendezvous::Relay(relay.addr())], None, PATIENCE).await.unwrap();
    assert_eq!(stream.observed, Some(node.local_addr().unwrap()));
    let stream = converse(stream, &mut plane).await;
    assert_eq!(stream.via, StreamVia::Relay(id(RELAY)));
    assert_eq!(relay.server.snapshot().splices, 1);
}

#[tokio::test]
async fn a_relay_inside_the_control_plane_needs_no_detour() {
    let mut plane = ControlPlane::start();
    let gateway: Option<Arc<dyn AcceptSpliced>> = Some(plane.acceptor.clone());
    let config = RelayServerConfig { gateway, ..RelayServerConfig::standalone(id(NETWORK), verify()) };
    let relay = Relay::with(loopback(), NETWORK, config);
    let rendezvous = [Rendezvous::Relay(relay.addr())];
    let stream = dial(&endpoint(1), id(NETWORK), &rendezvous, None, PATIENCE).await.unwrap();
    converse(stream, &mut plane).await;
}

#[tokio::test]
async fn a_client_of_a_relay_opens_streams_through_its_connection() {
    let (relay, mut plane) = (Relay::start(), ControlPlane::start());
    let _connection = plane.at_relay(&relay).await;
    let node = Client::node(&relay, 1);
    node.up().await;
    let splice = node.client.open_gateway_stream(id(NETWORK)).await.unwrap();
    let stream = over_splice(&identity(1), id(NETWORK), id(RELAY), splice).await.unwrap();
    converse(stream, &mut plane).await;
}

#[tokio::test]
async fn dialling_does_not_take_the_place_of_the_nodes_own_relay_connection() {
    let (relay, mut plane) = (Relay::start(), ControlPlane::start());
    let _connection = plane.at_relay(&relay).await;
    let node = Client::node(&relay, 1);
    node.up().await;
    let rendezvous = [Rendezvous::Relay(relay.addr())];
    let stream = dial(&node.endpoint, id(NETWORK), &rendezvous, None, PATIENCE).await.unwrap();
    converse(stream, &mut plane).await;
    assert_eq!(relay.server.snapshot().replaced, 0);
    node.up().await;
}

#[tokio::test]
async fn the_live_rendezvous_wins_while_a_dead_one_is_silent() {
    let mut plane = ControlPlane::start();
    let (_held, dead) = silent();
    let start = Instant::now();
    let stream = dial(&endpoint(1), id(NETWORK), &[dead, plane.address()], None, PATIENCE).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    converse(stream, &mut plane).await;
}

#[tokio::test]
async fn every_failed_attempt_is_reported() {
    let ((_held, dead), relay) = (silent(), Relay::start());
    let impostor = Rendezvous::Gateway(relay.at.into());
    let nameless = Rendezvous::Gateway("does-not-exist.invalid:5".parse().unwrap());
    let lonely = Rendezvous::Relay(relay.addr());
    let (endpoint, patience) = (endpoint(1), Duration::from_secs(1));
    let places = [dead.clone(), impostor, nameless, lonely];
    let error = dial(&endpoint, id(NETWORK), &places, None, patience).await.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("the control plane was not reached: "), "{text}");
    assert!(text.contains(&format!("directly at {dead}: no answer in time")), "{text}");
    assert!(text.contains("cannot resolve does-not-exist.invalid:5"), "{text}");
    assert!(text.contains("the control plane is not connected to this relay"), "{text}");
    assert!(matches!(error, DialError::AllFailed(all) if all.len() == 4));
    assert!(matches!(dial(&endpoint, id(NETWORK), &[], None, patience).await, Err(DialError::NoRendezvous)));
}

#[tokio::test]
async fn another_control_plane_is_refused_by_name() {
    let plane = ControlPlane::start();
    let error = dial(&endpoint(1), id(7), &[plane.address()], None, PATIENCE).await.unwrap_err();
    assert!(error.to_string().contains(&format!("but {} was expected", id(7))), "{error}");
}

#[tokio::test]
async fn a_relay_that_misdirects_is_found_out() {
    let (near, far) = tokio::io::duplex(4096);
    let (impostor, mut streams) = GatewayAcceptor::new(&identity(66), 1);
    impostor.accept_spliced(SplicedStream { relay: id(RELAY), from: id(1), addr: loopback(), io: Box::new(far) });
    let error = over_splice(&identity(1), id(NETWORK), id(RELAY), Box::new(near)).await.unwrap_err();
    assert!(matches!(error, AttemptError::WrongKey { actual, .. } if actual == id(66)), "{error}");
    assert!(streams.try_recv().is_err());
}

#[tokio::test]
async fn a_relay_that_announces_another_client_is_found_out() {
    let (near, far) = tokio::io::duplex(4096);
    let (acceptor, mut streams) = GatewayAcceptor::new(&identity(NETWORK), 1);
    let spliced = SplicedStream { relay: id(RELAY), from: id(5), addr: loopback(), io: Box::new(far) };
    acceptor.clone().accept_spliced(spliced);
    let dialled = over_splice(&identity(1), id(NETWORK), id(RELAY), Box::new(near)).await;
    let mut end = Vec::new();
    let _ = within("the end", dialled.unwrap().read_to_end(&mut end)).await;
    assert!(streams.try_recv().is_err());
    assert_eq!(acceptor.counters(), AcceptorSnapshot { accepted: 0, failed: 1, refused: 0 });
}

#[tokio::test]
async fn the_relay_sees_ciphertext_only() {
    let (relay, mut plane) = (Relay::start(), ControlPlane::start());
    let tap = Arc::new(TappingAcceptor { seen: Arc::default(), inner: plane.acceptor.clone() });
    let network = Client::with(plane.endpoint.clone(), relay.addr(), None, Some(tap.clone()));
    network.up().await;
    let node = endpoint(1);
    let stream = dial(&node, id(NETWORK), &[Rendezvous::Relay(relay.addr())], None, PATIENCE).await.unwrap();
    converse(stream, &mut plane).await;
    let seen = tap.seen.lock().unwrap();
    assert!(seen.len() > 100_000, "the tap saw {} bytes", seen.len());
    let contains = |needle: &[u8]| seen.windows(needle.len()).any(|window| window == needle);
    assert!(!contains(MARKER.as_bytes()) && !contains(b"xxxxxxxx"));
    assert!(!contains(id(1).as_bytes()), "nor the identity in the TLS handshake");
}

#[tokio::test]
async fn streams_that_nobody_takes_are_refused_and_not_piled_up() {
    let plane = ControlPlane::start();
    let node = endpoint(1);
    let mut dialled = Vec::new();
    for _ in 0..12 {
        let mut stream = dial(&node, id(NETWORK), &[plane.address()], None, PATIENCE).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        dialled.push(stream);
    }
    crate::world::eventually("eight wait, four are refused", || {
        plane.acceptor.counters() == AcceptorSnapshot { accepted: 8, failed: 0, refused: 4 }
    })
    .await;
}

/// Keeps what passes between the relay and TLS: exactly what the relay's pipe carries.
struct TappingAcceptor {
    seen: Arc<Mutex<Vec<u8>>>,
    inner: Arc<GatewayAcceptor>,
}

impl AcceptSpliced for TappingAcceptor {
    fn accept_spliced(self: Arc<Self>, stream: SplicedStream) {
        let io = Box::new(Tap { seen: self.seen.clone(), inner: stream.io });
        self.inner.clone().accept_spliced(SplicedStream { io, ..stream });
    }
}

struct Tap {
    seen: Arc<Mutex<Vec<u8>>>,
    inner: Box<dyn ByteStream>,
}

impl AsyncRead for Tap {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.seen.lock().unwrap().extend_from_slice(&buf.filled()[before..]);
        polled
    }
}

impl AsyncWrite for Tap {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let Poll::Ready(Ok(written)) = polled {
            self.seen.lock().unwrap().extend_from_slice(&buf[..written]);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
