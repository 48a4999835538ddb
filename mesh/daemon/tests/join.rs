//! Joining, with real QUIC on loopback: who is let in, who is not, and what they are told.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use keystone_mesh::control::{Answer, Request};
use keystone_mesh::join::join;
use keystone_mesh::member::{self, Founding, REGISTRY_FILE};
use keystone_mesh::quic::endpoint::{ConnectionHandler, EndpointLimits, QuicEndpoint};
use keystone_mesh::quic::gateway::{GatewayAcceptor, StreamVia};
use keystone_mesh::quic::relay_pool::{RelayPool, RelayPoolConfig};
use keystone_mesh::quic::relay_server::{self, RelayServer, RelayServerConfig};
use keystone_mesh::quic::tls::Protocol;
use keystone_mesh::registry::server::{Caller, Gateway};
use keystone_mesh::relay::verifier;
use keystone_mesh::state::{Membership, StateDir};
use keystone_mesh::store::Store;
use keystone_mesh_core::Secret;
use keystone_mesh_core::relay::{RelayAddr, Rendezvous};
use keystone_mesh_core::token::Token;
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(20);

/// A control plane and a relay on loopback, without data planes.
struct Network {
    store: Arc<Store>,
    gateway: SocketAddr,
    dir: tempfile::TempDir,
    relays: RelayPool,
    _tasks: JoinSet<()>,
}

impl Network {
    #[expect(clippy::unused_async, reason = "keeps it inside a runtime, which QUIC needs")]
    async fn start() -> Self {
        let mut tasks = JoinSet::new();
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        let secret = StateDir::open(&home).unwrap().secret_or_create().unwrap();
        let identity = secret.identity();

        let relay_identity = Secret::from_bytes([77; 32]).identity();
        let relay_endpoint = QuicEndpoint::bind(loopback(), relay_identity.clone(), EndpointLimits::default()).unwrap();
        let relay = RelayAddr { id: relay_identity.id(), addrs: vec![relay_endpoint.local_addr().unwrap().into()] };
        let server = RelayServer::new(relay.id, RelayServerConfig::standalone(identity.id(), verifier(identity.id())));
        tasks.spawn(async move { relay_server::serve(&relay_endpoint, server).await });

        let endpoint = QuicEndpoint::bind(loopback(), identity.clone(), EndpointLimits::default()).unwrap();
        let gateway = endpoint.local_addr().unwrap();
        member::init(
            &home,
            Founding {
                name: "home".parse().unwrap(),
                ipv4: "10.98.0.0/16".parse().unwrap(),
                ipv6: None,
                relays: vec![relay.clone()],
                gateways: vec![gateway.into()],
            },
        )
        .unwrap();
        let state = StateDir::read_only(&home);
        let store = Arc::new(Store::open(&state.file(REGISTRY_FILE), identity.clone()).unwrap());

        let (acceptor, mut streams) = GatewayAcceptor::new(&identity, 16);
        let handlers: Vec<(Protocol, Arc<dyn ConnectionHandler>)> = vec![(Protocol::Gateway, acceptor.clone())];
        let pool = RelayPoolConfig {
            credential: None,
            seed: 1,
            receive: Arc::new(|_, _, _| {}),
            spliced: Some(acceptor),
            local: None,
        };
        let relays = RelayPool::new(endpoint.clone(), pool);
        relays.set_relays(&[relay]);
        tasks.spawn(async move { endpoint.serve(handlers).await });
        let serving = Arc::new(Gateway::new(store.clone()));
        tasks.spawn(async move {
            while let Some(stream) = streams.recv().await {
                let caller = Caller {
                    id: stream.peer,
                    address: stream.observed.unwrap(),
                    direct: stream.via == StreamVia::Direct,
                };
                let serving = serving.clone();
                tokio::spawn(async move { serving.serve(stream, caller).await });
            }
        });
        Self { store, gateway, dir, relays, _tasks: tasks }
    }

    fn token(&self, request: Request) -> Token {
        match member::answer(&*self.store, request).now_or_never().unwrap() {
            Answer::Token { token, .. } => token.parse().unwrap(),
            Answer::Status(_)
            | Answer::Conditions { .. }
            | Answer::Tokens { .. }
            | Answer::Done
            | Answer::Failed { .. } => panic!("no token"),
        }
    }

    fn once(&self) -> Token {
        self.token(Request::TokenCreate { ttl: None, uses: Some(1), names: None, routes: vec![] })
    }

    async fn join(&self, name: &str, token: &Token) -> Result<Membership, String> {
        join_in(&self.dir.path().join(name), name, token, &[]).await
    }
}

async fn join_in(dir: &Path, name: &str, token: &Token, routes: &[&str]) -> Result<Membership, String> {
    let state = StateDir::open(dir).unwrap();
    let routes = routes.iter().map(|route| route.parse().unwrap()).collect();
    join(&state, token, name.parse().unwrap(), routes, PATIENCE).await.map_err(|error| format!("{error:#}"))
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_joins_straight_and_through_a_relay() {
    let network = Network::start().await;
    for (name, keep) in [("straight", 0), ("relayed", 1)] {
        let mut token = network.once();
        token.rendezvous.retain(|way| matches!(way, Rendezvous::Relay(_)) == (keep == 1));
        let membership = network.join(name, &token).await.unwrap();
        assert_eq!(membership.network, network.store.network().get().id);
        let kept = StateDir::read_only(&network.dir.path().join(name)).membership().unwrap().unwrap();
        assert_eq!(kept, membership);
    }
    assert_eq!(network.store.names().len(), 3);
    assert_eq!(network.relays.states().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_over_say_so() {
    let network = Network::start().await;
    let used = network.once();
    network.join("first", &used).await.unwrap();
    assert!(network.join("second", &used).await.unwrap_err().contains("used up"));
    assert!(network.join("first", &used).await.is_ok(), "a machine that is in already is told so");

    let expired = network.token(Request::TokenCreate { ttl: Some(0), uses: None, names: None, routes: vec![] });
    assert!(network.join("late", &expired).await.unwrap_err().contains("expired"));

    let revoked = network.once();
    network.store.revoke_token(revoked.id).unwrap();
    assert!(network.join("revoked", &revoked).await.unwrap_err().contains("revoked"));

    let unknown = Token { secret: keystone_mesh_core::token::TokenSecret::from_bytes([9; 20]), ..network.once() };
    assert!(network.join("guesser", &unknown).await.unwrap_err().contains("does not know this token"));
    assert_eq!(network.store.names().len(), 2, "nobody else came in");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_networks_key_is_not_believed() {
    let network = Network::start().await;
    let token = Token { network: Secret::from_bytes([5; 32]).identity().id(), ..network.once() };
    let error = network.join("worker", &token).await.unwrap_err();
    assert!(error.contains("not reached"), "{error}");
    assert!(StateDir::read_only(&network.dir.path().join("worker")).membership().unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_machine_cannot_claim_a_known_name() {
    let network = Network::start().await;
    network.join("worker", &network.once()).await.unwrap();
    let token = network.once();
    let error = join_in(&network.dir.path().join("impostor"), "worker", &token, &[]).await.unwrap_err();
    assert!(error.contains("already in the network with another identity"), "{error}");
    assert!(network.join("worker-2", &token).await.is_ok(), "the refusal cost no use");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_routes_are_held_to_the_token() {
    let network = Network::start().await;
    let token = network.token(Request::TokenCreate {
        ttl: None,
        uses: None,
        names: Some("worker-*".parse().unwrap()),
        routes: vec!["10.42.0.0/16".parse().unwrap()],
    });
    let dir = |name: &str| network.dir.path().join(name);
    assert!(network.join("other", &token).await.unwrap_err().contains("worker-*"));
    let error = join_in(&dir("worker-1"), "worker-1", &token, &["10.43.0.0/24"]).await.unwrap_err();
    assert!(error.contains("allows no route to 10.43.0.0/24"), "{error}");
    join_in(&dir("worker-2"), "worker-2", &token, &["10.42.1.0/24"]).await.unwrap();
    let error = join_in(&dir("worker-3"), "worker-3", &token, &["10.42.1.128/25"]).await.unwrap_err();
    assert!(error.contains("overlaps 10.42.1.0/24") && error.contains("worker-2"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_is_slowed() {
    let network = Network::start().await;
    let wrong = Token { secret: keystone_mesh_core::token::TokenSecret::from_bytes([9; 20]), ..network.once() };
    let mut slowed = false;
    for attempt in 0..8 {
        let error = network.join(&format!("guess-{attempt}"), &wrong).await.unwrap_err();
        slowed |= error.contains("too many failed joins");
    }
    assert!(slowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_in_one_network_does_not_join_another() {
    let (one, other) = (Network::start().await, Network::start().await);
    one.join("worker", &one.once()).await.unwrap();
    let error = join_in(&one.dir.path().join("worker"), "worker", &other.once(), &[]).await.unwrap_err();
    assert!(error.contains("keystone-mesh leave"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_at_the_gateway_ends_only_its_own_session() {
    use tokio::io::AsyncWriteExt as _;
    let network = Network::start().await;
    let stranger = Secret::from_bytes([42; 32]).identity();
    let endpoint = QuicEndpoint::bind(loopback(), stranger, EndpointLimits::default()).unwrap();
    let id = network.store.network().get().id;
    // 0x00ffffff: a length that only answers may have.
    let rubbish = [&b"\xff\xff\xff\xffhello"[..], b"\0\xff\xff\xffhello", b"\0\0\0\x05hello", b"\0\0\0\x02{}", b""];
    for rubbish in rubbish {
        let ways = [Rendezvous::Gateway(network.gateway.into())];
        let dialled = keystone_mesh::quic::gateway::dial(&endpoint, id, &ways, None, PATIENCE).await;
        let mut stream = dialled.unwrap();
        stream.write_all(rubbish).await.unwrap();
        let _ = stream.shutdown().await;
    }
    network.join("worker", &network.once()).await.unwrap();
}
