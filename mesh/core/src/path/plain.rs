//! The path to a plain WireGuard peer, one that answers no probes: as stock WireGuard does it.
//!
//! The configured endpoint is used as it is; after that, packets go to wherever the last authenticated one came from.

use std::net::SocketAddr;

use super::status::{Outcome, Reason, State, Status, Tried};
use super::way::Origin;
use super::{CandidateKind, Output};
use crate::io::Via;

/// Has no timers and sends nothing: drain [`PlainPath::poll_output`] until it says [`Output::Idle`].
#[derive(Clone, Debug, Default)]
pub struct PlainPath {
    configured: Option<SocketAddr>,
    current: Option<SocketAddr>,
    told: Option<SocketAddr>,
}

impl PlainPath {
    /// A peer at a configured endpoint, or one that will call.
    pub fn new(endpoint: Option<SocketAddr>) -> Self {
        Self { configured: endpoint, current: endpoint, told: None }
    }

    /// The configured endpoint changed. An endpoint that was removed leaves the peer where it was last seen.
    pub fn set_endpoint(&mut self, endpoint: Option<SocketAddr>) {
        if self.configured != endpoint {
            self.configured = endpoint;
            self.current = endpoint.or(self.current);
        }
    }

    /// An authenticated packet of the peer came from here.
    pub fn handle_received(&mut self, via: Via) {
        match via {
            Via::Direct(addr) => self.current = Some(addr),
            Via::Relay(_) => {}
        }
    }

    /// [`Output::Select`] where something changed, then [`Output::Idle`].
    pub fn poll_output(&mut self) -> Output {
        if self.told == self.current {
            return Output::Idle;
        }
        self.told = self.current;
        Output::Select(self.current.map(Via::Direct))
    }

    /// For people and JSON.
    pub fn status(&self) -> Status {
        let origin =
            if self.current == self.configured { Origin::Record(CandidateKind::Configured) } else { Origin::Heard };
        let way = |addr| Tried { via: Via::Direct(addr), origin, outcome: Outcome::Untried, ago: None, rtt: None };
        Status {
            state: if self.current.is_some() { State::Direct } else { State::Idle },
            via: self.current.map(Via::Direct),
            rtt: None,
            seen_as: None,
            reason: self.current.is_none().then_some(Reason::WaitsForPeer),
            tried: self.current.map(way).into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_peer_starts_at_its_endpoint_and_roams() {
        let (home, away) = ("203.0.113.5:51820".parse().unwrap(), "198.51.100.7:4000".parse().unwrap());
        let mut path = PlainPath::new(Some(home));
        assert_eq!(path.poll_output(), Output::Select(Some(Via::Direct(home))));
        assert_eq!(path.poll_output(), Output::Idle);
        path.handle_received(Via::Direct(home));
        assert_eq!(path.poll_output(), Output::Idle);
        path.handle_received(Via::Direct(away));
        assert_eq!(path.poll_output(), Output::Select(Some(Via::Direct(away))));
        path.set_endpoint(Some(home));
        assert_eq!(path.poll_output(), Output::Idle, "the configuration did not change");
    }

    #[test]
    fn a_plain_peer_without_endpoint_waits_for_its_first_packet() {
        let mut path = PlainPath::new(None);
        assert_eq!(path.poll_output(), Output::Idle);
        assert_eq!(path.status().reason, Some(Reason::WaitsForPeer));
        let addr = "198.51.100.7:4000".parse().unwrap();
        path.handle_received(Via::Direct(addr));
        assert_eq!(path.poll_output(), Output::Select(Some(Via::Direct(addr))));
        assert_eq!(path.status().state, State::Direct);
    }
}
