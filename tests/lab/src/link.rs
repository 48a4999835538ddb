//! One cable: a veth pair between a host or router and what it hangs on.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use ipnet::Ipv6Net;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::netns::Namespace;
use crate::tool;
use crate::world::Wire;

/// Addresses that an upstream gives to a node, and the `ip` lines that make them work at both ends.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Option<Ipv6Addr>,
    /// What a router with this lease may give to its LAN.
    pub(crate) delegated_v6: Option<Ipv6Net>,
    /// Lines for the node's end; they can be applied any number of times.
    pub(crate) near: String,
    /// The same for the upstream's end.
    pub(crate) far: String,
}

/// One end of a cable.
pub(crate) struct End {
    pub(crate) namespace: Arc<Namespace>,
    pub(crate) device: String,
}

impl End {
    pub(crate) fn new(namespace: &Arc<Namespace>, device: &str) -> Self {
        Self { namespace: Arc::clone(namespace), device: device.to_owned() }
    }
}

/// The cable between a node (the near end) and its upstream (the far end), with the node's lease.
pub struct Uplink {
    near: End,
    far: End,
    lease: Mutex<Lease>,
}

impl Uplink {
    /// Plugs the cable in at both ends and configures both.
    pub(crate) fn plug(near: End, far: End, lease: Lease, wire: Wire) -> Result<Self> {
        let add = format!(
            "link add name {} netns {} type veth peer name {} netns {}\n",
            far.device,
            far.namespace.name(),
            near.device,
            near.namespace.name()
        );
        tool::feed(std::process::Command::new("ip").args(["-batch", "-"]), &add)?;
        for end in [&far, &near] {
            end.namespace.ip(&format!("link set dev {} addrgenmode none{}\n", end.device, wire.link_options()))?;
        }
        let uplink = Self { near, far, lease: Mutex::new(lease) };
        uplink.configure()?;
        Ok(uplink)
    }

    /// A cable that is plugged in and configured already, seen from this end.
    pub(crate) fn plugged(near: End, far: End, lease: Lease) -> Self {
        Self { near, far, lease: Mutex::new(lease) }
    }

    /// Pulls the cable: the node sees its carrier go, and keeps its addresses.
    pub fn cut(&self) -> Result<()> {
        self.far.namespace.ip(&format!("link set dev {} down\n", self.far.device))
    }

    /// Plugs it in again.
    pub fn join(&self) -> Result<()> {
        self.far.namespace.ip(&self.lease().far)
    }

    /// Bounds the rate in both directions, in Mbit/s; None takes the bound away.
    pub fn set_rate(&self, mbit: Option<u32>) -> Result<()> {
        for end in [&self.near, &self.far] {
            let device = &end.device;
            // The bucket holds ten full frames, the queue 50 ms: a small home router.
            let change = match mbit {
                Some(mbit) => format!("qdisc replace dev {device} root tbf rate {mbit}mbit burst 16kb latency 50ms"),
                None => format!("qdisc delete dev {device} root"),
            };
            end.namespace.tc(&change)?;
        }
        Ok(())
    }

    /// Sets the largest IP packet of the link, in bytes, at both ends.
    pub fn set_mtu(&self, bytes: u16) -> Result<()> {
        for end in [&self.near, &self.far] {
            end.namespace.ip(&format!("link set dev {} mtu {bytes}\n", end.device))?;
        }
        Ok(())
    }

    pub(crate) fn lease(&self) -> Lease {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the lease while the cable is out; both ends forget the old one.
    pub(crate) fn renew(&self, lease: Lease) -> Result<()> {
        self.near.namespace.ip(&format!("addr flush dev {} scope global\n", self.near.device))?;
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = lease;
        self.configure()
    }

    fn configure(&self) -> Result<()> {
        let lease = self.lease();
        self.far.namespace.ip(&lease.far)?;
        self.near.namespace.ip(&lease.near)
    }
}
