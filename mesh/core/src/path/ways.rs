//! The table of ways to one peer: bounded, relays first.

use std::cmp::Reverse;
use std::net::SocketAddr;
use std::time::Instant;

use super::way::{Origin, Phase, Way};
use crate::io::Via;
use crate::key::NodeId;

/// Direct ways probed in parallel.
const MAX_DIRECT: usize = 16;
/// Of those, ways that a ping or an authenticated packet has named: replays could name any number.
const MAX_HEARD: usize = 4;
/// Of those, ways that punches have named.
const MAX_PUNCHED: usize = 8;
/// Relays kept warm.
pub(crate) const MAX_RELAYS: usize = 4;

#[derive(Clone, Debug, Default)]
pub(crate) struct Ways(Vec<Way>);

impl Ways {
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Way> + Clone {
        self.0.iter()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Way> {
        self.0.iter_mut()
    }

    pub(crate) fn direct(&self) -> impl Iterator<Item = &Way> + Clone {
        self.0.iter().filter(|way| !way.is_relay())
    }

    pub(crate) fn relays(&self) -> impl Iterator<Item = &Way> + Clone {
        self.0.iter().filter(|way| way.is_relay())
    }

    pub(crate) fn get(&self, via: Via) -> Option<&Way> {
        self.0.iter().find(|way| way.via == via)
    }

    pub(crate) fn get_mut(&mut self, via: Via) -> Option<&mut Way> {
        self.0.iter_mut().find(|way| way.via == via)
    }

    /// The way by this address, added if it is not there. None if the table is full of better ones.
    pub(crate) fn admit(&mut self, addr: SocketAddr, origin: Origin, now: Instant) -> Option<&mut Way> {
        let via = Via::Direct(addr);
        if self.get(via).is_none() {
            self.make_room(origin)?;
            self.0.push(Way::new(via, origin, now));
        }
        self.get_mut(via)
    }

    /// Makes the relays these, in this order; what is known of those that stay is kept.
    pub(crate) fn set_relays(&mut self, relays: &[NodeId], now: Instant) {
        let mut ways: Vec<Way> = relays
            .iter()
            .take(MAX_RELAYS)
            .map(|relay| {
                let via = Via::Relay(*relay);
                self.get(via).cloned().unwrap_or_else(|| Way::new(via, Origin::Relay, now))
            })
            .collect();
        ways.extend(self.0.drain(..).filter(|way| !way.is_relay()));
        self.0 = ways;
    }

    /// Drops the ways of the peer's former record that are not in the present one and do not work.
    pub(crate) fn retain_recorded(&mut self, present: impl Fn(SocketAddr) -> bool) {
        self.0.retain(|way| match (way.via, way.origin) {
            (Via::Direct(addr), Origin::Record(_)) => way.proven() || present(addr),
            (Via::Direct(_) | Via::Relay(_), _) => true,
        });
    }

    fn make_room(&mut self, newcomer: Origin) -> Option<()> {
        let limit = match newcomer {
            Origin::Heard => MAX_HEARD,
            Origin::Punched => MAX_PUNCHED,
            Origin::Relay | Origin::Remembered | Origin::Record(_) => MAX_DIRECT,
        };
        let same = self.direct().filter(|way| way.origin == newcomer).count();
        if same >= limit {
            self.evict(|way| way.origin == newcomer)
        } else if self.direct().count() >= MAX_DIRECT {
            self.evict(|_| true)
        } else {
            Some(())
        }
    }

    /// Removes the way that is least worth keeping: given up before still trying, of low origin, old.
    fn evict(&mut self, eligible: impl Fn(&Way) -> bool) -> Option<()> {
        let (at, _) = self
            .0
            .iter()
            .enumerate()
            .filter(|(_, way)| !way.is_relay() && !way.proven() && way.phase != Phase::Sizing && eligible(way))
            .max_by_key(|(_, way)| {
                let given_up = match way.phase {
                    Phase::Silent | Phase::TooNarrow => true,
                    Phase::Untried | Phase::Reaching | Phase::Sizing | Phase::Usable => false,
                };
                (given_up, way.origin, Reverse(way.added))
            })?;
        self.0.remove(at);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::CandidateKind;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "an epoch for virtual time")]
    fn the_table_is_bounded_and_what_works_stays() {
        let now = Instant::now();
        let mut ways = Ways::default();
        let addr = |n: u16| SocketAddr::from(([203, 0, 113, 1], 1000 + n));
        ways.admit(addr(0), Origin::Record(CandidateKind::Host), now).unwrap().phase = Phase::Usable;
        for n in 1..100 {
            ways.admit(addr(n), Origin::Heard, now);
        }
        assert_eq!(ways.direct().count(), 1 + MAX_HEARD);
        for n in 100..200 {
            ways.admit(addr(n), Origin::Punched, now);
            ways.admit(addr(n + 100), Origin::Record(CandidateKind::Reflexive), now);
        }
        assert_eq!(ways.direct().count(), MAX_DIRECT);
        assert!(ways.get(Via::Direct(addr(0))).is_some());
    }
}
