//! What the addresses that others see us at say about the NAT in front of us (RFC 4787, section 4.1).
//!
//! Observers (relays, gateways, peers) tell a node from which address its datagrams come. One observer shows whether
//! there is a NAT at all; two show whether the NAT gives a socket one address for all destinations, which is what
//! hole punching lives on.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// Observers remembered; two suffice for a verdict, more survive one going away.
const MAX_OBSERVERS: usize = 8;

/// How the NAT maps one socket of ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nat {
    /// Nobody has told, or only one observer behind a NAT.
    #[default]
    Unknown,
    /// Seen at an address of its own: no NAT.
    None,
    /// One external address for all destinations: can be punched.
    EndpointIndependent,
    /// Another external address per destination ("symmetric"): a peer learns the address only from a packet that
    /// reaches it.
    EndpointDependent,
}

impl Nat {
    /// The word used in records and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::None => "none",
            Self::EndpointIndependent => "endpoint-independent",
            Self::EndpointDependent => "endpoint-dependent",
        }
    }
}

impl FromStr for Nat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Unknown, Self::None, Self::EndpointIndependent, Self::EndpointDependent]
            .into_iter()
            .find(|nat| nat.label() == text)
            .ok_or_else(|| "expected unknown, none, endpoint-independent or endpoint-dependent".to_owned())
    }
}

impl fmt::Display for Nat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// The latest observations of one socket, one per observer.
#[derive(Clone, Debug, Default)]
pub struct Observations {
    /// Observer and what it saw, the most recent last.
    seen: Vec<(SocketAddr, SocketAddr)>,
}

impl Observations {
    /// `observer` (by the address we send to) saw us at `seen`. Returns whether that is news.
    pub fn record(&mut self, observer: SocketAddr, seen: SocketAddr) -> bool {
        let before = self.seen.iter().position(|(who, _)| *who == observer).map(|at| self.seen.remove(at).1);
        if before.is_some_and(|before| before != seen) {
            // The mapping moved (NAT rebooted, timeout): what others saw was the old one, and comparing the two would
            // make a good NAT look endpoint-dependent.
            self.seen.retain(|(_, other)| other.is_ipv4() != seen.is_ipv4());
        }
        if self.seen.len() == MAX_OBSERVERS {
            self.seen.remove(0);
        }
        self.seen.push((observer, seen));
        before != Some(seen)
    }

    /// Forgets everything: the local addresses changed.
    pub fn clear(&mut self) {
        self.seen.clear();
    }

    /// The addresses we are seen at, without repetition, the most recent first: reflexive candidates.
    pub fn reflexive(&self) -> Vec<SocketAddr> {
        let mut out = Vec::new();
        for (_, seen) in self.seen.iter().rev() {
            if !out.contains(seen) {
                out.push(*seen);
            }
        }
        out
    }

    /// The verdict for IPv4, given the socket's own addresses. IPv6 does not take part: it is rarely translated, and
    /// a node without NAT for IPv6 may well have one for IPv4.
    pub fn nat(&self, own: &[SocketAddr]) -> Nat {
        let mut seen = self.seen.iter().filter(|(_, seen)| seen.is_ipv4());
        let Some((first_observer, first)) = seen.next() else { return Nat::Unknown };
        if own.contains(first) && seen.clone().all(|(_, other)| own.contains(other)) {
            return Nat::None;
        }
        if seen.clone().any(|(_, other)| other != first) {
            return Nat::EndpointDependent;
        }
        // Two ports of one host would not show a mapping that depends on the destination's address.
        if seen.any(|(observer, _)| observer.ip() != first_observer.ip()) {
            Nat::EndpointIndependent
        } else {
            Nat::Unknown
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn verdict(observed: &[(&str, &str)]) -> Nat {
        let mut observations = Observations::default();
        for (observer, seen) in observed {
            observations.record(addr(observer), addr(seen));
        }
        observations.nat(&[addr("192.168.1.2:51840"), addr("198.51.100.9:51840")])
    }

    #[test]
    fn verdicts_by_table() {
        let cases: [(&str, &[_], Nat); 8] = [
            ("nobody told", &[], Nat::Unknown),
            ("seen at an own address", &[("9.9.9.1:1", "198.51.100.9:51840")], Nat::None),
            ("one observer behind a NAT", &[("9.9.9.1:1", "203.0.113.5:4000")], Nat::Unknown),
            (
                "two observers agree",
                &[("9.9.9.1:1", "203.0.113.5:4000"), ("9.9.9.2:1", "203.0.113.5:4000")],
                Nat::EndpointIndependent,
            ),
            (
                "two ports of one observer agree",
                &[("9.9.9.1:1", "203.0.113.5:4000"), ("9.9.9.1:2", "203.0.113.5:4000")],
                Nat::Unknown,
            ),
            (
                "two observers disagree",
                &[("9.9.9.1:1", "203.0.113.5:4000"), ("9.9.9.2:1", "203.0.113.5:4001")],
                Nat::EndpointDependent,
            ),
            (
                "the mapping moved",
                &[
                    ("9.9.9.1:1", "203.0.113.5:4000"),
                    ("9.9.9.2:1", "203.0.113.5:4000"),
                    ("9.9.9.1:1", "203.0.113.5:5000"),
                    ("9.9.9.2:1", "203.0.113.5:5000"),
                ],
                Nat::EndpointIndependent,
            ),
            ("only IPv6", &[("[2001:db8::1]:1", "[2001:db8::9]:51840")], Nat::Unknown),
        ];
        for (name, observed, expected) in cases {
            assert_eq!(verdict(observed), expected, "{name}");
        }
    }

    #[test]
    fn reflexive_addresses_are_the_most_recent_first_and_few() {
        let mut observations = Observations::default();
        for n in 0..20 {
            observations.record(addr(&format!("9.9.9.{n}:1")), addr(&format!("203.0.113.5:{}", 4000 + n / 2)));
        }
        let reflexive = observations.reflexive();
        assert_eq!(reflexive[0], addr("203.0.113.5:4009"));
        assert_eq!(reflexive.len(), 4);
    }
}
