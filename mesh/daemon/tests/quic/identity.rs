//! Who is at the other end.

use std::net::UdpSocket;
use std::time::Duration;

use keystone_mesh::quic::{ConnectError, EndpointLimits, Protocol, QuicEndpoint, RelayServerConfig};

use crate::world::{self, BadSocket, NETWORK, RELAY, Relay, endpoint, eventually, id, identity, loopback, within};

#[tokio::test]
async fn the_right_key_is_accepted_and_both_ends_know_each_other() {
    let relay = Relay::start();
    let node = endpoint(1);
    let connection = node.connect(relay.at, id(RELAY), Protocol::Relay).await.unwrap();
    assert_eq!(connection.peer, id(RELAY));
    assert_eq!(connection.remote_address(), relay.at);
    eventually("the relay accepts", || relay.endpoint.counters().accepted == 1).await;
}

#[tokio::test]
async fn another_key_is_refused_by_name() {
    let relay = Relay::start();
    let error = endpoint(1).connect(relay.at, id(NETWORK), Protocol::Relay).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::WrongKey { expected, actual, .. } if expected == id(NETWORK) && actual == id(RELAY)),
        "{error}"
    );
    let text = error.to_string();
    assert!(text.contains(&id(RELAY).to_string()) && text.contains(&id(NETWORK).to_string()), "{text}");
    eventually("the relay counts it", || relay.endpoint.counters().failed == 1).await;
}

#[tokio::test]
async fn a_protocol_without_a_handler_is_refused() {
    let relay = Relay::start();
    let error = endpoint(1).connect(relay.at, id(RELAY), Protocol::Gateway).await.unwrap_err();
    assert!(matches!(error, ConnectError::Failed { .. }), "{error}");
}

#[tokio::test]
async fn an_endpoint_that_serves_nothing_takes_no_connection() {
    let (quiet, node) = (endpoint(RELAY), endpoint(1));
    let to = quiet.local_addr().unwrap();
    let error = within("an answer", node.connect(to, id(RELAY), Protocol::Relay)).await.unwrap_err();
    assert!(error.to_string().contains(&to.to_string()), "{error}");
}

#[tokio::test]
async fn first_bytes_stay_apart_from_wireguard_stun_and_probes() {
    let relay = Relay::start();
    let socket = BadSocket::bind(usize::MAX);
    let node = world::Client::with(socket.endpoint(1), relay.addr(), Some(world::approval(1)), None);
    node.up().await;
    for _ in 0..100 {
        node.send(1, &[b"to myself"]);
    }
    let datagrams = || relay.server.snapshot().forwarded_datagrams;
    eventually("datagrams pass", || datagrams() == 100).await;
    assert!(socket.smallest_first_byte() >= 0x40);
}

#[tokio::test]
async fn under_load_clients_prove_their_address_first() {
    let limits = EndpointLimits { retry_above: 0, ..EndpointLimits::default() };
    let busy = QuicEndpoint::bind(loopback(), identity(RELAY), limits).unwrap();
    let relay = Relay::on(busy, RelayServerConfig::standalone(id(NETWORK), world::verify()));
    endpoint(1).connect(relay.at, id(RELAY), Protocol::Relay).await.unwrap();
    assert_eq!(relay.endpoint.counters().retried, 1);
}

#[tokio::test]
async fn an_address_has_so_many_connections_and_gets_them_back() {
    let limits = EndpointLimits { connections_per_address: 2, ..EndpointLimits::default() };
    let small = QuicEndpoint::bind(loopback(), identity(RELAY), limits).unwrap();
    let relay = Relay::on(small, RelayServerConfig::standalone(id(NETWORK), world::verify()));
    let node = endpoint(1);
    let first = node.connect(relay.at, id(RELAY), Protocol::Relay).await.unwrap();
    let _second = node.connect(relay.at, id(RELAY), Protocol::Relay).await.unwrap();
    assert!(node.connect(relay.at, id(RELAY), Protocol::Relay).await.is_err());
    assert_eq!(relay.endpoint.counters().refused, 1);
    first.connection.close(0u32.into(), b"");
    within("a free place", async {
        while node.connect(relay.at, id(RELAY), Protocol::Relay).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn random_datagrams_do_no_harm() {
    let relay = Relay::start();
    let stranger = UdpSocket::bind(loopback()).unwrap();
    let mut word = 1u32;
    for length in 1..1400 {
        let rubbish: Vec<u8> = (0..length)
            .map(|_| {
                word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (word >> 24) as u8
            })
            .collect();
        stranger.send_to(&rubbish, relay.at).unwrap();
    }
    endpoint(1).connect(relay.at, id(RELAY), Protocol::Relay).await.unwrap();
}
