//! Who takes part, and what each of them leaves on the node.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use keystone_cni::facts::{self, PodFacts, Ready};
use serde_json::{Value, json};

use crate::runtime::{Network, Target, files, ip, ip_do};

/// Where all keep their leases.
pub(crate) const DATA: &str = "/run/keystone-lab/leases";

/// The bridge that the plugin `bridge` makes and never removes.
const BRIDGE: &str = "cmp0";

/// A plugin with its configuration.
pub(crate) struct Contestant {
    pub(crate) title: &'static str,
    pub(crate) network: Network,
    pub(crate) is_ours: bool,
    prefix: &'static str,
}

/// What is there of a contestant's pods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) links: usize,
    pub(crate) leases: usize,
}

impl Contestant {
    pub(crate) fn all(plugin: &Path, reference: &Path, newer: Option<&Path>) -> Result<Vec<Self>> {
        let facts = PodFacts {
            version: facts::VERSION,
            node: "compare".into(),
            pod_cidrs: vec!["10.64.0.0/20".parse()?],
            mesh_addresses: vec!["10.98.0.2".parse()?],
            mtu: 1500,
            cluster_cidrs: vec!["10.64.0.0/16".parse()?],
            ready: Ready { mesh_address: true, pod_cidr: true, peer: true },
            not_ready: Vec::new(),
        };
        facts.write(Path::new(facts::DEFAULT_PATH))?;
        let ours = plugin.parent().context("a program is in a directory")?;
        let mut all =
            vec![Self::new("keystone-cni", true, "10.64.0.0/20", ours, "1.1.0", json!({ "type": "keystone-cni" }))];
        let ptp = || json!({ "type": "ptp", "mtu": 1500 });
        let bridge = || json!({ "type": "bridge", "bridge": BRIDGE, "isGateway": true, "mtu": 1500 });
        all.push(Self::new("ptp 1.1.1", false, "10.65.0.0/20", reference, "1.0.0", ptp()));
        all.push(Self::new("bridge 1.1.1", false, "10.66.0.0/20", reference, "1.0.0", bridge()));
        if let Some(newer) = newer {
            all.push(Self::new("ptp 1.9.1", false, "10.67.0.0/20", newer, "1.1.0", ptp()));
            all.push(Self::new("bridge 1.9.1", false, "10.68.0.0/20", newer, "1.1.0", bridge()));
        }
        for contestant in &mut all {
            contestant.network = contestant.with_range(contestant.prefix);
        }
        Ok(all)
    }

    fn new(
        title: &'static str,
        is_ours: bool,
        prefix: &'static str,
        path: &Path,
        version: &str,
        plugin: Value,
    ) -> Self {
        let network = Network {
            version: version.into(),
            name: title.replace(' ', "-"),
            plugins: vec![plugin],
            path: vec![path.into()],
            runtime_config: json!({}),
        };
        Self { title, network, is_ours, prefix }
    }

    /// The same with another prefix.
    pub(crate) fn with_range(&self, prefix: &str) -> Network {
        let mut network = self.network.clone();
        let plugin = &mut network.plugins[0];
        if self.is_ours {
            plugin["dataDir"] = DATA.into();
            plugin["ipam"] = json!({ "type": "keystone-cni", "ranges": [prefix] });
        } else {
            let all = if prefix.contains(':') { "::/0" } else { "0.0.0.0/0" };
            plugin["ipam"] = json!({
                "type": "host-local", "dataDir": DATA, "ranges": [[{ "subnet": prefix }]], "routes": [{ "dst": all }],
            });
        }
        network
    }

    /// Where its leases are.
    pub(crate) fn store(&self) -> PathBuf {
        let network = Path::new(DATA).join(&self.network.name);
        if self.is_ours { network.join("addresses") } else { network }
    }

    pub(crate) fn left(&self) -> Result<Left> {
        let links = ip(None, "link show type veth")?.len();
        let leases = files(&self.store()).iter().filter(|name| name.parse::<IpAddr>().is_ok()).count();
        Ok(Left { links, leases })
    }

    /// Forgets everything that a case left.
    pub(crate) fn clean(&self) -> Result<()> {
        for link in ip(None, "link show type veth")? {
            if let Some(name) = link["ifname"].as_str() {
                // The kernel may be removing it with its namespace.
                let _gone_meanwhile = ip_do(None, &format!("link delete {name}"));
            }
        }
        let _there_is_none = ip_do(None, &format!("link delete {BRIDGE}"));
        match fs::metadata(DATA) {
            Ok(place) if place.is_dir() => fs::remove_dir_all(DATA)?,
            Ok(_) => fs::remove_file(DATA)?,
            Err(_) => {}
        }
        Ok(())
    }

    /// A pod answers its host's first packet.
    pub(crate) fn answers(&self, result: &Value) -> bool {
        let address = result["ips"][0]["address"].as_str().and_then(|address| address.split('/').next());
        address.is_some_and(|address| {
            let ping = Command::new("ping").args(["-c", "1", "-W", "2", address]).output();
            ping.is_ok_and(|output| output.status.success())
        })
    }

    /// The address of a pod is kept from others.
    pub(crate) fn holds(&self, result: &Value) -> bool {
        let address = result["ips"][0]["address"].as_str().and_then(|address| address.split('/').next());
        address.is_some_and(|address| fs::symlink_metadata(self.store().join(address)).is_ok())
    }
}

/// The target of the pod in this namespace.
pub(crate) fn pod<'a>(container: &'a str, netns: &'a str) -> Target<'a> {
    Target::of(container, netns)
}
