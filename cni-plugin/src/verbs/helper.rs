//! Mode `helper`: last in somebody else's conflist, it fits their interface to the mesh.
//!
//! The pod's interface, and the host's end of it, get the mesh's MTU where theirs is larger. And what is in the mesh gets
//! routes of its own with that MTU, by the pod's own default gateway, so that a plugin which raises the interface's MTU
//! later does not send packets that the mesh cannot carry. Nothing of it outlives the interface, so DEL has nothing to do.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::check::differs;
use super::{facts, need};
use crate::facts::PodFacts;
use crate::kernel::{FoundRoute, Kernel, Link};
use crate::plan::Family;
use crate::spec::{Call, Code, Config, Error, Result, Success};

/// What was there before, to be put back.
enum Done {
    PodMtu(u32, u32),
    HostMtu(u32, u32),
    Route(u32, IpNet, IpAddr),
}

pub(super) fn add(call: &Call, config: &Config) -> Result<Value> {
    let raw = config.previous.as_ref().ok_or_else(no_previous)?;
    Success::parse("\"prevResult\"", raw)?;
    let facts = facts(config)?;
    let facts = need(facts.as_ref(), config)?;
    let mut kernel = Kernel::with_pod(call.netns.as_deref().unwrap_or("".as_ref()))?;
    let link = pod_link(&mut kernel, call)?;
    let mut done = Vec::new();
    match fit(&mut kernel, &link, mtu(config, facts), facts, &mut done) {
        Ok(()) => Ok(handed_on(raw, config)),
        Err(error) => Err(done.iter().rev().fold(error, |error, step| match put_back(&mut kernel, step) {
            Ok(()) => error,
            Err(left) => error.with_details(left),
        })),
    }
}

pub(super) fn check(call: &Call, config: &Config) -> Result<()> {
    Success::parse("\"prevResult\"", config.previous.as_ref().ok_or_else(no_previous)?)?;
    let facts = facts(config)?;
    let facts = need(facts.as_ref(), config)?;
    let mut kernel = Kernel::with_pod(call.netns.as_deref().unwrap_or("".as_ref()))?;
    let link = pod_link(&mut kernel, call)?;
    let mtu = mtu(config, facts);
    if link.mtu > mtu {
        return Err(differs(format!("the pod's {} has an MTU of {}, the mesh carries {mtu}", link.name, link.mtu)));
    }
    let routes = kernel.pod_routes(link.index)?;
    for (to, _) in mesh_routes(facts, &routes) {
        if !routes.iter().any(|route| route.to == to) {
            return Err(differs(format!("the pod has lost its route to {to}")));
        }
    }
    Ok(())
}

fn fit(kernel: &mut Kernel, link: &Link, mtu: u32, facts: &PodFacts, done: &mut Vec<Done>) -> Result<()> {
    if link.mtu > mtu {
        // The host's end first: it would go on to send what the pod's end no longer takes.
        if let Some(host) = host_end(kernel, link)?.filter(|host| host.mtu > mtu) {
            kernel.set_host_mtu(host.index, mtu)?;
            done.push(Done::HostMtu(host.index, host.mtu));
        }
        kernel.set_pod_mtu(link.index, mtu)?;
        done.push(Done::PodMtu(link.index, link.mtu));
    }
    let routes = kernel.pod_routes(link.index)?;
    for (to, by) in mesh_routes(facts, &routes) {
        if kernel.add_pod_route(link.index, to, by, mtu)? {
            done.push(Done::Route(link.index, to, by));
        }
    }
    Ok(())
}

fn put_back(kernel: &mut Kernel, step: &Done) -> Result<()> {
    match step {
        Done::PodMtu(index, mtu) => kernel.set_pod_mtu(*index, *mtu),
        Done::HostMtu(index, mtu) => kernel.set_host_mtu(*index, *mtu),
        Done::Route(index, to, by) => kernel.delete_pod_route(*index, *to, *by),
    }
}

/// The mesh's prefixes with the pod's default gateway of their family. A pod that reaches the world another way than by a
/// gateway on this interface has no such routes.
fn mesh_routes(facts: &PodFacts, routes: &[FoundRoute]) -> Vec<(IpNet, IpAddr)> {
    let gateway =
        |family: Family| routes.iter().find(|route| route.to == family.default_route()).and_then(|route| route.by);
    facts.cluster_cidrs.iter().filter_map(|to| Some((to.trunc(), gateway(Family::of(to.addr()))?))).collect()
}

fn pod_link(kernel: &mut Kernel, call: &Call) -> Result<Link> {
    kernel.pod_link(&call.ifname)?.ok_or_else(|| {
        Error::new(
            Code::InvalidConfig,
            format!(
                "the pod has no interface {}: the helper has to stand behind the plugin that makes it",
                call.ifname
            ),
        )
    })
}

/// The other end of a pair, if it is on this host and not in a third namespace.
fn host_end(kernel: &mut Kernel, link: &Link) -> Result<Option<Link>> {
    let Some(index) = link.peer.filter(|_| link.is_veth) else { return Ok(None) };
    let host = kernel.host_link_at(index)?;
    Ok(host.filter(|host| host.is_veth && host.peer == Some(link.index)))
}

/// As it came, whatever is in it, in the version that was asked for.
fn handed_on(previous: &Value, config: &Config) -> Value {
    let mut previous = previous.clone();
    if let Some(result) = previous.as_object_mut() {
        result.insert("cniVersion".into(), config.version.as_str().into());
    }
    previous
}

fn mtu(config: &Config, facts: &PodFacts) -> u32 {
    config.mtu.unwrap_or(facts.mtu)
}

fn no_previous() -> Error {
    Error::new(
        Code::InvalidConfig,
        "the helper came without \"prevResult\": it has to stand behind the plugin that makes the pod's interface",
    )
}
