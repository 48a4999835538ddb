//! A home router, a cloud NAT gateway, a carrier's NAT: one namespace with a `wan` and a bridge `lan`.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::Ipv4Net;

use crate::conntrack;
use crate::host::Host;
use crate::link::{End, Lease, Uplink};
use crate::nat::{self, Inbound, Nat};
use crate::netns::Namespace;
use crate::world::{Fabric, check_name};

/// On what a router's `wan` hangs.
#[derive(Clone, Debug, Default)]
pub enum Upstream {
    /// The public internet.
    #[default]
    Internet,
    /// Another router's LAN: a carrier's NAT (CGNAT) or a router behind the provider's.
    Behind(Router),
}

/// What to build. The default is the usual home router.
#[derive(Clone, Debug)]
pub struct RouterSpec {
    /// How it translates and filters.
    pub nat: Nat,
    /// What it hangs on.
    pub upstream: Upstream,
    /// The router's own address in its LAN, with the LAN's prefix length. Many homes have the same one, and so may
    /// routers here. Ignored for [`Nat::Firewall`], whose LAN has public addresses.
    pub lan: Ipv4Net,
    /// Whether the site has IPv6 too: public addresses, behind the same filter and never translated.
    pub ipv6: bool,
    /// What unasked packets meet.
    pub inbound: Inbound,
    /// Life of a UDP mapping that saw packets in one direction only. Linux: 30 s.
    pub udp_timeout: Duration,
    /// Life of a UDP mapping that saw replies. Linux: 120 s.
    pub udp_stream_timeout: Duration,
}

impl Default for RouterSpec {
    fn default() -> Self {
        Self {
            nat: Nat::PortRestricted,
            upstream: Upstream::Internet,
            lan: Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 1, 1), 24),
            ipv6: false,
            inbound: Inbound::Drop,
            udp_timeout: Duration::from_secs(30),
            udp_stream_timeout: Duration::from_secs(120),
        }
    }
}

/// A router in a world; clones are the same router.
#[derive(Clone)]
pub struct Router {
    inner: Arc<Inner>,
}

struct Inner {
    fabric: Arc<Fabric>,
    namespace: Arc<Namespace>,
    spec: RouterSpec,
    lan: Ipv4Net,
    uplink: Uplink,
    last_host: AtomicU8,
}

impl Router {
    pub(crate) fn new(fabric: &Arc<Fabric>, name: &str, spec: RouterSpec) -> Result<Self> {
        check_name(name)?;
        let behind_router = matches!(spec.upstream, Upstream::Behind(_));
        ensure!(!(spec.ipv6 && behind_router), "{name}: IPv6 is delegated by the internet only, not by a router");
        let routed = spec.nat == Nat::Firewall;
        ensure!(!(routed && behind_router), "{name}: a router that does not translate hangs on the internet");
        let lan = if routed { fabric.internet.public_lan()? } else { spec.lan };
        let namespace = Arc::new(Namespace::create(name)?);
        configure(&namespace, &spec, lan)?;
        let lease = lease(fabric, name, &spec, lan)?;
        let delegated = lease.delegated_v6;
        let far = match &spec.upstream {
            Upstream::Internet => &fabric.internet.namespace,
            Upstream::Behind(router) => &router.inner.namespace,
        };
        let uplink = Uplink::plug(End::new(&namespace, "wan"), End::new(far, name), lease, fabric.wire)?;
        if let Some(lan_v6) = delegated {
            namespace.ip(&format!("addr add fe80::1/64 dev lan nodad\nroute add {lan_v6} dev lan\n"))?;
        }
        let inner = Inner { fabric: Arc::clone(fabric), namespace, spec, lan, uplink, last_host: AtomicU8::new(0) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The router's name, which is also that of its network namespace and of its link at the other end.
    pub fn name(&self) -> &str {
        self.inner.namespace.name()
    }

    /// The kind that was asked for.
    pub fn nat(&self) -> Nat {
        self.inner.spec.nat
    }

    /// Adds a host to this router's LAN.
    pub fn host(&self, name: &str) -> Result<Host> {
        check_name(name)?;
        let namespace = Arc::new(Namespace::create(name)?);
        let lease = self.lan_lease(name, "eth0")?;
        let near = End::new(&namespace, "eth0");
        let uplink = Uplink::plug(near, End::new(&self.inner.namespace, name), lease, self.inner.fabric.wire)?;
        Ok(Host::new(&self.inner.fabric, namespace, uplink, Some(self.clone())))
    }

    /// The cable on the `wan` side.
    pub fn uplink(&self) -> &Uplink {
        &self.inner.uplink
    }

    /// The address of `wan`; of the outermost router it is what the world sees.
    pub fn wan_v4(&self) -> Ipv4Addr {
        self.inner.uplink.lease().v4
    }

    /// The router that stands at the internet, which is this one unless it hangs behind another.
    pub(crate) fn outermost(&self) -> &Self {
        match &self.inner.spec.upstream {
            Upstream::Internet => self,
            Upstream::Behind(router) => router.outermost(),
        }
    }

    /// Forgets every connection and mapping, as a router does that is switched off and on.
    pub fn forget_mappings(&self) -> Result<()> {
        let Inner { namespace, spec, lan, .. } = &*self.inner;
        namespace.nft(&nat::ruleset(spec.nat, spec.inbound, *lan, spec.udp_stream_timeout))?;
        namespace.enter(conntrack::flush).with_context(|| format!("on {}", self.name()))
    }

    /// Goes down and comes up again with all mappings gone and another address on `wan`, as many do at night.
    pub fn reboot(&self) -> Result<()> {
        let Inner { fabric, spec, lan, uplink, .. } = &*self.inner;
        uplink.cut()?;
        self.forget_mappings()?;
        uplink.renew(lease(fabric, self.name(), spec, *lan)?)
    }

    /// An address in this router's LAN. `port` is the bridge port for it, `device` the node's own device.
    fn lan_lease(&self, port: &str, device: &str) -> Result<Lease> {
        let Inner { lan, uplink, last_host, .. } = &*self.inner;
        let number = last_host.fetch_add(1, Ordering::Relaxed) + 1;
        let gateway = lan.addr();
        let v4 = Ipv4Addr::from_bits(gateway.to_bits() + u32::from(number));
        ensure!(lan.contains(&v4) && v4 != lan.broadcast(), "{}: no address is left in {}", self.name(), lan.trunc());
        let far = format!("link set dev {port} master lan\nlink set dev {port} up\n");
        let mut near = format!(
            "link set dev {device} up\naddr replace {v4}/{} dev {device}\nroute replace default via {gateway}\n",
            lan.prefix_len()
        );
        let v6 = uplink.lease().delegated_v6.map(|net| Ipv6Addr::from_bits(net.addr().to_bits() | u128::from(number)));
        if let Some(v6) = v6 {
            near += &format!("addr replace fe80::{}/64 dev {device} nodad\n", u16::from(number) + 1);
            near +=
                &format!("addr replace {v6}/64 dev {device} nodad\nroute replace default via fe80::1 dev {device}\n");
        }
        Ok(Lease { v4, v6, delegated_v6: None, near, far })
    }
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Router({}, {})", self.name(), self.nat())
    }
}

fn lease(fabric: &Fabric, name: &str, spec: &RouterSpec, lan: Ipv4Net) -> Result<Lease> {
    match &spec.upstream {
        Upstream::Internet => {
            let public_lan = (spec.nat == Nat::Firewall).then_some(lan);
            fabric.internet.lease(name, "wan", spec.ipv6, public_lan)
        }
        Upstream::Behind(router) => router.lan_lease(name, "wan"),
    }
}

fn configure(namespace: &Namespace, spec: &RouterSpec, lan: Ipv4Net) -> Result<()> {
    namespace.sysctl("ipv4/ip_forward", "1")?;
    namespace.sysctl("ipv6/conf/all/forwarding", "1")?;
    namespace.ip(&format!(
        "link add name lan type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
         link set dev lan addrgenmode none up\naddr add {}/{} dev lan\n",
        lan.addr(),
        lan.prefix_len()
    ))?;
    namespace.nft(&nat::ruleset(spec.nat, spec.inbound, lan, spec.udp_stream_timeout))?;
    let seconds = |life: Duration| life.as_secs().max(1).to_string();
    namespace.sysctl("netfilter/nf_conntrack_udp_timeout", &seconds(spec.udp_timeout))?;
    namespace.sysctl("netfilter/nf_conntrack_udp_timeout_stream", &seconds(spec.udp_stream_timeout))
}
