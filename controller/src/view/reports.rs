//! Who reaches whom, as daemons say when they are asked.

use std::collections::BTreeMap;
use std::net::IpAddr;

use keystone_mesh_core::node::NodeName;

use super::Now;

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
    by_reporter: BTreeMap<NodeName, Answered>,
}

#[derive(Clone, Debug)]
struct Answered {
    at: Now,
    peers: BTreeMap<NodeName, (Reach, Now)>,
}

impl Reports {
    pub(crate) fn handle(&mut self, report: Report) {
        let Report { reporter, at, peers } = report;
        let before = self.by_reporter.remove(&reporter);
        let since = |name: &NodeName, reach: Reach| {
            let known = before.as_ref().and_then(|before| before.peers.get(name));
            known.filter(|(old, _)| *old == reach).map_or(at, |(_, since)| *since)
        };
        let peers = peers.into_iter().map(|(name, reach)| (name.clone(), (reach, since(&name, reach)))).collect();
        self.by_reporter.insert(reporter, Answered { at, peers });
    }
}
