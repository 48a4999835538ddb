//! The public internet: one namespace that routes between sites, each with a public address on a link of its own.
//!
//! ```text
//!   site 1   198.51.100.1, 2001:db8:1::/48 ──┐
//!   site 2   198.51.100.2, 2001:db8:2::/48 ──┼── internet (192.0.2.1 and fe80::1 on every link)
//!   site 3   198.51.100.3 + 203.0.113.16/29 ─┘
//! ```
//!
//! All addresses are documentation ranges (RFC 5737, RFC 3849). Packets to anything else, private ranges above all,
//! vanish as they do on the real one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use ipnet::{Ipv4Net, Ipv6Net};

use crate::link::Lease;
use crate::netns::Namespace;

/// The next hop on every link; never seen elsewhere.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Leases of sites come from 198.51.100.0/24, public LANs behind firewalls from 203.0.113.0/24 in pieces of /29.
const LAST_LEASE: u8 = 253;
const LAST_PUBLIC_LAN: u8 = 31;

/// What happens to packets between sites.
#[derive(Default)]
struct Weather {
    /// Pairs of sites that exchange no UDP, smaller name first.
    udp_blocked: BTreeSet<(String, String)>,
    /// Packets lost per thousand, on the way into and out of a site.
    loss: BTreeMap<String, u16>,
}

#[derive(Default)]
struct State {
    leases: u8,
    public_lans: u8,
    weather: Weather,
}

pub(crate) struct Internet {
    pub(crate) namespace: Arc<Namespace>,
    state: Mutex<State>,
}

impl Internet {
    pub(crate) fn new() -> Result<Self> {
        let namespace = Arc::new(Namespace::create("internet")?);
        namespace.sysctl("ipv4/ip_forward", "1")?;
        namespace.sysctl("ipv6/conf/all/forwarding", "1")?;
        namespace.ip("route add blackhole 0.0.0.0/0\nroute add blackhole ::/0\n")?;
        Ok(Self { namespace, state: Mutex::default() })
    }

    /// An address for the site called `site`, whose own device is `device`. A second call gives it another one.
    pub(crate) fn lease(&self, site: &str, device: &str, ipv6: bool, public_lan: Option<Ipv4Net>) -> Result<Lease> {
        let mut state = self.state();
        if state.leases == LAST_LEASE {
            bail!("all {LAST_LEASE} public addresses are given out");
        }
        state.leases += 1;
        let number = state.leases;
        let v4 = Ipv4Addr::new(198, 51, 100, number);
        let mut far =
            format!("link set dev {site} up\naddr replace {GATEWAY}/32 dev {site}\nroute replace {v4}/32 dev {site}\n");
        let mut near = format!(
            "link set dev {device} up\naddr replace {v4}/32 dev {device}\nroute replace {GATEWAY}/32 dev {device}\n\
             route replace default via {GATEWAY} dev {device} src {v4}\n"
        );
        if let Some(lan) = public_lan {
            writeln!(far, "route replace {} via {v4} dev {site} onlink", lan.trunc())?;
        }
        let site_v6 = Ipv6Net::new(Ipv6Addr::new(0x2001, 0xdb8, number.into(), 0, 0, 0, 0, 0), 48)?;
        let v6 = Ipv6Addr::from_bits(site_v6.addr().to_bits() | 1);
        if ipv6 {
            writeln!(far, "addr replace fe80::1/64 dev {site} nodad\nroute replace {site_v6} via fe80::2 dev {site}")?;
            writeln!(near, "addr replace fe80::2/64 dev {device} nodad\naddr replace {v6}/128 dev {device} nodad")?;
            writeln!(near, "route replace default via fe80::1 dev {device} src {v6}")?;
        }
        let lan_v6 = Ipv6Net::new(Ipv6Addr::from_bits(site_v6.addr().to_bits() | (1 << 64)), 64)?;
        Ok(Lease { v4, v6: ipv6.then_some(v6), delegated_v6: ipv6.then_some(lan_v6), near, far })
    }

    /// A public prefix for the LAN of a router that does not translate; its first host address is the router's.
    pub(crate) fn public_lan(&self) -> Result<Ipv4Net> {
        let mut state = self.state();
        if state.public_lans == LAST_PUBLIC_LAN {
            bail!("all {LAST_PUBLIC_LAN} public LANs are given out");
        }
        state.public_lans += 1;
        Ipv4Net::new(Ipv4Addr::new(203, 0, 113, state.public_lans * 8 + 1), 29).context("29 bits are a prefix length")
    }

    pub(crate) fn set_udp_blocked(&self, a: &str, b: &str, blocked: bool) -> Result<()> {
        let pair = if a < b { (a.to_owned(), b.to_owned()) } else { (b.to_owned(), a.to_owned()) };
        self.change_weather(|weather| {
            if blocked {
                weather.udp_blocked.insert(pair);
            } else {
                weather.udp_blocked.remove(&pair);
            }
        })
    }

    pub(crate) fn set_loss(&self, site: &str, permille: u16) -> Result<()> {
        self.change_weather(|weather| {
            weather.loss.insert(site.to_owned(), permille.min(1000));
        })
    }

    fn change_weather(&self, change: impl FnOnce(&mut Weather)) -> Result<()> {
        let mut state = self.state();
        change(&mut state.weather);
        self.namespace.nft(&ruleset(&state.weather))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The whole ruleset; loading it replaces what was there in one step.
fn ruleset(weather: &Weather) -> String {
    let mut rules = String::new();
    for (a, b) in &weather.udp_blocked {
        for (from, to) in [(a, b), (b, a)] {
            rules += &format!("    meta l4proto udp iifname \"{from}\" oifname \"{to}\" drop\n");
        }
    }
    for (site, permille) in &weather.loss {
        for direction in ["iifname", "oifname"] {
            rules += &format!("    {direction} \"{site}\" numgen random mod 1000 < {permille} drop\n");
        }
    }
    format!(
        "table inet weather\ndelete table inet weather\ntable inet weather {{\n  chain forward {{\n    \
         type filter hook forward priority filter; policy accept\n{rules}  }}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_pair_is_blocked_both_ways_and_a_loss_counts_in_and_out() {
        let mut weather = Weather::default();
        weather.udp_blocked.insert(("a".into(), "b".into()));
        weather.loss.insert("c".into(), 200);
        let rules = ruleset(&weather);
        assert!(
            rules.contains("iifname \"a\" oifname \"b\" drop") && rules.contains("iifname \"b\" oifname \"a\" drop")
        );
        assert_eq!(rules.matches("mod 1000 < 200 drop").count(), 2);
    }
}
