//! CHECK: is everything as ADD left it? Reads only.

use std::net::IpAddr;

use super::{attachment, shown_netns};
use crate::attachment::{Attachment, HOST_MAC};
use crate::delegate;
use crate::ipam::Store;
use crate::kernel::{Kernel, Link};
use crate::plan::Family;
use crate::spec::{Call, Code, Config, Error, Ipam, Result, Success, Verb};

pub(super) fn check(call: &Call, config: &Config) -> Result<()> {
    let attachment = attachment(call, config);
    let previous = config.previous.as_ref().ok_or_else(|| {
        Error::new(Code::InvalidConfig, "CHECK came without \"prevResult\": the runtime has to give what ADD answered")
    })?;
    let previous = Success::parse("\"prevResult\"", previous)?;
    let addresses = addresses_of(&attachment, &previous, &shown_netns(call))?;
    let mut kernel = Kernel::with_pod(call.netns.as_deref().unwrap_or("".as_ref()))?;
    let pod = check_pod(&mut kernel, &attachment, &previous, &addresses)?;
    check_host(&mut kernel, &attachment, &addresses, &pod)?;
    match &config.ipam {
        Ipam::Own(_) => check_lease(config, &attachment, &addresses),
        Ipam::Delegated(plugin) => delegate::call(plugin, Verb::Check, call, config).map(|_nothing| ()),
    }
}

/// The addresses that the result gives to this interface. Plugins behind us may have added others.
fn addresses_of(attachment: &Attachment, previous: &Success, netns: &str) -> Result<Vec<IpAddr>> {
    let is_pods = |index: &usize| {
        previous.interfaces.get(*index).is_some_and(|it| it.name == attachment.ifname && !it.sandbox.is_empty())
    };
    let Some(interface) = (0..previous.interfaces.len()).find(is_pods) else {
        return Err(differs(format!("\"prevResult\" has no interface {} of {netns}", attachment.ifname)));
    };
    let ours = previous.ips.iter().filter(|ip| ip.interface.is_none_or(|index| index == interface));
    let addresses: Vec<IpAddr> = ours.map(|ip| ip.address.addr()).collect();
    if addresses.is_empty() {
        return Err(differs(format!("\"prevResult\" has no address for {}", attachment.ifname)));
    }
    Ok(addresses)
}

fn check_pod(kernel: &mut Kernel, attachment: &Attachment, previous: &Success, addresses: &[IpAddr]) -> Result<Link> {
    let name = &attachment.ifname;
    let link = kernel.pod_link(name)?.ok_or_else(|| differs(format!("the pod has no interface {name}")))?;
    if !link.up {
        return Err(differs(format!("the pod's {name} is down")));
    }
    let told = previous.interfaces.iter().find(|it| it.name == *name && !it.sandbox.is_empty());
    if let (Some(told), Some(mac)) = (told, link.mac)
        && !told.mac.is_empty()
        && !told.mac.eq_ignore_ascii_case(&mac.to_string())
    {
        return Err(differs(format!("the pod's {name} has the hardware address {mac} instead of {}", told.mac)));
    }
    let there = kernel.pod_addresses(link.index)?;
    if let Some(missing) = addresses.iter().find(|address| !there.contains(address)) {
        return Err(differs(format!("the pod's {name} has lost its address {missing}")));
    }
    let routes = kernel.pod_routes(link.index)?;
    let neighbours = kernel.pod_neighbours(link.index)?;
    for family in addresses.iter().map(|address| Family::of(*address)) {
        let (gateway, to) = (family.gateway(), family.default_route());
        if !routes.iter().any(|route| route.to == to && route.by == Some(gateway)) {
            return Err(differs(format!("the pod has lost its route to {to} by {gateway}")));
        }
        if !neighbours.contains(&(gateway, Some(HOST_MAC))) {
            return Err(differs(format!("the pod has lost its neighbour entry of {gateway}")));
        }
    }
    Ok(link)
}

fn check_host(kernel: &mut Kernel, attachment: &Attachment, addresses: &[IpAddr], pod: &Link) -> Result<()> {
    let name = attachment.host_name();
    let link = kernel.host_link(&name)?.ok_or_else(|| differs(format!("the host has no interface {name}")))?;
    if !link.up || link.mac != Some(HOST_MAC) || link.peer != Some(pod.index) {
        return Err(differs(format!(
            "the host's {name} is not the other end as it was made: up, with the hardware address {HOST_MAC}"
        )));
    }
    for address in addresses {
        if kernel.host_route(*address)? != Some(link.index) {
            return Err(differs(format!("the host has no route to {address} through {name}")));
        }
    }
    Ok(())
}

fn check_lease(config: &Config, attachment: &Attachment, addresses: &[IpAddr]) -> Result<()> {
    let lost = || differs(format!("the store has no lease for {attachment}"));
    let store = Store::open_existing(&config.data_dir, &config.network)?.ok_or_else(lost)?;
    let lease = store.get(attachment)?.ok_or_else(lost)?;
    let name = attachment.host_name();
    match addresses.iter().find(|address| !lease.addresses.contains(address) || !store.holds(&name, **address)) {
        Some(address) => Err(differs(format!("the store does not hold {address} for {attachment}"))),
        None => Ok(()),
    }
}

pub(super) fn differs(message: String) -> Error {
    Error::new(Code::Differs, message)
}
