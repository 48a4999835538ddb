//! Two path agents joined by a simulated network, in virtual time.
//!
//! Probes are really encoded and verified. Data packets stand for WireGuard's. Each node's driver samples its counters
//! every 100 ms, as the path module's head asks for. What must hold at any time is asserted here, in every test:
//! a direct way is selected only after a full-size ping of the same node was answered by it, timeouts are never in the
//! past, and draining ends.

pub mod nat;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use keystone_mesh_core::key::{NodeId, Secret};
use keystone_mesh_core::path::{Candidate, CandidateKind, Config, Output, PathAgent, State};
use keystone_mesh_core::probe::{KeyHint, Message, ProbeKey, TxId, Unverified, full_size};
use keystone_mesh_core::{PrivateKey, Via};

use self::nat::{Filtering, Mapping, Nat};

pub const SAMPLE: Duration = Duration::from_millis(100);
const RELAY_KEEPALIVE: Duration = Duration::from_secs(20);
const RELAY_ADDR: &str = "192.0.2.1:443";
pub const MTU: u16 = 1280;

pub fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Where a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// With a public address of its own.
    Public,
    /// Behind a NAT box of its own.
    Behind(Mapping, Filtering),
    /// Behind the NAT box of the first node.
    SameLan,
}

pub struct Node {
    pub agent: PathAgent,
    pub v4: SocketAddr,
    pub v6: Option<SocketAddr>,
    nat: Option<usize>,
    key: ProbeKey,
    config: Arc<Config>,

    // --- what its driver knows ---
    pub selected: Option<Via>,
    timeout: Option<Instant>,
    sent: bool,
    received: Option<Via>,
    observed: Option<SocketAddr>,
    flow: Option<(Duration, u64)>,
    /// Whether it sends nothing but an answer to each data packet.
    answers: bool,

    // --- what the test looks at ---
    pub selections: Vec<(Instant, Option<Via>)>,
    /// When data arrived, and by which way.
    pub arrived: Vec<(Instant, Via)>,
    /// When probes left, and where to.
    pub probes: Vec<(Instant, Via, usize)>,
    asked: BTreeMap<TxId, (Via, usize)>,
    proven: BTreeSet<Via>,
}

pub struct Relay {
    pub id: NodeId,
    pub up: bool,
    pub latency: Duration,
}

/// The network between the two nodes.
pub struct Net {
    pub latency: Duration,
    pub jitter: Duration,
    /// Of 1000 direct datagrams, this many are lost.
    pub loss: u64,
    /// Whether direct IPv4 passes, from the first node to the second and back.
    pub up: [bool; 2],
    pub v6_up: bool,
    pub lan_up: bool,
    /// UDP payload that passes directly, from the first node to the second and back.
    pub largest: [usize; 2],
}

pub struct World {
    pub now: Instant,
    pub start: Instant,
    pub nodes: [Node; 2],
    pub nats: Vec<Nat>,
    pub net: Net,
    pub relays: Vec<Relay>,
    /// Every direct datagram that a probe was in, by its sender.
    pub captured: Vec<(usize, Vec<u8>)>,
    pub rng: Rng,
    queue: BTreeMap<(Instant, u64), Event>,
    serial: u64,
}

#[derive(Clone)]
enum Event {
    Arrive { at: usize, via: Via, datagram: Datagram },
    Sample(usize),
    Flow { n: usize, generation: u64 },
    KeepRelay,
}

#[derive(Clone)]
enum Datagram {
    Probe(Vec<u8>),
    Data,
}

impl World {
    /// Two nodes that know each other's records, and one relay.
    pub fn new(places: [Place; 2], seed: u64) -> Self {
        let mut world = Self::without_records(places, seed);
        world.exchange_records();
        world
    }

    #[expect(clippy::disallowed_methods, reason = "an epoch for virtual time")]
    pub fn without_records(places: [Place; 2], seed: u64) -> Self {
        let start = Instant::now();
        let mut nats = Vec::new();
        let secrets = [1, 2].map(|n| Secret::from_bytes([n; 32]).wireguard(0));
        let nodes = [0, 1].map(|n| Node::new(n, places[n], &secrets, &mut nats, seed));
        let net = Net {
            latency: ms(20),
            jitter: ms(0),
            loss: 0,
            up: [true; 2],
            v6_up: true,
            lan_up: true,
            largest: [1500 - 28; 2],
        };
        let mut world = Self {
            now: start,
            start,
            nodes,
            nats,
            net,
            relays: vec![Relay { id: NodeId::from_bytes([9; 32]), up: true, latency: ms(60) }],
            captured: Vec::new(),
            rng: Rng(seed),
            queue: BTreeMap::new(),
            serial: 0,
        };
        world.relays_changed();
        world.at(world.now, Event::KeepRelay);
        for n in 0..2 {
            world.at(world.now + SAMPLE, Event::Sample(n));
        }
        world
    }

    // --- what a test does ---

    /// Tells each agent its own addresses and the other's, reflexive ones as the relay sees them.
    pub fn exchange_records(&mut self) {
        for n in 0..2 {
            let candidates = self.candidates(n);
            self.nodes[n].agent.set_local(candidates.clone().into(), self.now);
            self.nodes[1 - n].agent.set_remote(&candidates, self.now);
        }
        self.drain();
    }

    pub fn candidates(&mut self, n: usize) -> Vec<Candidate> {
        let host = |addr| Candidate { kind: CandidateKind::Host, addr };
        let mut all = vec![host(self.nodes[n].v4)];
        all.extend(self.nodes[n].v6.map(host));
        if self.relays.iter().any(|relay| relay.up) {
            let addr = self.external(n, RELAY_ADDR.parse().unwrap());
            all.push(Candidate { kind: CandidateKind::Reflexive, addr });
        }
        all
    }

    /// Node `n` sends a data packet every `period`.
    pub fn flow(&mut self, n: usize, period: Duration) {
        let generation = self.serial;
        self.nodes[n].flow = Some((period, generation));
        self.at(self.now, Event::Flow { n, generation });
    }

    /// Node `n` sends nothing but an answer to each data packet, as the far end of a ping does.
    pub fn answer(&mut self, n: usize) {
        self.nodes[n].flow = None;
        self.nodes[n].answers = true;
    }

    /// Both nodes send all the time.
    pub fn talk(&mut self) {
        self.flow(0, ms(50));
        self.flow(1, ms(50));
    }

    pub fn hush(&mut self) {
        self.nodes.iter_mut().for_each(|node| node.flow = None);
    }

    /// Connects or disconnects the relays as their `up` says.
    pub fn relays_changed(&mut self) {
        let up: Vec<_> = self.relays.iter().filter(|relay| relay.up).map(|relay| relay.id).collect();
        self.nodes.iter_mut().for_each(|node| node.agent.set_relays(&up, self.now));
        self.drain();
    }

    pub fn set_relay(&mut self, up: bool) {
        self.relays[0].up = up;
        self.relays_changed();
    }

    /// Cuts or heals all that is direct.
    pub fn set_direct(&mut self, up: bool) {
        self.net.up = [up; 2];
        self.net.v6_up = up;
        self.net.lan_up = up;
    }

    /// Starts the agent of `n` anew, with what a snapshot would give it.
    pub fn restart(&mut self, n: usize) {
        let seed = self.rng.next();
        let hint = self.nodes[n].agent.hint();
        let node = &mut self.nodes[n];
        node.agent = PathAgent::new(node.config.clone(), seed_bytes(seed));
        if let Some(hint) = hint {
            node.agent.set_hint(hint);
        }
        (node.selected, node.timeout, node.sent, node.received) = (None, None, false, None);
        node.asked.clear();
        node.proven.clear();
        self.relays_changed();
        self.exchange_records();
    }

    /// A datagram out of nowhere.
    pub fn inject(&mut self, at: usize, via: Via, bytes: Vec<u8>) {
        self.at(self.now, Event::Arrive { at, via, datagram: Datagram::Probe(bytes) });
        self.run(ms(0));
    }

    pub fn run(&mut self, span: Duration) {
        let end = self.now + span;
        while self.step(end) {}
    }

    /// Runs until `condition` holds. How long it took, or none after `limit`.
    pub fn run_until(&mut self, limit: Duration, condition: impl Fn(&Self) -> bool) -> Option<Duration> {
        let (begin, end) = (self.now, self.now + limit);
        while !condition(self) {
            if !self.step(end) {
                return None;
            }
        }
        Some(self.now - begin)
    }

    // --- what a test looks at ---

    pub fn direct(&self, n: usize) -> bool {
        matches!(self.nodes[n].selected, Some(Via::Direct(_)))
    }

    pub fn both_direct(&self) -> bool {
        self.direct(0) && self.direct(1)
    }

    pub fn state(&self, n: usize) -> State {
        self.nodes[n].agent.status(self.now).state
    }

    /// The longest time without data at node `n` since `from`.
    pub fn longest_gap(&self, n: usize, from: Instant) -> Duration {
        let times = self.nodes[n].arrived.iter().map(|(at, _)| *at).filter(|at| *at >= from);
        let times: Vec<_> = std::iter::once(from).chain(times).chain([self.now]).collect();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    // --- the clockwork ---

    fn at(&mut self, at: Instant, event: Event) {
        self.serial += 1;
        self.queue.insert((at, self.serial), event);
    }

    /// One event or timeout up to `end`. False once there is none left.
    pub fn step(&mut self, end: Instant) -> bool {
        let event = self.queue.keys().next().map(|(at, _)| *at);
        let timeout = self.nodes.iter().filter_map(|node| node.timeout).min();
        let Some(next) = event.into_iter().chain(timeout).min().filter(|at| *at <= end) else {
            self.now = end;
            return false;
        };
        self.now = self.now.max(next);
        let mut inputs = timeout.is_some_and(|at| at <= self.now);
        if event.is_some_and(|at| at <= self.now) {
            let (_, event) = self.queue.pop_first().unwrap();
            inputs |= self.handle(event);
        }
        if inputs {
            self.drain();
        }
        true
    }

    /// Returns whether an agent may have got an input.
    fn handle(&mut self, event: Event) -> bool {
        let now = self.now;
        match event {
            Event::Arrive { at, via, datagram: Datagram::Probe(bytes) } => self.nodes[at].probed(via, &bytes, now),
            Event::Arrive { at, via, datagram: Datagram::Data } => {
                self.nodes[at].received = Some(via);
                self.nodes[at].arrived.push((now, via));
                if let (true, Some(back)) = (self.nodes[at].answers, self.nodes[at].selected) {
                    self.nodes[at].sent = true;
                    self.transmit(at, back, Datagram::Data);
                }
                return false;
            }
            Event::Sample(n) => {
                self.at(now + SAMPLE, Event::Sample(n));
                return self.nodes[n].sample(now);
            }
            Event::Flow { n, generation } => {
                let Some((period, current)) = self.nodes[n].flow else { return false };
                if generation != current {
                    return false;
                }
                self.at(now + period, Event::Flow { n, generation });
                match self.nodes[n].selected {
                    Some(via) => {
                        self.nodes[n].sent = true;
                        self.transmit(n, via, Datagram::Data);
                        return matches!(via, Via::Relay(_));
                    }
                    None => self.nodes[n].agent.handle_demand(now),
                }
            }
            Event::KeepRelay => {
                (0..2).for_each(|n| self.observed_by_relay(n));
                self.at(now + RELAY_KEEPALIVE, Event::KeepRelay);
            }
        }
        true
    }

    pub fn drain(&mut self) {
        for n in 0..2 {
            for turn in 0.. {
                assert!(turn < 500, "draining does not end");
                let node = &mut self.nodes[n];
                match node.agent.poll_output(self.now) {
                    Output::Send { via, probe, len } => {
                        let bytes = probe.encode(&node.key, len);
                        if matches!(probe.message, Message::Ping { .. }) {
                            node.asked.insert(probe.txid, (via, bytes.len()));
                        }
                        node.probes.push((self.now, via, bytes.len()));
                        if matches!(via, Via::Direct(_)) {
                            self.captured.push((n, bytes.clone()));
                        }
                        self.transmit(n, via, Datagram::Probe(bytes));
                    }
                    Output::Select(via) => node.select(via, self.now),
                    Output::Timeout { at, .. } => {
                        assert!(at >= self.now, "a timeout in the past");
                        node.timeout = Some(at);
                        break;
                    }
                    Output::Idle => {
                        node.timeout = None;
                        break;
                    }
                }
            }
        }
    }

    // --- the network ---

    fn transmit(&mut self, from: usize, via: Via, datagram: Datagram) {
        match via {
            Via::Relay(id) => {
                let Some(relay) = self.relays.iter().find(|relay| relay.id == id && relay.up) else { return };
                let at = self.now + relay.latency;
                self.observed_by_relay(from);
                self.at(at, Event::Arrive { at: 1 - from, via, datagram });
            }
            Via::Direct(to) => {
                let Some((source, latency)) = self.route(from, to, datagram.len()) else { return };
                let jitter = self.net.jitter.mul_f64(self.rng.below(1000) as f64 / 1000.0);
                let at = self.now + latency + jitter;
                self.at(at, Event::Arrive { at: 1 - from, via: Via::Direct(source), datagram });
            }
        }
    }

    /// From which address the other node sees a datagram, if it gets there.
    fn route(&mut self, from: usize, to: SocketAddr, len: usize) -> Option<(SocketAddr, Duration)> {
        let peer = 1 - from;
        let (own4, own6) = (self.nodes[from].v4, self.nodes[from].v6);
        if to.is_ipv6() {
            let passes = self.net.v6_up && self.nodes[peer].v6 == Some(to) && self.passes(from, len);
            return own6.filter(|_| passes).map(|own| (own, self.net.latency));
        }
        let same_lan = self.nodes[from].nat.is_some() && self.nodes[from].nat == self.nodes[peer].nat;
        if same_lan && to == self.nodes[peer].v4 {
            return self.net.lan_up.then_some((own4, ms(1)));
        }
        if is_private(to.ip()) {
            return None;
        }
        let source = self.external(from, to);
        if !self.net.up[from] || !self.passes(from, len) {
            return None;
        }
        let inner = match self.nats.iter_mut().position(|nat| nat.public == to.ip()) {
            Some(nat) if Some(nat) == self.nodes[from].nat => return None,
            Some(nat) => self.nats[nat].inbound(source, to.port(), self.now)?,
            None => to,
        };
        (inner == self.nodes[peer].v4).then_some((source, self.net.latency))
    }

    /// A connected relay tells node `n` from where it comes, which is how the node hears of a new mapping.
    fn observed_by_relay(&mut self, n: usize) {
        let (before, nat) = (self.nodes[n].observed, self.nodes[n].nat);
        if nat.is_none() || !self.relays.iter().any(|relay| relay.up) {
            return;
        }
        let external = self.external(n, RELAY_ADDR.parse().unwrap());
        self.nodes[n].observed = Some(external);
        if before.is_some_and(|before| before != external) {
            let candidates = self.candidates(n);
            self.nodes[n].agent.set_local(candidates.into(), self.now);
        }
    }

    fn passes(&mut self, from: usize, len: usize) -> bool {
        len <= self.net.largest[from] && self.rng.below(1000) >= self.net.loss
    }

    /// The address that `to` would see node `n` at; opens the mapping.
    pub fn external(&mut self, n: usize, to: SocketAddr) -> SocketAddr {
        match self.nodes[n].nat {
            Some(nat) => self.nats[nat].outbound(self.nodes[n].v4, to, self.now),
            None => self.nodes[n].v4,
        }
    }
}

impl Node {
    fn new(n: usize, place: Place, secrets: &[PrivateKey; 2], nats: &mut Vec<Nat>, seed: u64) -> Self {
        let nat = match place {
            Place::Public => None,
            Place::Behind(mapping, filtering) => {
                let public = IpAddr::from([203, 0, 113, 10 + n as u8]);
                nats.push(Nat::new(public, mapping, filtering));
                Some(nats.len() - 1)
            }
            Place::SameLan => Some(0),
        };
        let ip = if nat.is_some() { [192, 168, 1, 10 + n as u8] } else { [198, 51, 100, 10 + n as u8] };
        let own = KeyHint::of(&secrets[n].public_key());
        let config =
            Arc::new(Config { own, full_size: full_size(MTU), excluded: vec!["10.98.0.0/16".parse().unwrap()] });
        Self {
            agent: PathAgent::new(config.clone(), seed_bytes(seed ^ (n as u64) << 40)),
            v4: SocketAddr::from((ip, 51840)),
            v6: None,
            nat,
            key: ProbeKey::agree(&secrets[n], &secrets[1 - n].public_key()).unwrap(),
            config,
            selected: None,
            timeout: None,
            sent: false,
            received: None,
            observed: None,
            flow: None,
            answers: false,
            selections: Vec::new(),
            arrived: Vec::new(),
            probes: Vec::new(),
            asked: BTreeMap::new(),
            proven: BTreeSet::new(),
        }
    }

    fn probed(&mut self, via: Via, bytes: &[u8], now: Instant) {
        let Ok(unverified) = Unverified::parse(bytes) else { return };
        if unverified.sender() == self.config.own {
            return;
        }
        let Ok(probe) = unverified.verify(&self.key) else { return };
        if let (Message::Pong { .. }, Some((asked, len))) = (&probe.message, self.asked.get(&probe.txid))
            && *asked == via
            && *len >= usize::from(full_size(MTU))
        {
            self.proven.insert(via);
        }
        self.agent.handle_probe(via, &probe, bytes.len(), now);
    }

    fn sample(&mut self, now: Instant) -> bool {
        let news = self.received.is_some() || self.sent;
        if let Some(via) = self.received.take() {
            self.agent.handle_received(via, now);
        }
        if std::mem::take(&mut self.sent) {
            self.agent.handle_sent(now);
        }
        news
    }

    fn select(&mut self, via: Option<Via>, now: Instant) {
        if let Some(Via::Direct(_)) = via {
            assert!(self.proven.contains(&via.unwrap()), "selected {via:?} unproven");
        }
        assert_ne!(via, self.selected, "selected again");
        self.selected = via;
        self.selections.push((now, via));
    }
}

impl Datagram {
    fn len(&self) -> usize {
        match self {
            Self::Probe(bytes) => bytes.len(),
            Self::Data => usize::from(full_size(MTU)),
        }
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

fn seed_bytes(seed: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&seed.to_be_bytes());
    bytes
}

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
