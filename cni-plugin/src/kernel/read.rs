//! What is there: interfaces, addresses, routes and neighbours, as far as CHECK, GC and the helper ask.
#![expect(clippy::wildcard_enum_match_arm, reason = "the library's lists of messages and attributes are open")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, State};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType};
use nix::errno::Errno;

use super::message;
use crate::attachment::Mac;
use crate::netlink::{Refusal, Socket};

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address, where it has one of six bytes.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its group.
    pub group: u32,
    /// True if it was set up.
    pub up: bool,
    /// Index of the other end, in whatever namespace that is.
    pub peer: Option<u32>,
    /// True for virtual Ethernet pairs.
    pub is_veth: bool,
}

/// A route of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundRoute {
    /// Destination.
    pub to: IpNet,
    /// Next hop.
    pub by: Option<IpAddr>,
    /// The route's own MTU in bytes.
    pub mtu: Option<u32>,
}

impl Link {
    pub(super) fn of(message: &Message) -> Option<Self> {
        let Message::NewLink(link) = message else { return None };
        let mut found = Self {
            index: link.header.index,
            name: String::new(),
            mac: None,
            mtu: 0,
            group: 0,
            up: link.header.flags.contains(LinkFlags::Up),
            peer: None,
            is_veth: false,
        };
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => found.name.clone_from(name),
                LinkAttribute::Address(bytes) => found.mac = bytes.as_slice().try_into().ok().map(Mac),
                LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
                LinkAttribute::Group(group) => found.group = *group,
                LinkAttribute::Link(index) => found.peer = Some(*index),
                LinkAttribute::LinkInfo(info) => found.is_veth = info.contains(&LinkInfo::Kind(InfoKind::Veth)),
                _ => {}
            }
        }
        Some(found)
    }
}

pub(super) fn link(socket: &mut Socket, name: &str) -> Result<Option<Link>, Refusal> {
    found(socket.get(message::get_link(name)))
}

pub(super) fn link_at(socket: &mut Socket, index: u32) -> Result<Option<Link>, Refusal> {
    found(socket.get(message::get_link_at(index)))
}

fn found(answer: Result<Option<Message>, Refusal>) -> Result<Option<Link>, Refusal> {
    match answer {
        Err(refusal) if refusal.is(Errno::ENODEV) => Ok(None),
        answer => Ok(answer?.as_ref().and_then(Link::of)),
    }
}

/// True once a link is up and the kernel has noticed.
pub(super) fn carries(socket: &mut Socket, index: u32) -> Result<bool, Refusal> {
    let Some(Message::NewLink(link)) = socket.get(message::get_link_at(index))? else { return Ok(false) };
    Ok(link.attributes.contains(&LinkAttribute::OperState(State::Up)))
}

pub(super) fn pairs(socket: &mut Socket) -> Result<Vec<Link>, Refusal> {
    Ok(socket.dump(&message::all_pairs())?.iter().filter_map(Link::of).collect())
}

pub(super) fn addresses(socket: &mut Socket, index: u32) -> Result<Vec<IpAddr>, Refusal> {
    let mut found = Vec::new();
    for message in socket.dump(&message::addresses_of(index))? {
        let Message::NewAddress(address) = message else { continue };
        // A kernel that ignores the filter lists all interfaces.
        if address.header.index != index {
            continue;
        }
        found.extend(address.attributes.into_iter().filter_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(address),
            _ => None,
        }));
    }
    Ok(found)
}

pub(super) fn routes(socket: &mut Socket, index: u32) -> Result<Vec<FoundRoute>, Refusal> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let routes = match socket.dump(&message::all_routes(family)) {
            // A kernel without IPv6.
            Err(refusal) if refusal.is(Errno::EOPNOTSUPP) => continue,
            routes => routes?,
        };
        found.extend(routes.iter().filter_map(|message| match message {
            Message::NewRoute(route) if oif(route) == Some(index) => main_route(route),
            _ => None,
        }));
    }
    Ok(found)
}

pub(super) fn neighbours(socket: &mut Socket, index: u32) -> Result<Vec<(IpAddr, Option<Mac>)>, Refusal> {
    let mut found = Vec::new();
    for message in socket.dump(&message::neighbours_of(index))? {
        let Message::NewNeighbour(neighbour) = message else { continue };
        if neighbour.header.ifindex != index || neighbour.header.state != NeighbourState::Permanent {
            continue;
        }
        let (mut address, mut mac) = (None, None);
        for attribute in &neighbour.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(to)) => address = Some(IpAddr::from(*to)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(to)) => address = Some(IpAddr::from(*to)),
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
                _ => {}
            }
        }
        found.extend(address.map(|address| (address, mac)));
    }
    Ok(found)
}

/// The interface of the route to exactly `address`; None where only a wider route, or none, answers.
pub(super) fn route_to(socket: &mut Socket, address: IpAddr) -> Result<Option<u32>, Refusal> {
    match socket.get(message::matching_route(address)) {
        Err(refusal) if refusal.is(Errno::ENETUNREACH) || refusal.is(Errno::EHOSTUNREACH) => Ok(None),
        answer => Ok(answer?.and_then(|message| match message {
            Message::NewRoute(route) if route.header.destination_prefix_length == IpNet::from(address).prefix_len() => {
                oif(&route)
            }
            _ => None,
        })),
    }
}

/// True if an address is one of this namespace's own.
pub(super) fn is_local(socket: &mut Socket, address: IpAddr) -> Result<bool, Refusal> {
    match socket.get(message::matching_route(address)) {
        Err(refusal) if refusal.is(Errno::ENETUNREACH) || refusal.is(Errno::EHOSTUNREACH) => Ok(false),
        answer => Ok(matches!(answer?, Some(Message::NewRoute(route)) if route.header.kind == RouteType::Local)),
    }
}

fn oif(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn main_route(route: &RouteMessage) -> Option<FoundRoute> {
    if route.header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let unspecified = match route.header.address_family {
        AddressFamily::Inet => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    let (mut to, mut by, mut mtu) = (unspecified, None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => to = ip(address)?,
            RouteAttribute::Gateway(address) => by = ip(address),
            RouteAttribute::Metrics(metrics) => mtu = metrics.iter().find_map(metric_mtu),
            _ => {}
        }
    }
    Some(FoundRoute { to: IpNet::new(to, route.header.destination_prefix_length).ok()?, by, mtu })
}

fn metric_mtu(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}
