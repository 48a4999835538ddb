//! One way to the peer, and what is known about it.
//!
//! ```text
//! direct:  untried -> reaching -> sizing -> usable        relay:  untried -> usable
//!                        |           |         |                     |         |
//!                        v           v         v                     +-> silent <-+
//!                     silent     too narrow  silent (died)
//! ```
//!
//! Untried, silent and too narrow start over whenever a round does, or the peer is heard there. A relay carries
//! packets of any size, and carries traffic before it is proven: it is known to be connected.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::candidate::CandidateKind;
use super::ladder::{Ladder, Purpose};
use super::score::{Score, Scored};
use crate::io::Via;
use crate::probe::TxId;

/// Pings whose answers are awaited; a ladder has six at most.
const MAX_PENDING: usize = 8;
/// Round trips of which the least counts. The least, because queues only ever add to the way's own delay.
const RTT_WINDOW: usize = 8;
/// For how long a way that died has to prove itself before traffic returns to it, and how long it must then live to
/// be forgiven.
const PROBATION: Duration = Duration::from_secs(60);
/// Full-size answers that prove it after the first death; each that follows before it is forgiven doubles them ...
const PROOFS_AFTER_DEATH: u8 = 3;
/// ... this often: 48 proofs, 15 s.
const MAX_DOUBLINGS: u8 = 4;
/// Between two such proofs.
const PROOF_GAP: Duration = Duration::from_millis(300);

/// Where a way's address comes from, the most to the least worth keeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The way through a relay.
    Relay,
    /// It worked before: from the snapshot, or before the agent went idle.
    Remembered,
    /// The peer's record.
    Record(CandidateKind),
    /// A punch named it.
    Punched,
    /// The peer was heard from there (RFC 8445's peer-reflexive).
    Heard,
}

impl Origin {
    /// The word in status and JSON.
    pub fn label(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Remembered => "remembered",
            Self::Record(kind) => kind.label(),
            Self::Punched => "punched",
            Self::Heard => "heard",
        }
    }
}

/// What is known of a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Untried,
    Reaching,
    Sizing,
    Usable,
    Silent,
    TooNarrow,
}

#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) via: Via,
    pub(crate) origin: Origin,
    pub(crate) phase: Phase,
    pub(crate) added: Instant,

    // --- questions ---
    pub(crate) ladder: Option<Ladder>,
    /// When a usable way is checked again.
    pub(crate) check_at: Option<Instant>,
    pending: Vec<Pending>,

    // --- answers ---
    pub(crate) rtt: Rtt,
    /// The last pong or authenticated packet.
    pub(crate) heard: Option<Instant>,
    pub(crate) died: Option<Instant>,
    usable_since: Option<Instant>,
    /// Deaths in a row, each before the one before was forgiven.
    deaths: u8,
    /// The last question that nothing answered, and the last that only small pings answered; none once disproved.
    pub(crate) silent: Option<Instant>,
    pub(crate) narrow: Option<Instant>,
    proofs: u8,
    /// Where the peer sees us from.
    pub(crate) seen_as: Option<SocketAddr>,
}

#[derive(Clone, Debug)]
struct Pending {
    txid: TxId,
    sent: Instant,
    full_size: bool,
}

impl Way {
    pub(crate) fn new(via: Via, origin: Origin, now: Instant) -> Self {
        Self {
            via,
            origin,
            phase: Phase::Untried,
            added: now,
            ladder: None,
            check_at: None,
            pending: Vec::new(),
            rtt: Rtt::default(),
            heard: None,
            died: None,
            usable_since: None,
            deaths: 0,
            silent: None,
            narrow: None,
            proofs: 0,
            seen_as: None,
        }
    }

    pub(crate) fn is_relay(&self) -> bool {
        self.addr().is_none()
    }

    /// The address of a direct way.
    pub(crate) fn addr(&self) -> Option<SocketAddr> {
        match self.via {
            Via::Direct(addr) => Some(addr),
            Via::Relay(_) => None,
        }
    }

    /// Whether traffic may go this way.
    pub(crate) fn usable(&self) -> bool {
        self.is_relay() || self.proven()
    }

    /// Whether the peer has answered this way as it has to.
    pub(crate) fn proven(&self) -> bool {
        self.phase == Phase::Usable
    }

    pub(crate) fn scored(&self) -> Scored {
        let score = Score::new(self.via, self.proven(), self.rtt.least().unwrap_or_default());
        Scored { via: self.via, score, samples: self.rtt.samples, jitter: self.rtt.jitter }
    }

    // --- asking ---

    /// Asks whether anything passes, unless that or more is being asked.
    pub(crate) fn reach(&mut self, now: Instant) {
        match self.phase {
            Phase::Usable | Phase::Sizing => {}
            Phase::Reaching if self.ladder.is_some() => {}
            Phase::Untried | Phase::Reaching | Phase::Silent | Phase::TooNarrow => {
                self.phase = Phase::Reaching;
                self.ladder = Some(Ladder::new(Purpose::Reach, now));
                self.check_at = None;
            }
        }
    }

    /// As [`Way::reach`], and the next ping of what is under way leaves at once: this is the moment.
    pub(crate) fn reach_now(&mut self, now: Instant) {
        match (&mut self.ladder, self.phase) {
            (Some(ladder), Phase::Reaching) => ladder.hurry(now),
            (Some(_) | None, _) => self.reach(now),
        }
    }

    /// Asks whether a usable way is still there. Urgency overtakes patience.
    pub(crate) fn check(&mut self, purpose: Purpose, now: Instant) {
        let free = match &self.ladder {
            None => true,
            Some(under_way) => purpose >= Purpose::Urgent && under_way.purpose() < purpose,
        };
        if self.proven() && free {
            self.ladder = Some(Ladder::new(purpose, now));
            self.check_at = None;
        }
    }

    /// Whether the ping that is due must have full size: everything but finding a direct way, or crossing a relay.
    pub(crate) fn asks_full_size(&self) -> bool {
        !self.is_relay() && self.ladder.as_ref().is_some_and(|ladder| ladder.purpose() != Purpose::Reach)
    }

    pub(crate) fn asked(&mut self, txid: TxId, now: Instant) {
        let full_size = self.asks_full_size();
        if self.pending.len() == MAX_PENDING {
            self.pending.remove(0);
        }
        self.pending.push(Pending { txid, sent: now, full_size });
        let rtt = self.rtt.smooth;
        if let Some(ladder) = &mut self.ladder {
            ladder.sent(rtt, now);
        }
    }

    /// Answers to what was asked before do not count any more: the network is another one.
    pub(crate) fn forget_questions(&mut self) {
        self.pending.clear();
        self.rtt = Rtt::default();
    }

    // --- being answered ---

    /// A pong came this way. `strict` where traffic has another way to go, so that a way that died has to earn it.
    /// False if it echoes nothing that was asked here.
    pub(crate) fn answered(&mut self, txid: TxId, seen: Option<SocketAddr>, strict: bool, now: Instant) -> bool {
        let Some(at) = self.pending.iter().position(|ping| ping.txid == txid) else { return false };
        let ping = self.pending.remove(at);
        self.rtt.measure(now.saturating_duration_since(ping.sent));
        self.heard = Some(now);
        self.seen_as = seen;
        if ping.full_size || self.is_relay() {
            self.proved(strict, now);
        } else {
            self.reached(now);
        }
        true
    }

    fn reached(&mut self, now: Instant) {
        match self.phase {
            Phase::Untried | Phase::Reaching | Phase::Silent => {
                self.phase = Phase::Sizing;
                self.ladder = Some(Ladder::new(Purpose::Size, now));
            }
            Phase::Sizing | Phase::Usable | Phase::TooNarrow => {}
        }
    }

    fn proved(&mut self, strict: bool, now: Instant) {
        self.proofs = self.proofs.saturating_add(1);
        let wanted = if strict { self.proofs_wanted(now) } else { 1 };
        if !self.proven() && self.proofs < wanted {
            self.phase = Phase::Sizing;
            self.ladder = Some(Ladder::new(Purpose::Size, now + PROOF_GAP));
            return;
        }
        if !self.proven() {
            self.usable_since = Some(now);
        }
        self.phase = Phase::Usable;
        self.ladder = None;
        (self.silent, self.narrow) = (None, None);
    }

    fn proofs_wanted(&self, now: Instant) -> u8 {
        let on_probation = self.died.is_some_and(|died| now < died + PROBATION);
        if !on_probation || self.is_relay() {
            return 1;
        }
        PROOFS_AFTER_DEATH << self.deaths.saturating_sub(1).min(MAX_DOUBLINGS)
    }

    /// The ladder ended without an answer. Whether a usable way died of it.
    pub(crate) fn unanswered(&mut self, now: Instant) -> bool {
        let died = self.proven();
        match self.ladder.take().map(|ladder| ladder.purpose()) {
            Some(Purpose::Size) => {
                self.phase = Phase::TooNarrow;
                (self.silent, self.narrow) = (None, Some(now));
            }
            Some(Purpose::Reach | Purpose::Patient | Purpose::Urgent | Purpose::Deserted) | None => {
                self.phase = Phase::Silent;
                (self.silent, self.narrow) = (Some(now), None);
            }
        }
        self.proofs = 0;
        if died {
            self.died = Some(now);
            let forgiven = self.usable_since.is_none_or(|since| now >= since + PROBATION);
            self.deaths = if forgiven { 1 } else { self.deaths.saturating_add(1) };
        }
        died
    }

    /// An authenticated packet came this way: as good as an answer to an urgent question, and all that a relay is
    /// asked. A patient question stays open, because it also asks whether what this node sends arrives in full size.
    pub(crate) fn carried(&mut self, now: Instant) {
        self.heard = Some(now);
        if self.is_relay() {
            self.phase = Phase::Usable;
            self.ladder = None;
        } else if self.ladder.as_ref().is_some_and(|ladder| ladder.purpose() >= Purpose::Urgent) {
            self.ladder = None;
        }
    }

    /// Whether an answer to this is awaited here.
    pub(crate) fn awaits(&self, txid: TxId) -> bool {
        self.pending.iter().any(|ping| ping.txid == txid)
    }
}

/// Round trips measured on one way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rtt {
    recent: [Duration; RTT_WINDOW],
    /// How many were measured.
    pub(crate) samples: u32,
    /// Exponentially weighted mean with gain 1/8, as in RFC 6298.
    pub(crate) smooth: Duration,
    /// Exponentially weighted mean deviation from that with gain 1/4, as in RFC 6298.
    pub(crate) jitter: Duration,
}

impl Rtt {
    pub(crate) fn measure(&mut self, rtt: Duration) {
        self.recent[self.samples as usize % RTT_WINDOW] = rtt;
        if self.samples == 0 {
            (self.smooth, self.jitter) = (rtt, rtt / 2);
        } else {
            self.jitter = (self.jitter * 3 + self.smooth.abs_diff(rtt)) / 4;
            self.smooth = (self.smooth * 7 + rtt) / 8;
        }
        self.samples = self.samples.saturating_add(1);
    }

    /// The least of the last 8.
    pub(crate) fn least(&self) -> Option<Duration> {
        self.recent.iter().take(self.samples as usize).min().copied()
    }
}
