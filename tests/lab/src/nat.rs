//! What kinds of NAT there are, what each promises, and the nftables ruleset that keeps the promise.

use std::fmt;
use std::time::Duration;

use ipnet::Ipv4Net;

/// What a router does with the source of what leaves, and whom it lets in. Names from RFC 3489 where they are still in
/// everybody's mouth; [`Nat::promise`] says the same in the terms of RFC 4787.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nat {
    /// Linux masquerading, most home routers: one port for all destinations, replies only from exactly those.
    PortRestricted,
    /// One port for all destinations; any port of an address that was written to may answer.
    AddressRestricted,
    /// One port for all destinations, and anyone may write to it.
    FullCone,
    /// Another random port for each destination; cloud NAT gateways and many carriers.
    Symmetric,
    /// No translation: public addresses behind a stateful firewall.
    Firewall,
}

impl Nat {
    /// All kinds, in order of declaration.
    pub const ALL: [Self; 5] =
        [Self::PortRestricted, Self::AddressRestricted, Self::FullCone, Self::Symmetric, Self::Firewall];

    /// What a probe from behind such a router must find.
    pub const fn promise(self) -> Behaviour {
        use Dependence::{Address, AddressAndPort, Endpoint};
        let (mapping, filtering) = match self {
            Self::PortRestricted | Self::Firewall => (Endpoint, AddressAndPort),
            Self::AddressRestricted => (Endpoint, Address),
            Self::FullCone => (Endpoint, Endpoint),
            Self::Symmetric => (AddressAndPort, AddressAndPort),
        };
        Behaviour { mapping, filtering }
    }
}

impl fmt::Display for Nat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::PortRestricted => "port-restricted",
            Self::AddressRestricted => "address-restricted",
            Self::FullCone => "full cone",
            Self::Symmetric => "symmetric",
            Self::Firewall => "firewall only",
        })
    }
}

/// On what of the remote side a NAT's decision depends (RFC 4787, sections 4.1 and 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dependence {
    /// On nothing: endpoint-independent, EIM or EIF.
    Endpoint,
    /// On its address: ADM or ADF.
    Address,
    /// On its address and port: APDM or APDF.
    AddressAndPort,
}

impl Dependence {
    const fn letters(self) -> &'static str {
        match self {
            Self::Endpoint => "EI",
            Self::Address => "AD",
            Self::AddressAndPort => "APD",
        }
    }
}

/// How a NAT behaves towards UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behaviour {
    /// Whether the outer port changes with the destination.
    pub mapping: Dependence,
    /// Who may write to the outer port.
    pub filtering: Dependence,
}

impl fmt::Display for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}M, {}F", self.mapping.letters(), self.filtering.letters())
    }
}

/// What a router does with a packet from outside that nobody asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inbound {
    /// Drops it silently, as home routers do.
    Drop,
    /// Answers it itself (port unreachable). Conntrack then owns the outer port for that peer, so that a hole punch that
    /// comes second leaves by another port: the classic failed punch.
    Answer,
}

/// The ruleset of a router with devices `wan` and `lan`, the whole of it: loading it replaces what was there.
pub(crate) fn ruleset(nat: Nat, inbound: Inbound, lan: Ipv4Net, mapping_life: Duration) -> String {
    let input_policy = match inbound {
        Inbound::Drop => "drop",
        Inbound::Answer => "accept",
    };
    let translation = match nat {
        Nat::Firewall => String::new(),
        Nat::PortRestricted => masquerade(lan, ""),
        Nat::Symmetric => masquerade(lan, "random,fully-random"),
        Nat::AddressRestricted => cone(mapping_life, "ip saddr . udp dport @contacted ") + &masquerade(lan, ""),
        Nat::FullCone => cone(mapping_life, "") + &masquerade(lan, ""),
    };
    format!(
        r#"table inet router
delete table inet router
table inet router {{
  chain input {{
    type filter hook input priority filter; policy {input_policy}
    iifname != "wan" accept
    ct state established,related accept
    meta l4proto {{ icmp, ipv6-icmp }} accept
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop
    ct state established,related accept
    iifname "lan" oifname "wan" accept
    ct status dnat accept
  }}
{translation}}}
"#
    )
}

fn masquerade(lan: Ipv4Net, flags: &str) -> String {
    let lan = lan.trunc();
    format!(
        r#"  chain postrouting {{
    type nat hook postrouting priority srcnat
    oifname "wan" ip saddr {lan} masquerade {flags}
  }}
"#
    )
}

/// Masquerading keeps the source port where it can, so remembering who sent from a port is enough to let others in by it.
/// The chain `remember` sees each packet before its source is translated, and so keeps the memory fresh.
fn cone(mapping_life: Duration, only_from: &str) -> String {
    let timeout = format!("{}s", mapping_life.as_secs().max(1));
    format!(
        r#"  map inside {{
    type inet_service : ipv4_addr . inet_service
    flags dynamic,timeout
    timeout {timeout}
    size 65535
  }}
  set contacted {{
    type ipv4_addr . inet_service
    flags dynamic,timeout
    timeout {timeout}
    size 65535
  }}
  chain remember {{
    type filter hook postrouting priority srcnat - 1
    oifname "wan" meta nfproto ipv4 meta l4proto udp update @inside {{ udp sport : ip saddr . udp sport }}
    oifname "wan" meta nfproto ipv4 meta l4proto udp update @contacted {{ ip daddr . udp sport }}
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat
    iifname "wan" meta nfproto ipv4 meta l4proto udp {only_from}dnat ip to udp dport map @inside
  }}
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaviours_print_as_the_rfc_abbreviates_them() {
        assert_eq!(Nat::PortRestricted.promise().to_string(), "EIM, APDF");
        assert_eq!(Nat::AddressRestricted.promise().to_string(), "EIM, ADF");
        assert_eq!(Nat::FullCone.promise().to_string(), "EIM, EIF");
        assert_eq!(Nat::Symmetric.promise().to_string(), "APDM, APDF");
    }

    #[test]
    fn only_the_cones_remember_who_sent() {
        let lan = "192.168.1.1/24".parse().unwrap();
        for nat in Nat::ALL {
            let rules = ruleset(nat, Inbound::Drop, lan, Duration::from_secs(120));
            assert_eq!(rules.contains("@inside"), matches!(nat, Nat::FullCone | Nat::AddressRestricted), "{nat}");
            assert_eq!(rules.contains("masquerade"), nat != Nat::Firewall, "{nat}");
        }
    }
}
