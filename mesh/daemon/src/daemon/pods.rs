//! What the daemon does for pods, put together: see [`crate::cni`].

use std::time::Instant;

use ipnet::IpNet;

use crate::cni::facts::FactsFile;
use crate::cni::installer::Installer;
use crate::cni::kernel::{PodKernel, Wanted};
use crate::cni::layout::Mode;
use crate::cni::service::{PodService, Told};
use crate::config::{Config, Places};
use crate::status::Status;

/// What the daemon does for pods.
pub(super) struct Pods {
    /// How they are served.
    pub(super) service: PodService,
    /// What was told of that, where the configuration does not say it.
    pub(super) told: Option<Told>,
    /// What they have to know of this node.
    pub(super) facts: FactsFile,
    /// The CNI directories' keeper, where there is one.
    installer: Option<Installer>,
    /// The keeper of what the kernel does for them.
    kernel: PodKernel,
}

impl Pods {
    pub(super) fn start(config: &Config, places: &Places) -> Self {
        let told = config.cni.mode.is_none().then(|| Told::in_directory(&places.state_dir));
        let service = told.as_ref().and_then(Told::read).unwrap_or_else(|| PodService::of(config));
        Self {
            service,
            told,
            facts: FactsFile::open(places.facts()),
            installer: Installer::start(&config.cni, places.facts()),
            kernel: PodKernel::start(),
        }
    }

    /// Tells pods, and the kernel, what has changed.
    pub(super) fn update(&mut self, status: &Status, now: Instant) {
        self.facts.update(status, now);
        self.kernel.set(self.wanted(status));
    }

    /// What is not as it should be.
    pub(super) fn problems(&self) -> impl Iterator<Item = String> {
        self.installer.iter().flat_map(Installer::problems).chain(self.kernel.problems())
    }

    /// What the kernel is to do for them.
    fn wanted(&self, status: &Status) -> Wanted {
        let node = &status.node;
        match self.service.mode {
            Mode::None | Mode::Helper | Mode::Underlay => Wanted::Nothing,
            // After a start nothing is known for a moment, and what the kernel has is right.
            Mode::PodNetwork if node.mesh_cidrs.is_empty() || node.pod_cidrs.is_empty() => Wanted::AsItIs,
            Mode::PodNetwork => {
                let others = status.peers.iter().flat_map(|peer| &peer.pod_cidrs);
                let pods: Vec<IpNet> = node.pod_cidrs.iter().chain(others).copied().collect();
                let cluster = pods.iter().chain(&node.mesh_cidrs).copied().collect();
                Wanted::Pods { own: node.pod_cidrs.clone(), pods, cluster, interface: node.interface.clone() }
            }
        }
    }
}
