//! How the [machine](super) follows what it knows: the plan, and its difference to what was told before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;

use super::peer::{Peer, Way};
use super::{Mesh, Output, Stale};
use crate::io::{PeerConfig, PeerOp, Via};
use crate::kernel::Route;
use crate::key::{NodeId, PublicKey};
use crate::network::Network;
use crate::node::{MAX_ENDPOINTS, NodeRecord};
use crate::path::candidate::usable;
use crate::path::{self, Candidate, CandidateKind};
use crate::plan::{self, Member, Plan};
use crate::probe::KeyHint;
use crate::relay::{HostPort, RelayAddr};

impl Mesh {
    pub(super) fn set_network(&mut self, network: Network) {
        let excluded = network.prefixes().into_iter().chain(self.own.addresses.iter().copied()).collect();
        self.path_config = Arc::new(path::Config { excluded, ..path::Config::clone(&self.path_config) });
        self.network = Some(network);
        self.stale = Stale::Network;
    }

    /// Makes the plan follow what is known, where it does not.
    pub(super) fn follow(&mut self, now: Instant) {
        let everybody = match std::mem::replace(&mut self.stale, Stale::Nothing) {
            Stale::Nothing => return,
            Stale::Entries => false,
            Stale::Network => true,
        };
        let Some(network) = &self.network else { return };
        let before = std::mem::take(&mut self.plan);
        let plan = plan::plan(self.own.identity, network, &self.entries, &self.stated);
        self.plan = if self.own.pod_routes { plan } else { plan.without_pod_routes() };
        let configured = |key: &PublicKey| self.plain.contains_key(key);
        let by_key = |plan: &Plan| -> BTreeMap<PublicKey, PeerConfig> {
            let configs = plan.configs().filter(|config| !configured(&config.key));
            configs.map(|config| (config.key, config.clone())).collect()
        };
        let (mut old, new) = (by_key(&before), by_key(&self.plan));
        // A node's key that has become a plain peer's, or the reverse, is another peer altogether.
        let other_kind = |key: &PublicKey| before.members.contains_key(key) != self.plan.members.contains_key(key);
        let mut ops: Vec<PeerOp> =
            old.keys().filter(|key| new.contains_key(key) && other_kind(key)).map(|key| PeerOp::Remove(*key)).collect();
        old.retain(|key, _| !ops.contains(&PeerOp::Remove(*key)));
        ops.extend(plan::diff(&old, &new));
        for op in &ops {
            match op {
                PeerOp::Remove(key) => self.forget(key),
                PeerOp::Set(config) => self.adopt(config.clone(), now),
            }
        }
        if !ops.is_empty() {
            self.outputs.push_back(Output::Peers(ops));
        }
        self.tell_relays();
        self.tell_names();
        self.tell_kernel();
        let everybody = everybody || (self.own.lan_routes && self.plan.location != before.location);
        let changed = |plan: &Plan, key: &PublicKey| {
            plan.members.get(key) != before.members.get(key) || plan.served.get(key) != before.served.get(key)
        };
        let changed: BTreeSet<PublicKey> =
            self.plan.configs().map(|config| config.key).filter(|key| everybody || changed(&self.plan, key)).collect();
        self.refresh_peers(|key| changed.contains(key), now);
        self.relocate(now);
        self.outputs.push_back(Output::Save);
    }

    pub(super) fn forget(&mut self, key: &PublicKey) {
        if let Some(peer) = self.peers.remove(key) {
            self.by_hint.remove(&KeyHint::of(key));
            self.live.remove(key);
            if let Some(at) = peer.deadline {
                self.deadlines.remove(&(at, *key));
            }
        }
    }

    pub(super) fn adopt(&mut self, config: PeerConfig, now: Instant) {
        let key = config.key;
        if let Some(peer) = self.peers.get_mut(&key) {
            peer.config = config;
            return;
        }
        let last = self.live.get(&key).copied();
        if self.plan.served.contains_key(&key) {
            self.peers.insert(key, Peer::plain(String::new(), config, last.flatten(), last.is_some()));
            return;
        }
        let mut agent = path::PathAgent::new(self.path_config.clone(), self.fresh_seed());
        agent.set_local(self.local.clone(), now);
        if let Some(Some(direct)) = self.live.get(&key) {
            agent.set_hint(Via::Direct(*direct));
        }
        let control_plane = self.network.as_ref().map(|network| network.id);
        let called = self.live.contains_key(&key) || config.identity == control_plane;
        self.by_hint.insert(KeyHint::of(&key), key);
        self.peers.insert(key, Peer::member(config, agent, called));
    }

    /// Gives the paths of these peers what is known of where they are.
    pub(super) fn refresh_peers(&mut self, which: impl Fn(&PublicKey) -> bool, now: Instant) {
        let control_plane = self.network.as_ref().map(|network| network.id);
        let keys: Vec<PublicKey> = self.plan.configs().map(|config| config.key).filter(which).collect();
        for key in keys {
            let Some(peer) = self.peers.get_mut(&key) else { continue };
            match &mut peer.way {
                Way::Agent(agent) => {
                    let Some(member) = self.plan.members.get(&key) else { continue };
                    peer.name = member.name.to_string();
                    agent.set_config(self.path_config.clone());
                    let forced = forced(member, &self.resolved, &self.path_config.excluded);
                    agent.set_remote(&path::candidate::with_forced(forced, &member.candidates), now);
                }
                Way::Plain(path) => {
                    // A configured peer's is set where the configuration says so.
                    let Some(served) = self.plan.served.get(&key).filter(|_| !self.plain.contains_key(&key)) else {
                        continue;
                    };
                    peer.name = served.name.to_string();
                    path.set_endpoint(served.endpoint.as_ref().and_then(|host| address_of(host, &self.resolved)));
                }
            }
            self.set_relays(key, now);
            // Without probes nobody would notice that a neighbour's pods, which need no path, are out of reach.
            let here = self.plan.members.get(&key).is_some_and(|member| self.stands_here(member));
            if let Some(Peer { way: Way::Agent(agent), config, wanted, fresh, .. }) = self.peers.get_mut(&key) {
                let eager = config.identity == control_plane || here;
                match std::mem::take(fresh) {
                    true if eager => agent.set_eager(true, now),
                    true if *wanted => agent.handle_demand(now),
                    true => {}
                    false if self.own.lan_routes => agent.set_eager(eager, now),
                    false => {}
                }
            }
            self.drain(key, now);
        }
    }

    pub(super) fn set_relays(&mut self, key: PublicKey, now: Instant) {
        let Some(member) = self.plan.members.get(&key) else { return };
        let common: Vec<NodeId> = member.relays.iter().filter(|id| self.relays_up.contains(id)).copied().collect();
        if let Some(Peer { way: Way::Agent(agent), .. }) = self.peers.get_mut(&key) {
            agent.set_relays(&common, now);
        }
    }

    /// Computes where this node may be reached and says so, to the agents and to the registry.
    pub(super) fn relocate(&mut self, now: Instant) {
        let own_prefixes = &self.path_config.excluded;
        let of = |kind: CandidateKind, addrs: &[SocketAddr]| -> Vec<Candidate> {
            let usable = addrs.iter().filter(|addr| usable(addr.ip(), own_prefixes));
            usable.map(|addr| Candidate { kind, addr: *addr }).collect()
        };
        let mut local: Vec<Candidate> = of(CandidateKind::Configured, &self.configured);
        for candidate in of(CandidateKind::Host, &self.host)
            .into_iter()
            .chain(of(CandidateKind::Reflexive, &self.observations.reflexive()))
        {
            if !local.iter().any(|other| other.addr == candidate.addr) {
                local.push(candidate);
            }
        }
        let kinds = [CandidateKind::Configured, CandidateKind::Reflexive, CandidateKind::Host];
        let local = path::candidate::spread(&local, kinds, MAX_ENDPOINTS);
        if *self.local != *local {
            self.local = local.into();
            let local = self.local.clone();
            self.each_agent(now, move |agent, now| agent.set_local(local.clone(), now));
        }
        self.publish();
    }

    pub(super) fn publish(&mut self) {
        let Some(name) = &self.own.name else { return };
        let relays = match &self.network {
            Some(_) => self.relays().iter().map(|relay| relay.id).collect(),
            None => self.own.relays.clone(),
        };
        let record = NodeRecord {
            name: name.clone(),
            identity: self.own.identity,
            public_key: self.own.key.public_key(),
            endpoints: self.local.to_vec(),
            nat: self.observations.nat(&self.host),
            relays,
            routes: self.own.routes.clone(),
            seq: 0,
        };
        if self.published.as_ref() != Some(&record) {
            self.published = Some(record.clone());
            self.outputs.push_back(Output::Publish(record));
        }
    }

    /// The network's relays that this node listens on. Where people name none that the network has, it is all of them: a
    /// slip must not cut the node off.
    pub(super) fn relays(&self) -> Vec<RelayAddr> {
        let all = self.network.as_ref().map_or(&[][..], |network| &network.relays);
        let named: Vec<RelayAddr> = all.iter().filter(|relay| self.plan.relays.contains(&relay.id)).cloned().collect();
        if named.is_empty() { all.to_vec() } else { named }
    }

    pub(super) fn tell_relays(&mut self) {
        let relays = self.relays();
        if self.relays_told != relays {
            self.relays_told.clone_from(&relays);
            self.outputs.push_back(Output::Relays(relays));
        }
    }

    pub(super) fn tell_names(&mut self) {
        let names = self.plan.names();
        if self.names_told != names {
            self.resolved.retain(|host, _| names.contains(host));
            self.names_told.clone_from(&names);
            self.outputs.push_back(Output::Names(names));
        }
    }

    pub(super) fn tell_kernel(&mut self) {
        let plain = self.plain.values().flat_map(|config| &config.allowed_ips).copied();
        let mut ways: BTreeMap<IpNet, Option<IpAddr>> =
            self.plan.routes().chain(plain).map(|net| (net, None)).collect();
        for (key, member) in &self.plan.members {
            let Some(neighbour) = self.neighbour(key, member) else { continue };
            for net in member.pod_cidrs.iter().filter(|net| net.addr().is_ipv4() == neighbour.is_ipv4()) {
                ways.entry(*net).and_modify(|via| *via = Some(neighbour));
            }
        }
        let routes = ways.into_iter().map(|(dst, via)| Route { dst, mtu: None, via }).collect();
        let told = (self.addresses(), routes);
        if self.kernel_told.as_ref() != Some(&told) {
            self.kernel_told = Some(told.clone());
            self.outputs.push_back(Output::Kernel { addresses: told.0, routes: told.1 });
        }
    }

    /// Whether people say that a member stands where this node does, and its pods may be reached plainly.
    pub(super) fn stands_here(&self, member: &Member) -> bool {
        self.own.lan_routes && member.location.is_some() && member.location == self.plan.location
    }

    /// The address of a member on a network that it shares with this node: where its direct path leads, if that is an
    /// address of its own host. One that is a router's in front of it has no route to its pods.
    fn neighbour(&self, key: &PublicKey, member: &Member) -> Option<IpAddr> {
        let Some(Via::Direct(addr)) = self.peers.get(key)?.selected.filter(|_| self.stands_here(member)) else {
            return None;
        };
        let own = |candidate: &Candidate| candidate.kind == CandidateKind::Host && candidate.addr.ip() == addr.ip();
        member.candidates.iter().any(own).then_some(addr.ip())
    }

    /// Agents must not share transaction ids, nor reuse those of an earlier start.
    fn fresh_seed(&mut self) -> [u8; 16] {
        self.agents_made += 1;
        let key = hkdf::Hkdf::<sha2::Sha256>::new(None, &self.own.seed);
        let mut seed = [0; 16];
        key.expand_multi_info(&[b"keystone-mesh 1 path", &self.agents_made.to_be_bytes()], &mut seed)
            .expect("16 bytes are within HKDF-SHA256's limit of 255 blocks");
        seed
    }
}

/// Where people say that a member is reached.
fn forced(member: &Member, resolved: &BTreeMap<HostPort, SocketAddr>, own: &[IpNet]) -> Vec<Candidate> {
    let addrs = member.forced.iter().filter_map(|host| address_of(host, resolved));
    let usable = addrs.filter(|addr| usable(addr.ip(), own));
    usable.map(|addr| Candidate { kind: CandidateKind::Configured, addr }).collect()
}

fn address_of(host: &HostPort, resolved: &BTreeMap<HostPort, SocketAddr>) -> Option<SocketAddr> {
    host.literal().or_else(|| resolved.get(host).copied())
}
