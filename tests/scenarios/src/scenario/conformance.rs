//! `kubernetes-e2e`: a whole cluster with its pods on the mesh, or on the reference plugins beside which it is held; what
//! Kubernetes' own tests say of it, and the claims that they leave out.

mod claims;
mod cluster;
mod mesh;
mod reference;
mod transfers;

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use clap::ValueEnum;
use keystone_kubelab::{Selection, Spec, State};
use serde_json::{Value, json};

use self::claims::Probes;
use self::transfers::{Files, Website, kubectl_reaches_pods};
use super::Options;
use super::stage::Stage;
use crate::story::{Story, millis};

/// Who carries the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Plugins {
    /// Ours, over the mesh, with every node behind a NAT
    Keystone,
    /// bridge, host-local and portmap on one network without NAT, with routes written by hand
    Reference,
}

/// Which of Kubernetes' own tests are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// None, only the scenario's own claims
    None,
    /// Every [sig-network] [Conformance] that is neither serial nor disruptive
    Conformance,
    /// Every Netpol but for SCTP
    Netpol,
}

/// What has to be there before the sandbox is entered.
pub(super) fn prepare(plugins: Plugins, image: Option<&Path>) -> Result<()> {
    match plugins {
        Plugins::Keystone if image.is_none() => mesh::build_image(),
        Plugins::Keystone | Plugins::Reference => Ok(()),
    }
}

pub(super) fn play(stage: &mut Stage, story: &mut Story, options: &Options) -> Result<Value> {
    let Options { plugins, suite, .. } = *options;
    let start = Instant::now();
    let (mut cluster, _mesh) = match plugins {
        Plugins::Keystone => {
            mesh::start(stage, story, options.image.as_deref()).map(|(cluster, mesh)| (cluster, Some(mesh)))?
        }
        Plugins::Reference => (reference::start(stage, story)?, None),
    };
    cluster.wait_ready(story)?;
    cluster.wait_untainted(story)?;
    cluster.start_dns(story)?;
    let ready = start.elapsed();

    story.chapter("Everything reaches everything");
    let probes = Probes::start(&mut cluster, story)?;
    probes.ask_all(&cluster, story)?;
    kubectl_reaches_pods(&cluster, story, &probes)?;
    let files = Files::serve(&cluster, &probes)?;
    files.load(&cluster, story, &probes)?;
    if plugins == Plugins::Keystone {
        story.chapter("Out of the cluster, and through an update");
        Website::open(stage.public_host("website")?)?.is_visited(&cluster, story, &probes)?;
        files.load_during_update(&mut cluster, story, &probes)?;
    }

    let nodes = cluster.members.len();
    let selection = match suite {
        Suite::None => return Ok(json!({ "ready_seconds": ready.as_secs_f64() })),
        Suite::Conformance => Selection::conformance(nodes),
        Suite::Netpol => Selection::network_policy(nodes),
    };
    story.chapter("Kubernetes' own tests");
    let start = Instant::now();
    let specs = cluster.server.run_tests(&selection)?;
    let took = start.elapsed();
    story.table(&table(&specs));
    let passed = specs.iter().filter(|spec| spec.state == State::Passed).count();
    let failed: Vec<&Spec> =
        specs.iter().filter(|spec| !matches!(spec.state, State::Passed | State::Skipped)).collect();
    let found = format!("{passed} of {} passed, in {}", specs.len(), millis(took));
    let failures: String =
        failed.iter().map(|spec| format!("\n{}: {}", spec.name, spec.failure.clone().unwrap_or_default())).collect();
    story.check(failed.is_empty() && passed > 0, "every spec passes", &(found + &failures));
    Ok(json!({
        "ready_seconds": ready.as_secs_f64(),
        "specs_seconds": took.as_secs_f64(),
        "processes": selection.processes,
        "specs": specs,
    }))
}

fn table(specs: &[Spec]) -> Vec<Vec<String>> {
    let head = ["spec", "seconds", "outcome"].map(str::to_owned).to_vec();
    let row = |spec: &Spec| {
        let outcome = format!("{:?}", spec.state).to_lowercase();
        vec![spec.name.clone(), format!("{:.1}", spec.seconds), outcome]
    };
    [head].into_iter().chain(specs.iter().map(row)).collect()
}
