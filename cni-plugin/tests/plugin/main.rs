//! The plugin on a real kernel, called as a runtime calls it.
//!
//! Each test has a sandbox of its own (keystone-lab), so namespaces, leases and settings of two tests never meet and nothing
//! outlives them.
#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

mod bad_input;
mod chained;
mod helper;
mod link;
mod runtime;
mod storm;
mod verbs;

use std::path::Path;

use anyhow::Result;
use keystone_cni::facts::{PodFacts, Ready, VERSION};
use keystone_lab::sandbox::in_own_world;
use serde_json::{Value, json};

use crate::runtime::Network;

const PLUGIN: &str = env!("CARGO_BIN_EXE_keystone-cni");
const DATA: &str = "/run/keystone-lab/leases";
const FACTS: &str = "/run/keystone-mesh/pods.json";

/// Runs `test` in a sandbox with facts written.
fn on_a_node(name: &str, test: impl FnOnce() -> Result<()>) {
    in_own_world(name, || {
        write_facts(&facts())?;
        test()
    });
}

fn facts() -> PodFacts {
    PodFacts {
        version: VERSION,
        node: "worker-1".into(),
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap(), "fd00:244:1::/64".parse().unwrap()],
        mesh_addresses: vec!["10.98.0.2".parse().unwrap()],
        mtu: 1300,
        cluster_cidrs: vec!["10.98.0.0/16".parse().unwrap(), "10.244.0.0/16".parse().unwrap()],
        ready: Ready { mesh_address: true, pod_cidr: true, peer: true },
        not_ready: vec![],
    }
}

fn write_facts(facts: &PodFacts) -> Result<()> {
    Ok(facts.write(Path::new(FACTS))?)
}

/// Our plugin with the facts' pod CIDRs, in the newest version.
fn ours() -> Network {
    with(json!({}))
}

fn with(mut options: Value) -> Network {
    options["dataDir"] = DATA.into();
    Network::ours(Path::new(PLUGIN), "1.1.0", options)
}

/// Nothing of any pod is on the host or in the store.
fn assert_nothing_left() -> Result<()> {
    assert_eq!(runtime::host_links()?, Vec::<String>::new());
    assert_eq!(runtime::host_routes()?, Vec::<String>::new());
    for network in runtime::files(Path::new(DATA)) {
        for part in ["holders", "addresses"] {
            let left = runtime::files(&Path::new(DATA).join(&network).join(part));
            assert_eq!(left, Vec::<String>::new(), "{network}/{part}");
        }
    }
    Ok(())
}
