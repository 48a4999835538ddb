//! The life of a connection to a relay.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use keystone_mesh::quic::{RelayServerConfig, RelayState};
use keystone_mesh_core::relay::{HostPort, RelayAddr, Role};
use quinn::{Runtime, TokioRuntime};

use crate::world::{Client, NETWORK, RELAY, Relay, approval, endpoint, eventually, id, loopback, verify};

fn observed(state: &RelayState) -> std::net::SocketAddr {
    match state {
        RelayState::Up { observed, .. } => *observed,
        RelayState::Connecting | RelayState::Down { .. } => panic!("not up: {state:?}"),
    }
}

#[tokio::test]
async fn the_relay_tells_a_client_its_address_and_role() {
    let relay = Relay::start();
    let node = Client::node(&relay, 1);
    let state = node.up().await;
    assert_eq!(observed(&state), node.endpoint.local_addr().unwrap());
    assert!(matches!(state, RelayState::Up { role: Role::Node, .. }), "{state:?}");
    let network = Client::with(endpoint(NETWORK), relay.addr(), None, None);
    assert!(matches!(network.up().await, RelayState::Up { role: Role::Network, .. }));
    let joiner = Client::with(endpoint(3), relay.addr(), None, None);
    assert!(matches!(joiner.up().await, RelayState::Up { role: Role::Joiner, .. }));
    assert_eq!(relay.server.snapshot().admitted, [1, 1, 1]);
}

#[tokio::test]
async fn a_client_whose_address_changes_is_told_its_address_and_loses_nothing() {
    let relay = Relay::start();
    let (mut a, mut b) = (Client::node(&relay, 1), Client::node(&relay, 2));
    let before = observed(&a.up().await);
    b.up().await;
    let socket = UdpSocket::bind(loopback()).unwrap();
    let after = socket.local_addr().unwrap();
    a.endpoint.rebind(TokioRuntime.wrap_udp_socket(socket).unwrap()).unwrap();
    a.client.network_changed();
    let state = a.reaches(|state| matches!(state, RelayState::Up { observed, .. } if *observed != before)).await;
    assert_eq!(observed(&state), after);
    assert_eq!(relay.server.snapshot().admitted, [0, 2, 0], "the same connection");
    b.send(1, &[b"still there"]);
    assert_eq!(a.receive().await.1, b"still there".as_slice());
    a.send(2, &[b"yes"]);
    assert_eq!(b.receive().await.1, b"yes".as_slice());
}

#[tokio::test]
async fn a_second_connection_with_the_same_identity_takes_the_place_of_the_first() {
    let relay = Relay::start();
    let (first, other) = (Client::node(&relay, 1), Client::node(&relay, 2));
    tokio::join!(first.up(), other.up());
    let mut second = Client::node(&relay, 1);
    second.up().await;
    let down = first.reaches(|state| matches!(state, RelayState::Down { .. })).await;
    let RelayState::Down { why, retry_at } = down else { unreachable!("waited for") };
    assert!(why.contains("another connection with this identity"), "{why}");
    assert!(retry_at > Instant::now() + Duration::from_secs(5), "two of them do not fight");
    other.send(1, &[b"to the present one"]);
    assert_eq!(second.receive().await.1, b"to the present one".as_slice());
    assert_eq!(relay.server.snapshot().replaced, 1);
    assert_eq!(relay.server.snapshot().clients, 2);
}

#[tokio::test]
async fn clients_come_back_soon_after_a_relay_restarts() {
    let relay = Relay::start();
    let (a, mut b) = (Client::node(&relay, 1), Client::node(&relay, 2));
    tokio::join!(a.up(), b.up());
    let at = relay.at;
    relay.stop().await;
    let down = |state: &RelayState| !matches!(state, RelayState::Up { .. });
    tokio::join!(a.reaches(down), b.reaches(down));
    let back = Instant::now();
    let relay = Relay::with(at, RELAY, RelayServerConfig::standalone(id(NETWORK), verify()));
    tokio::join!(a.up(), b.up());
    assert!(back.elapsed() < Duration::from_secs(8), "{:?}", back.elapsed());
    a.send(2, &[b"as before"]);
    assert_eq!(b.receive().await.1, b"as before".as_slice());
    assert_eq!(relay.server.snapshot().clients, 2);
}

#[tokio::test]
async fn a_network_change_ends_the_pause_at_once() {
    let relay = Relay::start();
    let first = Client::node(&relay, 1);
    first.up().await;
    let second = Client::node(&relay, 1);
    let down = first.reaches(|state| matches!(state, RelayState::Down { .. })).await;
    let RelayState::Down { retry_at, .. } = down else { unreachable!("waited for") };
    drop(second);
    first.client.network_changed();
    first.up().await;
    assert!(Instant::now() < retry_at);
}

#[tokio::test]
async fn an_approval_turns_a_joiner_into_a_node() {
    let relay = Relay::start();
    let node = Client::with(endpoint(1), relay.addr(), None, None);
    assert!(matches!(node.up().await, RelayState::Up { role: Role::Joiner, .. }));
    assert_eq!(node.send(2, &[b"not yet"]), 1);
    node.client.set_credential(Some(&approval(1)));
    node.reaches(|state| matches!(state, RelayState::Up { role: Role::Node, .. })).await;
    eventually("it is in the table", || relay.server.snapshot().clients == 1).await;
}

#[tokio::test]
async fn a_refused_credential_is_explained() {
    let relay = Relay::start();
    let node = Client::with(endpoint(1), relay.addr(), Some(approval(2)), None);
    let down = node.reaches(|state| matches!(state, RelayState::Down { .. })).await;
    let RelayState::Down { why, .. } = down else { unreachable!("waited for") };
    assert_eq!(why, "the relay refused: the approval is for another node");
}

#[tokio::test]
async fn a_relay_is_found_by_name_and_by_any_of_its_addresses() {
    let relay = Relay::start();
    let silent = UdpSocket::bind(loopback()).unwrap();
    let by_name: HostPort = format!("localhost:{}", relay.at.port()).parse().unwrap();
    let addrs = vec![silent.local_addr().unwrap().into(), by_name, "does-not-exist.invalid:1".parse().unwrap()];
    let node = Client::with(endpoint(1), RelayAddr { id: id(RELAY), addrs }, Some(approval(1)), None);
    node.up().await;
}

#[tokio::test]
async fn a_client_that_is_dropped_leaves_at_once() {
    let relay = Relay::start();
    let node = Client::node(&relay, 1);
    node.up().await;
    drop(node.client);
    eventually("the relay sees it go", || relay.server.snapshot().clients == 0).await;
}

#[tokio::test]
async fn a_node_that_lost_its_approval_is_sent_away_with_the_reason() {
    let relay = Relay::start();
    let node = Client::node(&relay, 1);
    node.up().await;
    assert!(relay.server.disconnect(id(1), "the approval was withdrawn"));
    let down = node.reaches(|state| matches!(state, RelayState::Down { .. })).await;
    assert!(matches!(&down, RelayState::Down { why, .. } if why == "the approval was withdrawn"), "{down:?}");
    assert!(!relay.server.disconnect(id(9), "never seen"));
}
