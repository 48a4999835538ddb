//! From what is known to what is wanted: every record and approval becomes peers, addresses and routes.
//!
//! A pure function of the network's document, the entries and the plain peers. A node whose entry has a fault is left
//! out, with the fault told; it never stops the others. Of two that claim one thing the one counts whose approval has
//! the higher serial: serials follow the time of approval, so an approval of old that somebody brings back takes
//! nothing from whoever has got the address since.

use std::cmp::Reverse;
use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::admission::overlap;
use crate::io::{PeerConfig, PeerOp};
use crate::key::{NodeId, PublicKey};
use crate::network::Network;
use crate::node::{Approval, Entry, Location, NodeName, NodeRecord};
use crate::path::Candidate;
use crate::path::candidate::usable;
use crate::plain_peer::{PlainPeer, SignedPlainPeer};
use crate::relay::HostPort;

/// A peer that may be spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: NodeName,
    /// Its mesh addresses.
    pub addresses: Vec<IpNet>,
    /// Networks behind it.
    pub routes: Vec<IpNet>,
    /// Networks of its pods.
    pub pod_cidrs: Vec<IpNet>,
    /// Where it may be reached, without addresses that must never be tried.
    pub candidates: Vec<Candidate>,
    /// Where people say that it is reached, with names that are to be resolved.
    pub forced: Vec<HostPort>,
    /// Relays that it listens on.
    pub relays: Vec<NodeId>,
    /// Where people say that it stands.
    pub location: Option<Location>,
    /// What the data plane needs.
    pub config: PeerConfig,
}

/// A plain WireGuard peer that this node serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Its name.
    pub name: NodeName,
    /// Its mesh addresses.
    pub addresses: Vec<IpNet>,
    /// Networks behind it.
    pub routes: Vec<IpNet>,
    /// Where it is reached; none: it has to come first.
    pub endpoint: Option<HostPort>,
    /// What the data plane needs.
    pub config: PeerConfig,
}

/// Why (a part of) a node is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No valid approval for this name and identity.
    NotApproved {
        /// The node.
        name: NodeName,
    },
    /// Two nodes with one WireGuard key.
    SharedKey {
        /// The node that is left out.
        name: NodeName,
        /// The node that has the key.
        other: NodeName,
    },
    /// Two nodes with overlapping networks.
    Overlap {
        /// The node that goes without `net`.
        name: NodeName,
        /// The network.
        net: IpNet,
        /// The node that has `taken`.
        other: NodeName,
        /// The network that it overlaps.
        taken: IpNet,
    },
    /// A network of a plain peer that is not among the approved routes of this node, which serves the peer.
    NotRouted {
        /// The plain peer.
        peer: NodeName,
        /// The network.
        net: IpNet,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotApproved { name } => write!(f, "node `{name}` is not approved for its identity; it is left out"),
            Self::SharedKey { name, other } => {
                write!(f, "node `{name}` shows the WireGuard key of `{other}`; it is left out")
            }
            Self::Overlap { name, net, other, taken } => {
                write!(f, "{net} of node `{name}` overlaps {taken} of `{other}`; it is left out")
            }
            Self::NotRouted { peer, net } => {
                write!(f, "{net} of plain peer `{peer}` is not approved as a route of this node; it is left out")
            }
        }
    }
}

/// What is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// This node's mesh addresses.
    pub addresses: Vec<IpNet>,
    /// Networks of this node's pods.
    pub pod_cidrs: Vec<IpNet>,
    /// Where people say that this node stands.
    pub location: Option<Location>,
    /// The relays that people tell this node to listen on; empty: all of the network's.
    pub relays: Vec<NodeId>,
    /// Every peer that may be spoken to.
    pub members: BTreeMap<PublicKey, Member>,
    /// Every plain peer that this node serves.
    pub served: BTreeMap<PublicKey, Served>,
    /// What is left out, and why.
    pub faults: Vec<Fault>,
}

impl Plan {
    /// What the kernel must send into the mesh: the mesh itself is reached by address, networks behind nodes by route.
    pub fn routes(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.configs().flat_map(|config| &config.allowed_ips).copied()
    }

    /// Leaves pods to somebody else's network: no peer is the way to its pods. Whose they are stays known.
    pub fn without_pod_routes(mut self) -> Self {
        for member in self.members.values_mut() {
            member.config.allowed_ips.retain(|net| !member.pod_cidrs.contains(net));
        }
        self
    }

    /// Every peer as the data plane needs it.
    pub fn configs(&self) -> impl Iterator<Item = &PeerConfig> {
        let members = self.members.values().map(|member| &member.config);
        members.chain(self.served.values().map(|served| &served.config))
    }

    /// Host names that are to be resolved, each once.
    pub fn names(&self) -> BTreeSet<HostPort> {
        let forced = self.members.values().flat_map(|member| &member.forced);
        let endpoints = self.served.values().filter_map(|served| served.endpoint.as_ref());
        forced.chain(endpoints).filter(|host| host.literal().is_none()).cloned().collect()
    }
}

/// Computes what is wanted of node `me`.
pub fn plan(
    me: NodeId,
    network: &Network,
    entries: &BTreeMap<NodeName, Entry>,
    peers: &BTreeMap<NodeName, SignedPlainPeer>,
) -> Plan {
    let mut plan = Plan::default();
    let mut claims = Claims::default();
    let approved = by_serial(network.id, entries, &mut plan.faults);
    let owners = owners(me, &approved);
    for (entry, approval) in approved {
        let (name, record) = (entry.name(), entry.record.get());
        let mut granted = Vec::with_capacity(approval.networks().count());
        for net in approval.networks() {
            match claims.claim(net, name) {
                Ok(()) => granted.push(net),
                Err((other, taken)) => plan.faults.push(Fault::Overlap { name: name.clone(), net, other, taken }),
            }
        }
        match owners.get(&record.public_key).filter(|owner| owner.name() != name) {
            Some(owner) => plan.faults.push(Fault::SharedKey { name: name.clone(), other: owner.name().clone() }),
            None if record.identity == me => {
                plan.addresses = among(&granted, &approval.addresses);
                plan.pod_cidrs = among(&granted, &approval.pod_cidrs);
                plan.location.clone_from(&approval.location);
                plan.relays.clone_from(&approval.relays);
            }
            None => drop(plan.members.insert(record.public_key, member(network, record, approval, granted))),
        }
    }
    if let Some(own) = entries.values().find(|entry| entry.record.get().identity == me) {
        serve(&mut plan, own, network, peers);
    }
    plan
}

/// Whose each WireGuard key is. Where two nodes show one key, it is that of the one that proves to have it, and where
/// that does not tell them apart, of the one with the higher serial. Proofs are checked only then.
fn owners<'a>(me: NodeId, approved: &[(&'a Entry, &Approval)]) -> BTreeMap<PublicKey, &'a Entry> {
    let proves = |entry: &Entry| entry.record.get().identity == me || entry.record.proves_its_key();
    let mut owners: BTreeMap<PublicKey, &Entry> = BTreeMap::new();
    for (entry, _) in approved {
        match owners.entry(entry.record.get().public_key) {
            Slot::Vacant(slot) => drop(slot.insert(entry)),
            Slot::Occupied(mut slot) if !proves(slot.get()) && proves(entry) => drop(slot.insert(entry)),
            Slot::Occupied(_) => {}
        }
    }
    owners
}

/// Adds the plain peers that this node serves. Each gets only what is approved as a route of this node: that is what
/// sends the others' packets here.
fn serve(plan: &mut Plan, own: &Entry, network: &Network, peers: &BTreeMap<NodeName, SignedPlainPeer>) {
    let Some(approval) = own.approved(network.id) else { return };
    let mut claims = Claims::default();
    let mut served: Vec<&PlainPeer> = peers.values().map(SignedPlainPeer::get).collect();
    served.retain(|peer| peer.network == network.id && peer.node == *own.name() && !peer.is_revoked());
    served.sort_by_key(|peer| Reverse(peer.serial));
    for peer in served {
        let mine = (peer.public_key == own.record.get().public_key).then_some(own.name());
        let other = mine.or_else(|| plan.members.get(&peer.public_key).map(|member| &member.name));
        if let Some(other) = other.or_else(|| plan.served.get(&peer.public_key).map(|served| &served.name)) {
            let fault = Fault::SharedKey { name: peer.name.clone(), other: other.clone() };
            plan.faults.push(fault);
            continue;
        }
        let mut granted = Vec::with_capacity(peer.addresses.len() + peer.routes.len());
        for &net in peer.addresses.iter().chain(&peer.routes) {
            if !approval.routes.iter().any(|route| route.contains(&net)) {
                plan.faults.push(Fault::NotRouted { peer: peer.name.clone(), net });
                continue;
            }
            match claims.claim(net, &peer.name) {
                Ok(()) => granted.push(net),
                Err((other, taken)) => plan.faults.push(Fault::Overlap { name: peer.name.clone(), net, other, taken }),
            }
        }
        plan.served.insert(peer.public_key, served_peer(peer, granted));
    }
}

fn served_peer(peer: &PlainPeer, granted: Vec<IpNet>) -> Served {
    Served {
        name: peer.name.clone(),
        addresses: among(&granted, &peer.addresses),
        routes: among(&granted, &peer.routes),
        endpoint: peer.endpoint.clone(),
        config: PeerConfig {
            key: peer.public_key,
            identity: None,
            preshared_key: None,
            persistent_keepalive: peer.persistent_keepalive,
            allowed_ips: granted,
        },
    }
}

/// The approved nodes, the highest serial first; the others become faults.
fn by_serial<'a>(
    network: NodeId,
    entries: &'a BTreeMap<NodeName, Entry>,
    faults: &mut Vec<Fault>,
) -> Vec<(&'a Entry, &'a Approval)> {
    let mut approved = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        match entry.approved(network) {
            Some(approval) => approved.push((entry, approval)),
            None => faults.push(Fault::NotApproved { name: name.clone() }),
        }
    }
    // Stable: of equal serials the first by name counts, on every node alike.
    approved.sort_by_key(|(_, approval)| Reverse(approval.serial));
    approved
}

fn member(network: &Network, record: &NodeRecord, approval: &Approval, granted: Vec<IpNet>) -> Member {
    let own_prefixes = network.prefixes();
    Member {
        name: record.name.clone(),
        addresses: among(&granted, &approval.addresses),
        routes: among(&granted, &approval.routes),
        pod_cidrs: among(&granted, &approval.pod_cidrs),
        candidates: record.endpoints.iter().filter(|c| usable(c.addr.ip(), &own_prefixes)).copied().collect(),
        forced: approval.endpoints.clone(),
        relays: record.relays.clone(),
        location: approval.location.clone(),
        config: PeerConfig {
            key: record.public_key,
            identity: Some(record.identity),
            preshared_key: None,
            persistent_keepalive: None,
            allowed_ips: granted,
        },
    }
}

fn among(granted: &[IpNet], kind: &[IpNet]) -> Vec<IpNet> {
    granted.iter().filter(|net| kind.contains(net)).copied().collect()
}

/// Changes that lead from one set of peers to another. Removals come first, so that a network can move from one peer
/// to another within one application.
pub fn diff(old: &BTreeMap<PublicKey, PeerConfig>, new: &BTreeMap<PublicKey, PeerConfig>) -> Vec<PeerOp> {
    let removed = old.keys().filter(|key| !new.contains_key(key)).map(|key| PeerOp::Remove(*key));
    let set = new.iter().filter(|(key, config)| old.get(key) != Some(config)).map(|(_, c)| PeerOp::Set(c.clone()));
    removed.chain(set).collect()
}

/// Disjoint networks and who has them, by first address.
#[derive(Debug, Default)]
struct Claims<'a> {
    nets: BTreeMap<(bool, u128), (IpNet, &'a NodeName)>,
}

impl<'a> Claims<'a> {
    /// Takes a network, or names whom it would be taken from. Networks already taken are disjoint, so only the
    /// nearest one below and the nearest one above can overlap.
    fn claim(&mut self, net: IpNet, owner: &'a NodeName) -> Result<(), (NodeName, IpNet)> {
        let start = position(net);
        let below = self.nets.range(..=start).next_back();
        let above = self.nets.range(start..).next();
        for (_, (taken, other)) in below.into_iter().chain(above) {
            if overlap(net, *taken) {
                return Err(((*other).clone(), *taken));
            }
        }
        self.nets.insert(start, (net, owner));
        Ok(())
    }
}

fn position(net: IpNet) -> (bool, u128) {
    match net.network() {
        IpAddr::V4(v4) => (false, u128::from(u32::from(v4))),
        IpAddr::V6(v6) => (true, u128::from(v6)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::network::tests::network;
    use crate::node::tests::{entry, record, secret};

    fn entries(list: Vec<Entry>) -> BTreeMap<NodeName, Entry> {
        list.into_iter().map(|entry| (entry.name().clone(), entry)).collect()
    }

    fn planned(list: Vec<Entry>) -> Plan {
        plan(secret(2).identity().id(), &network(1), &entries(list), &BTreeMap::new())
    }

    #[test]
    fn approved_nodes_become_peers_and_the_own_entry_becomes_addresses() {
        let plan = planned(vec![
            entry(1, 1, "home", "10.98.0.1/32", &["10.42.0.0/24"]),
            entry(1, 2, "me", "10.98.0.2/32", &[]),
        ]);
        assert_eq!(plan.addresses, ["10.98.0.2/32".parse().unwrap()]);
        let home = &plan.members[&secret(1).wireguard(0).public_key()];
        assert_eq!(home.config.allowed_ips.len(), 2);
        assert_eq!(plan.routes().count(), 2);
        assert!(plan.faults.is_empty());
    }

    #[test]
    fn nobody_is_used_without_an_approval_of_this_network() {
        let unapproved = Entry { record: record(3, "x").sign(&secret(3).identity()), approval: None };
        let foreign = entry(9, 4, "y", "10.98.0.4/32", &[]);
        let plan = planned(vec![unapproved, foreign, entry(1, 5, "z", "10.98.0.5/32", &[])]);
        assert_eq!(plan.members.len(), 1);
        assert_eq!(plan.faults.len(), 2);
    }

    #[test]
    fn overlaps_name_both_sides_and_stop_only_the_later_one() {
        let plan = planned(vec![
            entry(1, 3, "a", "10.98.0.3/32", &["10.42.0.0/16"]),
            entry(1, 4, "b", "10.98.0.4/32", &["10.42.7.0/24", "10.43.0.0/24"]),
        ]);
        assert_eq!(plan.faults.len(), 1);
        let text = plan.faults[0].to_string();
        assert!(text.contains("10.42.7.0/24 of node `b`") && text.contains("10.42.0.0/16 of `a`"), "{text}");
        let b = &plan.members[&secret(4).wireguard(0).public_key()];
        assert_eq!(b.routes, ["10.43.0.0/24".parse().unwrap()]);
    }

    #[test]
    fn a_stolen_wireguard_key_does_not_displace_its_owner() {
        let mut thief = record(4, "b");
        thief.public_key = record(3, "a").public_key;
        let thief = Entry { record: thief.sign(&secret(4).identity()), ..entry(1, 4, "b", "10.98.0.4/32", &[]) };
        let plan = planned(vec![entry(1, 3, "a", "10.98.0.3/32", &[]), thief]);
        assert_eq!(plan.members.len(), 1);
        assert!(matches!(plan.faults[..], [Fault::SharedKey { .. }]));
    }

    #[test]
    fn an_approval_of_old_takes_nothing_from_whoever_has_the_address_since() {
        let again = |serial: u64, byte: u8, name: &str| {
            let mut entry = entry(1, byte, name, "10.98.0.3/32", &["10.42.0.0/16"]);
            let approval = Approval { serial, ..entry.approval.unwrap().get().clone() };
            entry.approval = Some(approval.sign(&secret(1).identity()));
            entry
        };
        let plan = planned(vec![again(1, 3, "a"), again(2, 4, "b")]);
        assert_eq!(plan.faults.len(), 2);
        assert!(plan.members[&secret(3).wireguard(0).public_key()].config.allowed_ips.is_empty());
        assert_eq!(plan.members[&secret(4).wireguard(0).public_key()].config.allowed_ips.len(), 2);
    }

    #[test]
    fn a_shared_key_is_that_of_whoever_proves_it() {
        let owner = entry(1, 4, "b", "10.98.0.4/32", &[]);
        let proved = record(4, "b").sign_with_key(&secret(4).identity(), &secret(4).wireguard(0));
        let owner = Entry { record: proved, ..owner };
        for serial in [0, 9] {
            let mut thief = record(3, "a");
            thief.public_key = owner.record.get().public_key;
            let approval = entry(1, 3, "a", "10.98.0.3/32", &[]).approval.unwrap().get().clone();
            let approval = Some(Approval { serial, ..approval }.sign(&secret(1).identity()));
            let thief = Entry { record: thief.sign(&secret(3).identity()), approval };
            let plan = planned(vec![owner.clone(), thief]);
            assert_eq!(plan.members, planned(vec![owner.clone()]).members);
            assert!(matches!(&plan.faults[..], [Fault::SharedKey { name, .. }] if name.as_str() == "a"));
        }
    }

    #[test]
    fn nobody_takes_the_readers_own_key() {
        let mut thief = record(3, "a");
        thief.public_key = secret(2).wireguard(0).public_key();
        let thief = Entry { record: thief.sign(&secret(3).identity()), ..entry(1, 3, "a", "10.98.0.3/32", &[]) };
        let plan = planned(vec![thief, entry(1, 2, "me", "10.98.0.2/32", &[])]);
        assert!(plan.members.is_empty());
        assert_eq!(plan.addresses, ["10.98.0.2/32".parse().unwrap()]);
    }

    #[test]
    fn addresses_inside_the_mesh_are_never_candidates() {
        let mut own = record(3, "a");
        own.endpoints = vec!["host 10.98.0.3:51840".parse().unwrap(), "host 192.0.2.3:51840".parse().unwrap()];
        let own = Entry { record: own.sign(&secret(3).identity()), ..entry(1, 3, "a", "10.98.0.3/32", &[]) };
        let plan = planned(vec![own]);
        let member = plan.members.values().next().unwrap();
        assert_eq!(member.candidates, ["host 192.0.2.3:51840".parse().unwrap()]);
    }

    proptest! {
        #[test]
        fn claims_agree_with_comparing_every_pair(nets in proptest::collection::vec((0_u32..16, 24_u8..=32), 0..30)) {
            let names: Vec<NodeName> = (0..nets.len()).map(|i| format!("n{i}").parse().unwrap()).collect();
            let mut claims = Claims::default();
            let mut taken: Vec<IpNet> = Vec::new();
            for (i, (third, len)) in nets.into_iter().enumerate() {
                let address = std::net::Ipv4Addr::from(0x0a00_0000 | (third << 6));
                let net = IpNet::new(address.into(), len).unwrap().trunc();
                let free = taken.iter().all(|other| !overlap(net, *other));
                prop_assert_eq!(claims.claim(net, &names[i]).is_ok(), free);
                if free { taken.push(net); }
            }
        }

        #[test]
        fn applying_a_diff_gives_the_wanted_peers(old in 0_u8..32, new in 0_u8..32, changed in 0_u8..32) {
            let config = |i: u8, keepalive| PeerConfig {
                key: PublicKey::from_bytes([i; 32]), identity: None, preshared_key: None,
                persistent_keepalive: keepalive, allowed_ips: vec![],
            };
            let set = |bits: u8, changed: u8| (0..5).filter(|i| bits & (1 << i) != 0)
                .map(|i| (PublicKey::from_bytes([i; 32]), config(i, (changed & (1 << i) != 0).then_some(25)))).collect::<BTreeMap<_, _>>();
            let (old, new) = (set(old, 0), set(new, changed));
            let mut state = old.clone();
            for op in diff(&old, &new) {
                match op {
                    PeerOp::Set(config) => drop(state.insert(config.key, config)),
                    PeerOp::Remove(key) => drop(state.remove(&key)),
                }
            }
            prop_assert_eq!(&state, &new);
            prop_assert!(diff(&new, &new).is_empty());
        }
    }
}
