//! How the data plane serves pods, as configured here or told by the agent's pod.

use std::fs::{self, File};
use std::io::{self, Write as _};
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

/// What was told last, kept so that a daemon that starts again goes on as before, after a reboot too: pods that start before
/// the agent's must not be without the policies that it told.
#[derive(Debug)]
pub struct Told(PathBuf);

impl Told {
    /// In the daemon's state directory.
    pub fn in_directory(state_dir: &Path) -> Self {
        Self(state_dir.join("pod-service.json"))
    }

    /// What stands there; what does not read was never told.
    pub fn read(&self) -> Option<PodService> {
        serde_json::from_slice(&fs::read(&self.0).ok()?).ok()
    }

    /// Keeps it. A crash leaves the old or the whole new one.
    pub fn write(&self, service: PodService) {
        let beside = self.0.with_extension("tmp");
        let written = serde_json::to_vec(&service).map_err(io::Error::from).and_then(|text| {
            let mut file = File::create(&beside)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&beside, &self.0)
        });
        if let Err(error) = written {
            let _nothing_to_remove = fs::remove_file(&beside);
            tracing::warn!(%error, "how pods are served is forgotten with the next start, until the agent tells it again");
        }
    }

    /// Forgets it: the node has left.
    pub fn forget(&self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_is_read_again_until_it_is_forgotten_and_nothing_else_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let told = Told::in_directory(directory.path());
        assert_eq!(told.read(), None);
        for policies in [false, true] {
            let service = PodService { mode: Mode::PodNetwork, routes: true, policies };
            told.write(service);
            assert_eq!(told.read(), Some(service));
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        told.forget();
        assert_eq!((told.read(), fs::read_dir(directory.path()).unwrap().count()), (None, 0));
    }

    #[test]
    fn what_cannot_be_kept_leaves_what_was() {
        let directory = tempfile::tempdir().unwrap();
        let told = Told::in_directory(directory.path());
        let service = PodService { mode: Mode::Helper, routes: false, policies: true };
        told.write(service);
        fs::create_dir(directory.path().join("pod-service.tmp")).unwrap();
        told.write(PodService { policies: false, ..service });
        assert_eq!(told.read(), Some(service));
    }
}
