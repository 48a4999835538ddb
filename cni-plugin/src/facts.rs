//! What the daemon tells the plugin: a small file, so that a pod starts while the daemon restarts.
//!
//! ```text
//!   keystone-mesh  ──writes, atomically──▶  /run/keystone-mesh/pods.json  ──reads──▶  keystone-cni
//! ```
//!
//! The daemon writes the file whenever its content changes and leaves it in place when it stops. ADD reads the pod CIDRs
//! and the MTU from it, STATUS what is not ready.

use std::io::{self, ErrorKind, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::{fs, process};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Where the daemon writes the facts, unless it is told otherwise.
pub const DEFAULT_PATH: &str = "/run/keystone-mesh/pods.json";

/// The form of the file that this program reads and writes.
pub const VERSION: u32 = 1;

/// Far more than a mesh of thousands of nodes needs (one line of 20 bytes for each pod CIDR).
const MAX_BYTES: u64 = 4 << 20;

/// What a node knows about its pods' network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodFacts {
    /// Form of this file: [`VERSION`].
    pub version: u32,
    /// Name of this node in its mesh.
    pub node: String,
    /// The prefixes this node gives to its pods, as the controller approved them. Either family, any number.
    #[serde(rename = "podCIDRs", default)]
    pub pod_cidrs: Vec<IpNet>,
    /// This node's own addresses in the mesh.
    #[serde(default)]
    pub mesh_addresses: Vec<IpAddr>,
    /// Largest IP packet in bytes that passes the mesh unfragmented.
    pub mtu: u32,
    /// Everything that is inside the cluster: the mesh's prefixes and all known pod CIDRs of all nodes.
    #[serde(rename = "clusterCIDRs", default)]
    pub cluster_cidrs: Vec<IpNet>,
    /// What this node has, of what pods need.
    pub ready: Ready,
    /// A sentence for each thing that is missing, for people.
    #[serde(default)]
    pub not_ready: Vec<String>,
}

/// What a node needs before pods should be started on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ready {
    /// The node is approved and its mesh addresses are on the interface.
    pub mesh_address: bool,
    /// At least one pod CIDR is approved.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: bool,
    /// At least one peer is reachable, or there is none to reach; also where nothing was missing earlier in this boot.
    pub peer: bool,
}

impl Ready {
    /// True when nothing is missing.
    pub fn all(self) -> bool {
        self.mesh_address && self.pod_cidr && self.peer
    }
}

/// Why facts could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// The daemon has not written them.
    #[error("{} does not exist: is keystone-mesh running on this node, and told to serve pods?", path.display())]
    Missing {
        /// Where they were looked for.
        path: PathBuf,
    },
    /// They are there but cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// They are no facts.
    #[error("{} holds no facts about pods: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// A form of another release.
    #[error("{} is of version {found}, this program reads version {VERSION}: update the older of the two", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version it claims.
        found: u32,
    },
}

impl PodFacts {
    /// Reads the facts at `path`.
    pub fn read(path: &Path) -> Result<Self, FactsError> {
        let unreadable = |source| FactsError::Unreadable { path: path.into(), source };
        let malformed = |reason| FactsError::Malformed { path: path.into(), reason };
        let size = match fs::metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(FactsError::Missing { path: path.into() });
            }
            answer => answer.map_err(unreadable)?.len(),
        };
        if size > MAX_BYTES {
            return Err(malformed(format!("it has {size} bytes, more than {MAX_BYTES}")));
        }
        let text = fs::read(path).map_err(unreadable)?;
        // The version comes first: what else another version says is not for us to judge.
        let Form { version } = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if version != VERSION {
            return Err(FactsError::Version { path: path.into(), found: version });
        }
        serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))
    }

    /// Replaces the facts at `path` in one step, so that no reader ever sees half of them. Makes the directory where it
    /// is missing.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(directory)?;
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        let name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_string_lossy();
        let beside = directory.join(format!(".{name}.{}", process::id()));
        let written = fs::File::create(&beside)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&beside, path));
        if written.is_err() {
            let _nothing_to_remove = fs::remove_file(&beside);
        }
        written
    }
}

/// The one field that every version has.
#[derive(Deserialize)]
struct Form {
    version: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> PodFacts {
        PodFacts {
            version: VERSION,
            node: "worker-1".into(),
            pod_cidrs: vec!["10.244.1.0/24".parse().unwrap(), "fd00:244:1::/64".parse().unwrap()],
            mesh_addresses: vec!["10.98.0.2".parse().unwrap()],
            mtu: 1280,
            cluster_cidrs: vec!["10.98.0.0/16".parse().unwrap()],
            ready: Ready { mesh_address: true, pod_cidr: true, peer: false },
            not_ready: vec!["no peer answers".into()],
        }
    }

    #[test]
    fn the_file_has_the_names_that_daemon_and_plugin_agreed_on() {
        let json = serde_json::to_value(facts()).unwrap();
        let expected = serde_json::json!({
            "version": 1, "node": "worker-1", "podCIDRs": ["10.244.1.0/24", "fd00:244:1::/64"],
            "meshAddresses": ["10.98.0.2"], "mtu": 1280, "clusterCIDRs": ["10.98.0.0/16"],
            "ready": { "meshAddress": true, "podCIDR": true, "peer": false }, "notReady": ["no peer answers"],
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else_is_left_in_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/pods.json");
        facts().write(&path).unwrap();
        facts().write(&path).unwrap();
        assert_eq!(PodFacts::read(&path).unwrap(), facts());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn each_fault_of_the_file_has_its_sentence() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pods.json");
        let said = |text: &str| {
            fs::write(&path, text).unwrap();
            PodFacts::read(&path).unwrap_err().to_string()
        };
        assert!(said("{").contains("holds no facts"));
        assert!(said(r#"{"version":2,"else":true}"#).contains("version 2"));
        assert!(said(r#"{"version":1,"node":"a"}"#).contains("missing field"));
        fs::remove_file(&path).unwrap();
        assert!(matches!(PodFacts::read(&path), Err(FactsError::Missing { .. })));
    }
}
