//! The kernel's answers as typed values. Policy is not applied here: foreign state is read too.
#![expect(clippy::wildcard_enum_match_arm, reason = "netlink attributes are an open set; a reader takes what it knows")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use keystone_mesh_core::kernel::{
    Actual, FWMARK, Family, HostAddress, HostInterface, KernelRoute, KernelRule, Link, TABLE,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::{KernelError, io_error};

/// Everything that concerns the mesh.
pub(super) async fn actual(handle: &Handle, interface: &str) -> Result<Actual, KernelError> {
    let Interfaces { link, addresses, others, ipv6 } = interfaces(handle, interface).await?;
    let mut actual = Actual { link, addresses, others, ipv6, ..Actual::default() };
    for family in Family::ALL {
        actual.routes.extend(routes(handle, family).await?);
        actual.rules.extend(rules(handle, family).await?);
    }
    Ok(actual)
}

/// The mesh interface and the others.
pub(super) struct Interfaces {
    pub(super) link: Option<Link>,
    pub(super) addresses: Vec<IpNet>,
    pub(super) others: Vec<HostInterface>,
    pub(super) ipv6: bool,
}

pub(super) async fn interfaces(handle: &Handle, mesh: &str) -> Result<Interfaces, KernelError> {
    let request = handle.link().get().set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
    let links: Vec<LinkMessage> = request.execute().try_collect().await.map_err(failed("links"))?;
    let messages: Vec<AddressMessage> =
        handle.address().get().execute().try_collect().await.map_err(failed("addresses"))?;

    let mut addresses: BTreeMap<u32, Vec<HostAddress>> = BTreeMap::new();
    for message in &messages {
        addresses.entry(message.header.index).or_default().extend(host_address(message));
    }

    let mut found = Interfaces { link: None, addresses: Vec::new(), others: Vec::new(), ipv6: false };
    let mut ipv6_of_mesh = None;
    for message in &links {
        let index = message.header.index;
        let own = addresses.remove(&index).unwrap_or_default();
        if name(message) == mesh {
            found.link = Some(link(message));
            found.addresses = own.iter().map(|address| address.net).collect();
            ipv6_of_mesh = Some(has_ipv6(message));
        } else {
            found.ipv6 |= has_ipv6(message);
            let up = message.header.flags.contains(LinkFlags::Up);
            found.others.push(HostInterface { name: name(message).to_owned(), up, addresses: own });
        }
    }
    found.ipv6 = ipv6_of_mesh.unwrap_or(found.ipv6);
    Ok(found)
}

fn link(message: &LinkMessage) -> Link {
    let is_tun = |info: &LinkInfo| matches!(info, LinkInfo::Kind(InfoKind::Tun));
    let mut link =
        Link { index: message.header.index, mtu: 0, up: message.header.flags.contains(LinkFlags::Up), tun: false };
    for attribute in &message.attributes {
        if let LinkAttribute::Mtu(mtu) = attribute {
            link.mtu = *mtu;
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            link.tun = infos.iter().any(is_tun);
        }
    }
    link
}

fn name(message: &LinkMessage) -> &str {
    let mut names = message.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    });
    names.next().unwrap_or_default()
}

/// Whether the interface takes IPv6 addresses: it has the family's settings, and they do not disable it.
fn has_ipv6(message: &LinkMessage) -> bool {
    let families = message.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::AfSpecUnspec(families) => Some(families),
        _ => None,
    });
    let settings = families.flatten().filter_map(|family| match family {
        AfSpecUnspec::Inet6(settings) => Some(settings),
        _ => None,
    });
    settings.flatten().any(|setting| matches!(setting, AfSpecInet6::DevConf(conf) if conf.disable_ipv6 == 0))
}

fn host_address(message: &AddressMessage) -> Option<HostAddress> {
    let (mut local, mut prefix_address, mut flags) = (None, None, AddressFlags::empty());
    for attribute in &message.attributes {
        if let AddressAttribute::Local(addr) = attribute {
            local = Some(*addr);
        } else if let AddressAttribute::Address(addr) = attribute {
            prefix_address = Some(*addr);
        } else if let AddressAttribute::Flags(set) = attribute {
            flags = *set;
        }
    }
    // A point-to-point interface has its own address in IFA_LOCAL and the peer's in IFA_ADDRESS; IPv6 only the latter.
    let net = IpNet::new(local.or(prefix_address)?, message.header.prefix_len).ok()?;
    let unfit = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    let global = message.header.scope == AddressScope::Universe;
    Some(HostAddress { net, global, preferred: !flags.intersects(unfit) })
}

async fn routes(handle: &Handle, family: Family) -> Result<Vec<KernelRoute>, KernelError> {
    let mut filter = match family {
        Family::V4 => RouteMessageBuilder::<Ipv4Addr>::new().table_id(TABLE).build(),
        Family::V6 => RouteMessageBuilder::<Ipv6Addr>::new().table_id(TABLE).build(),
    };
    // Of any origin and type; the kernel selects by table, so a full internet table next to ours costs nothing.
    filter.header.table = 0;
    filter.header.protocol = RouteProtocol::Unspec;
    filter.header.kind = RouteType::Unspec;
    let messages: Vec<RouteMessage> =
        handle.route().get(filter).execute().try_collect().await.map_err(failed("routes"))?;
    Ok(messages.iter().filter_map(route).collect())
}

fn route(message: &RouteMessage) -> Option<KernelRoute> {
    let length = message.header.destination_prefix_length;
    let mut dst = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let (mut table, mut metric, mut mtu, mut link) = (u32::from(message.header.table), 0, None, None);
    let mut indirect = message.header.kind != RouteType::Unicast;
    let mut via = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(addr)) => dst = (*addr).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(addr)) => dst = (*addr).into(),
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Metrics(metrics) => mtu = metrics.iter().find_map(mtu_of),
            RouteAttribute::Gateway(RouteAddress::Inet(addr)) => (via, indirect) = (Some((*addr).into()), true),
            RouteAttribute::Gateway(RouteAddress::Inet6(addr)) => (via, indirect) = (Some((*addr).into()), true),
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => indirect = true,
            RouteAttribute::NhId(_) | RouteAttribute::Encap(_) => indirect = true,
            _ => {}
        }
    }
    let dst = IpNet::new(dst, length).ok()?;
    let link = link.filter(|_| !indirect);
    let protocol = message.header.protocol.into();
    (table == TABLE).then_some(KernelRoute { dst, metric, protocol, link, via, mtu })
}

fn mtu_of(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    }
}

async fn rules(handle: &Handle, family: Family) -> Result<Vec<KernelRule>, KernelError> {
    let version = match family {
        Family::V4 => IpVersion::V4,
        Family::V6 => IpVersion::V6,
    };
    let messages: Vec<RuleMessage> =
        handle.rule().get(version).execute().try_collect().await.map_err(failed("rules"))?;
    Ok(messages.iter().map(|message| rule(message, family)).collect())
}

fn rule(message: &RuleMessage, family: Family) -> KernelRule {
    let header = &message.header;
    let (mut table, mut priority, mut protocol) = (u32::from(header.table), 0, 0);
    let (mut mark, mut selects_more) = (None, header.dst_len != 0 || header.src_len != 0 || header.tos != 0);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Table(id) => table = *id,
            RuleAttribute::Priority(place) => priority = *place,
            RuleAttribute::Protocol(origin) => protocol = (*origin).into(),
            RuleAttribute::FwMark(value) => mark = Some(*value),
            // All bits set: every bit of the mark counts, nothing is suppressed.
            RuleAttribute::FwMask(u32::MAX) | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            _ => selects_more = true,
        }
    }
    let inverted = header.flags.contains(RuleFlags::Invert);
    let not_marked = inverted && mark == Some(FWMARK) && !selects_more && header.action == RuleAction::ToTable;
    KernelRule { family, priority, table, protocol, not_marked }
}

fn failed(what: &'static str) -> impl Fn(rtnetlink::Error) -> KernelError {
    move |error| KernelError::Read { what, error: io_error(error) }
}
