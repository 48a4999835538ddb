//! ADD: all of it, or an error and nothing.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::{attachment, facts, mtu, own_pools, shown_netns};
use crate::apply::apply;
use crate::attachment::Attachment;
use crate::delegate;
use crate::facts::PodFacts;
use crate::ipam::{Pool, Store};
use crate::kernel::Kernel;
use crate::plan::Wanted;
use crate::spec::{Call, Code, Config, Dns, Error, Ipam, Result, Success, Verb};

/// Addresses for a pod, and what has to be given back where the rest fails.
struct Granted {
    addresses: Vec<IpAddr>,
    routes: Vec<IpNet>,
    dns: Dns,
    /// They were not this attachment's before.
    fresh: bool,
}

pub(super) fn add(call: &Call, config: &Config) -> Result<Value> {
    if config.previous.is_some() {
        return Err(Error::new(
            Code::InvalidConfig,
            "keystone-cni has to be the first plugin of its conflist; behind others it can stand with \"mode\": \"helper\"",
        ));
    }
    let attachment = attachment(call, config);
    let facts = facts(config)?;
    let mtu = mtu(facts.as_ref(), config)?;
    let pools = own_pools(facts.as_ref(), config)?;
    let mut kernel = Kernel::with_pod(call.netns.as_deref().unwrap_or("".as_ref()))?;
    refuse_a_second_one(&attachment, &mut kernel)?;

    let granted = grant(call, config, &attachment, &pools, facts.as_ref())?;
    let wanted = Wanted {
        mac: config.runtime.mac.unwrap_or_else(|| attachment.pod_mac()),
        attachment,
        mtu,
        addresses: granted.addresses,
        routes: granted.routes,
    };
    match wanted.plan().and_then(|plan| apply(&plan, &mut kernel)) {
        Ok(()) => {
            let dns = if granted.dns == Dns::default() { config.dns.clone() } else { granted.dns };
            Ok(wanted.result(&shown_netns(call), dns).to_json(config.version))
        }
        Err(error) if granted.fresh => Err(give_back(call, config, &wanted.attachment, error)),
        Err(error) => Err(error),
    }
}

/// Before anything is taken, so that an ADD that comes twice harms nothing of the first.
fn refuse_a_second_one(attachment: &Attachment, kernel: &mut Kernel) -> Result<()> {
    let host = attachment.host_name();
    let message = if kernel.pod_has(&attachment.ifname)? {
        format!("the pod has an interface {} already: DEL it first, or set another CNI_IFNAME", attachment.ifname)
    } else if kernel.host_has(&host)? {
        format!(
            "container {} is attached in another network namespace ({host} on the host): DEL it first",
            attachment.container
        )
    } else {
        return Ok(());
    };
    Err(Error::new(Code::AlreadyAttached, message))
}

fn grant(
    call: &Call,
    config: &Config,
    attachment: &Attachment,
    pools: &[Pool],
    facts: Option<&PodFacts>,
) -> Result<Granted> {
    match &config.ipam {
        Ipam::Own(_) => {
            let wanted = asked_for(&config.runtime.ips, pools)?;
            let mut store = Store::open(&config.data_dir, &config.network)?;
            let (addresses, fresh) = store.lease(attachment, pools, &wanted, call.pod.as_deref())?;
            Ok(Granted { addresses, routes: Vec::new(), dns: Dns::default(), fresh })
        }
        Ipam::Delegated(plugin) => {
            let result = delegate::add(plugin, call, config)?;
            one_of_each_family(plugin, &result, facts).map_err(|error| give_back(call, config, attachment, error))
        }
    }
}

/// What the runtime asked for has to be ours to give.
fn asked_for(ips: &[String], pools: &[Pool]) -> Result<Vec<IpAddr>> {
    let mut wanted: Vec<IpAddr> = Vec::new();
    for text in ips {
        let address = text.split('/').next().unwrap_or_default();
        let address: IpAddr = address
            .parse()
            .map_err(|_| Error::new(Code::InvalidConfig, format!("{text:?} in \"runtimeConfig.ips\" is no address")))?;
        if !pools.iter().any(|pool| pool.contains(address)) {
            return Err(Error::new(
                Code::InvalidConfig,
                format!("{address}, which was asked for, is not among the addresses that this node gives to pods"),
            ));
        }
        if wanted.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            return Err(Error::new(
                Code::InvalidConfig,
                "\"runtimeConfig.ips\" asks for two addresses of one family: a pod has one of each at most",
            ));
        }
        wanted.push(address);
    }
    Ok(wanted)
}

fn one_of_each_family(plugin: &str, result: &Success, facts: Option<&PodFacts>) -> Result<Granted> {
    let mut addresses: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.addr()).collect();
    addresses.sort_unstable();
    if addresses.windows(2).any(|pair| pair[0].is_ipv4() == pair[1].is_ipv4()) {
        return Err(Error::new(
            Code::InvalidConfig,
            format!("the IPAM plugin {plugin} gave two addresses of one family: a pod has one of each at most"),
        ));
    }
    let mesh = facts.map(|facts| facts.mesh_addresses.as_slice()).unwrap_or_default();
    if let Some(address) = addresses.iter().find(|address| mesh.contains(address)) {
        return Err(Error::new(
            Code::InvalidConfig,
            format!(
                "the IPAM plugin {plugin} gave {address}, this node's address in the mesh: give pods another range"
            ),
        ));
    }
    let routes = result.routes.iter().map(|route| route.dst).collect();
    Ok(Granted { addresses, routes, dns: result.dns.clone(), fresh: true })
}

fn give_back(call: &Call, config: &Config, attachment: &Attachment, error: Error) -> Error {
    let given = match &config.ipam {
        Ipam::Own(_) => {
            Store::open(&config.data_dir, &config.network).and_then(|mut store| store.release(&attachment.host_name()))
        }
        Ipam::Delegated(plugin) => delegate::call(plugin, Verb::Del, call, config).map(|_nothing| ()),
    };
    match given {
        Ok(()) => error,
        Err(left) => error.with_details(format_args!("its addresses could not be given back, GC will do it: {left}")),
    }
}
