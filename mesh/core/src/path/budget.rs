//! How many probes may leave: a token bucket.

use std::time::{Duration, Instant};

/// A first round of a peer with 16 addresses sends 64 probes in its first 0.7 s.
const BURST: u32 = 64;
/// 32 probes a second once the burst is spent.
const REFILL: Duration = Duration::from_micros(31_250);

/// At most `BURST` at once, and one more every `REFILL`.
#[derive(Clone, Default)]
pub(crate) struct Budget {
    spent: u32,
    refilled: Option<Instant>,
}

impl Budget {
    /// Takes one, or says when there will be one (always later than `now`).
    pub(crate) fn take(&mut self, now: Instant) -> Result<(), Instant> {
        self.refill(now);
        if self.spent < BURST {
            self.spent += 1;
            return Ok(());
        }
        Err(self.refilled.unwrap_or(now) + REFILL)
    }

    fn refill(&mut self, now: Instant) {
        let since = *self.refilled.get_or_insert(now);
        let earned = now.saturating_duration_since(since).as_micros() / REFILL.as_micros();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned >= self.spent {
            (self.spent, self.refilled) = (0, Some(now));
        } else {
            self.spent -= earned;
            self.refilled = Some(since + REFILL * earned);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "an epoch for virtual time")]
    fn no_more_than_the_burst_and_the_rate_leave() {
        let start = Instant::now();
        let mut budget = Budget::default();
        let mut taken = 0;
        for ms in 0..10_000 {
            let now = start + Duration::from_millis(ms);
            while budget.take(now).is_ok() {
                taken += 1;
            }
            assert!(budget.take(now).unwrap_err() > now);
        }
        assert!((64 + 318..=64 + 321).contains(&taken), "{taken}");
    }
}
