//! How much a client may send through a relay.
//!
//! The generic cell rate algorithm (ITU-T I.371, the virtual scheduling form): for bytes and for packets one instant
//! each, up to which what was admitted has been paid for. It may run ahead of `now` by the burst. Nothing is refilled
//! and nothing rounds away, however often it is asked.

use std::time::{Duration, Instant};

/// Rates and bursts of one client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Bytes per second in the long run; at least 1.
    pub bytes_per_second: u64,
    /// Packets per second in the long run; at least 1.
    pub packets_per_second: u64,
    /// How much time's worth may come at once.
    pub burst: Duration,
}

impl Quota {
    /// An approved node: 1 Gb/s and 500,000 packets a second, a quarter of a second of it at once.
    pub const NODE: Self =
        Self { bytes_per_second: 125_000_000, packets_per_second: 500_000, burst: Duration::from_millis(250) };
    /// A joiner that is not approved: 64 KiB/s, enough for the join's few messages on its one stream.
    pub const JOINER: Self = Self { bytes_per_second: 65_536, packets_per_second: 200, burst: Duration::from_secs(2) };

    fn cost(amount: u64, per_second: u64) -> Duration {
        let nanos = u128::from(amount) * 1_000_000_000 / u128::from(per_second.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// One client's use of its quota.
#[derive(Clone, Debug)]
pub struct Meter {
    quota: Quota,
    bytes_paid_until: Instant,
    packets_paid_until: Instant,
}

impl Meter {
    /// A meter with its whole burst at hand.
    pub fn new(quota: Quota, now: Instant) -> Self {
        Self { quota, bytes_paid_until: now, packets_paid_until: now }
    }

    /// Whether a packet of `bytes` may pass; it is charged where it may.
    pub fn admit(&mut self, bytes: usize, now: Instant) -> bool {
        let byte_cost = Quota::cost(bytes as u64, self.quota.bytes_per_second);
        let bytes_until = self.bytes_paid_until.max(now) + byte_cost;
        let packets_until = self.packets_paid_until.max(now) + Quota::cost(1, self.quota.packets_per_second);
        let limit = now + self.quota.burst;
        if bytes_until > limit || packets_until > limit {
            return false;
        }
        self.bytes_paid_until = bytes_until;
        self.packets_paid_until = packets_until;
        true
    }

    /// How long a sender that can wait must wait before `bytes` are paid for; zero where they are. Charges them.
    pub fn charge(&mut self, bytes: usize, now: Instant) -> Duration {
        let byte_cost = Quota::cost(bytes as u64, self.quota.bytes_per_second);
        self.bytes_paid_until = self.bytes_paid_until.max(now) + byte_cost;
        self.bytes_paid_until.saturating_duration_since(now + self.quota.burst)
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QUOTA: Quota = Quota { bytes_per_second: 1000, packets_per_second: 10, burst: Duration::from_secs(1) };

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let start = Instant::now();
        let mut meter = Meter::new(QUOTA, start);
        let admitted = (0..100).filter(|_| meter.admit(10, start)).count();
        assert_eq!(admitted, 10, "packets are the narrower limit");
        let later = start + Duration::from_millis(500);
        assert_eq!((0..100).filter(|_| meter.admit(10, later)).count(), 5);
    }

    #[test]
    fn a_packet_beyond_the_burst_never_passes_and_costs_nothing() {
        let start = Instant::now();
        let mut meter = Meter::new(QUOTA, start);
        assert!(!meter.admit(1001, start));
        assert!(meter.admit(1000, start));
    }

    #[test]
    fn who_can_wait_is_told_how_long() {
        let start = Instant::now();
        let mut meter = Meter::new(QUOTA, start);
        assert_eq!(meter.charge(1000, start), Duration::ZERO);
        assert_eq!(meter.charge(500, start), Duration::from_millis(500));
    }

    proptest! {
        #[test]
        fn the_long_run_never_exceeds_rate_and_burst(
            packets in prop::collection::vec((0usize..2000, 0u64..300), 1..300),
        ) {
            let start = Instant::now();
            let (mut meter, mut now, mut sent) = (Meter::new(QUOTA, start), start, 0u64);
            for (bytes, pause) in packets {
                now += Duration::from_millis(pause);
                if meter.admit(bytes, now) { sent += bytes as u64; }
                let allowed = 1000.0 * ((now - start) + QUOTA.burst).as_secs_f64();
                prop_assert!(sent as f64 <= allowed + 1.0);
            }
        }
    }
}
