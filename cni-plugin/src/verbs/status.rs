//! STATUS: could a pod start here, and if not, what is missing.

use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{facts, own_pools};
use crate::delegate;
use crate::spec::{Call, Code, Config, Error, Ipam, Mode, Result, Verb};

/// Where the daemon listens: beside the facts, so that both are found wherever the daemon was told to run.
const CONTROL_SOCKET: &str = "control.sock";

pub(super) fn status(call: &Call, config: &Config) -> Result<()> {
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
        (facts.ready.pod_cidr || config.mode == Mode::Helper || !needs_pod_cidr(config), "a pod CIDR"),
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
    if config.mode == Mode::PodNetwork {
        own_pools(Some(&facts), config).map_err(not_available)?;
        if let Ipam::Delegated(plugin) = &config.ipam {
            delegate::call(plugin, Verb::Status, call, config)?;
        }
    }
    daemon_answers(&config.facts)
}

fn needs_pod_cidr(config: &Config) -> bool {
    matches!(&config.ipam, Ipam::Own(ranges) if ranges.is_empty())
}

/// A connection is enough: a daemon that hangs does not take one for long, and what it would say is in the facts.
fn daemon_answers(facts: &Path) -> Result<()> {
    let socket = facts.with_file_name(CONTROL_SOCKET);
    match UnixStream::connect(&socket) {
        Ok(_connection) => Ok(()),
        Err(error) => Err(Error::new(
            Code::LimitedConnectivity,
            format!(
                "keystone-mesh does not answer at {}: {error}; start it again, pods can be made and removed meanwhile",
                socket.display()
            ),
        )),
    }
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
