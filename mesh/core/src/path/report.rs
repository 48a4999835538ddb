//! An agent's state as a [`Status`].

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::Base;
use super::active::Active;
use super::status::{Outcome, Reason, State, Status, Tried};
use super::way::{Phase, Way};
use crate::io::Via;

/// For how long a death explains why a path is not direct; after that, what came of probing does.
const DEATH_IS_NEWS: Duration = Duration::from_secs(60);

pub(super) fn status(base: &Base, active: Option<&Active>, now: Instant) -> Status {
    let selected = active.and_then(|active| active.ways.get(base.selected?));
    let state = match (active, base.selected) {
        (None, _) => State::Idle,
        (Some(_), None) => State::Connecting,
        (Some(_), Some(Via::Relay(_))) => State::Relayed,
        (Some(_), Some(Via::Direct(_))) => State::Direct,
    };
    let reason = match (active, state) {
        (Some(_), State::Direct) => None,
        (Some(active), _) => Some(why_not_direct(base, active, now)),
        (None, _) => Some(Reason::NoDemand),
    };
    Status {
        state,
        via: base.selected,
        rtt: selected.filter(|way| way.rtt.samples > 0).map(|way| way.rtt.smooth),
        seen_as: selected.and_then(|way| way.seen_as),
        reason,
        tried: active.map_or_else(Vec::new, |active| active.ways.iter().map(|way| tried(way, now)).collect()),
    }
}

/// The most telling of the reasons that apply.
fn why_not_direct(base: &Base, active: &Active, now: Instant) -> Reason {
    let ways: Vec<(SocketAddr, &Way)> = active.ways.direct().filter_map(|way| Some((way.addr()?, way))).collect();
    let addresses = ways.len();
    let ago = |at: Instant| now.saturating_duration_since(at);

    if active.rounds <= 1 && active.death.is_none() && ways.iter().any(|(_, way)| outcome(way) == Outcome::Probing) {
        return Reason::Probing { since: ago(active.started), addresses };
    }
    if let Some((addr, _)) = ways.iter().find(|(_, way)| way.narrow.is_some()) {
        return Reason::LargeProbesLost { addr: *addr, len: base.config.full_size };
    }
    match active.death {
        Some((addr, at)) if ago(at) < DEATH_IS_NEWS => Reason::Died { addr, ago: ago(at) },
        Some(_) | None if base.selected.is_none() => Reason::NoPath,
        Some(_) | None if addresses == 0 => Reason::NoCandidates,
        Some(_) | None => {
            let last = ways.iter().filter_map(|(_, way)| way.silent).max().unwrap_or(active.started);
            Reason::NoAnswer { addresses, ago: ago(last) }
        }
    }
}

fn tried(way: &Way, now: Instant) -> Tried {
    let outcome = outcome(way);
    let since = match outcome {
        Outcome::Untried | Outcome::Probing => None,
        Outcome::Silent => way.silent,
        Outcome::LargeProbesLost => way.narrow,
        Outcome::Died => way.died,
        Outcome::Works => way.heard,
    };
    Tried {
        via: way.via,
        origin: way.origin,
        outcome,
        ago: since.map(|at| now.saturating_duration_since(at)),
        rtt: (way.rtt.samples > 0).then_some(way.rtt.smooth),
    }
}

fn outcome(way: &Way) -> Outcome {
    match way.phase {
        Phase::Untried => Outcome::Untried,
        Phase::Reaching | Phase::Sizing => Outcome::Probing,
        Phase::Usable => Outcome::Works,
        Phase::TooNarrow => Outcome::LargeProbesLost,
        Phase::Silent if way.died.is_some() => Outcome::Died,
        Phase::Silent => Outcome::Silent,
    }
}
