//! When to try again: exponential backoff with jitter, for connections that are kept for ever.
//!
//! Each failure doubles the pause up to a ceiling; the pause itself is drawn between half and all of it, so that a
//! thousand clients of a restarted relay do not return in the same instant. A connection that was up long enough is
//! forgiven its past; one that drops at once is not, so that a flapping server is not hammered.

use std::time::{Duration, Instant};

/// The first pause after a failure.
pub const FLOOR: Duration = Duration::from_millis(200);
/// No pause is longer.
pub const CEILING: Duration = Duration::from_secs(15);
/// A connection that stood this long starts again at [`FLOOR`].
pub const STABLE: Duration = Duration::from_secs(10);

/// The backoff of one connection.
#[derive(Clone, Debug)]
pub struct Backoff {
    failures: u32,
    connected: Option<Instant>,
    random: SplitMix64,
}

impl Backoff {
    /// A backoff without failures so far. Different clients take different seeds.
    pub fn new(seed: u64) -> Self {
        Self { failures: 0, connected: None, random: SplitMix64(seed) }
    }

    /// The connection is up.
    pub fn handle_connected(&mut self, now: Instant) {
        self.connected = Some(now);
    }

    /// The connection failed or ended; returns when to try again.
    pub fn handle_failure(&mut self, now: Instant) -> Instant {
        let stood = self.connected.take().map(|since| now.saturating_duration_since(since));
        if stood.is_some_and(|stood| stood >= STABLE) {
            self.failures = 0;
        }
        let full = FLOOR.saturating_mul(1 << self.failures.min(16)).min(CEILING);
        self.failures = self.failures.saturating_add(1);
        now + full.mul_f64(0.5 + 0.5 * self.random.unit())
    }

    /// The network changed: what failed before says nothing about it.
    pub fn handle_network_change(&mut self) {
        self.failures = 0;
    }

    /// Someone else holds what we want (another connection with our identity): the next pause is the longest.
    pub fn handle_displaced(&mut self) {
        self.failures = 16;
        self.connected = None;
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): jitter needs spread, not secrecy.
#[derive(Clone, Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    /// A number in `0.0..1.0`.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pauses_double_up_to_the_ceiling() {
        let now = Instant::now();
        let mut backoff = Backoff::new(1);
        let mut full = FLOOR;
        for _ in 0..12 {
            let pause = backoff.handle_failure(now) - now;
            assert!(pause >= full / 2 && pause <= full, "{pause:?} of {full:?}");
            full = (full * 2).min(CEILING);
        }
    }

    #[test]
    fn only_a_connection_that_stood_long_enough_is_forgiven() {
        let start = Instant::now();
        let mut backoff = Backoff::new(2);
        for _ in 0..8 {
            backoff.handle_failure(start);
        }
        backoff.handle_connected(start);
        let soon = start + STABLE / 2;
        assert!(backoff.handle_failure(soon) - soon > CEILING / 3);
        backoff.handle_connected(soon);
        let later = soon + STABLE;
        assert!(backoff.handle_failure(later) - later <= FLOOR);
    }

    #[test]
    fn a_network_change_starts_afresh_and_a_displacement_waits_longest() {
        let now = Instant::now();
        let mut backoff = Backoff::new(3);
        backoff.handle_displaced();
        assert!(backoff.handle_failure(now) - now >= CEILING / 2);
        backoff.handle_network_change();
        assert!(backoff.handle_failure(now) - now <= FLOOR);
    }

    proptest! {
        #[test]
        fn every_pause_lies_between_half_the_floor_and_the_ceiling(seed: u64, failures in 1usize..100) {
            let now = Instant::now();
            let mut backoff = Backoff::new(seed);
            for _ in 0..failures {
                let pause = backoff.handle_failure(now) - now;
                prop_assert!(pause >= FLOOR / 2 && pause <= CEILING);
            }
        }
    }
}
