//! The world: the internet and everything that hangs on it.

use std::sync::Arc;

use anyhow::{Result, ensure};

use crate::host::Host;
use crate::internet::Internet;
use crate::link::{End, Uplink};
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
