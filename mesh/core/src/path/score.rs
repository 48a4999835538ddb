//! Which way is best: a rank that derives its order, and the hysteresis that keeps traffic where it is.

use std::net::IpAddr;
use std::time::Duration;

use crate::io::Via;

/// A direct way is left for another only if that is better by more than this ...
const MARGIN: Duration = Duration::from_millis(5);
/// ... by more than one part in this many of the present cost ...
const MARGIN_SHARE: u32 = 5;
/// ... and by more than this many times what its own round trips vary by: the least of eight varies about as much.
const MARGIN_JITTERS: u32 = 2;
/// Round trips measured before a way's cost is believed.
const ENOUGH_SAMPLES: u32 = 3;

/// How good a way is. Less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Score {
    pub(crate) tier: Tier,
    /// The round trip plus the class's handicap.
    pub(crate) cost: Duration,
    pub(crate) class: Class,
}

/// What decides before any round trip does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// Carries full-size packets without anybody in between.
    Direct,
    /// Through a relay, and the peer answers there.
    Relay,
    /// Through a relay that is connected; the peer has not answered there (yet).
    UnprovenRelay,
}

/// What kind of network a way seems to cross.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// A private address that answers: the same LAN, or a routed site.
    Lan,
    /// Public IPv6: no NAT mapping that can be lost.
    V6,
    /// Public IPv4.
    V4,
    /// Through a relay.
    Relayed,
}

impl Class {
    pub(crate) fn of(via: Via) -> Self {
        match via {
            Via::Relay(_) => Self::Relayed,
            Via::Direct(addr) => match addr.ip() {
                IpAddr::V4(ip) if ip.is_private() => Self::Lan,
                IpAddr::V6(ip) if ip.is_unique_local() => Self::Lan,
                IpAddr::V4(_) => Self::V4,
                IpAddr::V6(_) => Self::V6,
            },
        }
    }

    /// Added to the round trip. One step is less than [`MARGIN`], so that it decides where to begin but is no reason
    /// to move; two steps are more, so that a LAN path takes over from a hairpin through the router.
    fn handicap(self) -> Duration {
        Duration::from_millis(match self {
            Self::Lan => 0,
            Self::V6 => 3,
            Self::V4 => 6,
            Self::Relayed => 0,
        })
    }
}

/// One usable way as the choice sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scored {
    pub(crate) via: Via,
    pub(crate) score: Score,
    /// Round trips measured.
    pub(crate) samples: u32,
    /// By how much they vary.
    pub(crate) jitter: Duration,
}

impl Score {
    pub(crate) fn new(via: Via, proven: bool, rtt: Duration) -> Self {
        let class = Class::of(via);
        let tier = match (via, proven) {
            (Via::Direct(_), _) => Tier::Direct,
            (Via::Relay(_), true) => Tier::Relay,
            (Via::Relay(_), false) => Tier::UnprovenRelay,
        };
        Self { tier, cost: rtt + class.handicap(), class }
    }
}

/// What to do about the selected way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing is better, or not by enough.
    Keep,
    /// Better by so much that it counts once it has been so for a while.
    Challenged(Via),
    /// At once: the selected way is gone or of a lower tier. None where there is no usable way at all.
    Switch(Option<Via>),
}

/// Compares the selected way with all usable ones (in order of preference where scores are equal).
pub(crate) fn judge(selected: Option<Via>, usable: &[Scored]) -> Verdict {
    let best = usable.iter().min_by_key(|way| way.score);
    let current = usable.iter().find(|way| Some(way.via) == selected);
    match (current, best) {
        (None, None) if selected.is_none() => Verdict::Keep,
        (None, best) => Verdict::Switch(best.map(|way| way.via)),
        (Some(current), Some(best)) if best.score.tier < current.score.tier => Verdict::Switch(Some(best.via)),
        (Some(current), Some(best)) if beats(best, current) => Verdict::Challenged(best.via),
        (Some(_), _) => Verdict::Keep,
    }
}

/// Cost is one number and a win needs a margin, so ways cannot beat each other in a circle.
fn beats(challenger: &Scored, current: &Scored) -> bool {
    let margin = MARGIN.max(current.score.cost / MARGIN_SHARE).max(current.jitter * MARGIN_JITTERS);
    challenger.samples >= ENOUGH_SAMPLES
        && current.samples >= ENOUGH_SAMPLES
        && challenger.score.cost + margin < current.score.cost
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::NodeId;

    fn way(via: &str, rtt_ms: u64) -> Scored {
        let via = match via.parse() {
            Ok(addr) => Via::Direct(addr),
            Err(_) => Via::Relay(NodeId::from_bytes([via.as_bytes()[0]; 32])),
        };
        Scored { via, score: Score::new(via, true, Duration::from_millis(rtt_ms)), samples: 9, jitter: Duration::ZERO }
    }

    #[test]
    fn verdicts_by_table() {
        let lan = |rtt| way("10.0.0.2:1", rtt);
        let v6 = |rtt| way("[2001:db8::2]:1", rtt);
        let v4 = |rtt| way("203.0.113.2:1", rtt);
        let relay = |rtt| way("relay", rtt);
        let cases = [
            ("nothing is there", None, vec![], Verdict::Keep),
            ("the first way", None, vec![relay(50)], Verdict::Switch(Some(relay(0).via))),
            ("the last way is gone", Some(v4(9)), vec![], Verdict::Switch(None)),
            (
                "direct beats relay at any round trip",
                Some(relay(1)),
                vec![relay(1), v4(99)],
                Verdict::Switch(Some(v4(0).via)),
            ),
            ("a dead direct way goes to the relay", Some(v4(9)), vec![relay(50)], Verdict::Switch(Some(relay(0).via))),
            ("a little faster is not enough", Some(v4(20)), vec![v4(20), v6(19)], Verdict::Keep),
            ("much faster is", Some(v4(40)), vec![v4(40), v6(20)], Verdict::Challenged(v6(0).via)),
            ("a fifth is needed of slow ways", Some(v4(200)), vec![v4(200), v6(170)], Verdict::Keep),
            ("IPv6 is where to begin", None, vec![v4(20), v6(20)], Verdict::Switch(Some(v6(0).via))),
            ("IPv4 is kept against equal IPv6", Some(v4(20)), vec![v4(20), v6(20)], Verdict::Keep),
            ("LAN takes over from a hairpin", Some(v4(2)), vec![v4(2), lan(1)], Verdict::Challenged(lan(0).via)),
            ("a distant private network does not", Some(v4(2)), vec![v4(2), lan(30)], Verdict::Keep),
        ];
        for (name, selected, usable, expected) in cases {
            assert_eq!(judge(selected.map(|way| way.via), &usable), expected, "{name}");
        }
    }

    #[test]
    fn a_round_trip_measured_once_is_not_believed() {
        let (slow, mut fast) = (way("203.0.113.2:1", 100), way("203.0.113.3:1", 10));
        fast.samples = 1;
        assert_eq!(judge(Some(slow.via), &[slow, fast]), Verdict::Keep);
    }

    #[test]
    fn a_relay_where_the_peer_answers_goes_before_one_where_it_does_not() {
        let (a, mut b) = (way("a", 90), way("b", 1));
        b.score = Score::new(b.via, false, Duration::ZERO);
        assert_eq!(judge(Some(b.via), &[a, b]), Verdict::Switch(Some(a.via)));
    }
}
