//! One operation as one netlink request.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use keystone_mesh_core::kernel::{
    Actual, FWMARK, Family, KernelOp, KernelRule, ROUTE_METRIC, ROUTE_PROTOCOL, RULE_PRIORITY, Route, TABLE,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use super::io_error;

/// Does one operation on the interface that `actual` knows.
pub(super) async fn execute(handle: &Handle, actual: &Actual, op: KernelOp) -> io::Result<()> {
    let link = || actual.link.map(|link| link.index).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV));
    let done = match op {
        KernelOp::SetMtu(mtu) => {
            handle.link().set(LinkUnspec::new_with_index(link()?).mtu(mtu).build()).execute().await
        }
        KernelOp::SetUp => handle.link().set(LinkUnspec::new_with_index(link()?).up().build()).execute().await,
        KernelOp::SetDown => handle.link().set(LinkUnspec::new_with_index(link()?).down().build()).execute().await,
        KernelOp::RemoveLink => handle.link().del(link()?).execute().await,

        KernelOp::AddAddress(net) => {
            let mut request = handle.address().add(link()?, net.addr(), net.prefix_len());
            // The network gives each address once; detecting duplicates would only delay its use by a second.
            let flags = AddressAttribute::Flags(AddressFlags::Noprefixroute | AddressFlags::Nodad);
            request.message_mut().attributes.push(flags);
            request.execute().await
        }
        KernelOp::RemoveAddress(net) => handle.address().del(address_message(link()?, net)).execute().await,

        KernelOp::AddRoute(route) => handle.route().add(route_message(link()?, route)).execute().await,
        KernelOp::ReplaceRoute(route) => handle.route().add(route_message(link()?, route)).replace().execute().await,
        KernelOp::RemoveRoute(route) => {
            let mut message = own_route(route.dst, route.metric);
            // Whatever it leads to: type and scope are no part of the question.
            message.header.kind = RouteType::Unspec;
            message.header.scope = RouteScope::NoWhere;
            handle.route().del(message).execute().await
        }

        KernelOp::AddRule(family) => {
            let mut request = handle.rule().add();
            let rule = KernelRule {
                family,
                priority: RULE_PRIORITY,
                table: TABLE,
                protocol: ROUTE_PROTOCOL,
                not_marked: true,
            };
            *request.message_mut() = rule_message(rule);
            request.execute().await
        }
        KernelOp::RemoveRule(rule) => handle.rule().del(rule_message(rule)).execute().await,
    };
    done.map_err(io_error)
}

fn address_message(link: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = address_family(Family::of(&net));
    message.header.prefix_len = net.prefix_len();
    message.header.index = link;
    message.attributes.push(AddressAttribute::Local(net.addr()));
    message
}

fn route_message(link: u32, route: Route) -> RouteMessage {
    let mut message = own_route(route.dst, ROUTE_METRIC);
    match route.via {
        None => message.attributes.push(RouteAttribute::Oif(link)),
        // The host knows by which interface it reaches a neighbour. A gateway is no destination on the link itself.
        Some(via) => {
            message.header.scope = RouteScope::Universe;
            message.attributes.push(RouteAttribute::Gateway(match via {
                IpAddr::V4(v4) => RouteAddress::Inet(v4),
                IpAddr::V6(v6) => RouteAddress::Inet6(v6),
            }));
        }
    }
    message.attributes.extend(route.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    message
}

fn own_route(dst: IpNet, metric: u32) -> RouteMessage {
    let mut message = match dst.addr() {
        IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(v4, dst.prefix_len())
            .scope(RouteScope::Link)
            .build(),
        IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(v6, dst.prefix_len()).build(),
    };
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    // Tables above 255 stand in the attribute only.
    message.header.table = 0;
    message.attributes.extend([RouteAttribute::Table(TABLE), RouteAttribute::Priority(metric)]);
    message
}

fn rule_message(rule: KernelRule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Table(rule.table),
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Protocol(RouteProtocol::Other(rule.protocol)),
    ];
    if rule.not_marked {
        message.header.flags = RuleFlags::Invert;
        message.attributes.extend([RuleAttribute::FwMark(FWMARK), RuleAttribute::FwMask(u32::MAX)]);
    }
    message
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}
