//! One peer of the [machine](super).

use std::net::SocketAddr;
use std::time::Instant;

use super::PeerStatus;
use crate::io::{PeerConfig, Via};
use crate::key::{PrivateKey, PublicKey};
use crate::path::{self, PathAgent, PlainPath, TimeoutReason};
use crate::plan::Plan;
use crate::probe::ProbeKey;

/// How a peer's path is found.
pub(super) enum Way {
    /// By probes and relays: a member of the network.
    Agent(PathAgent),
    /// As stock WireGuard does: a plain peer.
    Plain(PlainPath),
}

pub(super) struct Peer {
    pub(super) name: String,
    pub(super) config: PeerConfig,
    pub(super) way: Way,
    pub(super) selected: Option<Via>,

    /// The key of probes: agreed on when the first one comes or goes, because agreeing costs some 60 µs.
    probe_key: Option<ProbeKey>,

    /// A handshake is due as soon as there is a path.
    pub(super) wanted: bool,
    /// The agent has not been told yet that it is wanted.
    pub(super) fresh: bool,

    // --- the data plane's counters at the last sample ---
    pub(super) sent: u64,
    pub(super) received: u64,

    pub(super) deadline: Option<Instant>,
    pub(super) deadline_reason: TimeoutReason,
}

impl Peer {
    /// A member. `called`: it is to be reached at once, without waiting for a packet.
    pub(super) fn member(config: PeerConfig, agent: PathAgent, called: bool) -> Self {
        Self::new(String::new(), config, Way::Agent(agent), called)
    }

    /// A plain WireGuard peer. `called`: it had a session before a restart, and may still use that; otherwise WireGuard
    /// itself calls it when a packet waits.
    pub(super) fn plain(name: String, config: PeerConfig, endpoint: Option<SocketAddr>, called: bool) -> Self {
        Self::new(name, config, Way::Plain(PlainPath::new(endpoint)), called)
    }

    fn new(name: String, config: PeerConfig, way: Way, called: bool) -> Self {
        Self {
            name,
            config,
            way,
            selected: None,
            probe_key: None,
            wanted: called,
            fresh: true,
            sent: 0,
            received: 0,
            deadline: None,
            deadline_reason: TimeoutReason::Idle,
        }
    }

    pub(super) fn poll(&mut self, now: Instant) -> path::Output {
        match &mut self.way {
            Way::Agent(agent) => agent.poll_output(now),
            Way::Plain(path) => path.poll_output(),
        }
    }

    /// Whether a path that has just been found is to be used for a handshake at once. Asks once.
    pub(super) fn wants_handshake(&mut self) -> bool {
        self.selected.is_none() && std::mem::take(&mut self.wanted)
    }

    pub(super) fn probe_key(&mut self, own: &PrivateKey) -> Option<&ProbeKey> {
        if self.probe_key.is_none() {
            self.probe_key = ProbeKey::agree(own, &self.config.key);
        }
        self.probe_key.as_ref()
    }

    /// Where the peer was last reached directly.
    pub(super) fn direct(&self) -> Option<SocketAddr> {
        let via = match &self.way {
            Way::Agent(agent) => agent.hint(),
            Way::Plain(path) => path.status().via,
        };
        match via? {
            Via::Direct(addr) => Some(addr),
            Via::Relay(_) => None,
        }
    }

    pub(super) fn status(&self, key: PublicKey, plan: &Plan, now: Instant) -> PeerStatus {
        let path = match &self.way {
            Way::Agent(agent) => agent.status(now),
            Way::Plain(path) => path.status(),
        };
        let (member, served) = (plan.members.get(&key), plan.served.get(&key));
        let (addresses, routes) = match (member, served) {
            (Some(member), _) => (member.addresses.clone(), member.routes.clone()),
            (None, Some(served)) => (served.addresses.clone(), served.routes.clone()),
            (None, None) => (Vec::new(), self.config.allowed_ips.clone()),
        };
        PeerStatus {
            name: self.name.clone(),
            identity: self.config.identity,
            key,
            addresses,
            routes,
            pod_cidrs: member.map(|member| member.pod_cidrs.clone()).unwrap_or_default(),
            location: member.and_then(|member| member.location.clone()),
            path,
        }
    }
}
