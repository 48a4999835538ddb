//! The machine of one node: everything that is decided about its mesh, composed.
//!
//! ```text
//!   registry ──── network, entries ──┐                          ┌── Peers, SetPath, StartHandshake ──> data plane
//!   relays ────── up, observed ──────┤                          ├── Kernel ──────────────────────────> rtnetlink
//!   kernel ────── own addresses ─────┼──> Mesh: plan, diff, ────┼── Relays ──────────────────────────> relay pool
//!   data plane ── probes, demand, ───┤    one agent per peer    ├── SendProbe ───────────────────────> socket, relay
//!                 counters           │                          ├── Publish ─────────────────────────> registry
//!   clock ─────── now ───────────────┘                          └── Save ────────────────────────────> snapshot on disk
//! ```
//!
//! The driver calls a `handle_*`, then drains [`Mesh::poll_output`] until it says [`Output::Timeout`] or
//! [`Output::Idle`]. What the registry tells is only noted; the plan is made when outputs are asked for, so a driver that
//! hands over a thousand changes in one go pays for one plan. Losing the registry is no input: what is known stays in
//! force.

mod follow;
mod peer;
mod words;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;

use self::peer::{Peer, Way};
pub use self::words::{Counters, Hint, Output, Own, PeerStatus, ProbeRefusal};
use crate::io::{PeerConfig, PeerOp, Via};
use crate::kernel::Route;
use crate::key::{NodeId, PublicKey};
use crate::network::Network;
use crate::node::{Approval, Entry, NodeName, NodeRecord};
use crate::path::{self, Candidate, Nat, Observations, TimeoutReason};
use crate::plain_peer::SignedPlainPeer;
use crate::plan::{self, Plan};
use crate::probe::{self, KeyHint, Unverified};
use crate::relay::{HostPort, RelayAddr};

/// What of the plan does not follow what is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stale {
    /// Nothing.
    Nothing,
    /// Nodes and plain peers: those that changed.
    Entries,
    /// Everything: the network's document says how every peer is reached.
    Network,
}

/// The machine. See the [module](self).
pub struct Mesh {
    own: Own,

    // --- what is known ---
    network: Option<Network>,
    entries: BTreeMap<NodeName, Entry>,
    /// Plain peers that the network states, of every serving node.
    stated: BTreeMap<NodeName, SignedPlainPeer>,
    /// Plain peers from this node's own configuration, which win over stated ones.
    plain: BTreeMap<PublicKey, PeerConfig>,
    /// Peers that had a session when this node was last heard of.
    live: BTreeMap<PublicKey, Option<SocketAddr>>,

    // --- where this node is ---
    host: Vec<SocketAddr>,
    configured: Vec<SocketAddr>,
    /// What host names of approvals and stated peers stand for at present.
    resolved: BTreeMap<HostPort, SocketAddr>,
    observations: Observations,
    relays_up: BTreeSet<NodeId>,

    // --- what follows ---
    plan: Plan,
    stale: Stale,
    path_config: Arc<path::Config>,
    local: Arc<[Candidate]>,
    peers: BTreeMap<PublicKey, Peer>,
    by_hint: BTreeMap<KeyHint, PublicKey>,
    deadlines: BTreeSet<(Instant, PublicKey)>,
    published: Option<NodeRecord>,
    relays_told: Vec<RelayAddr>,
    names_told: BTreeSet<HostPort>,
    kernel_told: Option<(Vec<IpNet>, Vec<Route>)>,
    /// A path changed, and with it perhaps who is reached plainly.
    ways_changed: bool,
    outputs: VecDeque<Output>,
    agents_made: u64,
}

impl Mesh {
    /// A node that knows nobody yet.
    pub fn new(own: Own) -> Self {
        let path_config = path::Config {
            own: KeyHint::of(&own.key.public_key()),
            full_size: probe::full_size(own.mtu),
            excluded: own.addresses.clone(),
        };
        Self {
            own,
            network: None,
            entries: BTreeMap::new(),
            stated: BTreeMap::new(),
            plain: BTreeMap::new(),
            live: BTreeMap::new(),
            host: Vec::new(),
            configured: Vec::new(),
            resolved: BTreeMap::new(),
            observations: Observations::default(),
            relays_up: BTreeSet::new(),
            plan: Plan::default(),
            stale: Stale::Nothing,
            path_config: Arc::new(path_config),
            local: Arc::new([]),
            peers: BTreeMap::new(),
            by_hint: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            published: None,
            relays_told: Vec::new(),
            names_told: BTreeSet::new(),
            kernel_told: None,
            ways_changed: false,
            outputs: VecDeque::new(),
            agents_made: 0,
        }
    }

    // --- inputs: what is known ---

    /// Peers that had a session before a restart, with where they were reached: they are called at once.
    pub fn handle_hints(&mut self, hints: impl IntoIterator<Item = Hint>) {
        self.live = hints.into_iter().map(|hint| (hint.peer, hint.direct)).collect();
    }

    /// A plain WireGuard peer from the configuration.
    pub fn handle_plain_peer(&mut self, name: String, config: PeerConfig, endpoint: Option<SocketAddr>, now: Instant) {
        let key = config.key;
        match self.peers.get_mut(&key) {
            Some(Peer { way: Way::Plain(path), .. }) => path.set_endpoint(endpoint),
            Some(_) => return,
            None => {
                self.plain.insert(key, config.clone());
                let last = self.live.get(&key).copied();
                self.peers.insert(key, Peer::plain(name, config.clone(), endpoint.or(last.flatten()), last.is_some()));
                self.outputs.push_back(Output::Peers(vec![PeerOp::Set(config)]));
                self.tell_kernel();
            }
        }
        self.drain(key, now);
    }

    /// Everything that the registry knows; what it does not name is gone.
    pub fn handle_snapshot(
        &mut self,
        network: Network,
        entries: impl IntoIterator<Item = Entry>,
        peers: impl IntoIterator<Item = SignedPlainPeer>,
    ) {
        self.entries = entries.into_iter().map(|entry| (entry.name().clone(), entry)).collect();
        self.stated = peers.into_iter().map(|peer| (peer.get().name.clone(), peer)).collect();
        self.set_network(network);
    }

    /// A node came or changed.
    pub fn handle_entry(&mut self, entry: Entry) {
        let name = entry.name().clone();
        let entry = match self.entries.get(&name) {
            Some(known) => known.clone().succeeded_by(entry),
            None => entry,
        };
        if self.entries.insert(name.clone(), entry).as_ref() != self.entries.get(&name) {
            self.stale = self.stale.max(Stale::Entries);
        }
    }

    /// A node went.
    pub fn handle_removed(&mut self, name: &NodeName) {
        if self.entries.remove(name).is_some() {
            self.stale = self.stale.max(Stale::Entries);
        }
    }

    /// A plain peer of the network came or changed.
    pub fn handle_peer(&mut self, peer: SignedPlainPeer) {
        let name = peer.get().name.clone();
        if self.stated.get(&name).is_none_or(|known| known.get().serial < peer.get().serial) {
            self.stated.insert(name, peer);
            self.stale = self.stale.max(Stale::Entries);
        }
    }

    /// A plain peer of the network went.
    pub fn handle_peer_removed(&mut self, name: &NodeName) {
        if self.stated.remove(name).is_some() {
            self.stale = self.stale.max(Stale::Entries);
        }
    }

    /// The network's document changed.
    pub fn handle_network(&mut self, network: Network) {
        if self.network.as_ref().is_some_and(|known| known.serial > network.serial) {
            return;
        }
        self.set_network(network);
    }

    /// Whether packets to pods go through the mesh from here on.
    pub fn set_pod_routes(&mut self, routed: bool) {
        if self.own.pod_routes != routed {
            self.own.pod_routes = routed;
            self.stale = self.stale.max(Stale::Entries);
        }
    }

    // --- inputs: where this node is ---

    /// The host's own addresses, with the port of the socket.
    pub fn handle_host_addresses(&mut self, addresses: Vec<SocketAddr>, now: Instant) {
        if self.host == addresses {
            return;
        }
        let first = self.host.is_empty();
        self.host = addresses;
        if !first {
            // What others saw belonged to the old addresses.
            self.observations.clear();
        }
        self.relocate(now);
        if !first {
            self.each_agent(now, |agent, now| agent.handle_network_changed(now));
        }
    }

    /// Addresses that the administrator gave.
    pub fn handle_configured_addresses(&mut self, addresses: Vec<SocketAddr>, now: Instant) {
        if self.configured != addresses {
            self.configured = addresses;
            self.relocate(now);
        }
    }

    /// What the names of [`Output::Names`] stand for at present. A name that is missing keeps its last address: a
    /// resolver that is away for a minute must not cost a way that works.
    pub fn handle_resolved(&mut self, found: impl IntoIterator<Item = (HostPort, SocketAddr)>, now: Instant) {
        let mut changed = false;
        for (host, addr) in found {
            if self.names_told.contains(&host) {
                changed |= self.resolved.insert(host, addr) != Some(addr);
            }
        }
        if changed {
            self.refresh_peers(|_| true, now);
        }
    }

    /// A relay is connected, or not any more.
    pub fn handle_relay(&mut self, relay: NodeId, up: bool, now: Instant) {
        let changed = if up { self.relays_up.insert(relay) } else { self.relays_up.remove(&relay) };
        if changed {
            let keys: Vec<PublicKey> = self.peers.keys().copied().collect();
            for key in keys {
                self.set_relays(key, now);
                self.drain(key, now);
            }
        }
    }

    /// `observer` (where we send to) sees this node's socket at `seen`.
    pub fn handle_observed(&mut self, observer: SocketAddr, seen: SocketAddr, now: Instant) {
        if self.observations.record(observer, seen) {
            self.relocate(now);
        }
    }

    // --- inputs: the data plane ---

    /// A datagram that looks like a probe. `from`: the identity that a relay names as its sender.
    pub fn handle_probe(
        &mut self,
        via: Via,
        from: Option<NodeId>,
        datagram: &[u8],
        now: Instant,
    ) -> Result<(), ProbeRefusal> {
        let unverified = Unverified::parse(datagram)?;
        let key = self.by_hint.get(&unverified.sender()).copied().ok_or(ProbeRefusal::UnknownSender)?;
        let Some(peer) = self.peers.get_mut(&key) else { return Ok(()) };
        // A relay that names another sender than the one that authenticates has mixed something up.
        if from.is_some() && from != peer.config.identity {
            return Err(ProbeRefusal::OtherSender);
        }
        let probe_key = peer.probe_key(&self.own.key).ok_or(ProbeRefusal::UnknownSender)?;
        let probe = unverified.verify(probe_key)?;
        if let Way::Agent(agent) = &mut peer.way {
            agent.handle_probe(via, &probe, datagram.len(), now);
        }
        self.drain(key, now);
        Ok(())
    }

    /// A packet wants to go to a peer that has no path or no session.
    pub fn handle_demand(&mut self, peer: &PublicKey, now: Instant) {
        if let Some(Peer { way: Way::Agent(agent), wanted, .. }) = self.peers.get_mut(peer) {
            *wanted = true;
            agent.handle_demand(now);
        }
        self.drain(*peer, now);
    }

    /// An authenticated packet came another way than packets go.
    pub fn handle_roamed(&mut self, peer: &PublicKey, via: Via, now: Instant) {
        match self.peers.get_mut(peer).map(|peer| &mut peer.way) {
            Some(Way::Agent(agent)) => agent.handle_received(via, now),
            Some(Way::Plain(path)) => path.handle_received(via),
            None => return,
        }
        self.drain(*peer, now);
    }

    /// A session was established. Peers with one are called at once after a restart.
    pub fn handle_session(&mut self, peer: &PublicKey) {
        let hint = self.peers.get(peer).and_then(Peer::direct);
        if self.peers.contains_key(peer) && self.live.insert(*peer, hint) != Some(hint) {
            self.outputs.push_back(Output::Save);
        }
    }

    /// What the data plane counted; to be sampled every 100 ms while there is traffic, else every half second. Whether
    /// anything was counted since the last time.
    pub fn handle_counters(&mut self, counters: &[Counters], now: Instant) -> bool {
        let mut any = false;
        for counter in counters {
            let Some(peer) = self.peers.get_mut(&counter.peer) else { continue };
            let received = counter.received > peer.received;
            let sent = counter.sent > peer.sent;
            (peer.received, peer.sent) = (counter.received, counter.sent);
            any |= received || sent;
            match &mut peer.way {
                Way::Agent(agent) => {
                    if let (true, Some(via)) = (received, counter.received_via) {
                        agent.handle_received(via, now);
                    }
                    if sent {
                        agent.handle_sent(now);
                    }
                }
                Way::Plain(_) => continue,
            }
            if received || sent {
                self.drain(counter.peer, now);
            }
        }
        any
    }

    /// The time that [`Output::Timeout`] named has come.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(&(at, key)) = self.deadlines.first() {
            if at > now {
                break;
            }
            self.drain(key, now);
            // An agent that is due again at once would hold up the others; it is served in the next call.
            if self.deadlines.first() == Some(&(at, key)) {
                break;
            }
        }
    }

    // --- outputs ---

    /// What is to be done. Ends with [`Output::Timeout`] or [`Output::Idle`].
    pub fn poll_output(&mut self, now: Instant) -> Output {
        self.follow(now);
        if std::mem::take(&mut self.ways_changed) {
            self.tell_kernel();
        }
        if let Some(output) = self.outputs.pop_front() {
            return output;
        }
        match self.deadlines.first() {
            Some(&(at, key)) => {
                let reason = self.peers.get(&key).map_or(TimeoutReason::Idle, |peer| peer.deadline_reason);
                Output::Timeout { at: at.max(now), reason }
            }
            None => Output::Idle,
        }
    }

    /// Every peer, by name.
    pub fn peers(&self, now: Instant) -> Vec<PeerStatus> {
        let mut peers: Vec<_> = self.peers.iter().map(|(key, peer)| peer.status(*key, &self.plan, now)).collect();
        peers.sort_by(|a, b| a.name.cmp(&b.name));
        peers
    }

    /// The key of a peer by name.
    pub fn peer_named(&self, name: &str) -> Option<PublicKey> {
        self.peers.iter().find(|(_, peer)| peer.name == name).map(|(key, _)| *key)
    }

    /// This node's mesh addresses.
    pub fn addresses(&self) -> Vec<IpNet> {
        self.plan.addresses.iter().chain(&self.own.addresses).copied().collect()
    }

    /// Networks of this node's pods.
    pub fn pod_cidrs(&self) -> &[IpNet] {
        &self.plan.pod_cidrs
    }

    /// Where this node may be reached, and its NAT.
    pub fn location(&self) -> (&[Candidate], Nat) {
        (&self.local, self.observations.nat(&self.host))
    }

    /// What is left out of the plan, and why.
    pub fn faults(&self) -> &[plan::Fault] {
        &self.plan.faults
    }

    /// Networks that this node asks to be the way to and is not allowed to be.
    pub fn unapproved_routes(&self) -> impl Iterator<Item = IpNet> + '_ {
        let network = self.network.as_ref().map(|network| network.id);
        let own = self.own.name.as_ref().and_then(|name| self.entries.get(name));
        let approved = own.and_then(|entry| entry.approved(network?));
        let led = |approval: &Approval, route: IpNet| approval.networks().any(|net| net == route);
        self.own.routes.iter().copied().filter(move |route| approved.is_some_and(|approval| !led(approval, *route)))
    }

    /// What a snapshot keeps of the registry.
    pub fn known(&self) -> (Option<&Network>, impl Iterator<Item = &Entry>, impl Iterator<Item = &SignedPlainPeer>) {
        (self.network.as_ref(), self.entries.values(), self.stated.values())
    }

    /// What a snapshot keeps of the peers.
    pub fn hints(&self) -> Vec<Hint> {
        let direct = |key: &PublicKey, old: Option<SocketAddr>| self.peers.get(key).and_then(Peer::direct).or(old);
        self.live.iter().map(|(key, old)| Hint { peer: *key, direct: direct(key, *old) }).collect()
    }

    // --- carrying it out ---

    fn each_agent(&mut self, now: Instant, act: impl Fn(&mut path::PathAgent, Instant)) {
        let keys: Vec<PublicKey> = self.peers.keys().copied().collect();
        for key in keys {
            if let Some(Peer { way: Way::Agent(agent), .. }) = self.peers.get_mut(&key) {
                act(agent, now);
            }
            self.drain(key, now);
        }
    }

    /// Turns what a peer's path wants into outputs.
    fn drain(&mut self, key: PublicKey, now: Instant) {
        let Some(peer) = self.peers.get_mut(&key) else { return };
        if let Some(at) = peer.deadline.take() {
            self.deadlines.remove(&(at, key));
        }
        loop {
            match peer.poll(now) {
                path::Output::Send { via, probe, len } => {
                    let to = peer.config.identity;
                    if let Some(probe_key) = peer.probe_key(&self.own.key) {
                        let bytes = probe.encode(probe_key, len);
                        self.outputs.push_back(Output::SendProbe { to, via, bytes });
                    }
                }
                path::Output::Select(via) => {
                    self.outputs.push_back(Output::SetPath { peer: key, via });
                    // Without a path the handshake's first message was lost, and its next is seconds away.
                    if via.is_some() && peer.wants_handshake() {
                        self.outputs.push_back(Output::StartHandshake(key));
                    }
                    peer.selected = via;
                    self.ways_changed |= self.own.lan_routes;
                }
                path::Output::Timeout { at, reason } => {
                    peer.deadline = Some(at);
                    peer.deadline_reason = reason;
                    self.deadlines.insert((at, key));
                    return;
                }
                path::Output::Idle => return,
            }
        }
    }
}

/// The socket addresses that a host's addresses make with the mesh's port.
pub fn with_port(addresses: impl IntoIterator<Item = IpAddr>, port: u16) -> Vec<SocketAddr> {
    addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect()
}

#[cfg(test)]
mod tests;
