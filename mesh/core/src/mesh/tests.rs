//! Two or three whole nodes, driven by hand in virtual time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::*;
use crate::network::tests::network;
use crate::node::tests::{entry, secret};
use crate::plain_peer::PlainPeer;
use crate::relay::RelayAddr;

const MTU: u16 = 1280;

/// A node, and what its outputs have come to.
struct Node {
    mesh: Mesh,
    byte: u8,
    peers: BTreeMap<PublicKey, PeerConfig>,
    paths: BTreeMap<PublicKey, Option<Via>>,
    handshakes: Vec<PublicKey>,
    routes: Vec<IpNet>,
    /// Those that do not go through the mesh.
    plainly: BTreeMap<IpNet, IpAddr>,
    addresses: Vec<IpNet>,
    relays: Vec<RelayAddr>,
    names: BTreeSet<HostPort>,
    published: Vec<NodeRecord>,
    sent: Vec<(Option<NodeId>, Via, Vec<u8>)>,
    saves: usize,
}

impl Node {
    fn new(byte: u8, name: &str) -> Self {
        let own = Own {
            identity: secret(byte).identity().id(),
            key: secret(byte).wireguard(0),
            name: Some(name.parse().unwrap()),
            relays: vec![],
            mtu: MTU,
            routes: vec![],
            pod_routes: true,
            lan_routes: false,
            addresses: vec![],
            seed: [byte; 32],
        };
        Self {
            mesh: Mesh::new(own),
            byte,
            peers: BTreeMap::new(),
            paths: BTreeMap::new(),
            handshakes: vec![],
            routes: vec![],
            plainly: BTreeMap::new(),
            addresses: vec![],
            relays: vec![],
            names: BTreeSet::new(),
            published: vec![],
            sent: vec![],
            saves: 0,
        }
    }

    fn key(&self) -> PublicKey {
        secret(self.byte).wireguard(0).public_key()
    }

    fn drain(&mut self, now: Instant) -> Option<Instant> {
        loop {
            match self.mesh.poll_output(now) {
                Output::Peers(ops) => {
                    for op in ops {
                        match op {
                            PeerOp::Set(config) => drop(self.peers.insert(config.key, config)),
                            PeerOp::Remove(key) => {
                                self.peers.remove(&key);
                                self.paths.remove(&key);
                            }
                        }
                    }
                }
                Output::Kernel { addresses, routes } => {
                    self.addresses = addresses;
                    self.routes = routes.iter().map(|route| route.dst).collect();
                    self.plainly = routes.iter().filter_map(|route| Some((route.dst, route.via?))).collect();
                }
                Output::Relays(relays) => self.relays = relays,
                Output::Names(names) => self.names = names,
                Output::SetPath { peer, via } => {
                    assert!(self.peers.contains_key(&peer), "a path for a peer that the data plane does not have");
                    self.paths.insert(peer, via);
                }
                Output::StartHandshake(peer) => {
                    assert!(self.paths.get(&peer).copied().flatten().is_some(), "a handshake without a path");
                    self.handshakes.push(peer);
                }
                Output::SendProbe { to, via, bytes } => self.sent.push((to, via, bytes)),
                Output::Publish(record) => self.published.push(record),
                Output::Save => self.saves += 1,
                Output::Timeout { at, .. } => {
                    assert!(at >= now);
                    return Some(at);
                }
                Output::Idle => return None,
            }
        }
    }
}

fn everyone() -> Vec<Entry> {
    vec![
        entry(1, 1, "home", "10.98.0.1/32", &["10.42.0.0/24"]),
        entry(1, 2, "worker-1", "10.98.0.2/32", &[]),
        entry(1, 3, "worker-2", "10.98.0.3/32", &[]),
    ]
}

/// A node with pods, and what the network says of it at `serial`.
fn pods(byte: u8, name: &str, cidrs: &[&str], serial: u64) -> Entry {
    let mut entry = entry(1, byte, name, &format!("10.98.0.{byte}/32"), &[]);
    let pod_cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
    let approval = Approval { pod_cidrs, serial, ..entry.approval.unwrap().get().clone() };
    entry.approval = Some(approval.sign(&secret(1).identity()));
    entry
}

fn relay() -> NodeId {
    secret(200).identity().id()
}

fn key(byte: u8) -> PublicKey {
    secret(byte).wireguard(0).public_key()
}

fn worker(now: Instant) -> Node {
    let mut node = Node::new(2, "worker-1");
    node.mesh.handle_snapshot(network(1), everyone(), []);
    node.drain(now);
    node
}

/// Carries probes between two nodes whose direct addresses are given, until both are quiet for so long.
fn exchange(a: &mut Node, b: &mut Node, direct: &[(u8, SocketAddr)], mut now: Instant, time: Duration) -> Instant {
    let end = now + time;
    while now < end {
        let mut carried = false;
        for (from, to) in [(0, 1), (1, 0)] {
            let (sender, receiver) = if (from, to) == (0, 1) { (&mut *a, &mut *b) } else { (&mut *b, &mut *a) };
            for (identity, via, bytes) in std::mem::take(&mut sender.sent) {
                if identity != Some(secret(receiver.byte).identity().id()) {
                    continue;
                }
                let own = |byte: u8| direct.iter().find(|(of, _)| *of == byte).map(|(_, addr)| *addr);
                let (arrives, from_id) = match via {
                    Via::Direct(addr) if own(receiver.byte) == Some(addr) => (own(sender.byte).map(Via::Direct), None),
                    Via::Direct(_) => (None, None),
                    Via::Relay(id) => (Some(Via::Relay(id)), Some(secret(sender.byte).identity().id())),
                };
                if let Some(arrives) = arrives {
                    carried = true;
                    receiver.mesh.handle_probe(arrives, from_id, &bytes, now).unwrap();
                }
            }
        }
        let next = [a.drain(now), b.drain(now)].into_iter().flatten().min();
        if !carried {
            now = next.unwrap_or(end).max(now + Duration::from_millis(1));
            a.mesh.handle_timeout(now);
            b.mesh.handle_timeout(now);
        }
    }
    now
}

#[test]
fn a_snapshot_becomes_peers_routes_addresses_and_relays() {
    let node = worker(Instant::now());
    assert_eq!(node.peers.len(), 2);
    assert_eq!(node.addresses, ["10.98.0.2/32".parse().unwrap()]);
    assert_eq!(node.routes.len(), 3);
    assert_eq!(node.relays.len(), 1);
    assert!(node.saves > 0);
}

#[test]
fn the_control_plane_is_called_at_once_and_others_on_demand() {
    let now = Instant::now();
    let mut node = worker(now);
    assert!(node.handshakes.is_empty(), "no relay is up, and no address answers");
    node.mesh.handle_relay(relay(), true, now);
    node.drain(now);
    assert_eq!(node.paths[&key(1)], Some(Via::Relay(relay())));
    assert_eq!(node.handshakes, [key(1)]);
    assert_eq!(node.paths[&key(3)], Some(Via::Relay(relay())), "an idle peer has a way for its first packet");
    node.mesh.handle_demand(&key(3), now);
    node.drain(now);
    assert!(node.sent.iter().any(|(to, ..)| *to == Some(secret(3).identity().id())));
}

#[test]
fn two_nodes_become_direct_by_themselves() {
    let now = Instant::now();
    let (mut home, mut node) = (Node::new(1, "home"), worker(now));
    home.mesh.handle_snapshot(network(1), everyone(), []);
    let addresses: [(u8, SocketAddr); 2] =
        [(1, "192.0.2.7:51840".parse().unwrap()), (2, "198.51.100.9:51840".parse().unwrap())];
    for (node, (_, addr)) in [&mut home, &mut node].into_iter().zip(addresses) {
        node.mesh.handle_host_addresses(vec![addr], now);
        node.mesh.handle_relay(relay(), true, now);
        node.drain(now);
    }
    exchange(&mut home, &mut node, &addresses, now, Duration::from_secs(3));
    assert_eq!(node.paths[&key(1)], Some(Via::Direct(addresses[0].1)));
    assert_eq!(home.paths[&key(2)], Some(Via::Direct(addresses[1].1)));
}

#[test]
fn after_a_restart_every_peer_with_a_session_is_called() {
    let now = Instant::now();
    let mut node = Node::new(2, "worker-1");
    let direct = "192.0.2.33:51840".parse().unwrap();
    node.mesh.handle_hints([Hint { peer: key(3), direct: Some(direct) }]);
    node.mesh.handle_snapshot(network(1), everyone(), []);
    node.drain(now);
    assert!(node.sent.iter().any(|(_, via, _)| *via == Via::Direct(direct)), "its last address is asked first");
    node.mesh.handle_relay(relay(), true, now);
    node.drain(now);
    assert_eq!(node.handshakes.len(), 2, "the control plane and the peer with a session");
}

#[test]
fn losing_every_relay_keeps_peers_and_routes() {
    let now = Instant::now();
    let mut node = worker(now);
    node.mesh.handle_relay(relay(), true, now);
    node.drain(now);
    node.mesh.handle_relay(relay(), false, now);
    node.drain(now);
    assert_eq!((node.peers.len(), node.routes.len()), (2, 3));
}

#[test]
fn a_removed_node_is_gone_and_its_route_with_it() {
    let now = Instant::now();
    let mut node = worker(now);
    node.mesh.handle_removed(&"home".parse().unwrap());
    node.drain(now);
    assert!(!node.peers.contains_key(&key(1)));
    assert_eq!(node.routes, ["10.98.0.3/32".parse().unwrap()]);
}

#[test]
fn an_older_record_does_not_undo_a_newer_one() {
    let now = Instant::now();
    let mut node = worker(now);
    let mut newer = entry(1, 3, "worker-2", "10.98.0.3/32", &[]);
    let record = NodeRecord { seq: 5, endpoints: vec![], ..newer.record.get().clone() };
    newer.record = record.sign(&secret(3).identity());
    node.mesh.handle_entry(newer);
    node.mesh.handle_entry(entry(1, 3, "worker-2", "10.98.0.3/32", &[]));
    node.drain(now);
    let (_, mut known, _) = node.mesh.known();
    assert!(known.any(|entry| entry.record.get().seq == 5));
}

#[test]
fn a_record_is_published_only_when_it_says_something_else() {
    let now = Instant::now();
    let mut node = worker(now);
    let before = node.published.len();
    let addr = "192.0.2.9:51840".parse().unwrap();
    for _ in 0..3 {
        node.mesh.handle_host_addresses(vec![addr], now);
        node.mesh.handle_observed("203.0.113.1:1".parse().unwrap(), "203.0.113.50:4000".parse().unwrap(), now);
        node.drain(now);
    }
    assert_eq!(node.published.len(), before + 2, "once for the address, once for how it is seen");
    let record = node.published.last().unwrap();
    assert_eq!(record.endpoints.len(), 2);
    assert_eq!(record.relays, [relay()]);
}

#[test]
fn a_joiner_says_at_once_which_relays_it_listens_on() {
    let now = Instant::now();
    let mut node = Node::new(2, "worker-1");
    node.mesh.own.relays = vec![relay()];
    node.mesh.handle_host_addresses(vec!["192.0.2.9:51840".parse().unwrap()], now);
    node.drain(now);
    assert_eq!(node.published.last().unwrap().relays, [relay()]);
}

#[test]
fn rubbish_and_strangers_probes_are_refused() {
    let now = Instant::now();
    let mut node = worker(now);
    let from = Via::Direct("192.0.2.66:1".parse().unwrap());
    assert!(matches!(node.mesh.handle_probe(from, None, b"rubbish", now), Err(ProbeRefusal::Bad(_))));
    let stranger = secret(66).wireguard(0);
    let probe = probe::Probe {
        sender: KeyHint::of(&stranger.public_key()),
        txid: probe::TxId([0; 12]),
        message: probe::Message::Ping { wanted: true },
    };
    let probe_key = probe::ProbeKey::agree(&stranger, &node.key()).unwrap();
    let bytes = probe.encode(&probe_key, 0);
    assert_eq!(node.mesh.handle_probe(from, None, &bytes, now), Err(ProbeRefusal::UnknownSender));
    let claims_home = probe::Probe { sender: KeyHint::of(&key(1)), ..probe }.encode(&probe_key, 0);
    assert!(matches!(node.mesh.handle_probe(from, None, &claims_home, now), Err(ProbeRefusal::Bad(_))));
    node.drain(now);
    assert!(!node.sent.iter().any(|(_, via, _)| *via == from), "nothing is sent to a stranger");
}

#[test]
fn a_relay_that_names_another_sender_is_not_believed() {
    let now = Instant::now();
    let mut node = worker(now);
    let ping = probe::Probe {
        sender: KeyHint::of(&key(3)),
        txid: probe::TxId([0; 12]),
        message: probe::Message::Ping { wanted: true },
    };
    let bytes = ping.encode(&probe::ProbeKey::agree(&secret(3).wireguard(0), &node.key()).unwrap(), 0);
    let home = Some(secret(1).identity().id());
    assert_eq!(node.mesh.handle_probe(Via::Relay(relay()), home, &bytes, now), Err(ProbeRefusal::OtherSender));
}

#[test]
fn plain_peers_live_beside_members() {
    let now = Instant::now();
    let mut node = worker(now);
    let laptop = PeerConfig {
        key: key(9),
        identity: None,
        preshared_key: None,
        persistent_keepalive: None,
        allowed_ips: vec!["10.99.0.9/32".parse().unwrap()],
    };
    let endpoint = "192.0.2.99:51820".parse().unwrap();
    node.mesh.handle_plain_peer("laptop".into(), laptop, Some(endpoint), now);
    node.drain(now);
    assert_eq!(node.paths[&key(9)], Some(Via::Direct(endpoint)));
    assert_eq!(node.routes.len(), 4);
    node.mesh.handle_snapshot(network(1), everyone(), []);
    node.drain(now);
    assert!(node.peers.contains_key(&key(9)), "a change of the network does not touch it");
    let roamed = Via::Direct("192.0.2.100:1".parse().unwrap());
    node.mesh.handle_roamed(&key(9), roamed, now);
    node.drain(now);
    assert_eq!(node.paths[&key(9)], Some(roamed));
}

fn stated(name: &str, node: &str, byte: u8, address: &str, serial: u64) -> PlainPeer {
    PlainPeer {
        network: secret(1).identity().id(),
        name: name.parse().unwrap(),
        node: node.parse().unwrap(),
        public_key: key(byte),
        addresses: vec![address.parse().unwrap()],
        routes: vec![],
        endpoint: None,
        persistent_keepalive: Some(25),
        serial,
    }
}

fn sign(peer: PlainPeer) -> SignedPlainPeer {
    peer.sign(&secret(1).identity())
}

/// Everyone, where worker-1 serves the plain peers of 10.98.9.0/24.
fn with_server() -> Vec<Entry> {
    let mut everyone = everyone();
    everyone[1] = entry(1, 2, "worker-1", "10.98.0.2/32", &["10.98.9.0/24"]);
    everyone
}

#[test]
fn the_serving_node_alone_has_a_plain_peer_of_the_network() {
    let now = Instant::now();
    let laptop = sign(stated("laptop", "worker-1", 9, "10.98.9.1/32", 1));
    for (byte, name, serves) in [(2, "worker-1", true), (3, "worker-2", false)] {
        let mut node = Node::new(byte, name);
        node.mesh.handle_snapshot(network(1), with_server(), [laptop.clone()]);
        node.drain(now);
        assert_eq!(node.peers.contains_key(&key(9)), serves, "{name}");
        let to_peer: IpNet = "10.98.9.1/32".parse().unwrap();
        let to_server: IpNet = "10.98.9.0/24".parse().unwrap();
        assert_eq!(node.routes.contains(&to_peer), serves, "{name}");
        assert_eq!(node.peers.get(&key(2)).is_some_and(|home| home.allowed_ips.contains(&to_server)), !serves);
        if serves {
            assert_eq!(node.peers[&key(9)].persistent_keepalive, Some(25));
            let status = node.mesh.peers(now).into_iter().find(|peer| peer.name == "laptop").unwrap();
            assert_eq!(status.addresses, [to_peer]);
        }
    }
}

#[test]
fn a_stated_peer_changes_in_place_and_goes() {
    let now = Instant::now();
    let mut node = Node::new(2, "worker-1");
    node.mesh.handle_snapshot(network(1), with_server(), []);
    node.mesh.handle_peer(sign(stated("laptop", "worker-1", 9, "10.98.9.1/32", 5)));
    node.drain(now);
    let endpoint: SocketAddr = "192.0.2.9:51820".parse().unwrap();
    let moved = PlainPeer { endpoint: Some(endpoint.into()), ..stated("laptop", "worker-1", 9, "10.98.9.2/32", 6) };
    node.mesh.handle_peer(sign(moved));
    node.drain(now);
    assert_eq!(node.peers[&key(9)].allowed_ips, ["10.98.9.2/32".parse().unwrap()]);
    assert_eq!(node.paths[&key(9)], Some(Via::Direct(endpoint)));
    node.mesh.handle_peer(sign(stated("laptop", "worker-1", 9, "10.98.9.1/32", 5)));
    node.drain(now);
    assert_eq!(node.peers[&key(9)].allowed_ips, ["10.98.9.2/32".parse().unwrap()], "an older statement");
    let elsewhere =
        PlainPeer { serial: 7, node: "home".parse().unwrap(), ..stated("laptop", "x", 9, "10.98.9.2/32", 7) };
    node.mesh.handle_peer(sign(elsewhere.clone()));
    node.drain(now);
    assert!(!node.peers.contains_key(&key(9)), "another node serves it");
    node.mesh.handle_peer(sign(PlainPeer { serial: 8, node: "worker-1".parse().unwrap(), ..elsewhere }));
    node.drain(now);
    assert!(node.peers.contains_key(&key(9)));
    node.mesh.handle_peer_removed(&"laptop".parse().unwrap());
    node.drain(now);
    assert!(!node.peers.contains_key(&key(9)));
    assert!(!node.routes.contains(&"10.98.9.2/32".parse().unwrap()));
}

#[test]
fn a_configured_peer_wins_over_a_stated_one_with_its_key() {
    let now = Instant::now();
    let mut node = Node::new(2, "worker-1");
    let configured = PeerConfig {
        key: key(9),
        identity: None,
        preshared_key: None,
        persistent_keepalive: None,
        allowed_ips: vec!["10.99.0.9/32".parse().unwrap()],
    };
    node.mesh.handle_plain_peer("mine".into(), configured.clone(), None, now);
    let laptop = sign(stated("laptop", "worker-1", 9, "10.98.9.1/32", 1));
    node.mesh.handle_snapshot(network(1), with_server(), [laptop]);
    node.drain(now);
    assert_eq!(node.peers[&key(9)], configured);
    node.mesh.handle_peer_removed(&"laptop".parse().unwrap());
    node.drain(now);
    assert_eq!(node.peers[&key(9)], configured);
}

#[test]
fn a_plain_peers_key_that_a_member_shows_becomes_the_members() {
    let now = Instant::now();
    let mut node = Node::new(2, "worker-1");
    let laptop = sign(stated("laptop", "worker-1", 9, "10.98.9.1/32", 1));
    node.mesh.handle_snapshot(network(1), with_server(), [laptop]);
    node.drain(now);
    node.mesh.handle_entry(entry(1, 9, "worker-9", "10.98.0.9/32", &[]));
    node.drain(now);
    assert_eq!(node.peers[&key(9)].identity, Some(secret(9).identity().id()));
    node.mesh.handle_removed(&"worker-9".parse().unwrap());
    node.drain(now);
    assert_eq!(node.peers[&key(9)].identity, None);
}

/// An entry of worker-2 as the network's word is changed by `change`.
fn approved(change: impl FnOnce(&mut Approval)) -> Entry {
    let mut entry = entry(1, 3, "worker-2", "10.98.0.3/32", &[]);
    let mut approval = entry.approval.unwrap().get().clone();
    approval.serial += 1;
    change(&mut approval);
    entry.approval = Some(approval.sign(&secret(1).identity()));
    entry
}

#[test]
fn forced_endpoints_are_tried_by_address_and_by_name() {
    let now = Instant::now();
    let mut node = worker(now);
    let name: HostPort = "worker-2.example.org:4000".parse().unwrap();
    let literal: SocketAddr = "198.51.100.3:4000".parse().unwrap();
    let wanted = [name.clone(), literal.into(), "10.98.0.3:4000".parse().unwrap()];
    node.mesh.handle_entry(approved(|approval| approval.endpoints = wanted.into()));
    node.drain(now);
    assert_eq!(node.names, BTreeSet::from([name.clone()]));
    let resolved: SocketAddr = "198.51.100.4:4000".parse().unwrap();
    let never_asked = ("other.example.org:1".parse().unwrap(), resolved);
    node.mesh.handle_resolved([(name, resolved), never_asked], now);
    node.mesh.handle_demand(&key(3), now);
    node.drain(now);
    let probed = |addr: SocketAddr| node.sent.iter().any(|(_, via, _)| *via == Via::Direct(addr));
    assert!(probed(literal) && probed(resolved) && probed("192.0.2.7:51840".parse().unwrap()));
    assert!(!probed("10.98.0.3:4000".parse().unwrap()), "an address inside the mesh");
    node.mesh.handle_entry(approved(|approval| approval.serial += 1));
    node.drain(now);
    assert!(node.names.is_empty());
}

#[test]
fn a_node_listens_on_the_relays_that_people_name() {
    let now = Instant::now();
    let mut node = Node::new(3, "worker-2");
    let mut two = network(1);
    let second = secret(201).identity().id();
    two.relays.push(format!("{second}@relay-2.example.org:51840").parse().unwrap());
    node.mesh.handle_snapshot(two, everyone(), []);
    node.drain(now);
    assert_eq!(node.relays.len(), 2);
    node.mesh.handle_entry(approved(|approval| approval.relays = vec![second]));
    node.drain(now);
    assert_eq!(node.relays.iter().map(|relay| relay.id).collect::<Vec<_>>(), [second]);
    assert_eq!(node.published.last().unwrap().relays, [second]);
    let stranger = secret(202).identity().id();
    node.mesh.handle_entry(approved(|a| (a.relays, a.serial) = (vec![stranger], 3)));
    node.drain(now);
    assert_eq!(node.relays.len(), 2, "a relay that the network does not have cuts nobody off");
}

#[test]
fn a_revoked_node_is_no_peer_and_a_located_one_says_where_it_is() {
    let now = Instant::now();
    let mut node = worker(now);
    node.mesh.handle_entry(approved(|approval| approval.location = Some("eu/1a".parse().unwrap())));
    node.drain(now);
    let status = node.mesh.peers(now).into_iter().find(|peer| peer.name == "worker-2").unwrap();
    assert_eq!(status.location.unwrap().as_str(), "eu/1a");
    node.mesh.handle_entry(approved(|a| (a.addresses, a.serial) = (vec![], 3)));
    node.drain(now);
    assert!(!node.peers.contains_key(&key(3)));
    node.mesh.handle_entry(approved(|_| {}));
    node.drain(now);
    assert!(!node.peers.contains_key(&key(3)), "an approval of old does not undo it");
}

#[test]
fn after_a_restart_a_plain_peer_with_a_session_is_called_where_it_was() {
    let now = Instant::now();
    let plain = |byte: u8| PeerConfig {
        key: key(byte),
        identity: None,
        preshared_key: None,
        persistent_keepalive: None,
        allowed_ips: vec![format!("10.99.0.{byte}/32").parse().unwrap()],
    };
    let before = || {
        let mut node = Node::new(2, "worker-1");
        node.mesh.handle_plain_peer("roamer".into(), plain(8), None, now);
        node.mesh.handle_plain_peer("silent".into(), plain(9), Some("192.0.2.9:51820".parse().unwrap()), now);
        node.drain(now);
        node
    };
    let mut node = before();
    assert!(node.handshakes.is_empty(), "nobody is called without reason");
    let seen: SocketAddr = "198.51.100.8:40000".parse().unwrap();
    node.mesh.handle_roamed(&key(8), Via::Direct(seen), now);
    node.mesh.handle_session(&key(8));
    node.drain(now);
    let hints = node.mesh.hints();
    assert_eq!(hints, [Hint { peer: key(8), direct: Some(seen) }]);

    let mut again = Node::new(2, "worker-1");
    again.mesh.handle_hints(hints);
    again.mesh.handle_plain_peer("roamer".into(), plain(8), None, now);
    again.mesh.handle_plain_peer("silent".into(), plain(9), Some("192.0.2.9:51820".parse().unwrap()), now);
    again.drain(now);
    assert_eq!(again.paths[&key(8)], Some(Via::Direct(seen)));
    assert_eq!(again.handshakes, [key(8)]);
}

#[test]
fn an_idle_node_of_a_large_mesh_does_nothing() {
    let now = Instant::now();
    let mut entries = everyone();
    for i in 0..200_u32 {
        let (byte, third) = (10 + (i % 150) as u8, i / 150);
        if third == 0 {
            entries.push(entry(1, byte, &format!("n{i}"), &format!("10.98.1.{byte}/32"), &[]));
        }
    }
    let mut node = Node::new(1, "home");
    node.mesh.handle_snapshot(network(1), entries, []);
    node.mesh.handle_relay(relay(), true, now);
    assert_eq!(node.drain(now), None, "no timer runs");
    assert!(node.sent.is_empty());
}

#[test]
fn a_thousand_events_in_one_go_are_one_plan() {
    let now = Instant::now();
    let mut node = worker(now);
    let (saves, before) = (node.saves, node.peers.clone());
    for serial in 1..=500 {
        node.mesh.handle_entry(approved(|approval| approval.serial = serial));
        node.mesh.handle_entry(entry(1, 4, "passing", "10.98.0.4/32", &[]));
        node.mesh.handle_removed(&"passing".parse().unwrap());
    }
    node.drain(now);
    assert_eq!(node.saves, saves + 1, "each plan is followed by one save");
    assert_eq!(node.peers, before, "who came and went in the same breath was never told to the data plane");
    node.drain(now);
    assert_eq!(node.saves, saves + 1, "and nothing is left to plan");
}

#[test]
fn a_change_of_one_peer_does_not_touch_the_others() {
    let now = Instant::now();
    let mut node = worker(now);
    node.mesh.handle_relay(relay(), true, now);
    node.drain(now);
    let moved: SocketAddr = "192.0.2.77:51840".parse().unwrap();
    node.mesh.handle_entry(approved(|approval| approval.endpoints = vec![moved.into()]));
    node.mesh.handle_demand(&key(3), now);
    node.drain(now);
    node.mesh.handle_demand(&key(3), now);
    node.drain(now);
    assert!(node.sent.iter().any(|(_, via, _)| *via == Via::Direct(moved)), "the one that changed is followed");
    assert_eq!(node.paths[&key(1)], Some(Via::Relay(relay())), "the other keeps its path");
    let mut other = network(1);
    (other.serial, other.relays) = (other.serial + 1, vec![]);
    node.mesh.handle_network(other);
    node.drain(now);
    assert!(node.relays.is_empty(), "what the network says reaches everybody");
}

// --- pods ---

#[test]
fn pods_are_reached_through_their_nodes_unless_somebody_else_carries_them() {
    let now = Instant::now();
    let mut node = Node::new(2, "worker-1");
    let entries =
        vec![pods(2, "worker-1", &["10.42.2.0/24"], 1), pods(3, "worker-2", &["10.42.3.0/24", "fd00:3::/64"], 1)];
    node.mesh.handle_snapshot(network(1), entries.clone(), []);
    node.drain(now);
    let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
    assert_eq!(node.routes, nets(&["10.42.3.0/24", "10.98.0.3/32", "fd00:3::/64"]));
    assert_eq!(node.mesh.pod_cidrs(), nets(&["10.42.2.0/24"]));

    let mut underlay = Node::new(2, "worker-1");
    underlay.mesh.own.pod_routes = false;
    underlay.mesh.handle_snapshot(network(1), entries, []);
    underlay.drain(now);
    assert_eq!(
        (&underlay.routes, &underlay.peers[&key(3)].allowed_ips),
        (&nets(&["10.98.0.3/32"]), &nets(&["10.98.0.3/32"]))
    );
    assert_eq!(
        underlay.mesh.peers(now)[0].pod_cidrs,
        nets(&["10.42.3.0/24", "fd00:3::/64"]),
        "whose they are is known"
    );
}

#[test]
fn a_pod_cidr_that_moves_is_never_sent_to_two_and_in_the_end_to_the_right_one_in_whatever_order_it_is_told() {
    /// What a node says; none: it is gone.
    type Told = (&'static str, Option<Entry>);
    const CIDR: &str = "10.42.3.0/24";
    let arrives = pods(4, "worker-3", &[], 2);
    let gets = pods(4, "worker-3", &[CIDR], 4);
    let wider = pods(4, "worker-3", &["10.42.0.0/16"], 4);
    let gives = pods(3, "worker-2", &[], 3);
    let says = |entry: &Entry| ("", Some(entry.clone()));
    let stories: [Vec<Told>; 3] = [
        // The node goes, the next one gets its number.
        vec![says(&arrives), ("worker-2", None), says(&gets)],
        // The node stays and gives it away.
        vec![says(&arrives), says(&gives), says(&gets)],
        vec![says(&arrives), says(&gives), says(&wider)],
    ];
    for (number, story) in stories.into_iter().enumerate() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let now = Instant::now();
            let mut node = Node::new(2, "worker-1");
            let before = [pods(2, "worker-1", &[], 1), pods(3, "worker-2", &[CIDR], 1)];
            node.mesh.handle_snapshot(network(1), before, []);
            node.drain(now);
            let cidr: IpNet = CIDR.parse().unwrap();
            let carries = |node: &Node| -> Vec<PublicKey> {
                let leads = |config: &&PeerConfig| config.allowed_ips.iter().any(|net| net.contains(&cidr));
                node.peers.values().filter(leads).map(|config| config.key).collect()
            };
            assert_eq!(carries(&node), [key(3)]);
            for step in order {
                match story[step].clone() {
                    (_, Some(entry)) => node.mesh.handle_entry(entry),
                    (name, None) => node.mesh.handle_removed(&name.parse().unwrap()),
                }
                node.drain(now);
                assert!(carries(&node).len() <= 1, "story {number}, {order:?}");
            }
            assert_eq!(carries(&node), [key(4)], "story {number}, {order:?}");
            assert_eq!(node.routes.iter().filter(|net| net.contains(&cidr)).count(), 1);
        }
    }
}

/// Nodes 2 and 3 with pods in both families, at these locations.
fn neighbours(here: &str, there: &str) -> Vec<Entry> {
    let of = |byte: u8, name: &str, cidrs: &[&str], location: &str, serial: u64| {
        let entry = pods(byte, name, cidrs, serial);
        let location = Some(location.parse().unwrap());
        let approval = Approval { location, ..entry.approval.unwrap().get().clone() };
        Entry { approval: Some(approval.sign(&secret(1).identity())), record: entry.record }
    };
    vec![of(2, "worker-1", &["10.42.2.0/24"], here, 5), of(3, "worker-2", &["10.42.3.0/24", "fd00:3::/64"], there, 5)]
}

/// The two nodes at their host addresses, and a clock that has run until their paths are found.
fn on_one_lan(entries: &[Entry], lan_routes: bool, now: Instant) -> (Node, Node, Instant) {
    let mut nodes = [Node::new(2, "worker-1"), Node::new(3, "worker-2")];
    for (node, host) in nodes.iter_mut().zip(["192.168.1.2:51840", "192.0.2.7:51840"]) {
        node.mesh.own.lan_routes = lan_routes;
        node.mesh.handle_host_addresses(vec![host.parse().unwrap()], now);
        node.mesh.handle_snapshot(network(1), entries.to_vec(), []);
        node.drain(now);
    }
    let [mut one, mut other] = nodes;
    one.mesh.handle_demand(&key(3), now);
    other.mesh.handle_demand(&key(2), now);
    let until = now + Duration::from_secs(5);
    let at = run_wire(&mut one, &mut other, now, until, true);
    (one, other, at)
}

/// Carries probes between two nodes until then; `open`: or swallows them.
fn run_wire(one: &mut Node, other: &mut Node, mut now: Instant, until: Instant, open: bool) -> Instant {
    let addrs: [SocketAddr; 2] = ["192.168.1.2:51840", "192.0.2.7:51840"].map(|addr| addr.parse().unwrap());
    while now < until {
        let due = [one.drain(now), other.drain(now)].into_iter().flatten().min();
        let sent = [std::mem::take(&mut one.sent), std::mem::take(&mut other.sent)];
        let idle = sent.iter().all(Vec::is_empty);
        for (from, probes) in sent.into_iter().enumerate() {
            for (_, via, bytes) in probes {
                let to = 1 - from;
                if open && via == Via::Direct(addrs[to]) {
                    let receiver = if to == 0 { &mut *one } else { &mut *other };
                    receiver.mesh.handle_probe(Via::Direct(addrs[from]), None, &bytes, now).unwrap();
                }
            }
        }
        if idle {
            now = due.map_or(until, |due| due.max(now + Duration::from_millis(1)).min(until));
            one.mesh.handle_timeout(now);
            other.mesh.handle_timeout(now);
        }
    }
    one.drain(now);
    other.drain(now);
    now
}

#[test]
fn pods_of_a_neighbour_in_the_same_location_are_reached_plainly_while_its_own_address_answers() {
    let cidr: IpNet = "10.42.3.0/24".parse().unwrap();
    let start = Instant::now();
    let (mut one, mut other, now) = on_one_lan(&neighbours("home/attic", "home/attic"), true, start);
    let via: IpAddr = "192.0.2.7".parse().unwrap();
    assert_eq!(one.plainly, BTreeMap::from([(cidr, via)]), "IPv6 has no probed address, so it stays in the mesh");
    assert!(one.peers[&key(3)].allowed_ips.contains(&cidr), "the mesh stays ready to carry them");

    // An hour without a packet through the mesh: the neighbour is asked on.
    let now = run_wire(&mut one, &mut other, now, now + Duration::from_secs(3600), true);
    assert_eq!(one.plainly.len(), 1);

    // The neighbour's address answers no more: the mesh takes over, and gives back when it does.
    let now = run_wire(&mut one, &mut other, now, now + Duration::from_secs(30), false);
    assert!(one.plainly.is_empty() && one.routes.contains(&cidr));
    let now = run_wire(&mut one, &mut other, now, now + Duration::from_secs(120), true);
    assert_eq!(one.plainly.len(), 1);

    // It moves house, and later this node does too.
    let moved = |here, there| {
        neighbours(here, there).into_iter().map(|entry| {
            let approval = Approval { serial: 9, ..entry.approval.unwrap().get().clone() };
            Entry { approval: Some(approval.sign(&secret(1).identity())), record: entry.record }
        })
    };
    moved("home/attic", "office").for_each(|entry| one.mesh.handle_entry(entry));
    one.drain(now);
    assert!(one.plainly.is_empty());
}

#[test]
fn nobody_is_reached_plainly_unless_asked_for_and_at_an_address_of_its_own_in_the_same_location() {
    let now = Instant::now();
    let (off, _, _) = on_one_lan(&neighbours("home", "home"), false, now);
    assert!(off.paths[&key(3)].is_some() && off.plainly.is_empty(), "without the option");
    let (apart, _, _) = on_one_lan(&neighbours("home", "office"), true, now);
    assert!(apart.paths[&key(3)].is_some() && apart.plainly.is_empty(), "in another place");

    // Its router forwards the port: the address is not its own, and leads to no pods.
    let mut entries = neighbours("home", "home");
    let mut record = entries[1].record.get().clone();
    record.endpoints = vec!["host 10.0.0.9:51840".parse().unwrap(), "configured 192.0.2.7:51840".parse().unwrap()];
    entries[1].record = record.sign(&secret(3).identity());
    let (routed, _, _) = on_one_lan(&entries, true, now);
    assert!(routed.paths[&key(3)].is_some() && routed.plainly.is_empty(), "behind a router");
}
