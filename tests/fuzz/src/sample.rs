//! Statements that are signed as they should be.

use keystone_mesh_core::network::{DEFAULT_IPV4, Network, SignedNetwork, default_ipv6};
use keystone_mesh_core::node::{Approval, Entry, NodeRecord, SignedApproval, SignedRecord};
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::plain_peer::{PlainPeer, SignedPlainPeer};
use keystone_mesh_core::token::{Token, TokenId, TokenSecret};
use keystone_mesh_core::{Identity, Secret};

/// A node's secret: the byte, 32 times.
pub fn secret(byte: u8) -> Secret {
    Secret::from_bytes([byte; 32])
}

/// Its identity.
pub fn identity(byte: u8) -> Identity {
    secret(byte).identity()
}

/// What the node of `byte` says of itself.
pub fn record(byte: u8) -> SignedRecord {
    let record = NodeRecord {
        name: "worker-1".parse().expect("a node name"),
        identity: identity(byte).id(),
        public_key: secret(byte).wireguard(0).public_key(),
        endpoints: ["host 192.0.2.7:51840", "reflexive [2001:db8::1]:9"].map(|text| text.parse().expect("one")).into(),
        nat: Nat::EndpointIndependent,
        relays: vec![identity(200).id()],
        routes: vec!["10.42.1.0/24".parse().expect("a prefix")],
        seq: 3,
    };
    record.sign_with_key(&identity(byte), &secret(byte).wireguard(0))
}

/// What the network of `network` allows the node of `byte`.
pub fn approval(network: u8, byte: u8) -> SignedApproval {
    let approval = Approval {
        network: identity(network).id(),
        name: "worker-1".parse().expect("a node name"),
        identity: identity(byte).id(),
        addresses: ["10.98.0.2/32", "fd00::2/128"].map(|text| text.parse().expect("an address")).into(),
        routes: vec!["192.168.7.0/24".parse().expect("a prefix")],
        pod_cidrs: ["10.42.1.0/24", "fd00:42:0:1::/64"].map(|text| text.parse().expect("a prefix")).into(),
        endpoints: ["home.example.org:4000", "192.0.2.9:4000"].map(|text| text.parse().expect("a host")).into(),
        relays: vec![identity(200).id()],
        location: Some("eu/1a".parse().expect("a location")),
        serial: 2,
    };
    approval.sign(&identity(network))
}

/// What the network says of a plain peer.
pub fn peer(network: u8) -> SignedPlainPeer {
    let peer = PlainPeer {
        network: identity(network).id(),
        name: "worker-1".parse().expect("a name"),
        node: "home".parse().expect("a node name"),
        public_key: secret(77).wireguard(0).public_key(),
        addresses: vec!["10.98.1.1/32".parse().expect("an address")],
        routes: vec!["192.168.7.0/24".parse().expect("a prefix")],
        endpoint: Some("laptop.example.org:51820".parse().expect("a host")),
        persistent_keepalive: Some(25),
        serial: 4,
    };
    peer.sign(&identity(network))
}

/// A node's record with its approval.
pub fn entry(network: u8, byte: u8) -> Entry {
    Entry { record: record(byte), approval: Some(approval(network, byte)) }
}

/// The network's document.
pub fn network(byte: u8) -> SignedNetwork {
    let id = identity(byte).id();
    let relay = format!("{}@relay.example.org:51840,192.0.2.1:443", identity(200).id());
    let network = Network {
        id,
        ipv4: DEFAULT_IPV4.parse().expect("a prefix"),
        ipv6: default_ipv6(id),
        relays: vec![relay.parse().expect("a relay")],
        gateways: vec!["home.example.org:51840".parse().expect("a gateway")],
        serial: 1,
    };
    network.sign(&identity(byte)).expect("the sample is small")
}

/// A join token of that network.
pub fn token(byte: u8) -> Token {
    Token {
        network: identity(byte).id(),
        id: TokenId::from_bytes([1; 8]),
        secret: TokenSecret::from_bytes([2; 20]),
        rendezvous: network(byte).get().rendezvous(),
    }
}
