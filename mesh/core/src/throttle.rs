//! Slows down whoever keeps failing to prove something.
//!
//! Failures are counted per source: an IPv4 address, or an IPv6 /64, which is what one customer has. After a few free
//! ones each further failure doubles the time for which the source is not heard. The table is bounded: when it is
//! full, the source that failed longest ago is forgotten.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Failures without consequence: a person mistypes a few times.
const FREE_FAILURES: u32 = 5;
/// The wait after the first failure beyond the free ones.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait. With 160-bit secrets it is about noise and load, not about guessing.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// A source that did not fail for so long starts afresh.
const FORGET_AFTER: Duration = Duration::from_secs(900);
/// Most sources remembered: at about 64 bytes each some 256 KiB.
const MAX_SOURCES: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Failures {
    count: u32,
    last: Instant,
}

impl Failures {
    fn heard_again_at(&self) -> Instant {
        let over = self.count.saturating_sub(FREE_FAILURES);
        match over.checked_sub(1) {
            None => self.last,
            Some(doublings) => self.last + (FIRST_WAIT * 2_u32.pow(doublings.min(16))).min(LONGEST_WAIT),
        }
    }
}

/// Failures per source.
#[derive(Debug, Default)]
pub struct Throttle {
    sources: BTreeMap<IpAddr, Failures>,
}

impl Throttle {
    /// How long a source has to wait before it is heard; none where it is heard at once.
    pub fn wait(&self, source: IpAddr, now: Instant) -> Option<Duration> {
        let until = self.sources.get(&bucket(source))?.heard_again_at();
        until.checked_duration_since(now).filter(|wait| !wait.is_zero())
    }

    /// Counts a failure.
    pub fn handle_failure(&mut self, source: IpAddr, now: Instant) {
        let source = bucket(source);
        if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&source) {
            self.sources.retain(|_, failures| now.saturating_duration_since(failures.last) < FORGET_AFTER);
            if self.sources.len() >= MAX_SOURCES
                && let Some(oldest) = self.sources.iter().min_by_key(|(_, failures)| failures.last).map(|(ip, _)| *ip)
            {
                self.sources.remove(&oldest);
            }
        }
        let failures = self.sources.entry(source).or_insert(Failures { count: 0, last: now });
        if now.saturating_duration_since(failures.last) >= FORGET_AFTER {
            failures.count = 0;
        }
        failures.count = failures.count.saturating_add(1);
        failures.last = now;
    }

    /// Forgets a source that succeeded.
    pub fn handle_success(&mut self, source: IpAddr) {
        self.sources.remove(&bucket(source));
    }
}

fn bucket(source: IpAddr) -> IpAddr {
    match source {
        IpAddr::V4(_) => source,
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_few_failures_are_free_and_then_the_wait_doubles() {
        let (mut throttle, t0) = (Throttle::default(), Instant::now());
        for _ in 0..FREE_FAILURES {
            throttle.handle_failure(ip("192.0.2.1"), t0);
            assert_eq!(throttle.wait(ip("192.0.2.1"), t0), None);
        }
        for seconds in [1, 2, 4, 8] {
            throttle.handle_failure(ip("192.0.2.1"), t0);
            assert_eq!(throttle.wait(ip("192.0.2.1"), t0), Some(Duration::from_secs(seconds)));
        }
        assert_eq!(throttle.wait(ip("192.0.2.2"), t0), None, "others are not slowed");
        assert_eq!(throttle.wait(ip("192.0.2.1"), t0 + Duration::from_secs(8)), None);
    }

    #[test]
    fn an_ipv6_customer_is_one_source_and_success_clears_it() {
        let (mut throttle, t0) = (Throttle::default(), Instant::now());
        for i in 0..20 {
            throttle.handle_failure(ip(&format!("2001:db8::{i}")), t0);
        }
        assert!(throttle.wait(ip("2001:db8::ffff"), t0).is_some());
        throttle.handle_success(ip("2001:db8::1"));
        assert_eq!(throttle.wait(ip("2001:db8::ffff"), t0), None);
    }

    #[test]
    fn the_table_and_the_wait_are_bounded() {
        let (mut throttle, t0) = (Throttle::default(), Instant::now());
        for i in 0..(2 * MAX_SOURCES as u32) {
            throttle.handle_failure(IpAddr::V4(i.into()), t0);
        }
        assert_eq!(throttle.sources.len(), MAX_SOURCES);
        for _ in 0..1000 {
            throttle.handle_failure(ip("192.0.2.1"), t0);
        }
        assert_eq!(throttle.wait(ip("192.0.2.1"), t0), Some(LONGEST_WAIT));
    }
}
