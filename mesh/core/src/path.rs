//! Which way a peer's packets go: relay first, then direct.
//!
//! Two nodes, each perhaps behind a NAT, want to exchange packets at once and the short way soon. One [`PathAgent`]
//! per peer decides. It sends [probes](crate::probe), and says which way is selected; nothing but its
//! [`Output::Select`] moves traffic.
//!
//! ```text
//!                       demand, traffic, a probe that wants us, eager
//!            +--------+ ---------------------------------------------> +-------------------------------------+
//!            |  idle  |                                                |  active                             |
//!            | relay  | <--------------------------------------------- |  relay --- direct way works ------> |
//!            | if any | 5 min without traffic, the peer not wanting it |        <-- it died (<= 1 s) ------- |
//!            +--------+                                                +-------------------------------------+
//! ```
//!
//! **First packet.** A connected relay is selected before anything is asked, in the idle state already: the first
//! packet has somewhere to go, and its passing is what wakes the agent.
//!
//! **Becoming direct.** Every address of the peer is asked at once. Each end also tells the other
//! through the relay to do the same, because a NAT lets a packet in only after one went out: whoever sends second
//! gets through. Each ping is answered, and the address that it came from is asked too; that is how the port of a peer
//! behind an endpoint-dependent ("symmetric") NAT becomes known. What becomes direct: everything where one side's NAT
//! maps endpoint-independently, unless the other side's is endpoint-dependent and this one filters by port.
//! A way is usable once a ping of full size was answered: traffic does not move to a way that drops what is large.
//!
//! ```text
//!   A (behind NAT)                    relay                     B (behind NAT)
//!   ping to B's addresses --------------------------------> X   B's NAT knows no A yet; A's NAT now knows B
//!   punch [A's addresses] ----------->  |  ----------------->
//!      <---------------------------------------------------- ping to A's addresses
//!   pong, ping to where it came from ---------------------->
//!   full-size ping ... pong: selected                           the same: selected
//! ```
//!
//! **Staying alive.** Pongs and authenticated packets confirm a way. If packets go out and nothing comes back, four
//! pings within 300 ms decide, and traffic is back on the relay within a second of the failure. The relay is kept warm
//! for that.
//!
//! **Trust.** An address that was learned from a ping, a punch or a packet is only asked, never used: traffic follows
//! pongs, which echo a fresh transaction id and are authenticated. A recorded ping that is replayed from elsewhere
//! costs a pong and a few small pings, within a budget, and moves nothing; at worst it keeps an idle agent awake.
//!
//! # What the driver does
//!
//! * Feeds every verified probe to [`PathAgent::handle_probe`], encodes and sends every [`Output::Send`].
//! * **Samples the peer's counters every 100 ms while the peer is active** (idle peers may be sampled as seldom as
//!   every second): if authenticated packets came in, [`PathAgent::handle_received`] with where they came from; then,
//!   if data packets went out, [`PathAgent::handle_sent`]. In this order. WireGuard's own empty keepalives are best
//!   left out of both: they would keep an idle peer awake.
//! * Calls [`PathAgent::handle_demand`] when a packet finds no way, and as soon as it likes when traffic to an idle
//!   peer begins (a handshake is started): probing need not wait for the next sample.
//! * Drains [`PathAgent::poll_output`] after every input and at the time that it names.
//! * Sends direct probes with "don't fragment" set, or their size would say nothing.
//!
//! An agent costs some hundred bytes while idle, has no timer then and sends nothing.

mod active;
mod budget;
pub mod candidate;
mod draw;
mod ladder;
mod nat;
mod plain;
mod report;
mod score;
mod status;
mod way;
mod ways;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;

pub use candidate::{Candidate, CandidateKind};
pub use nat::{Nat, Observations};
pub use plain::PlainPath;
pub use status::{Outcome, Reason, State, Status, Tried};
pub use way::Origin;

use self::active::Active;
use self::budget::Budget;
use self::draw::Draw;
use crate::io::Via;
use crate::key::NodeId;
use crate::probe::{KeyHint, MAX_PUNCH_ADDRESSES, Message, Probe, TxId};

/// Addresses of the peer's record that are kept.
const MAX_RECORDED: usize = 12;

/// What all agents of a node share.
#[derive(Clone, Debug)]
pub struct Config {
    /// The hint of this node's WireGuard key.
    pub own: KeyHint,
    /// UDP payload that a direct way must carry, bytes: [`crate::probe::full_size`] of the mesh MTU.
    pub full_size: u16,
    /// Prefixes that are never probed: the mesh's own, pods, services.
    pub excluded: Vec<IpNet>,
}

/// What an agent wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Encode with the pair's key, padded to `len` bytes (0: no padding), and send.
    Send {
        /// Where to.
        via: Via,
        /// What.
        probe: Probe,
        /// Least size of the datagram, bytes.
        len: u16,
    },
    /// The peer's packets go this way as of now; none: there is no way.
    Select(Option<Via>),
    /// Drained. Poll again at this time, which is not in the past.
    Timeout {
        /// When.
        at: Instant,
        /// What for.
        reason: TimeoutReason,
    },
    /// Drained. There is nothing to do until the next input.
    Idle,
}

/// What an agent waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TimeoutReason {
    /// The next ping of a series, or its verdict.
    Probe,
    /// A way that works is due for a check.
    Check,
    /// The next round over the ways that do not work.
    Round,
    /// Going idle.
    Idle,
}

impl TimeoutReason {
    /// The word in logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Check => "check",
            Self::Round => "round",
            Self::Idle => "idle",
        }
    }
}

/// Decides the way to one peer. See the [module](self).
pub struct PathAgent {
    base: Base,
    active: Option<Box<Active>>,
}

/// What an agent knows and has whether it is active or not.
struct Base {
    config: Arc<Config>,
    draw: Draw,
    outputs: VecDeque<Output>,

    // --- what the world is like ---
    local: Arc<[Candidate]>,
    remote: Box<[Candidate]>,
    relays: Box<[NodeId]>,
    remembered: Option<SocketAddr>,
    eager: bool,

    selected: Option<Via>,
    /// Pings that we send.
    probes: Budget,
    /// Pings and punches of the peer that we answer; what is over it was a flood or a replay.
    answers: Budget,
}

impl PathAgent {
    /// An agent for one peer, idle. `seed` must be fresh for every agent and every start of the daemon: transaction
    /// ids come from it, and with ids that were used before, recorded pongs would be believed.
    pub fn new(config: Arc<Config>, seed: [u8; 16]) -> Self {
        let base = Base {
            config,
            draw: Draw::new(seed),
            outputs: VecDeque::new(),
            local: Arc::new([]),
            remote: Box::new([]),
            relays: Box::new([]),
            remembered: None,
            eager: false,
            selected: None,
            probes: Budget::default(),
            answers: Budget::default(),
        };
        Self { base, active: None }
    }

    // --- what the world is like ---

    /// The shared values changed (mesh MTU, prefixes, own key).
    pub fn set_config(&mut self, config: Arc<Config>) {
        self.base.config = config;
    }

    /// Where this node may be reachable, to be told to the peer.
    pub fn set_local(&mut self, candidates: Arc<[Candidate]>, now: Instant) {
        if self.base.local != candidates {
            self.base.local = candidates;
            if let Some(active) = &mut self.active {
                active.local_changed(&self.base, now);
            }
        }
    }

    /// Where the peer may be reachable, from its record. Of many, 12 are kept, of each kind in turn.
    pub fn set_remote(&mut self, candidates: &[Candidate], now: Instant) {
        let kinds = [CandidateKind::Reflexive, CandidateKind::Host, CandidateKind::Configured];
        let candidates = candidate::spread(candidates, kinds, MAX_RECORDED).into_boxed_slice();
        if self.base.remote != candidates {
            self.base.remote = candidates;
            if let Some(active) = &mut self.active {
                active.record_changed(&self.base, now);
            }
        }
    }

    /// The relays that are connected and by which the peer can be reached, the preferred first. Of many, 4 are used.
    pub fn set_relays(&mut self, relays: &[NodeId], now: Instant) {
        let relays = &relays[..relays.len().min(ways::MAX_RELAYS)];
        if *self.base.relays == *relays {
            return;
        }
        self.base.relays = relays.into();
        match &mut self.active {
            Some(active) => active.relays_changed(&self.base, now),
            None => self.base.rest(None),
        }
    }

    /// A way that worked before the daemon was restarted. It is asked first, like any other.
    pub fn set_hint(&mut self, last_good: Via) {
        match last_good {
            Via::Direct(addr) => self.base.remembered = Some(addr),
            Via::Relay(_) => {}
        }
    }

    /// Eager agents never go idle: for the few peers that must always be a hop away (the control plane).
    pub fn set_eager(&mut self, eager: bool, now: Instant) {
        self.base.eager = eager;
        if eager {
            self.wake(now).want(false, now);
        }
    }

    /// The node's own addresses changed or the host woke up: everything is asked again at once.
    pub fn handle_network_changed(&mut self, now: Instant) {
        if let Some(active) = &mut self.active {
            active.network_changed(&mut self.base, now);
        }
    }

    // --- traffic ---

    /// A packet wants to go to the peer.
    pub fn handle_demand(&mut self, now: Instant) {
        self.wake(now).want(true, now);
    }

    /// Since the last sample, packets went to the peer on the selected way.
    pub fn handle_sent(&mut self, now: Instant) {
        self.wake(now);
        if let Some(active) = &mut self.active {
            active.sent(&self.base, now);
        }
    }

    /// Since the last sample, packets that WireGuard authenticated came from the peer this way.
    pub fn handle_received(&mut self, via: Via, now: Instant) {
        self.wake(now);
        if let Some(active) = &mut self.active {
            active.received(&self.base, via, now);
        }
    }

    // --- probes ---

    /// A probe of the peer, verified with the pair's key, came this way in a datagram of `len` bytes.
    pub fn handle_probe(&mut self, via: Via, probe: &Probe, len: usize, now: Instant) {
        match &probe.message {
            Message::Ping { wanted } => self.handle_ping(via, probe.txid, *wanted, len, now),
            Message::Pong { seen } => {
                if let Some(active) = &mut self.active {
                    active.ponged(&self.base, via, probe.txid, *seen, now);
                }
            }
            Message::Punch { answer, addresses } => self.handle_punch(*answer, addresses, now),
        }
    }

    fn handle_ping(&mut self, via: Via, txid: TxId, wanted: bool, len: usize, now: Instant) {
        if self.base.answers.take(now).is_err() {
            return;
        }
        let seen = match via {
            Via::Direct(addr) => Some(addr),
            Via::Relay(_) => None,
        };
        self.base.send(via, txid, Message::Pong { seen }, 0);
        if wanted {
            self.wake(now).peer_wants(now);
        }
        if let Some(active) = &mut self.active {
            active.pinged(&self.base, via, len, now);
        }
    }

    fn handle_punch(&mut self, is_answer: bool, addresses: &[SocketAddr], now: Instant) {
        if self.base.answers.take(now).is_err() {
            return;
        }
        self.wake(now);
        if let Some(active) = &mut self.active {
            active.punched(&mut self.base, addresses, now);
            if !is_answer {
                active.punch(&mut self.base, true);
            }
        }
    }

    // --- outputs ---

    /// What is to be done. Ends with [`Output::Timeout`] or [`Output::Idle`].
    pub fn poll_output(&mut self, now: Instant) -> Output {
        if self.base.outputs.is_empty() {
            self.advance(now);
        }
        if let Some(output) = self.base.outputs.pop_front() {
            return output;
        }
        match self.active.as_ref().and_then(|active| active.deadline(&self.base)) {
            Some((at, reason)) => Output::Timeout { at: at.max(now), reason },
            None => Output::Idle,
        }
    }

    /// For people and JSON.
    pub fn status(&self, now: Instant) -> Status {
        report::status(&self.base, self.active.as_deref(), now)
    }

    /// The direct way in use, or the last one that worked: what the snapshot keeps for [`PathAgent::set_hint`].
    pub fn hint(&self) -> Option<Via> {
        match self.base.selected {
            Some(Via::Direct(addr)) => Some(Via::Direct(addr)),
            Some(Via::Relay(_)) | None => self.base.remembered.map(Via::Direct),
        }
    }

    fn wake(&mut self, now: Instant) -> &mut Active {
        let Self { base, active } = self;
        active.get_or_insert_with(|| Box::new(Active::new(base, now)))
    }

    fn advance(&mut self, now: Instant) {
        let Some(active) = &mut self.active else { return };
        if active.idle_at(&self.base).is_none_or(|at| now < at) {
            active.advance(&mut self.base, now);
            return;
        }
        let relay = active.best_relay();
        self.active = None;
        self.base.rest(relay);
        self.base.outputs.shrink_to_fit();
    }
}

impl Base {
    fn send(&mut self, via: Via, txid: TxId, message: Message, len: u16) {
        let probe = Probe { sender: self.config.own, txid, message };
        self.outputs.push_back(Output::Send { via, probe, len });
    }

    fn select(&mut self, via: Option<Via>) {
        if self.selected != via {
            self.selected = via;
            self.outputs.push_back(Output::Select(via));
        }
        if let Some(Via::Direct(addr)) = via {
            self.remembered = Some(addr);
        }
    }

    /// Selects what idle peers use: a relay, this one or any.
    fn rest(&mut self, relay: Option<NodeId>) {
        let present = match self.selected {
            Some(Via::Relay(id)) if self.relays.contains(&id) => Some(id),
            Some(Via::Relay(_) | Via::Direct(_)) | None => None,
        };
        self.select(present.or(relay).or(self.relays.first().copied()).map(Via::Relay));
    }

    fn may_probe(&self, addr: SocketAddr) -> bool {
        addr.port() != 0
            && candidate::usable(addr.ip(), &self.config.excluded)
            && !self.local.iter().any(|own| own.addr == addr)
    }

    fn own_addresses(&self) -> Vec<SocketAddr> {
        let kinds = [CandidateKind::Reflexive, CandidateKind::Host, CandidateKind::Configured];
        let some = candidate::spread(&self.local, kinds, MAX_PUNCH_ADDRESSES);
        some.into_iter().map(|candidate| candidate.addr).collect()
    }
}
