//! Requests to the kernel, one function for each (rtnetlink(7)).

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType,
};

use crate::attachment::Mac;
use crate::plan::{Pair, ROUTE_PROTOCOL};

/// `IFALIASZ` of linux/if.h without its final zero.
const MAX_ALIAS: usize = 255;

/// A pair with one end here and the other in `netns`, in one request: no moment at which the pod's end is on the host.
pub(super) fn create_pair(pair: &Pair, host_mac: Mac, netns: &impl AsFd) -> Message {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(pair.pod.clone()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::Address(pair.pod_mac.0.to_vec()),
        LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()),
    ];
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(pair.host.clone()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::Address(host_mac.0.to_vec()),
        LinkAttribute::Group(pair.group),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    Message::NewLink(link)
}

/// Up. Both ends are made at once, so the carrier is there as soon as both are.
pub(super) fn set_up(index: u32) -> Message {
    Message::SetLink(up(index))
}

/// Up, with a name for people, and `without_ipv6` addresses of the kernel's own making: the host's end needs none, and each
/// costs three routes and a second of duplicate address detection.
pub(super) fn set_host_up(index: u32, alias: &str, without_ipv6: bool) -> Message {
    let mut link = up(index);
    link.attributes.push(LinkAttribute::IfAlias(alias[..alias.floor_char_boundary(MAX_ALIAS)].into()));
    if without_ipv6 {
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        link.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])]));
    }
    Message::SetLink(link)
}

fn up(index: u32) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link
}

pub(super) fn set_mtu(index: u32, mtu: u32) -> Message {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes = vec![LinkAttribute::Mtu(mtu)];
    Message::SetLink(link)
}

pub(super) fn delete_link(name: &str) -> Message {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::IfName(name.into())];
    Message::DelLink(link)
}

pub(super) fn get_link(name: &str) -> Message {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::IfName(name.into())];
    Message::GetLink(link)
}

pub(super) fn get_link_at(index: u32) -> Message {
    let mut link = LinkMessage::default();
    link.header.index = index;
    Message::GetLink(link)
}

/// All links that are virtual Ethernet pairs.
pub(super) fn all_pairs() -> Message {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)])];
    Message::GetLink(link)
}

/// An address alone, without a prefix on the link, in force at once: the address was given to this pod and nobody else, so
/// that duplicate address detection has nothing to find.
pub(super) fn address(index: u32, address: IpAddr) -> Message {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.family = family(address);
    message.header.prefix_len = IpNet::from(address).prefix_len();
    message.header.scope = AddressScope::Universe;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    if address.is_ipv6() {
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    Message::NewAddress(message)
}

pub(super) fn addresses_of(index: u32) -> Message {
    let mut message = AddressMessage::default();
    message.header.index = index;
    Message::GetAddress(message)
}

/// Where `address` is, for good.
pub(super) fn neighbour(index: u32, address: IpAddr, mac: Mac) -> Message {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }),
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
    ];
    Message::NewNeighbour(message)
}

pub(super) fn neighbours_of(index: u32) -> Message {
    let mut message = NeighbourMessage::default();
    message.attributes = vec![NeighbourAttribute::IfIndex(index)];
    Message::GetNeighbour(message)
}

/// The host's route to an address of a pod.
pub(super) fn route_to(index: u32, address: IpAddr) -> Message {
    let mut message = route(IpNet::from(address), index);
    message.header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    if address.is_ipv4() {
        message.header.scope = RouteScope::Link;
    }
    Message::NewRoute(message)
}

/// A pod's route by a gateway that is not in any prefix of its interface.
pub(super) fn route_by(index: u32, to: IpNet, gateway: IpAddr, mtu: Option<u32>) -> Message {
    let mut message = route(to, index);
    message.header.flags = RouteFlags::Onlink;
    message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
    message.attributes.extend(mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    Message::NewRoute(message)
}

pub(super) fn delete_route_by(index: u32, to: IpNet, gateway: IpAddr) -> Message {
    let mut message = route(to, index);
    message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
    Message::DelRoute(message)
}

/// Which route answers for `address`, as it stands in the table.
pub(super) fn matching_route(address: IpAddr) -> Message {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = IpNet::from(address).prefix_len();
    message.header.flags = RouteFlags::FibMatch;
    message.attributes = vec![RouteAttribute::Destination(RouteAddress::from(address))];
    Message::GetRoute(message)
}

pub(super) fn all_routes(family: AddressFamily) -> Message {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    Message::GetRoute(message)
}

fn route(to: IpNet, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(to.addr()),
        destination_prefix_length: to.prefix_len(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    if to.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(to.network())));
    }
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
