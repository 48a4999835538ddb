//! Packets through a relay.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use keystone_mesh::quic::relay_pool::RelayPoolConfig;
use keystone_mesh::quic::{RelayPool, RelayServerConfig};
use keystone_mesh_core::relay::{AdmissionLimits, Quota, RelayDrop};

use crate::world::{
    BadSocket, Client, NETWORK, RELAY, Relay, approval, endpoint, eventually, id, inbox, loopback, verify, within,
};

fn packet(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + length) as u8).collect()
}

#[tokio::test]
async fn packets_go_both_ways_and_name_their_sender() {
    let relay = Relay::start();
    let (mut a, mut b) = (Client::node(&relay, 1), Client::node(&relay, 2));
    tokio::join!(a.up(), b.up());
    assert_eq!(a.send(2, &[b"hello", b"again"]), 0);
    assert_eq!(b.receive().await, (id(1), b"hello".as_slice().into()));
    assert_eq!(b.receive().await, (id(1), b"again".as_slice().into()));
    assert_eq!(b.send(1, &[b"welcome"]), 0);
    assert_eq!(a.receive().await, (id(2), b"welcome".as_slice().into()));
}

#[tokio::test]
async fn packets_of_every_size_pass_before_the_path_mtu_is_known() {
    // Nothing above QUIC's minimum passes this receiver's path, so its connection never learns of more.
    let relay = Relay::start();
    let narrow = BadSocket::bind(1200).endpoint(2);
    let a = Client::node(&relay, 1);
    let mut b = Client::with(narrow, relay.addr(), Some(approval(2)), None);
    tokio::join!(a.up(), b.up());
    let sizes: Vec<usize> = (1..=1600).step_by(7).chain([1162, 1280, 1312, 1313, 1500, 1532, 1600, 9216]).collect();
    // A batch at a time: a burst larger than the socket's buffer would be lost for another reason than its size.
    for sizes in sizes.chunks(8) {
        let packets: Vec<_> = sizes.iter().map(|size| packet(*size)).collect();
        assert_eq!(a.send(2, &packets.iter().map(Vec::as_slice).collect::<Vec<_>>()), 0);
        let mut missing: BTreeSet<_> = packets.into_iter().collect();
        while !missing.is_empty() {
            let (from, packet) = b.receive().await;
            assert_eq!(from, id(1));
            assert!(missing.remove(packet.as_ref()), "a packet of {} bytes that was not sent", packet.len());
        }
    }
}

#[tokio::test]
async fn a_packet_that_no_frame_holds_is_dropped_and_counted() {
    let relay = Relay::start();
    let a = Client::node(&relay, 1);
    a.up().await;
    assert_eq!(a.send(2, &[&packet(9217), &[]]), 2);
    assert_eq!(a.client.counters().unsendable, 2);
}

#[tokio::test]
async fn packets_to_nobody_are_counted() {
    let relay = Relay::start();
    let a = Client::node(&relay, 1);
    a.up().await;
    a.send(9, &[b"is anybody there"]);
    eventually("the drop is counted", || relay.server.snapshot().dropped(RelayDrop::UnknownDestination) == 1).await;
    assert_eq!(relay.server.snapshot().forwarded_datagrams, 0);
}

#[tokio::test]
async fn packets_before_the_relay_is_up_are_dropped_and_counted() {
    let silent = std::net::UdpSocket::bind(loopback()).unwrap();
    let relay = format!("{}@{}", id(RELAY), silent.local_addr().unwrap()).parse().unwrap();
    let a = Client::with(endpoint(1), relay, Some(approval(1)), None);
    assert_eq!(a.send(2, &[b"too early", b"still"]), 2);
    assert_eq!(a.client.counters().not_connected, 2);
}

#[tokio::test]
async fn more_than_the_quota_is_dropped() {
    let quota = Quota { bytes_per_second: 1000, packets_per_second: 1000, burst: Duration::from_secs(10) };
    let limits = AdmissionLimits { node_quota: quota, ..AdmissionLimits::default() };
    let config = RelayServerConfig { limits, ..RelayServerConfig::standalone(id(NETWORK), verify()) };
    let relay = Relay::with(loopback(), RELAY, config);
    let (a, b) = (Client::node(&relay, 1), Client::node(&relay, 2));
    tokio::join!(a.up(), b.up());
    for _ in 0..30 {
        assert_eq!(a.send(2, &[&packet(967)]), 0);
    }
    let snapshot = || relay.server.snapshot();
    eventually("all are accounted for", || snapshot().forwarded_datagrams + snapshot().dropped(RelayDrop::Quota) == 30)
        .await;
    let forwarded = snapshot().forwarded_datagrams;
    assert!((10..=30).contains(&forwarded) && snapshot().dropped(RelayDrop::Quota) > 0, "{forwarded} forwarded");
}

#[tokio::test]
async fn a_receiver_that_stops_does_not_make_the_relay_grow() {
    let relay = Relay::start();
    let socket = BadSocket::bind(usize::MAX);
    let a = Client::node(&relay, 1);
    let b = Client::with(socket.endpoint(2), relay.addr(), Some(approval(2)), None);
    tokio::join!(a.up(), b.up());
    socket.switch_off();
    let (burst, snapshot) = (vec![packet(1100); 32], || relay.server.snapshot());
    let burst: Vec<_> = burst.iter().map(Vec::as_slice).collect();
    within("20 MB", async {
        loop {
            a.send(2, &burst);
            tokio::time::sleep(Duration::from_millis(1)).await;
            let seen = snapshot().forwarded_datagrams + snapshot().dropped(RelayDrop::QueueFull);
            if seen > 18_000 {
                return;
            }
        }
    })
    .await;
    let held = snapshot().forwarded_bytes;
    assert!(held < 3 << 20, "the relay took {held} bytes for a receiver that takes none");
    assert!(snapshot().dropped(RelayDrop::QueueFull) > 14_000);
}

#[tokio::test]
async fn a_node_that_is_a_relay_itself_needs_no_connection_to_it() {
    let (deliver, mut inside) = inbox();
    let config = RelayServerConfig { node: Some(deliver), ..RelayServerConfig::standalone(id(NETWORK), verify()) };
    let relay = Relay::with(loopback(), RELAY, config);
    let (receive, _none) = inbox();
    let local = Some(relay.server.clone());
    let pool = RelayPool::new(
        relay.endpoint.clone(),
        RelayPoolConfig { credential: None, seed: 1, receive, spliced: None, local },
    );
    pool.set_relays(&[relay.addr()]);
    assert!(pool.states().is_empty(), "no connection to itself");

    let mut a = Client::node(&relay, 1);
    a.up().await;
    let large = packet(4000);
    assert_eq!(a.send(RELAY, &[b"small", &large]), 0);
    assert_eq!(within("a packet", inside.recv()).await.unwrap(), (id(1), b"small".as_slice().into()));
    assert_eq!(within("a packet", inside.recv()).await.unwrap(), (id(1), large.clone().into()));
    let dropped = pool.send(id(RELAY), id(1), &mut [b"back".as_slice(), &large].into_iter());
    assert_eq!(dropped, 0);
    assert_eq!(a.receive().await, (id(RELAY), b"back".as_slice().into()));
    assert_eq!(a.receive().await, (id(RELAY), large.into()));
}

#[tokio::test]
async fn a_pool_sends_through_the_relay_that_is_named() {
    let (first, second) =
        (Relay::start(), { Relay::with(loopback(), RELAY + 1, RelayServerConfig::standalone(id(NETWORK), verify())) });
    let (receive, _none) = inbox();
    let config = RelayPoolConfig { credential: Some(approval(1)), seed: 1, receive, spliced: None, local: None };
    let pool = Arc::new(RelayPool::new(endpoint(1), config));
    let mut changes = pool.changes();
    pool.set_relays(&[first.addr(), second.addr()]);
    let mut b = Client::node(&second, 2);
    b.up().await;
    let up = || {
        pool.states().iter().filter(|(_, state)| matches!(state, keystone_mesh::quic::RelayState::Up { .. })).count()
    };
    within("both relays up", async {
        while up() < 2 {
            changes.changed().await.unwrap();
        }
    })
    .await;
    // From a thread that is no part of the runtime, as the data plane's are.
    let sender = pool.clone();
    let dropped = tokio::task::spawn_blocking(move || {
        std::thread::spawn(move || sender.send(id(RELAY + 1), id(2), &mut [b"by the second".as_slice()].into_iter()))
            .join()
    });
    assert_eq!(dropped.await.unwrap().unwrap(), 0);
    assert_eq!(b.receive().await, (id(1), b"by the second".as_slice().into()));
    assert_eq!(pool.send(id(77), id(2), &mut [b"x".as_slice()].into_iter()), 1, "not one of its relays");

    pool.set_relays(&[second.addr()]);
    eventually("the first relay sees it go", || first.server.snapshot().clients == 0).await;
    assert!(matches!(pool.states()[..], [(relay, _)] if relay == id(RELAY + 1)));
}
