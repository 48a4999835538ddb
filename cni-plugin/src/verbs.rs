//! What the runtime can ask for, one module for each verb.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::attachment::Attachment;
use crate::facts::{FactsError, PodFacts};
use crate::ipam::{Pool, pools};
use crate::spec::{Call, Code, Config, Error, Ipam, Mode, Result, Verb, Version};

mod add;
mod check;
mod del;
mod gc;
mod helper;
mod status;

/// Does what a call asks. The answer goes to stdout; `Null` is no answer.
pub fn run(call: &Call, config: &Config) -> Result<Value> {
    let needed = match call.verb {
        Verb::Check => config.version.has_check(),
        Verb::Gc | Verb::Status => config.version.has_gc_and_status(),
        Verb::Add | Verb::Del | Verb::Version => true,
    };
    if !needed {
        return Err(Error::new(
            Code::IncompatibleVersion,
            format!("{} is not part of CNI {}: set a newer \"cniVersion\"", call.verb, config.version.as_str()),
        ));
    }
    let nothing = |()| Value::Null;
    match (call.verb, config.mode) {
        (Verb::Version, _) => Ok(Version::supported()),
        (Verb::Status, _) => status::status(call, config).map(nothing),
        (Verb::Add, Mode::PodNetwork) => add::add(call, config),
        (Verb::Del, Mode::PodNetwork) => del::del(call, config).map(nothing),
        (Verb::Check, Mode::PodNetwork) => check::check(call, config).map(nothing),
        (Verb::Gc, Mode::PodNetwork) => gc::gc(call, config).map(nothing),
        (Verb::Add, Mode::Helper) => helper::add(call, config),
        (Verb::Check, Mode::Helper) => helper::check(call, config).map(nothing),
        // What the helper made is on the other plugins' interface, and goes with it.
        (Verb::Del | Verb::Gc, Mode::Helper) => Ok(Value::Null),
    }
}

fn attachment(call: &Call, config: &Config) -> Attachment {
    Attachment { network: config.network.clone(), container: call.container.clone(), ifname: call.ifname.clone() }
}

/// The facts, where they are there. What cannot be done without them asks [`need`].
fn facts(config: &Config) -> Result<Option<PodFacts>> {
    match PodFacts::read(&config.facts) {
        Ok(facts) => Ok(Some(facts)),
        Err(FactsError::Missing { .. }) => Ok(None),
        Err(error @ FactsError::Unreadable { .. }) => Err(Error::new(Code::Io, error.to_string())),
        Err(error @ (FactsError::Malformed { .. } | FactsError::Version { .. })) => {
            Err(Error::new(Code::TryAgainLater, error.to_string()))
        }
    }
}

fn need<'a>(facts: Option<&'a PodFacts>, config: &Config) -> Result<&'a PodFacts> {
    facts.ok_or_else(|| Error::new(Code::TryAgainLater, FactsError::Missing { path: config.facts.clone() }.to_string()))
}

fn mtu(facts: Option<&PodFacts>, config: &Config) -> Result<u32> {
    config.mtu.map_or_else(|| need(facts, config).map(|facts| facts.mtu), Ok)
}

/// The pools of our own IPAM; none where another plugin does it.
fn own_pools(facts: Option<&PodFacts>, config: &Config) -> Result<Vec<Pool>> {
    let Ipam::Own(ranges) = &config.ipam else { return Ok(Vec::new()) };
    let (prefixes, origin) = if ranges.is_empty() {
        (&need(facts, config)?.pod_cidrs, "the node's pod CIDRs")
    } else {
        (ranges, "\"ipam.ranges\"")
    };
    if prefixes.is_empty() {
        return Err(Error::new(
            Code::TryAgainLater,
            "this node has no pod CIDR yet: Kubernetes gives one to the Node (spec.podCIDRs), and the controller approves it",
        ));
    }
    if let Some((prefix, address)) = facts.and_then(|facts| in_the_way(prefixes, &facts.mesh_addresses)) {
        return Err(Error::new(
            Code::InvalidConfig,
            format!(
                "{prefix} in {origin} contains {address}, this node's address in the mesh: give pods another prefix"
            ),
        ));
    }
    pools(prefixes, origin)
}

fn in_the_way<'a>(prefixes: &'a [IpNet], addresses: &'a [IpAddr]) -> Option<(&'a IpNet, &'a IpAddr)> {
    let mut pairs = prefixes.iter().flat_map(|prefix| addresses.iter().map(move |address| (prefix, address)));
    pairs.find(|(prefix, address)| prefix.contains(*address))
}

/// The namespace as it was given, for results.
fn shown_netns(call: &Call) -> String {
    call.netns.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
}
