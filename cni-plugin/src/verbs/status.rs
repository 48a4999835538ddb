//! STATUS: could a pod start here, and if not, what is missing.
//!
//! Any error turns the whole node NotReady (containerd 2 tells the kubelet that there is no network), and Kubernetes then takes
//! its pods out of Services. So only what would keep ADD from giving a pod a network counts: a daemon that restarts does
//! not, for ADD reads the facts that it left, and the facts do not count a peer that is lost after the node was ready.
//! A helper is chained to somebody else's network, whose own plugin says whether that is ready.

use super::{facts, own_pools};
use crate::delegate;
use crate::spec::{Call, Code, Config, Error, Ipam, Mode, Result, Verb};

pub(super) fn status(call: &Call, config: &Config) -> Result<()> {
    if config.mode == Mode::Helper {
        return Ok(());
    }
    let facts = facts(config).map_err(not_available)?;
    let Some(facts) = facts else {
        return Err(Error::new(
            Code::NotAvailable,
            format!(
                "{} does not exist: keystone-mesh is not running on this node, or was not told to serve pods (--cni-mode)",
                config.facts.display()
            ),
        ));
    };
    let missing: Vec<&str> = [
        (facts.ready.mesh_address, "a mesh address"),
        (facts.ready.pod_cidr || !needs_pod_cidr(config), "a pod CIDR"),
        (facts.ready.peer, "a reachable peer"),
    ]
    .into_iter()
    .filter_map(|(there, what)| (!there).then_some(what))
    .collect();
    if !missing.is_empty() {
        let error = Error::new(
            Code::NotAvailable,
            format!("this node's mesh is not ready for pods: it has not {} yet", or(&missing)),
        );
        return Err(facts.not_ready.iter().fold(error, |error, sentence| error.with_details(sentence)));
    }
    own_pools(Some(&facts), config).map_err(not_available)?;
    match &config.ipam {
        Ipam::Delegated(plugin) => delegate::call(plugin, Verb::Status, call, config).map(drop),
        Ipam::Own(_) => Ok(()),
    }
}

fn needs_pod_cidr(config: &Config) -> bool {
    matches!(&config.ipam, Ipam::Own(ranges) if ranges.is_empty())
}

/// Whatever the fault is, for STATUS it means that ADD would fail.
fn not_available(error: Error) -> Error {
    Error { code: Code::NotAvailable as u32, ..error }
}

fn or(parts: &[&str]) -> String {
    match parts {
        [] => String::new(),
        [one] => (*one).into(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}
