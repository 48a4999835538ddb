//! When a question is asked again, and when its silence is an answer.

use std::time::{Duration, Instant};

/// What a series of pings is to find out.
/// Ordered by how soon the answer is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    /// Does anything pass? Small pings, because most addresses never answer, and because an address that only a ping
    /// has named must not be sent more than that ping weighed.
    Reach,
    /// Do full-size packets pass?
    Size,
    /// Is the way still there? Nothing says it is not, so loss gets time to pass.
    Patient,
    /// Is the way still there? Packets go out and nothing comes back.
    Urgent,
    /// Is the way still there? The peer has left it for a relay, and nothing was heard on it lately.
    Deserted,
}

/// Milliseconds before each ping; the last number is the wait for the verdict.
///
/// Reach: hole punching needs both ends to have sent, and the second learns of it a relay's latency later; five
/// repeats also pass 30 % loss each way (all six are lost in 2 % of rounds).
const REACH: &[u64] = &[0, 100, 200, 400, 800, 1600, 1000];
const SIZE: &[u64] = &[0, 100, 200, 400, 800, 1000];
const PATIENT: &[u64] = &[0, 300, 600, 1200, 1200, 1000];
/// Dead 450 ms after the first of four, for round trips up to 80 ms. With counters sampled every 100 ms (up to three
/// samples to see a silence) one end has left a dead way within 750 ms.
const URGENT: &[u64] = &[0, 100, 100, 100, 150];
/// And the other end, which may have had nothing to send and so noticed nothing, 180 ms later: the peer has asked four
/// times already. Together they are below the second within which traffic is to flow again.
const DESERTED: &[u64] = &[0, 50, 50, 80];

/// Replayed pings must not make a ladder burn down in an instant.
const HURRY_GAP: Duration = Duration::from_millis(50);

/// A series of pings under way.
#[derive(Clone, Debug)]
pub(crate) struct Ladder {
    purpose: Purpose,
    step: usize,
    at: Instant,
    last: Option<Instant>,
}

/// What the moment asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing yet.
    Wait,
    /// A ping; tell [`Ladder::sent`].
    Ping,
    /// Every ping had its time and none was answered.
    Unanswered,
}

impl Ladder {
    pub(crate) fn new(purpose: Purpose, at: Instant) -> Self {
        Self { purpose, step: 0, at, last: None }
    }

    pub(crate) fn purpose(&self) -> Purpose {
        self.purpose
    }

    /// When [`Ladder::step`] has more to say.
    pub(crate) fn at(&self) -> Instant {
        self.at
    }

    pub(crate) fn step(&self, now: Instant) -> Step {
        if now < self.at {
            Step::Wait
        } else if self.step + 1 < self.gaps().len() {
            Step::Ping
        } else {
            Step::Unanswered
        }
    }

    /// A ping left. `rtt` is the way's round trip, as far as known: a verdict never comes before an answer can.
    pub(crate) fn sent(&mut self, rtt: Duration, now: Instant) {
        self.step += 1;
        self.last = Some(now);
        let gaps = self.gaps();
        let gap = Duration::from_millis(gaps[self.step.min(gaps.len() - 1)]);
        let last = self.step + 1 == gaps.len();
        self.at = now + if last { gap.max(rtt * 5 / 4 + Duration::from_millis(50)) } else { gap };
    }

    /// The next ping must wait until there is budget for it.
    pub(crate) fn hold(&mut self, until: Instant) {
        self.at = until;
    }

    /// Brings the next ping forward, if one is left to send and the last is not just out.
    pub(crate) fn hurry(&mut self, now: Instant) {
        let rested = self.last.is_none_or(|last| now >= last + HURRY_GAP);
        if rested && self.step + 1 < self.gaps().len() {
            self.at = self.at.min(now);
        }
    }

    fn gaps(&self) -> &'static [u64] {
        match self.purpose {
            Purpose::Reach => REACH,
            Purpose::Size => SIZE,
            Purpose::Patient => PATIENT,
            Purpose::Urgent => URGENT,
            Purpose::Deserted => DESERTED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an epoch for virtual time")]
    fn walk(purpose: Purpose, rtt_ms: u64) -> (Vec<u64>, u64) {
        let start = Instant::now();
        let mut ladder = Ladder::new(purpose, start);
        let mut sent = Vec::new();
        for ms in 0.. {
            let now = start + Duration::from_millis(ms);
            match ladder.step(now) {
                Step::Wait => {}
                Step::Ping => {
                    sent.push(ms);
                    ladder.sent(Duration::from_millis(rtt_ms), now);
                }
                Step::Unanswered => return (sent, ms),
            }
        }
        unreachable!("the ladder ends")
    }

    #[test]
    fn urgent_is_over_within_half_a_second() {
        assert_eq!(walk(Purpose::Urgent, 20), (vec![0, 100, 200, 300], 450));
    }

    #[test]
    fn a_slow_way_gets_the_time_it_needs() {
        assert_eq!(walk(Purpose::Urgent, 400).1, 300 + 550);
    }

    #[test]
    fn reaching_takes_six_pings() {
        assert_eq!(walk(Purpose::Reach, 0), (vec![0, 100, 300, 700, 1500, 3100], 4100));
    }
}
