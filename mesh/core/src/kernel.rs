//! What the kernel should hold for the mesh, and the steps from what it holds to that.
//!
//! The desired state of one interface is a value ([`Desired`]); the driver reads what is there ([`Actual`]); [`diff`]
//! answers with the operations between the two, in an order in which no step breaks one before it. Whatever somebody
//! else changes by hand comes back as a difference, so restoring is no special case.
//!
//! ```text
//!   packet of an application                    datagram of the daemon's own socket (marked FWMARK)
//!            |                                               |
//!   rule 5184: not fwmark FWMARK ---- matches ---+           +-- passes the rule by
//!                                                |           |
//!                                 table 5184: mesh routes    main table: the way to the internet
//!                                                |           |
//!                                            ksmesh0        eth0
//! ```
//!
//! **What is ours**, and everything else is left alone: routes in [`TABLE`] with [`ROUTE_PROTOCOL`], rules with that
//! protocol, and the interface itself with its addresses (but link-local ones, which the kernel makes). Where a foreign
//! route stands in the way of a desired one, or a desired one in the way of the host's own network, nothing is changed
//! and a [`Warning`] says so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::path::candidate::usable;

mod host;
#[cfg(test)]
mod tests;

pub use host::{CONTAINER_INTERFACE_PREFIXES, HostAddress, HostInterface, host_addresses};

/// The origin written into our routes and rules (`rtm_protocol` of rtnetlink(7), `FRA_PROTOCOL` of rules).
///
/// The kernel gives meaning to 0 to 4 only; the rest belongs to whoever takes it. 152 is in none of iproute2's
/// `rt_protos` (which end at 99 before the routing daemons' block of 186 to 199) and is not Calico's 80.
pub const ROUTE_PROTOCOL: u8 = 152;

/// The routing table of the mesh. Above 255, where distributions number theirs; reads like the default port 51840.
pub const TABLE: u32 = 5184;

/// Where the rule stands: after `local` (0), before `main` (32766), and before Tailscale's 5210 to 5270, whose
/// catch-all rules would otherwise answer first.
pub const RULE_PRIORITY: u32 = 5184;

/// The mark on the daemon's own datagrams (`SO_MARK` of socket(7)), which keeps them out of [`TABLE`].
///
/// One bit, because other software tests single bits of a mark: kube-proxy masquerades what has 0x4000 (which would
/// rewrite the source port that peers and NATs know us by) and drops 0x8000, the portmap plugin takes 0x2000, Cilium
/// 0x0f00, the AWS CNI 0x80, KubeSpan 0x60, Antrea the low byte, Calico and Tailscale the upper half.
pub const FWMARK: u32 = 0x1000;

/// The metric of our routes: what the kernel gives IPv6 routes by default, and stated so that IPv4 has it too.
pub const ROUTE_METRIC: u32 = 1024;

/// An address family, where a thing exists once for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of a prefix.
    pub fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Everything that the kernel should hold for the mesh interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// MTU of the interface in bytes. IPv6 needs 1280 or more.
    pub mtu: u32,
    /// Whether the interface is up. Routes exist only while it is.
    pub up: bool,
    /// The interface's addresses with their prefix lengths.
    pub addresses: Vec<IpNet>,
    /// What is reached through the interface. Order and duplicates do not matter; the last of two wins.
    pub routes: Vec<Route>,
    /// Whether lookups go to [`TABLE`] at all.
    pub rule: bool,
}

/// A destination that is reached through the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// The destination; bits after the prefix are ignored.
    pub dst: IpNet,
    /// The path MTU towards it in bytes; none leaves it to the interface.
    pub mtu: Option<u32>,
    /// A neighbour on a network of the host's own through which it is reached plainly. Where it is none, the mesh is
    /// the way, as it is without one.
    pub via: Option<IpAddr>,
}

/// What the kernel holds, as far as it concerns the mesh. Foreign state is in it too; [`diff`] knows what is ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// The mesh interface, where it exists.
    pub link: Option<Link>,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// All routes of [`TABLE`].
    pub routes: Vec<KernelRoute>,
    /// All rules, of both families.
    pub rules: Vec<KernelRule>,
    /// The other interfaces of the host.
    pub others: Vec<HostInterface>,
    /// Whether IPv6 is enabled: on the mesh interface, or on the host where that does not exist.
    pub ipv6: bool,
}

/// The mesh interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number of it.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up (`IFF_UP` of netdevice(7)).
    pub up: bool,
    /// Whether it is a TUN or TAP device. Another kind that carries our name is not ours.
    pub tun: bool,
}

/// A route of [`TABLE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelRoute {
    /// The destination.
    pub dst: IpNet,
    /// Its priority among routes to the same destination.
    pub metric: u32,
    /// Who made it.
    pub protocol: u8,
    /// The interface it leads to directly; none for every other kind (a gateway, several next hops, a blackhole).
    pub link: Option<u32>,
    /// The gateway that it leads to, where it is one.
    pub via: Option<IpAddr>,
    /// Its path MTU in bytes, where it has one.
    pub mtu: Option<u32>,
}

/// A rule of the policy routing database (ip-rule(8)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelRule {
    /// Whose lookups it concerns.
    pub family: Family,
    /// Its place in the order of rules.
    pub priority: u32,
    /// The table that it sends to.
    pub table: u32,
    /// Who made it.
    pub protocol: u8,
    /// Whether it says exactly `not fwmark FWMARK lookup`, and nothing else.
    pub not_marked: bool,
}

/// One change of the kernel's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelOp {
    /// Takes a rule away.
    RemoveRule(KernelRule),
    /// Takes a route away.
    RemoveRoute(KernelRoute),
    /// Sets the MTU in bytes.
    SetMtu(u32),
    /// Brings the interface up.
    SetUp,
    /// Adds an address, without the route to its prefix that the kernel would put into the main table.
    AddAddress(IpNet),
    /// Takes an address away.
    RemoveAddress(IpNet),
    /// Adds a route.
    AddRoute(Route),
    /// Changes a route in place, so that there is no moment without one.
    ReplaceRoute(Route),
    /// Adds the rule `not fwmark FWMARK lookup TABLE`.
    AddRule(Family),
    /// Takes the interface down.
    SetDown,
    /// Takes the interface away, with all that hangs on it.
    RemoveLink,
}

impl fmt::Display for KernelOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RemoveRule(rule) => write!(f, "remove {} rule {}", rule.family, rule.priority),
            Self::RemoveRoute(route) => write!(f, "remove route {}", route.dst),
            Self::SetMtu(mtu) => write!(f, "set MTU {mtu}"),
            Self::SetUp => write!(f, "set interface up"),
            Self::AddAddress(address) => write!(f, "add address {address}"),
            Self::RemoveAddress(address) => write!(f, "remove address {address}"),
            Self::AddRoute(route) => write!(f, "add route {}", route.dst),
            Self::ReplaceRoute(route) => write!(f, "change route {}", route.dst),
            Self::AddRule(family) => write!(f, "add {family} rule {RULE_PRIORITY}"),
            Self::SetDown => write!(f, "set interface down"),
            Self::RemoveLink => write!(f, "remove interface"),
        }
    }
}

/// A reason why a part of the desired state is left out. The rest is in force.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Warning {
    /// There is no such interface.
    #[error("the mesh interface does not exist; its addresses and routes wait for it")]
    LinkMissing,
    /// Something else has the interface's name.
    #[error("an interface has the mesh interface's name but is no TUN device; it is left alone: rename one of the two")]
    LinkNotTun,
    /// The host or the interface has no IPv6.
    #[error(
        "IPv6 is disabled, so the mesh runs on IPv4 only; enable it with `sysctl net.ipv6.conf.all.disable_ipv6=0`"
    )]
    Ipv6Disabled,
    /// A route would take the host's own network away.
    #[error(
        "the mesh route {route} is left out: it covers {network} of interface {interface}, which is this host's own"
    )]
    RouteCoversLocalNetwork {
        /// The desired route.
        route: IpNet,
        /// The network that it covers.
        network: IpNet,
        /// The interface with an address in that network.
        interface: String,
    },
    /// Somebody else's route has the place in our table.
    #[error("the mesh route {dst} is left out: table {TABLE} has a route to it that is not ours (protocol {protocol})")]
    ForeignRoute {
        /// The destination.
        dst: IpNet,
        /// The foreign route's protocol number.
        protocol: u8,
    },
}

/// The way from the actual to the desired state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// To be done in this order. Empty where nothing differs.
    pub ops: Vec<KernelOp>,
    /// What is left out of the desired state, and why.
    pub warnings: BTreeSet<Warning>,
}

/// The operations that make the kernel hold what is desired.
///
/// First goes away what sends traffic (rules, then routes), then the interface gets ready, then addresses, then routes,
/// and the rule last, so that a lookup never meets half a mesh. Addresses are added before others are removed,
/// because the kernel drops all routes of an interface with its last address.
pub fn diff(desired: &Desired, actual: &Actual) -> Diff {
    let mut diff = Diff::default();
    let link = own_link(actual, &mut diff.warnings);
    if !actual.ipv6 {
        diff.warnings.insert(Warning::Ipv6Disabled);
    }
    let carried = |family: Family| family == Family::V4 || actual.ipv6;

    let (removed_rules, added_rules) = rules(desired, actual, carried);
    diff.ops.extend(removed_rules.into_iter().map(KernelOp::RemoveRule));

    let Some(link) = link else {
        diff.ops.extend(own_routes(actual).map(KernelOp::RemoveRoute));
        diff.ops.extend(added_rules.into_iter().map(KernelOp::AddRule));
        return diff;
    };

    let wanted = installable_routes(desired, actual, carried, &mut diff.warnings);
    let (removed_routes, set_routes) = routes(&wanted, actual, link.index);
    diff.ops.extend(removed_routes);

    if link.mtu != desired.mtu {
        diff.ops.push(KernelOp::SetMtu(desired.mtu));
    }
    if desired.up && !link.up {
        diff.ops.push(KernelOp::SetUp);
    }

    let addresses: BTreeSet<IpNet> = desired.addresses.iter().copied().filter(|a| carried(Family::of(a))).collect();
    let present: BTreeSet<IpNet> = actual.addresses.iter().copied().filter(|a| !made_by_the_kernel(a)).collect();
    diff.ops.extend(addresses.difference(&present).copied().map(KernelOp::AddAddress));
    diff.ops.extend(present.difference(&addresses).copied().map(KernelOp::RemoveAddress));

    diff.ops.extend(set_routes);
    diff.ops.extend(added_rules.into_iter().map(KernelOp::AddRule));
    if !desired.up && link.up {
        diff.ops.push(KernelOp::SetDown);
    }
    diff
}

/// The operations that take everything of ours away, in the reverse order of building it.
pub fn removal(actual: &Actual) -> Diff {
    let mut diff = Diff::default();
    diff.ops.extend(own_rules(actual).map(KernelOp::RemoveRule));
    diff.ops.extend(own_routes(actual).map(KernelOp::RemoveRoute));
    if actual.link.is_some() && own_link(actual, &mut diff.warnings).is_some() {
        diff.ops.push(KernelOp::RemoveLink);
    }
    diff
}

fn own_link(actual: &Actual, warnings: &mut BTreeSet<Warning>) -> Option<Link> {
    match actual.link {
        Some(link) if link.tun => Some(link),
        Some(_) => {
            warnings.insert(Warning::LinkNotTun);
            None
        }
        None => {
            warnings.insert(Warning::LinkMissing);
            None
        }
    }
}

fn made_by_the_kernel(address: &IpNet) -> bool {
    match address {
        IpNet::V4(_) => false,
        IpNet::V6(v6) => v6.addr().is_unicast_link_local(),
    }
}

fn own_rules(actual: &Actual) -> impl Iterator<Item = KernelRule> {
    actual.rules.iter().copied().filter(|rule| rule.protocol == ROUTE_PROTOCOL)
}

fn own_routes(actual: &Actual) -> impl Iterator<Item = KernelRoute> {
    actual.routes.iter().copied().filter(|route| route.protocol == ROUTE_PROTOCOL)
}

/// The rules to remove and the families that lack one. A foreign rule that says the same serves as well as ours: the
/// kernel refuses a second one.
fn rules(desired: &Desired, actual: &Actual, carried: impl Fn(Family) -> bool) -> (Vec<KernelRule>, Vec<Family>) {
    let says_it = |rule: &KernelRule| rule.priority == RULE_PRIORITY && rule.table == TABLE && rule.not_marked;
    let wanted = |family: Family| desired.rule && carried(family);

    let removed = own_rules(actual).filter(|rule| !(wanted(rule.family) && says_it(rule))).collect();
    let served = |family: Family| actual.rules.iter().any(|rule| rule.family == family && says_it(rule));
    let added = Family::ALL.into_iter().filter(|&family| wanted(family) && !served(family)).collect();
    (removed, added)
}

/// The desired routes that can stand: of a family that the interface carries, and in nobody's way.
fn installable_routes(
    desired: &Desired,
    actual: &Actual,
    carried: impl Fn(Family) -> bool,
    warnings: &mut BTreeSet<Warning>,
) -> BTreeMap<IpNet, Route> {
    if !desired.up {
        return BTreeMap::new();
    }
    let way = |route: &Route| {
        let dst = route.dst.trunc();
        let via =
            route.via.filter(|via| Family::of(&(*via).into()) == Family::of(&dst) && on_link(*via, &actual.others));
        (dst, Route { dst, mtu: route.mtu, via })
    };
    let mut wanted: BTreeMap<IpNet, Route> = desired.routes.iter().map(way).collect();
    // By destination: a large mesh has thousands of routes, and each looks here.
    let foreign: BTreeMap<IpNet, u8> = actual
        .routes
        .iter()
        .filter(|route| route.metric == ROUTE_METRIC && route.protocol != ROUTE_PROTOCOL)
        .map(|route| (route.dst, route.protocol))
        .collect();
    wanted.retain(|route, _| {
        let in_place = || foreign.get(route).map(|&protocol| Warning::ForeignRoute { dst: *route, protocol });
        let refusal = covered_network(route, &actual.others).or_else(in_place);
        let stands = carried(Family::of(route)) && refusal.is_none();
        warnings.extend(refusal);
        stands
    });
    wanted
}

/// Whether an address is a neighbour's: in a network of an interface that is up, and not the host's own.
fn on_link(address: IpAddr, others: &[HostInterface]) -> bool {
    let up = others.iter().filter(|interface| interface.up);
    let mut networks = up.flat_map(|interface| &interface.addresses).map(|address| address.net);
    let neighbour = |net: IpNet| net.prefix_len() < net.max_prefix_len() && net.contains(&address);
    networks.clone().any(neighbour) && !networks.any(|net| net.addr() == address)
}

/// The host's network that a route would take away. A single address is none: the kernel answers for its own addresses
/// before it looks at any other table.
fn covered_network(route: &IpNet, others: &[HostInterface]) -> Option<Warning> {
    let connected = others.iter().filter(|interface| interface.up).flat_map(|interface| {
        let networks = interface.addresses.iter().map(|address| address.net.trunc());
        networks.map(move |network| (network, &interface.name))
    });
    connected
        .filter(|(network, _)| network.prefix_len() < network.max_prefix_len() && usable(network.addr(), &[]))
        .find(|(network, _)| route.contains(network))
        .map(|(network, interface)| Warning::RouteCoversLocalNetwork {
            route: *route,
            network,
            interface: interface.clone(),
        })
}

/// What to remove, and what to add or change.
fn routes(wanted: &BTreeMap<IpNet, Route>, actual: &Actual, index: u32) -> (Vec<KernelOp>, Vec<KernelOp>) {
    let in_place = |route: &KernelRoute| route.metric == ROUTE_METRIC && wanted.contains_key(&route.dst);
    let removed = own_routes(actual).filter(|route| !in_place(route)).map(KernelOp::RemoveRoute).collect();

    let present: BTreeMap<IpNet, KernelRoute> = own_routes(actual).filter(in_place).map(|r| (r.dst, r)).collect();
    let leads_there = |route: &KernelRoute, wanted: &Route| match wanted.via {
        Some(_) => route.via == wanted.via,
        None => route.link == Some(index),
    };
    let set = wanted.iter().filter_map(|(dst, wanted)| match present.get(dst) {
        None => Some(KernelOp::AddRoute(*wanted)),
        Some(route) if leads_there(route, wanted) && route.mtu == wanted.mtu => None,
        Some(_) => Some(KernelOp::ReplaceRoute(*wanted)),
    });
    (removed, set.collect())
}
