//! How the data plane serves pods, as configured here or told by the agent's pod.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::layout::Mode;
use crate::config::Config;

/// How the data plane serves pods.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct PodService {
    /// Who makes the pods' network.
    pub mode: Mode,
    /// Whether packets to pods go through the mesh.
    pub routes: bool,
    /// Whether network policies are enforced.
    pub policies: bool,
}

impl PodService {
    /// What a configuration says.
    pub fn of(config: &Config) -> Self {
        Self { mode: config.cni.mode.unwrap_or_default(), routes: config.pod_routes, policies: config.network_policy }
    }
}

/// What was told last, kept so that a daemon that starts again goes on as before; a reboot forgets it, and the agent tells
/// it again within seconds.
#[derive(Debug)]
pub struct Told(PathBuf);

impl Told {
    /// In the daemon's run directory.
    pub fn in_directory(run_dir: &Path) -> Self {
        Self(run_dir.join("pod-service.json"))
    }

    /// What stands there; what does not read was never told.
    pub fn read(&self) -> Option<PodService> {
        serde_json::from_slice(&std::fs::read(&self.0).ok()?).ok()
    }

    /// Keeps it.
    pub fn write(&self, service: PodService) {
        let written = serde_json::to_vec(&service).map_err(std::io::Error::from);
        if let Err(error) = written.and_then(|text| std::fs::write(&self.0, text)) {
            tracing::warn!(%error, "how pods are served is forgotten with the next start, until the agent tells it again");
        }
    }

    /// Forgets it: the node has left.
    pub fn forget(&self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
