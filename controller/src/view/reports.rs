//! Who reaches whom, as daemons say when they are asked.

use std::collections::BTreeMap;
use std::net::IpAddr;

use keystone_mesh_core::node::NodeName;

use super::Now;

/// A reporter that is silent for so long is forgotten, in milliseconds: longer than any sensible life of a report.
const MEMORY: u64 = 3_600_000;

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reporter {
    /// The node.
    pub name: NodeName,
    /// Its mesh addresses, IPv4 first; the status listener answers on each.
    pub addresses: Vec<IpAddr>,
}

/// Whether a reporter reaches a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It does, directly or through a relay.
    Reached,
    /// It does not.
    Unreached,
}

/// What one reporter answered. That it answered shows that it is reached itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Who.
    pub reporter: NodeName,
    /// When.
    pub at: Now,
    /// Each peer that it knows, by node name. One that is not in here is not known to it yet, which says nothing.
    pub peers: BTreeMap<NodeName, Reach>,
}

/// The last report of each reporter, and since when each answer is the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reports {
    /// Since when reporters are asked; none where it was never said.
    started: Option<Now>,
    by_reporter: BTreeMap<NodeName, Answered>,
}

#[derive(Clone, Debug)]
struct Answered {
    since: Now,
    at: Now,
    peers: BTreeMap<NodeName, (Reach, Now)>,
}

/// What the reports that still count say of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Evidence {
    /// Somebody reaches it, since then.
    Reached(Now),
    /// Those who know it do not reach it, since then.
    Unreached(Now),
    /// Nobody says anything, since then; none where nobody was asked yet.
    Silence(Option<Now>),
}

impl Reports {
    pub(crate) fn since(started: Now) -> Self {
        Self { started: Some(started), by_reporter: BTreeMap::new() }
    }

    pub(crate) fn handle(&mut self, report: Report) {
        let Report { reporter, at, peers } = report;
        let before = self.by_reporter.remove(&reporter);
        self.by_reporter.retain(|_, answered| at.saturating_sub(answered.at) < MEMORY);
        let since = |name: &NodeName, reach: Reach| {
            let known = before.as_ref().and_then(|before| before.peers.get(name));
            known.filter(|(old, _)| *old == reach).map_or(at, |(_, since)| *since)
        };
        let peers = peers.into_iter().map(|(name, reach)| (name.clone(), (reach, since(&name, reach)))).collect();
        let since = before.as_ref().map_or(at, |before| before.since);
        self.by_reporter.insert(reporter, Answered { since, at, peers });
    }

    /// When the next report stops to count that still does.
    pub(crate) fn lapse(&self, now: Now, life: u64) -> Option<Now> {
        let lapses = self.by_reporter.values().map(|answered| answered.at.saturating_add(life).saturating_add(1));
        lapses.filter(|at| *at > now).min()
    }

    /// What is said of a node by reports of at most `life` milliseconds ago.
    pub(crate) fn evidence(&self, name: &NodeName, now: Now, life: u64) -> Evidence {
        let (mut reached, mut unreached, mut last) = (None::<Now>, None::<Now>, self.started);
        for (reporter, answered) in &self.by_reporter {
            let said = if reporter == name {
                Some((Reach::Reached, answered.since))
            } else {
                answered.peers.get(name).copied()
            };
            let Some((reach, since)) = said else { continue };
            last = last.max(Some(answered.at));
            if now.saturating_sub(answered.at) > life {
                continue;
            }
            match reach {
                Reach::Reached => reached = Some(reached.map_or(since, |known| known.min(since))),
                Reach::Unreached => unreached = Some(unreached.map_or(since, |known| known.max(since))),
            }
        }
        match (reached, unreached) {
            (Some(since), _) => Evidence::Reached(since),
            (None, Some(since)) => Evidence::Unreached(since),
            (None, None) => Evidence::Silence(last),
        }
    }
}
