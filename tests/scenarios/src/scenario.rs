//! The stories that `keystone-lab` tells. Each builds its network, plays, measures, and claims what must be so.

mod bench_peers;
pub(crate) mod conformance;
mod curtain;
mod home_and_cloud;
mod join;
mod joins;
mod kubernetes;
mod nats;
mod outage;
mod pairs;
mod spread;
mod stage;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;
use keystone_kubelab::{Assets, NODE_TOOLS, TEST_TOOLS};
use serde_json::{Value, json};

use self::conformance::{Plugins, Suite};
use crate::story::Story;
use keystone_lab::mesh::Program;
use keystone_lab::sandbox::Place;
use keystone_lab::{Wire, preflight};
use stage::Stage;

/// Distance of the pings that show that a tunnel is there, and how long it may take.
const PING_EVERY: Duration = Duration::from_millis(20);
const BENCH_PATIENCE: Duration = Duration::from_secs(20);

/// Which story.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// A control plane at home and three workers in clouds become one network; a link fails and heals
    HomeAndCloud,
    /// Many machines join, one after the other, each as if it had never been here; how long each takes
    Joins,
    /// Control plane and relay are gone for long; what was direct goes on, and a worker restarts meanwhile
    Outage,
    /// A Kubernetes cluster with its control plane at home and workers behind NATs; needs root and `make test-assets`
    Kubernetes,
    /// A whole Kubernetes cluster with its pods on the mesh, under Kubernetes' own tests; needs root and `make test-assets`
    KubernetesE2e,
    /// The API server is gone for long; all goes on, daemons restart meanwhile, and its return is taken up; needs `make test-assets`
    KubernetesOutage,
    /// What many nodes cost: daemons, simulated nodes and watches on one API server; needs `make test-assets`
    KubernetesScale,
    /// Throughput, CPU and memory of plain WireGuard peers side by side: ours, wireguard-go and boringtun-cli
    BenchPeers,
    /// The lab itself: each kind of NAT, and how a probe finds it; needs no keystone-mesh
    Nats,
}

impl Scenario {
    const fn needs_mesh(self) -> bool {
        match self {
            Self::HomeAndCloud
            | Self::Joins
            | Self::Outage
            | Self::Kubernetes
            | Self::KubernetesE2e
            | Self::KubernetesOutage
            | Self::KubernetesScale
            | Self::BenchPeers => true,
            Self::Nats => false,
        }
    }

    /// Says, before anything is touched, what is missing on this machine; installs what Debian has.
    pub(crate) fn prepare(self, plugins: Plugins, image: Option<&Path>) -> Result<()> {
        let tests = [NODE_TOOLS, TEST_TOOLS].concat();
        let further = match self {
            Self::BenchPeers => preflight::PEER_TOOLS,
            Self::Kubernetes => NODE_TOOLS,
            Self::KubernetesE2e => &tests,
            Self::HomeAndCloud
            | Self::Joins
            | Self::Outage
            | Self::KubernetesOutage
            | Self::KubernetesScale
            | Self::Nats => &[],
        };
        preflight::ensure(&[preflight::NETWORK_TOOLS, preflight::SCENARIO_TOOLS, further].concat())?;
        match self {
            Self::Kubernetes => Assets::find_for_cluster().map(drop)?,
            Self::KubernetesE2e => {
                Assets::find_for_cluster()?;
                Assets::find_tests()?;
                conformance::prepare(plugins, image)?;
            }
            Self::KubernetesOutage | Self::KubernetesScale => Assets::find().map(drop)?,
            Self::HomeAndCloud | Self::Joins | Self::Outage | Self::BenchPeers | Self::Nats => {}
        }
        Ok(())
    }
}

/// How to play it.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Print one JSON document at the end and nothing else.
    pub(crate) json: bool,
    /// Stay up when the story is over.
    pub(crate) keep: bool,
    /// Cables carry frames of at most the MTU.
    pub(crate) ethernet: bool,
    /// The program under test; None for the one beside this program.
    pub(crate) mesh_bin: Option<PathBuf>,
    /// How many machines join in each half of [`Scenario::Joins`].
    pub(crate) joins: u32,
    /// How long [`Scenario::Outage`] and [`Scenario::KubernetesOutage`] last, and [`Scenario::KubernetesScale`] idles.
    pub(crate) duration: Duration,
    /// Real daemons of [`Scenario::KubernetesScale`].
    pub(crate) daemons: u32,
    /// Simulated nodes of [`Scenario::KubernetesScale`].
    pub(crate) nodes: u32,
    /// Watches of [`Scenario::KubernetesScale`], besides those of its daemons.
    pub(crate) watches: u32,
    /// Rounds of [`Scenario::BenchPeers`].
    pub(crate) rounds: u32,
    /// Seconds for each direction in [`Scenario::BenchPeers`].
    pub(crate) seconds: u32,
    /// Only the second half of [`Scenario::BenchPeers`].
    pub(crate) idle: bool,
    /// Who carries the pods in [`Scenario::KubernetesE2e`].
    pub(crate) plugins: Plugins,
    /// Which tests [`Scenario::KubernetesE2e`] runs.
    pub(crate) suite: Suite,
    /// Where the image of [`Scenario::KubernetesE2e`] is; None where it was built for it.
    pub(crate) image: Option<PathBuf>,
}

/// Plays `scenario` inside the sandbox. False if something that it shows is not so, which has then been said.
pub(crate) fn play(scenario: Scenario, options: &Options, place: Place) -> Result<bool> {
    preflight::check_nftables()?;
    let program = if scenario.needs_mesh() {
        preflight::check_tun()?;
        Some(Program::find(options.mesh_bin.clone())?)
    } else {
        None
    };
    let start = Instant::now();
    let mut story = Story::begin(!options.json);
    let mut stage = Stage::new(if options.ethernet { Wire::Ethernet } else { Wire::Offloaded }, program)?;
    let played = match scenario {
        Scenario::HomeAndCloud => home_and_cloud::play(&mut stage, &mut story),
        Scenario::Joins => joins::play(&mut stage, &mut story, options.joins),
        Scenario::Outage => outage::play(&mut stage, &mut story, options.duration),
        Scenario::Kubernetes => kubernetes::play(&mut stage, &mut story),
        Scenario::KubernetesE2e => conformance::play(&mut stage, &mut story, options),
        Scenario::KubernetesOutage => kubernetes::outage::play(&mut stage, &mut story, options.duration),
        Scenario::KubernetesScale => kubernetes::scale::play(&mut stage, &mut story, options),
        Scenario::BenchPeers => bench_peers::play(&mut stage, &mut story, options),
        Scenario::Nats => nats::play(&mut stage, &mut story),
    };
    let (results, broken_off) = match played {
        Ok(results) => (results, None),
        Err(err) => (Value::Null, Some(err)),
    };
    let error = broken_off.or_else(|| story.verdict().err());
    if let Some(err) = &error {
        curtain::report_failure(&stage, err);
    }
    if options.json {
        curtain::print_document(&json!({
            "scenario": scenario.to_possible_value().map(|value| value.get_name().to_owned()),
            "ok": error.is_none(),
            "seconds": start.elapsed().as_secs_f64(),
            "results": results,
            "checks": story.checks(),
            "error": error.as_ref().map(|err| format!("{err:#}")),
        }))?;
    }
    if options.keep {
        curtain::stay_up(&stage, place)?;
    }
    Ok(error.is_none())
}
