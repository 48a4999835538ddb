//! Two data planes with real TUN devices, each in a network namespace of its own, over a cable.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod host;
mod relay;
mod traffic;

use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use host::{Node, config, key, pair, wait_until};
use keystone_mesh::dataplane::{Config, DataEvent, DataPlane, StartError};
use keystone_mesh::tun::{Offload, Tun, TunConfig, TunError, TunQueue};
use keystone_mesh::udp::UdpConfig;
use keystone_mesh_core::io::PeerOp;
use keystone_mesh_core::{DropReason, PresharedKey, Via};
use relay::{Relay, node_id, relay_id};
use tokio::sync::mpsc;
use traffic::{ping, ping_once, serve_echo, stream};

const ECHO: u16 = 7;

/// Namespaces need root; says so where it is missing. CI runs as root.
macro_rules! needs_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: network namespaces need root");
            return;
        }
    };
}

fn psk() -> PresharedKey {
    PresharedKey::from_bytes([42; 32])
}

#[test]
fn packets_pass_both_ways_over_both_families_with_and_without_a_preshared_key() {
    needs_root!();
    for preshared_key in [None, Some(psk())] {
        for wire_v6 in [false, true] {
            let (a, b) = pair(preshared_key.clone(), wire_v6);
            serve_echo(&a, ECHO);
            serve_echo(&b, ECHO);
            for v6 in [false, true] {
                ping(&a, b.mesh_address(v6), ECHO);
                ping(&b, a.mesh_address(v6), ECHO);
            }
            for node in [&a, &b] {
                let stats = node.plane().stats();
                assert_eq!(stats.live_sessions, 1);
                assert!(stats.peers[0].last_handshake.is_some());
                assert!(stats.peers[0].rx_bytes > 500 && stats.peers[0].tx_bytes > 500, "{stats:?}");
            }
        }
    }
}

#[test]
fn different_preshared_keys_never_meet() {
    needs_root!();
    let (a, b) = pair(Some(psk()), false);
    b.plane().apply(&[PeerOp::Set(config(1, None))]);
    let to = b.mesh_address(false);
    a.host.run(move || UdpSocket::bind("0.0.0.0:0").unwrap().send_to(&[1], (to, ECHO)).unwrap());
    wait_until("the response is refused", || a.plane().stats().dropped(DropReason::BadHandshake) > 0);
    assert_eq!(a.plane().stats().live_sessions, 0);
}

#[test]
fn a_long_stream_arrives_unchanged_over_both_families() {
    needs_root!();
    let (a, b) = pair(None, false);
    for v6 in [false, true] {
        stream(&a, &b, v6, 24 << 20);
        stream(&b, &a, v6, 24 << 20);
    }
    let stats = a.plane().stats();
    assert_eq!(stats.dropped(DropReason::SourceNotAllowed), 0);
    assert_eq!(stats.dropped(DropReason::BadTag), 0);
    assert_eq!(stats.dropped(DropReason::TunWriteFailed), 0);
}

#[test]
fn several_shards_carry_traffic() {
    needs_root!();
    let (a, b) = (Node::with_shards(1, 3), Node::with_shards(2, 2));
    a.host.connect(1, &b.host, 2);
    a.add(&b, None, Some(b.direct(false)));
    b.add(&a, None, Some(a.direct(false)));
    stream(&a, &b, false, 8 << 20);
    stream(&b, &a, true, 8 << 20);
}

#[test]
fn the_first_packet_waits_for_the_handshake() {
    needs_root!();
    let (a, b) = pair(None, false);
    serve_echo(&b, ECHO);
    let took = ping_once(&a, b.mesh_address(false), ECHO).expect("the first packet is answered");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_packet_without_a_path_is_a_demand_and_leaves_when_there_is_one() {
    needs_root!();
    let (mut a, b) = pair(None, false);
    serve_echo(&b, ECHO);
    a.plane().set_path(&b.public(), None);
    let (peer, to) = (b.public(), b.mesh_address(false));
    let socket = a.host.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    socket.set_read_timeout(Some(host::DEADLINE)).unwrap();
    socket.send_to(&[1, 2, 3], (to, ECHO)).unwrap();
    a.wait_event(|event| *event == DataEvent::Demand { peer });
    a.plane().set_path(&peer, Some(b.direct(false)));
    let mut buffer = [0; 100];
    assert_eq!(socket.recv_from(&mut buffer).unwrap().0, 3);
    a.wait_event(|event| *event == DataEvent::Handshake { peer });
}

#[test]
fn a_peer_that_moved_is_reported_and_followed_only_when_told() {
    needs_root!();
    let (mut a, b) = pair(None, false);
    serve_echo(&a, ECHO);
    let nowhere = Via::Direct("192.0.2.99:9".parse().unwrap());
    a.plane().set_path(&b.public(), Some(nowhere));
    // The answer to the handshake goes back where it came from; what follows proves the way.
    b.plane().start_handshake(&a.public());
    let (peer, via) = (b.public(), b.direct(false));
    a.wait_event(|event| *event == DataEvent::Roamed { peer, via });
    assert_eq!(a.plane().stats().peers[0].via, Some(nowhere));
    a.plane().set_path(&b.public(), Some(via));
    ping(&b, a.mesh_address(false), ECHO);
}

#[test]
fn a_restarted_node_is_reached_again_at_once() {
    needs_root!();
    let (a, mut b) = pair(None, false);
    serve_echo(&a, ECHO);
    ping(&b, a.mesh_address(false), ECHO);
    b.stop();
    b.start();
    b.add(&a, None, Some(a.direct(false)));
    serve_echo(&b, ECHO);
    b.plane().start_handshake(&a.public());
    wait_until("the session is back", || b.plane().stats().live_sessions == 1);
    let took = ping(&a, b.mesh_address(false), ECHO);
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_persistent_keepalive_makes_and_keeps_a_session() {
    needs_root!();
    let (a, mut b) = pair(None, false);
    let mut peer = config(2, None);
    peer.persistent_keepalive = Some(1);
    a.plane().apply(&[PeerOp::Set(peer)]);
    b.wait_event(|event| *event == DataEvent::Handshake { peer: key(1).public_key() });
    let after = b.plane().stats().peers[0].rx_bytes + 3 * 32;
    wait_until("three keepalives come", || b.plane().stats().peers[0].rx_bytes >= after);
}

#[test]
fn packets_that_wait_are_bounded_and_what_is_lost_is_counted() {
    needs_root!();
    let (a, b) = pair(None, false);
    a.plane().set_path(&b.public(), None);
    let to = b.mesh_address(false);
    a.host.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..200 {
            socket.send_to(&[1; 50], (to, 9)).unwrap();
        }
    });
    wait_until("the losses are counted", || a.plane().stats().dropped(DropReason::NoPath) == 72);
    a.plane().set_path(&b.public(), Some(b.direct(false)));
    wait_until("the rest arrives", || b.plane().stats().rx_packets >= 128);
}

#[test]
fn changing_the_preshared_key_ends_the_session_and_other_changes_do_not() {
    needs_root!();
    let (a, b) = pair(None, false);
    serve_echo(&b, ECHO);
    ping(&a, b.mesh_address(false), ECHO);
    let mut peer = config(2, None);
    peer.allowed_ips.push("10.99.0.0/16".parse().unwrap());
    a.plane().apply(&[PeerOp::Set(peer)]);
    assert_eq!(a.plane().stats().live_sessions, 1);
    a.plane().apply(&[PeerOp::Set(config(2, Some(psk())))]);
    assert_eq!(a.plane().stats().live_sessions, 0);
    b.plane().apply(&[PeerOp::Set(config(1, Some(psk())))]);
    ping(&a, b.mesh_address(false), ECHO);
}

#[test]
fn a_source_that_is_not_allowed_is_dropped_and_counted() {
    needs_root!();
    let (a, b) = pair(None, false);
    serve_echo(&a, ECHO);
    ping(&b, a.mesh_address(false), ECHO);
    b.host.ip("address add 10.98.0.77/32 dev ks0");
    let to = a.mesh_address(false);
    b.host.run(move || UdpSocket::bind("10.98.0.77:0").unwrap().send_to(&[1; 50], (to, ECHO)).unwrap());
    wait_until("the packet is counted", || a.plane().stats().dropped(DropReason::SourceNotAllowed) == 1);
    ping(&b, a.mesh_address(false), ECHO);
}

#[test]
fn packets_to_nobody_are_counted() {
    needs_root!();
    let (a, _b) = pair(None, false);
    a.host.run(|| UdpSocket::bind("0.0.0.0:0").unwrap().send_to(&[1; 50], "10.98.0.200:9").unwrap());
    wait_until("the packet is counted", || a.plane().stats().dropped(DropReason::NoRoute) > 0);
}

#[test]
fn malformed_datagrams_are_counted_while_traffic_flows() {
    needs_root!();
    let (a, b) = pair(None, false);
    serve_echo(&a, ECHO);
    ping(&b, a.mesh_address(false), ECHO);
    let Via::Direct(to) = a.direct(false) else { unreachable!("direct") };
    let cases: [(DropReason, Vec<u8>); 6] = [
        (DropReason::UnknownDatagram, vec![0x13; 100]),
        (DropReason::UnknownDatagram, vec![]),
        (DropReason::MalformedWireGuard, vec![4, 0, 0, 0, 1, 2, 3]),
        (DropReason::MalformedWireGuard, [vec![1, 0, 0, 0], vec![0; 100]].concat()),
        (DropReason::UnknownSession, [vec![4, 0, 0, 0], vec![0xff; 60]].concat()),
        (DropReason::BadMac, [vec![1, 0, 0, 0], vec![7; 144]].concat()),
    ];
    for (reason, datagram) in cases {
        let before = a.plane().stats().dropped(reason);
        b.host.run(move || UdpSocket::bind("0.0.0.0:0").unwrap().send_to(&datagram, to).unwrap());
        wait_until(reason.label(), || a.plane().stats().dropped(reason) == before + 1);
    }
    // A flood of random bytes, each datagram of a kind of ours by its first bytes.
    b.host.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut state = 7u32;
        for round in 0..20_000u32 {
            let mut datagram = vec![0; 1 + (round % 200) as usize];
            for byte in &mut datagram {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                *byte = (state >> 24) as u8;
            }
            datagram[0] = (round % 6) as u8;
            if let Some(reserved) = datagram.get_mut(1..4) {
                reserved.fill(0);
            }
            socket.send_to(&datagram, to).unwrap();
        }
    });
    ping(&b, a.mesh_address(true), ECHO);
}

#[test]
fn a_stranger_gets_no_answer_and_is_counted() {
    needs_root!();
    let (a, b) = pair(None, false);
    a.plane().apply(&[PeerOp::Remove(b.public())]);
    b.plane().start_handshake(&a.public());
    wait_until("the initiation is counted", || a.plane().stats().dropped(DropReason::UnknownPeer) > 0);
    assert_eq!(b.plane().stats().live_sessions, 0);
}

#[test]
fn probes_and_quic_share_the_port() {
    needs_root!();
    let (mut a, b) = pair(None, false);
    let (Via::Direct(to), via) = (a.direct(false), b.direct(false)) else { unreachable!("direct") };
    b.plane().send_probe(to, b"\x05KSP and the rest");
    let event = a.wait_event(|event| matches!(event, DataEvent::Probe { .. }));
    assert_eq!(event, DataEvent::Probe { via, from: None, bytes: b"\x05KSP and the rest".to_vec() });

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (sender, receiver) = (b.plane().quic_socket(), a.plane().quic_socket());
    let run = [[0x41; 1200], [0x42; 1200], [0x43; 1200]].concat();
    let transmit = quinn::udp::Transmit {
        destination: format!("[::ffff:192.0.2.1]:{}", a.port).parse().unwrap(),
        ecn: None,
        contents: &run,
        segment_size: Some(1200),
        src_ip: None,
    };
    sender.try_send(&transmit).unwrap();
    let mut received = Vec::new();
    runtime.block_on(async {
        while received.len() < run.len() {
            let mut buffer = [0; 65535];
            let mut metas = [quinn::udp::RecvMeta::default()];
            let poll = std::future::poll_fn(|cx| {
                receiver.poll_recv(cx, &mut [std::io::IoSliceMut::new(&mut buffer)], &mut metas)
            });
            tokio::time::timeout(host::DEADLINE, poll).await.unwrap().unwrap();
            assert_eq!(metas[0].addr, format!("[::ffff:192.0.2.2]:{}", b.port).parse().unwrap());
            received.extend_from_slice(&buffer[..metas[0].len]);
        }
        let mut poller = sender.create_io_poller();
        let writable = std::future::poll_fn(|cx| poller.as_mut().poll_writable(cx));
        tokio::time::timeout(host::DEADLINE, writable).await.unwrap().unwrap();
    });
    assert_eq!(received, run);
}

/// Two data planes without kernel interfaces, peers of each other through a relay in memory.
struct Relayed {
    relay: Arc<Relay>,
    planes: [Arc<DataPlane>; 2],
    taps: [std::os::unix::net::UnixDatagram; 2],
    events: [mpsc::Receiver<DataEvent>; 2],
}

impl Relayed {
    fn new() -> Self {
        let relay = Arc::new(Relay::default());
        let [one, two] = [1, 2].map(|number| {
            let (tap, queue) = std::os::unix::net::UnixDatagram::pair().unwrap();
            tap.set_read_timeout(Some(host::DEADLINE)).unwrap();
            queue.set_nonblocking(true).unwrap();
            let (events, receiver) = mpsc::channel(100);
            let plane = DataPlane::start(Config {
                tun: vec![TunQueue::from_fd(OwnedFd::from(queue), Offload::None)],
                sockets: vec![Arc::new(keystone_mesh::udp::UdpSocket::bind(&UdpConfig::default()).unwrap())],
                private_key: key(number),
                relay: relay.connection(node_id(number)),
                events,
            });
            let plane = Arc::new(plane.unwrap());
            relay.attach(node_id(number), &plane);
            let other = 3 - number;
            let mut peer = config(other, None);
            peer.identity = Some(node_id(other));
            plane.apply(&[PeerOp::Set(peer)]);
            plane.set_path(&key(other).public_key(), Some(Via::Relay(relay_id())));
            (plane, tap, receiver)
        });
        Self { relay, planes: [one.0, two.0], taps: [one.1, two.1], events: [one.2, two.2] }
    }

    /// An IPv4 packet from the first node to the second, behind its virtio header.
    fn packet(payload: u8) -> Vec<u8> {
        let mut packet = vec![0; 10];
        packet.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 253, 0, 0, 10, 98, 0, 1, 10, 98, 0, 2]);
        packet.extend([payload; 8]);
        packet
    }

    fn send_and_check(&self, payload: u8) {
        self.taps[0].send(&Self::packet(payload)).unwrap();
        let mut buffer = [0; 100];
        let len = self.taps[1].recv(&mut buffer).unwrap();
        assert_eq!(buffer[..len], Self::packet(payload));
    }
}

#[test]
fn a_relay_carries_sessions_and_probes() {
    let mut relayed = Relayed::new();
    for payload in 0..50 {
        relayed.send_and_check(payload);
    }
    assert!(relayed.relay.deliver(node_id(1), node_id(2), vec![Bytes::from_static(b"\x05KSP")]));
    let probe = DataEvent::Probe { via: Via::Relay(relay_id()), from: Some(node_id(1)), bytes: b"\x05KSP".to_vec() };
    wait_for_event(&mut relayed.events[1], &probe);
}

fn wait_for_event(events: &mut mpsc::Receiver<DataEvent>, wanted: &DataEvent) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let search = async { while events.recv().await.expect("the plane runs") != *wanted {} };
        tokio::time::timeout(host::DEADLINE, search).await.expect("the event comes");
    });
}

#[test]
fn replays_are_dropped_and_counted() {
    let relayed = Relayed::new();
    for payload in 0..10 {
        relayed.send_and_check(payload);
    }
    let carried = relayed.relay.carried(node_id(1), node_id(2));
    let data = carried.iter().filter(|packet| packet[0] == 4).cloned().collect::<Vec<_>>();
    let initiations = carried.iter().filter(|packet| packet[0] == 1).cloned().collect::<Vec<_>>();
    assert!(data.len() >= 10 && !initiations.is_empty());
    let dropped = |reason| relayed.planes[1].stats().dropped(reason);

    let count = data.len() as u64;
    relayed.relay.deliver(node_id(1), node_id(2), data.clone());
    wait_until("the packets are counted", || dropped(DropReason::ReplayedPacket) == count);
    relayed.relay.deliver(node_id(1), node_id(2), initiations);
    wait_until("the initiation is counted", || dropped(DropReason::ReplayedHandshake) > 0);

    let mut forged = data[9].to_vec();
    forged[8] = forged[8].wrapping_add(100);
    relayed.relay.deliver(node_id(1), node_id(2), vec![forged.into()]);
    wait_until("the forgery is counted", || dropped(DropReason::BadTag) == 1);
    let last = [&data[9][..8], &[0xff; 8], &data[9][16..]].concat();
    relayed.relay.deliver(node_id(1), node_id(2), vec![last.into()]);
    wait_until("the last counter is refused", || dropped(DropReason::ReplayedPacket) == count + 1);

    relayed.taps[1].set_nonblocking(true).unwrap();
    assert!(relayed.taps[1].recv(&mut [0; 100]).is_err(), "a replay reached the TUN");
    relayed.taps[1].set_nonblocking(false).unwrap();
    relayed.send_and_check(200);
}

#[test]
fn malformed_packets_from_the_tun_are_counted() {
    let relayed = Relayed::new();
    let mut wrong_length = Relayed::packet(1);
    wrong_length[13] = 99;
    let mut wrong_offload = Relayed::packet(1);
    wrong_offload[1] = 1;
    for bytes in [vec![1, 2, 3], vec![0; 10], wrong_length, wrong_offload, vec![0xff; 60]] {
        let before = relayed.planes[0].stats().dropped(DropReason::MalformedInner);
        relayed.taps[0].send(&bytes).unwrap();
        wait_until("the packet is counted", || {
            relayed.planes[0].stats().dropped(DropReason::MalformedInner) == before + 1
        });
    }
    relayed.send_and_check(1);
}

#[test]
fn queues_and_sockets_must_match() {
    let config = Config {
        tun: Vec::new(),
        sockets: Vec::new(),
        private_key: key(1),
        relay: Arc::new(keystone_mesh::dataplane::NoRelays),
        events: mpsc::channel(1).0,
    };
    assert!(matches!(DataPlane::start(config), Err(StartError::Shards { tun: 0, sockets: 0 })));
}

#[test]
fn an_interface_in_use_is_refused_and_a_persistent_one_taken_over() {
    needs_root!();
    let host = host::Host::new();
    host.run(|| {
        let open = |name: &str, persistent| Tun::open(&TunConfig { name: name.to_owned(), queues: 2, persistent });
        let first = open("ks0", true).unwrap();
        assert!(matches!(open("ks0", true), Err(TunError::NameInUse(_))));
        drop(first);
        let again = open("ks0", false).expect("the persistent interface is attached to");
        drop(again);
        let error = open("lo", false).unwrap_err();
        assert!(matches!(error, TunError::NameInUse(_)), "{error}");
    });
    host.ip("link add ks1 type veth peer name ks2");
    host.run(|| {
        let config = TunConfig { name: "ks1".to_owned(), queues: 1, persistent: false };
        assert!(matches!(Tun::open(&config), Err(TunError::NameInUse(_))));
    });
}

#[test]
fn a_deleted_interface_is_reported() {
    needs_root!();
    let (mut a, _b) = pair(None, false);
    a.host.ip("link delete ks0");
    a.wait_event(|event| *event == DataEvent::TunLost);
}
