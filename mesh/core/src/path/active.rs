//! The part of a path agent that exists while its peer is wanted: probing, selecting, watching.
//!
//! What happens when:
//! * **rounds** ask every way that does not work whether it does, and make the peer do the same (a punch through the
//!   relay): at once, then ever more seldom, then only while there is traffic;
//! * **checks** ask the ways that work whether they still do: the selected one, and the others as standby;
//! * **silence**, when packets go out and nothing comes back, makes a check urgent;
//! * **selection** follows from the above: nothing else moves traffic.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::ladder::{Purpose, Step};
use super::score::{Verdict, judge};
use super::way::{Origin, Phase, Way};
use super::ways::Ways;
use super::{Base, TimeoutReason};
use crate::io::Via;
use crate::key::NodeId;
use crate::probe::{Message, TxId};

// --- how long a peer stays wanted ---

/// Without traffic either way, the agent goes idle.
const IDLE_AFTER: Duration = Duration::from_secs(300);
/// The peer wants the path for this long after it said so; four of its keepalives.
const PEER_WANTS_FOR: Duration = Duration::from_secs(60);

// --- rounds ---

/// From one round to the next; the last repeats.
const ROUNDS: &[Duration] =
    &[Duration::from_secs(5), Duration::from_secs(15), Duration::from_secs(60), Duration::from_secs(120)];
/// From one round to the next while a direct way works, to find a better one.
const UPGRADE_ROUND: Duration = Duration::from_secs(300);
/// The longest gap while there is traffic and no way at all.
const NO_PATH_ROUND: Duration = Duration::from_secs(15);
/// Rounds that events ask for come no faster than this.
const ROUND_GAP: Duration = Duration::from_secs(1);
/// After the last of [`ROUNDS`], rounds wait until there was traffic within this.
const ROUND_TRAFFIC: Duration = Duration::from_secs(120);

/// A way on which full-size pings were lost is asked again on the peer's account only after this.
const NARROW_REST: Duration = Duration::from_secs(30);

// --- checks ---

/// The selected way. RFC 4787 asks NATs to keep a mapping for 2 minutes; 30 s is seen in the field, and a keepalive
/// may be lost.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// The other ways that work, the relay among them; with jitter still within 25 s.
const STANDBY: Duration = Duration::from_secs(20);
/// Ways whose round trip matters at the moment: one that has just been found, and two that are compared.
const MEASURE: Duration = Duration::from_secs(1);
/// Samples after which a way has been found long enough.
const WARM_UP_SAMPLES: u32 = 4;

// --- silence ---

/// Sending without hearing anything for this long makes a check urgent: two of the samples that the driver takes of its
/// counters. Where the round trip is longer, this costs a few pings at the beginning of each exchange.
const PATIENCE: Duration = Duration::from_millis(200);
/// Each check that was answered although nothing else was doubles the patience up to this: one-way traffic costs a
/// ping a second.
const MAX_PATIENCE: Duration = Duration::from_secs(1);

// --- moving between ways that work ---

/// A better way must be better at this many measurements in a row: eight of each of the two, so that no measurement
/// that made it look better still counts in the end.
const WINS_TO_MOVE: u8 = 16;
/// And the last such move must be this long ago.
const DWELL: Duration = Duration::from_secs(30);

pub(super) struct Active {
    pub(super) ways: Ways,
    pub(super) started: Instant,

    // --- who wants it ---
    traffic: Option<Instant>,
    peer_wants_until: Option<Instant>,

    // --- rounds ---
    pub(super) rounds: usize,
    last_round: Option<Instant>,
    next_round: Option<Instant>,

    // --- selection ---
    selected_at: Instant,
    patience: Duration,
    challenge: Option<Challenge>,
    measured: bool,
    moved_at: Option<Instant>,
    pub(super) death: Option<(SocketAddr, Instant)>,
}

/// A way that has been better than the selected one lately.
struct Challenge {
    by: Via,
    wins: u8,
}

impl Active {
    pub(super) fn new(base: &Base, now: Instant) -> Self {
        let mut active = Self {
            ways: Ways::default(),
            started: now,
            traffic: None,
            peer_wants_until: None,
            rounds: 0,
            last_round: None,
            next_round: Some(now),
            selected_at: now,
            patience: PATIENCE,
            challenge: None,
            measured: false,
            moved_at: None,
            death: None,
        };
        active.ways.set_relays(&base.relays, now);
        if let Some(addr) = base.remembered.filter(|addr| base.may_probe(*addr)) {
            active.ways.admit(addr, Origin::Remembered, now);
        }
        active.admit_recorded(base, now);
        active
    }

    // --- who wants it ---

    /// There is traffic, or this end wants the path ready.
    pub(super) fn want(&mut self, traffic: bool, now: Instant) {
        if traffic {
            self.traffic = Some(now);
        }
        if self.next_round.is_none() {
            let rested = self.last_round.map_or(now, |last| last + NO_PATH_ROUND);
            self.next_round = Some(rested.max(now));
        }
    }

    pub(super) fn peer_wants(&mut self, now: Instant) {
        self.peer_wants_until = Some(now + PEER_WANTS_FOR);
    }

    /// When the agent goes idle if nothing happens; none while it must not.
    pub(super) fn idle_at(&self, base: &Base) -> Option<Instant> {
        // Without a relay a direct way could not be punched again: it is kept up as long as it lives.
        let last_resort = matches!(base.selected, Some(Via::Direct(_))) && base.relays.is_empty();
        if base.eager || last_resort {
            return None;
        }
        let own = self.traffic.map(|at| at + IDLE_AFTER);
        Some(own.max(self.peer_wants_until).unwrap_or(self.started))
    }

    fn wanted_here(&self, base: &Base, now: Instant) -> bool {
        base.eager || self.traffic_within(IDLE_AFTER, now)
    }

    fn traffic_within(&self, span: Duration, now: Instant) -> bool {
        self.traffic.is_some_and(|at| now < at + span)
    }

    // --- what the world is like ---

    pub(super) fn record_changed(&mut self, base: &Base, now: Instant) {
        self.ways.retain_recorded(|addr| base.remote.iter().any(|candidate| candidate.addr == addr));
        self.admit_recorded(base, now);
        let untried = |way: &&mut Way| way.phase == Phase::Untried && !way.is_relay();
        self.ways.iter_mut().filter(untried).for_each(|way| way.reach(now));
    }

    pub(super) fn relays_changed(&mut self, base: &Base, now: Instant) {
        let known: Vec<Via> = self.ways.relays().map(|way| way.via).collect();
        self.ways.set_relays(&base.relays, now);
        let mut gained = false;
        for way in self.ways.iter_mut().filter(|way| way.is_relay() && !known.contains(&way.via)) {
            way.reach(now);
            gained = true;
        }
        if gained && !matches!(base.selected, Some(Via::Direct(_))) {
            self.round_soon(now);
        }
    }

    /// What this node tells the peer about itself changed.
    pub(super) fn local_changed(&mut self, base: &Base, now: Instant) {
        if !matches!(base.selected, Some(Via::Direct(_))) {
            self.round_soon(now);
        }
    }

    /// Nothing that was known about any way holds: ask everything at once.
    pub(super) fn network_changed(&mut self, base: &mut Base, now: Instant) {
        for way in self.ways.iter_mut() {
            way.forget_questions();
            if way.proven() {
                way.ladder = None;
                way.check(Purpose::Urgent, now);
            } else {
                way.phase = Phase::Untried;
            }
        }
        self.patience = PATIENCE;
        self.rounds = 0;
        self.start_round(base, true, now);
    }

    // --- traffic ---

    pub(super) fn sent(&mut self, base: &Base, now: Instant) {
        self.want(true, now);
        let (selected_at, patience) = (self.selected_at, self.patience);
        let Some(way) = base.selected.and_then(|via| self.ways.get_mut(via)) else { return };
        let heard = way.heard.unwrap_or(way.added).max(selected_at);
        let silent = now.saturating_duration_since(heard) >= patience;
        let asking = way.ladder.as_ref().is_some_and(|ladder| ladder.purpose() >= Purpose::Urgent);
        if silent && way.proven() && !asking {
            way.check(Purpose::Urgent, now);
            self.patience = (patience * 2).min(MAX_PATIENCE);
        }
    }

    pub(super) fn received(&mut self, base: &Base, via: Via, now: Instant) {
        self.want(true, now);
        if base.selected == Some(via) {
            self.patience = PATIENCE;
        } else if matches!(via, Via::Relay(_)) {
            self.doubt_selected(base, now);
        }
        if let Some(way) = self.heard_from(base, via, now) {
            way.carried(now);
            // Where this direction is too narrow and the other is not, packets keep coming: no reason to ask again.
            if way.phase != Phase::TooNarrow {
                way.reach(now);
            }
        }
    }

    // --- probes ---

    /// A ping arrived (and has been answered): the peer can send to us here, so we may well be able to send back.
    pub(super) fn pinged(&mut self, base: &Base, via: Via, len: usize, now: Instant) {
        let full_size = len >= usize::from(base.config.full_size);
        let Some(way) = self.heard_from(base, via, now) else { return };
        match way.phase {
            Phase::Untried | Phase::Reaching | Phase::Silent => way.reach_now(now),
            // Small pings pass, that is known; two ends asking each other again about it would never stop.
            Phase::TooNarrow if full_size && way.narrow.is_none_or(|at| now >= at + NARROW_REST) => way.reach(now),
            Phase::TooNarrow | Phase::Sizing | Phase::Usable => {}
        }
    }

    pub(super) fn ponged(&mut self, base: &Base, via: Via, txid: TxId, seen: Option<SocketAddr>, now: Instant) {
        let strict = base.selected.is_some_and(|selected| selected != via);
        if self.ways.get_mut(via).is_some_and(|way| way.answered(txid, seen, strict, now)) {
            self.measured = true;
        } else if self.ways.iter().any(|way| way.awaits(txid))
            && let Some(way) = self.heard_from(base, via, now)
        {
            // The answer left by another address than the question came to. Not a way until it is asked itself.
            way.reach(now);
        }
    }

    /// The peer probes us as of now, and says from where.
    pub(super) fn punched(&mut self, base: &mut Base, addresses: &[SocketAddr], now: Instant) {
        self.peer_wants(now);
        for addr in addresses.iter().filter(|addr| base.may_probe(**addr)) {
            self.ways.admit(*addr, Origin::Punched, now);
        }
        for way in self.ways.iter_mut().filter(|way| !way.is_relay()) {
            way.reach_now(now);
        }
        // A peer whose ways all work does not punch: whatever is selected here may be dead over there.
        self.doubt_selected(base, now);
        if self.rounds == 0 {
            // This is the first round, begun by the other end.
            self.start_round(base, false, now);
        }
    }

    /// The peer seems to have left the direct way in use: is it dead?
    fn doubt_selected(&mut self, base: &Base, now: Instant) {
        let selected_at = self.selected_at;
        let direct = base.selected.filter(|via| matches!(via, Via::Direct(_)));
        if let Some(way) = direct.and_then(|via| self.ways.get_mut(via)) {
            let heard = way.heard.unwrap_or(way.added).max(selected_at);
            let silent = now.saturating_duration_since(heard) >= PATIENCE;
            way.check(if silent { Purpose::Deserted } else { Purpose::Urgent }, now);
        }
    }

    /// The way that something came by, added if it is a direct one.
    fn heard_from(&mut self, base: &Base, via: Via, now: Instant) -> Option<&mut Way> {
        match via {
            Via::Relay(_) => self.ways.get_mut(via),
            Via::Direct(addr) if base.may_probe(addr) => self.ways.admit(addr, Origin::Heard, now),
            Via::Direct(_) => None,
        }
    }

    fn admit_recorded(&mut self, base: &Base, now: Instant) {
        for candidate in base.remote.iter().filter(|candidate| base.may_probe(candidate.addr)) {
            self.ways.admit(candidate.addr, Origin::Record(candidate.kind), now);
        }
    }

    // --- time ---

    /// Does what is due, then selects. Ends because whatever is done is not due again at the same time.
    pub(super) fn advance(&mut self, base: &mut Base, now: Instant) {
        if self.next_round.is_some_and(|at| at <= now) {
            self.round_due(base, now);
        }
        loop {
            self.start_checks(now);
            let died = self.climb(base, now);
            self.select(base, now);
            if !died {
                break;
            }
            self.rounds = 0;
            self.start_round(base, true, now);
        }
        self.schedule_checks(base, now);
    }

    /// The next moment at which something is due.
    pub(super) fn deadline(&self, base: &Base) -> Option<(Instant, TimeoutReason)> {
        let ladders = self.ways.iter().filter_map(|way| Some((way.ladder.as_ref()?.at(), TimeoutReason::Probe)));
        let checks = self.ways.iter().filter_map(|way| Some((way.check_at?, TimeoutReason::Check)));
        let round = self.next_round.map(|at| (at, TimeoutReason::Round));
        let idle = self.idle_at(base).map(|at| (at, TimeoutReason::Idle));
        ladders.chain(checks).chain(round).chain(idle).min()
    }

    // --- rounds ---

    fn round_soon(&mut self, now: Instant) {
        let at = self.last_round.map_or(now, |last| (last + ROUND_GAP).max(now));
        self.next_round = Some(self.next_round.map_or(at, |next| next.min(at)));
        self.rounds = 0;
    }

    fn round_due(&mut self, base: &mut Base, now: Instant) {
        let wanted = self.rounds < ROUNDS.len() && self.wanted_here(base, now);
        let no_path = base.selected.is_none() && base.eager;
        if self.rounds == 0 || wanted || no_path || self.traffic_within(ROUND_TRAFFIC, now) {
            self.start_round(base, true, now);
        } else {
            self.next_round = None;
        }
    }

    fn start_round(&mut self, base: &mut Base, punch: bool, now: Instant) {
        self.ways.iter_mut().for_each(|way| way.reach(now));
        if punch && base.probes.take(now).is_ok() {
            self.punch(base, false);
        }
        let gap = ROUNDS[self.rounds.min(ROUNDS.len() - 1)];
        let gap = match base.selected {
            Some(Via::Direct(_)) => UPGRADE_ROUND,
            Some(Via::Relay(_)) => gap,
            None if self.traffic_within(ROUND_TRAFFIC, now) => gap.min(NO_PATH_ROUND),
            None => gap,
        };
        self.rounds += 1;
        self.last_round = Some(now);
        self.next_round = Some(now + base.draw.jitter(gap));
    }

    /// Tells the peer through the best relay to probe us.
    pub(super) fn punch(&mut self, base: &mut Base, answer: bool) {
        let Some(relay) = self.best_relay().map(Via::Relay) else { return };
        let txid = base.draw.txid();
        let addresses = base.own_addresses();
        base.send(relay, txid, Message::Punch { answer, addresses }, 0);
    }

    // --- checks ---

    fn start_checks(&mut self, now: Instant) {
        for way in self.ways.iter_mut().filter(|way| way.check_at.is_some_and(|at| at <= now)) {
            way.check_at = None;
            if way.proven() {
                way.check(Purpose::Patient, now);
            } else if way.is_relay() {
                way.reach(now);
            }
        }
    }

    fn schedule_checks(&mut self, base: &mut Base, now: Instant) {
        for way in self.ways.iter_mut().filter(|way| way.usable() && way.ladder.is_none() && way.check_at.is_none()) {
            let selected = base.selected == Some(way.via);
            let compared = self.challenge.as_ref().is_some_and(|challenge| selected || challenge.by == way.via);
            let gap = if way.proven() && (compared || way.rtt.samples < WARM_UP_SAMPLES) {
                MEASURE
            } else if selected {
                KEEPALIVE
            } else {
                STANDBY
            };
            way.check_at = Some(now + base.draw.jitter(gap));
        }
    }

    /// Sends the pings that are due and draws the conclusions that are. Whether the selected way died.
    fn climb(&mut self, base: &mut Base, now: Instant) -> bool {
        let wanted = self.wanted_here(base, now);
        let mut died = false;
        for way in self.ways.iter_mut() {
            let Some(ladder) = &mut way.ladder else { continue };
            match ladder.step(now) {
                Step::Wait => {}
                Step::Ping => match base.probes.take(now) {
                    Err(later) => ladder.hold(later),
                    Ok(()) => {
                        let len = if way.asks_full_size() { base.config.full_size } else { 0 };
                        let txid = base.draw.txid();
                        way.asked(txid, now);
                        base.send(way.via, txid, Message::Ping { wanted }, len);
                    }
                },
                Step::Unanswered => {
                    if way.unanswered(now) && base.selected == Some(way.via) {
                        died = true;
                        if let Via::Direct(addr) = way.via {
                            self.death = Some((addr, now));
                        }
                    }
                }
            }
        }
        died
    }

    // --- selection ---

    fn select(&mut self, base: &mut Base, now: Instant) {
        let usable: Vec<_> = self.ways.iter().filter(|way| way.usable()).map(Way::scored).collect();
        let measured = std::mem::take(&mut self.measured);
        match judge(base.selected, &usable) {
            Verdict::Keep => {
                if measured {
                    self.challenge = None;
                }
            }
            Verdict::Switch(via) => self.switch(base, via, now),
            Verdict::Challenged(by) => {
                if measured && self.won(by) && self.moved_at.is_none_or(|at| now >= at + DWELL) {
                    self.moved_at = Some(now);
                    self.switch(base, Some(by), now);
                }
            }
        }
    }

    /// Counts a win. Whether there were enough in a row.
    fn won(&mut self, by: Via) -> bool {
        let before =
            self.challenge.as_ref().filter(|challenge| challenge.by == by).map_or(0, |challenge| challenge.wins);
        let wins = before.saturating_add(1);
        self.challenge = Some(Challenge { by, wins });
        wins >= WINS_TO_MOVE
    }

    fn switch(&mut self, base: &mut Base, via: Option<Via>, now: Instant) {
        base.select(via);
        self.selected_at = now;
        self.patience = PATIENCE;
        self.challenge = None;
        if let Some(way) = via.and_then(|via| self.ways.get_mut(via)) {
            way.check_at = None;
        }
    }

    /// The relay that packets take while nobody wants the path.
    pub(super) fn best_relay(&self) -> Option<NodeId> {
        let best = self.ways.relays().min_by_key(|way| way.scored().score)?;
        match best.via {
            Via::Relay(id) => Some(id),
            Via::Direct(_) => None,
        }
    }
}
