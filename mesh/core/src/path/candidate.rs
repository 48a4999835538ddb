//! Addresses at which a node may be reachable.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;

use crate::io::excerpt;

/// Where an address came from. Ordered from the most to the least trustworthy guess of being the shortest way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CandidateKind {
    /// An address of one of the node's own interfaces.
    Host,
    /// Given by the administrator.
    Configured,
    /// The node's address as a relay or gateway saw it (RFC 8445's server-reflexive).
    Reflexive,
}

impl CandidateKind {
    /// The word used in records.
    pub fn label(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Configured => "configured",
            Self::Reflexive => "reflexive",
        }
    }
}

/// One address and its origin. As text: `host 192.0.2.7:51840`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Candidate {
    /// Where the address came from.
    pub kind: CandidateKind,
    /// The address; IPv4 is never written as an IPv4-mapped IPv6 address.
    pub addr: SocketAddr,
}

/// Why a candidate's text was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a candidate: `{0}`; expected `host|configured|reflexive ADDRESS:PORT`")]
pub struct CandidateError(pub String);

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.label(), self.addr)
    }
}

impl FromStr for Candidate {
    type Err = CandidateError;

    fn from_str(text: &str) -> Result<Self, CandidateError> {
        let refused = || CandidateError(excerpt(text));
        let (kind, addr) = text.split_once(' ').ok_or_else(refused)?;
        let kind = match kind {
            "host" => CandidateKind::Host,
            "configured" => CandidateKind::Configured,
            "reflexive" => CandidateKind::Reflexive,
            _ => return Err(refused()),
        };
        let addr: SocketAddr = addr.parse().map_err(|_| refused())?;
        if addr.port() == 0 || matches!(addr, SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some()) {
            return Err(refused());
        }
        Ok(Self { kind, addr })
    }
}

/// Whether an address may be offered or probed at all.
///
/// Never: unspecified, loopback, multicast, broadcast, link-local (a scope means nothing to a peer, and
/// 169.254.0.0/16 holds cloud metadata services), and whatever lies inside `own`, the
/// prefixes that the mesh itself carries: a tunnel that runs through itself is the classic failure.
pub fn usable(addr: IpAddr, own: &[IpNet]) -> bool {
    let excluded = match addr {
        IpAddr::V4(v4) => {
            v4.is_unspecified()
                || v4.is_loopback()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.is_link_local()
                || v4.octets()[0] == 0
        }
        IpAddr::V6(v6) => {
            v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_multicast()
                || v6.is_unicast_link_local()
                || v6.to_ipv4_mapped().is_some()
        }
    };
    !excluded && !own.iter().any(|net| net.contains(&addr))
}

/// A peer's candidates with those that people force, which come first and are not repeated.
pub(crate) fn with_forced(mut forced: Vec<Candidate>, recorded: &[Candidate]) -> Vec<Candidate> {
    let named: Vec<SocketAddr> = forced.iter().map(|candidate| candidate.addr).collect();
    forced.extend(recorded.iter().filter(|candidate| !named.contains(&candidate.addr)));
    forced
}

/// At most `limit` of the candidates, one of each kind in turn, in the order of `kinds`: a node with twenty interfaces
/// must not crowd out its one reflexive address.
pub(crate) fn spread(candidates: &[Candidate], kinds: [CandidateKind; 3], limit: usize) -> Vec<Candidate> {
    let mut queues = kinds.map(|kind| candidates.iter().filter(move |candidate| candidate.kind == kind));
    let mut out: Vec<Candidate> = Vec::new();
    loop {
        let turn: Vec<_> = queues.iter_mut().filter_map(Iterator::next).copied().collect();
        if turn.is_empty() || out.len() >= limit {
            out.truncate(limit);
            return out;
        }
        for candidate in turn {
            if !out.iter().any(|other| other.addr == candidate.addr) {
                out.push(candidate);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        for text in ["host 192.0.2.7:51840", "reflexive [2001:db8::1]:9", "configured 203.0.113.9:1"] {
            assert_eq!(text.parse::<Candidate>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn rubbish_is_refused_with_the_form_that_is_expected() {
        for text in ["", "host", "host 1.2.3.4", "host 1.2.3.4:0", "relay 1.2.3.4:5", "host [::ffff:1.2.3.4]:5"] {
            let error = text.parse::<Candidate>().unwrap_err();
            assert!(error.to_string().contains("ADDRESS:PORT"), "{error}");
        }
    }

    #[test]
    fn many_interfaces_do_not_crowd_out_the_reflexive_address() {
        use CandidateKind::{Configured, Host, Reflexive};
        let mut all: Vec<Candidate> = (0..20).map(|n| format!("host 10.0.0.{n}:1").parse().unwrap()).collect();
        all.push("reflexive 203.0.113.1:1".parse().unwrap());
        all.push("configured 203.0.113.1:1".parse().unwrap());
        let some = spread(&all, [Reflexive, Host, Configured], 4);
        let texts: Vec<_> = some.iter().map(Candidate::to_string).collect();
        assert_eq!(texts, ["reflexive 203.0.113.1:1", "host 10.0.0.0:1", "host 10.0.0.1:1", "host 10.0.0.2:1"]);
    }

    #[test]
    fn the_mesh_never_runs_through_itself() {
        let own: [IpNet; 1] = ["10.98.0.0/16".parse().unwrap()];
        assert!(!usable("10.98.3.4".parse().unwrap(), &own));
        assert!(!usable("169.254.169.254".parse().unwrap(), &own));
        assert!(!usable("fe80::1".parse().unwrap(), &own));
        assert!(usable("10.99.0.1".parse().unwrap(), &own));
    }
}
