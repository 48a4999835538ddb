//! What the benchmarks work on: a network of any size, a flow of TCP packets, numbers that look random.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use keystone_mesh::tun::checksum;
use keystone_mesh_core::network::{DEFAULT_IPV4, Network, default_ipv6};
use keystone_mesh_core::node::{Approval, Entry, NodeName, NodeRecord, SignedApproval, SignedRecord};
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::{Identity, Secret};

/// Bytes of a TCP packet's headers in [`tcp_flow`]: IPv4, TCP, timestamps.
pub const TCP_HEADERS: usize = 52;

/// The network key.
pub fn network_key() -> Identity {
    Secret::from_bytes([1; 32]).identity()
}

/// The network's document.
pub fn network() -> Network {
    let id = network_key().id();
    Network {
        id,
        ipv4: DEFAULT_IPV4.parse().expect("a prefix"),
        ipv6: default_ipv6(id),
        relays: vec![],
        gateways: vec!["home.example.org:51840".parse().expect("a gateway")],
        serial: 1,
    }
}

/// The secret of the `n`-th node.
pub fn secret(n: u32) -> Secret {
    let mut bytes = [2; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    Secret::from_bytes(bytes)
}

/// What the `n`-th node says of itself: four endpoints, a relay, a pod network.
pub fn record(n: u32) -> NodeRecord {
    let endpoints = [
        format!("host 192.168.{}.{}:51840", n >> 8 & 0xff, n & 0xff),
        format!("host [2001:db8::{n:x}]:51840"),
        "configured 198.51.100.7:51840".to_owned(),
        format!("reflexive 203.0.113.{}:{}", n & 0xff, 1024 + n % 60_000),
    ];
    NodeRecord {
        name: name(n),
        identity: secret(n).identity().id(),
        public_key: secret(n).wireguard(0).public_key(),
        endpoints: endpoints.map(|text| text.parse().expect("a candidate")).into(),
        nat: Nat::EndpointIndependent,
        relays: vec![network_key().id()],
        routes: vec![pods(n)],
        seq: 1,
    }
}

/// The record with its signature.
pub fn signed_record(n: u32) -> SignedRecord {
    record(n).sign(&secret(n).identity())
}

/// What the network allows the `n`-th node: an address of each family and its pod network.
pub fn approval(n: u32) -> SignedApproval {
    let approval = Approval {
        network: network_key().id(),
        name: name(n),
        identity: secret(n).identity().id(),
        addresses: vec![address(n), IpNet::new(format!("fd00:98::{n:x}").parse().expect("IPv6"), 128).expect("128")],
        routes: vec![],
        pod_cidrs: vec![pods(n)],
        endpoints: vec![],
        relays: vec![],
        location: None,
        serial: 1,
    };
    approval.sign(&network_key())
}

/// A mesh of so many nodes, all approved.
pub fn mesh(nodes: u32) -> BTreeMap<NodeName, Entry> {
    let entry = |n| (name(n), Entry { record: signed_record(n), approval: Some(approval(n)) });
    (0..nodes).map(entry).collect()
}

/// The mesh address of the `n`-th node.
pub fn address(n: u32) -> IpNet {
    IpAddr::from(Ipv4Addr::from_bits(0x0a62_0000 + n)).into()
}

/// The pod network of the `n`-th node.
pub fn pods(n: u32) -> IpNet {
    Ipv4Net::new(Ipv4Addr::from_bits(0xac10_0000 + (n << 8)), 24).expect("24 is a prefix length").into()
}

/// A run of `count` packets of one TCP flow, `payload` bytes each, side by side, checksums complete.
pub fn tcp_flow(count: usize, payload: usize) -> Vec<u8> {
    let packet = |index| tcp_packet(index as u16, (index * payload) as u32, payload);
    (0..count).flat_map(packet).collect()
}

/// A TCP packet over IPv4 with timestamps.
pub fn tcp_packet(id: u16, sequence: u32, payload: usize) -> Vec<u8> {
    let total = (TCP_HEADERS + payload) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend(id.to_be_bytes());
    packet.extend([0x40, 0, 64, 6, 0, 0, 10, 98, 0, 1, 10, 98, 0, 2]);
    packet.extend([0xa8, 0xca, 0, 80]);
    packet.extend(sequence.to_be_bytes());
    packet.extend([0, 0, 0, 77, 0x80, 0x10, 1, 0xf5, 0, 0, 0, 0]);
    packet.extend([1, 1, 8, 10, 0, 0, 0, 5, 0, 0, 0, 6]);
    packet.extend((0..payload).map(|i| (i % 251) as u8));
    let header = checksum::finish(checksum::sum(&packet[..20], 0));
    packet[10..12].copy_from_slice(&header);
    let pseudo = checksum::pseudo_header(&packet[12..20], 6, packet.len() - 20);
    let tcp = checksum::finish(checksum::sum(&packet[20..], pseudo));
    packet[36..38].copy_from_slice(&tcp);
    packet
}

/// Numbers in an order that no cache or predictor guesses, the same at every run (the generator of Numerical Recipes).
pub fn numbers() -> impl Iterator<Item = u32> {
    let step =
        |state: &u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
    std::iter::successors(Some(1), step).map(|state| (state >> 33) as u32)
}

fn name(n: u32) -> NodeName {
    format!("worker-{n:05}").parse().expect("a node name")
}
