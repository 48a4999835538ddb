//! The world: the internet and everything that hangs on it.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use anyhow::{Result, ensure};

use crate::host::Host;
use crate::internet::Internet;
use crate::link::{End, Lease, Uplink};
use crate::netns::Namespace;
use crate::router::{Router, RouterSpec};
use crate::sandbox;

/// The longest name of a network device (`IFNAMSIZ` - 1); names of hosts and routers name devices too.
const LONGEST_NAME: usize = 15;

/// What a packet on a cable may look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// As veth does it: segments travel together in super packets of up to 64 KiB. Fast, as inside one machine.
    #[default]
    Offloaded,
    /// As on a cable: the sender cuts, and no frame is longer than the MTU.
    Ethernet,
}

impl Wire {
    /// More than one segment per packet makes the kernel cut in software before the device sees it (ip-link(8)).
    pub(crate) const fn link_options(self) -> &'static str {
        match self {
            Self::Offloaded => "",
            Self::Ethernet => " gso_max_segs 1",
        }
    }
}

/// What all hosts and routers of one world share.
pub(crate) struct Fabric {
    pub(crate) internet: Internet,
    pub(crate) wire: Wire,
}

/// A world with an internet and, at first, nothing else. It ends with its last host, and at the latest with the sandbox.
pub struct World {
    fabric: Arc<Fabric>,
}

impl World {
    /// Makes the internet. Only inside a [`sandbox`], so that nothing can be left behind.
    pub fn new(wire: Wire) -> Result<Self> {
        ensure!(sandbox::is_inside(), "a world exists inside a sandbox only");
        Ok(Self { fabric: Arc::new(Fabric { internet: Internet::new()?, wire }) })
    }

    /// A host with a public IPv4 and a public IPv6 address and nothing in front of it.
    pub fn public_host(&self, name: &str) -> Result<Host> {
        check_name(name)?;
        let namespace = Arc::new(Namespace::create(name)?);
        let lease = self.fabric.internet.lease(name, "eth0", true, None)?;
        let far = End::new(&self.fabric.internet.namespace, name);
        let uplink = Uplink::plug(End::new(&namespace, "eth0"), far, lease, self.fabric.wire)?;
        Ok(Host::new(&self.fabric, namespace, uplink, None))
    }

    /// Two hosts on one cable, with nothing else: 192.0.2.1 and 192.0.2.2, 2001:db8:ffff::1 and 2001:db8:ffff::2.
    pub fn two_hosts(&self, names: [&str; 2]) -> Result<[Host; 2]> {
        for name in names {
            check_name(name)?;
        }
        let [a, b] = names.map(|name| Namespace::create(name).map(Arc::new));
        let (a, b) = (a?, b?);
        let ends = || (End::new(&a, "eth0"), End::new(&b, "eth0"));
        let (near, far) = ends();
        let uplink = Uplink::plug(near, far, lease_on_cable(1, 2), self.fabric.wire)?;
        let (far, near) = ends();
        let same = Uplink::plugged(near, far, lease_on_cable(2, 1));
        Ok([Host::new(&self.fabric, a.clone(), uplink, None), Host::new(&self.fabric, b.clone(), same, None)])
    }

    /// A router as `spec` says; [`Router::host`] puts hosts behind it.
    pub fn router(&self, name: &str, spec: RouterSpec) -> Result<Router> {
        Router::new(&self.fabric, name, spec)
    }

    /// The internet drops UDP between the sites of `a` and `b`, both ways, from now on. All else passes: their direct
    /// path dies while both still reach a relay.
    pub fn block_udp(&self, a: &Host, b: &Host) -> Result<()> {
        self.fabric.internet.set_udp_blocked(a.site(), b.site(), true)
    }

    /// Takes [`Self::block_udp`] back.
    pub fn unblock_udp(&self, a: &Host, b: &Host) -> Result<()> {
        self.fabric.internet.set_udp_blocked(a.site(), b.site(), false)
    }

    /// The internet loses so many of a thousand packets on their way into, and as many on their way out of, the site of
    /// `host`; 0 is fair weather.
    pub fn set_loss(&self, host: &Host, permille: u16) -> Result<()> {
        self.fabric.internet.set_loss(host.site(), permille)
    }
}

/// What a host on a cable of its own has, and the one at the other end.
fn lease_on_cable(own: u8, other: u8) -> Lease {
    let v4 = |number: u8| Ipv4Addr::new(192, 0, 2, number);
    let v6 = |number: u8| Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, number.into());
    let lines = |number: u8| {
        let (v4, v6) = (v4(number), v6(number));
        format!("link set dev eth0 up\naddr replace {v4}/24 dev eth0\naddr replace {v6}/64 dev eth0 nodad\n")
    };
    Lease { v4: v4(own), v6: Some(v6(own)), delegated_v6: None, near: lines(own), far: lines(other) }
}

/// Names become names of devices and namespaces, and must not be those that every node has.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        !name.is_empty() && name.len() <= LONGEST_NAME && name.chars().all(plain) && !name.starts_with('-'),
        "{name:?} cannot be a name: it takes 1 to {LONGEST_NAME} characters of a-z, 0-9 and -"
    );
    ensure!(!["lo", "lan", "wan", "eth0", "internet"].contains(&name), "{name:?} is taken in every world");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_plain_and_free() {
        check_name("home-router").unwrap();
        for bad in ["", "-x", "Home", "a_b", "a-name-too-long-x", "lan", "internet"] {
            check_name(bad).unwrap_err();
        }
    }
}
