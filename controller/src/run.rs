//! The controller put together: the watches, the loop, the election, the reporters and the HTTP listener.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::coordination::v1::Lease;
use keystone_mesh_api::LEADER_LEASE;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use prometheus_client::registry::Registry;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::apply::Applier;
use crate::args::{RunArgs, read_key};
use crate::driver::{Driver, Wiring};
use crate::events::Recorder;
use crate::http::{self, Health};
use crate::index::Index;
use crate::lease::{self, Leadership, Replica};
use crate::metrics::Metrics;
use crate::{reports, watch as watches};

/// A request without a byte of an answer for so long is dead; longer than a watch may be silent.
const READ_TIMEOUT: Duration = Duration::from_secs(75);
/// A connection is made in so long, or tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Reports that wait for the loop.
const REPORTS: usize = 16;

/// Runs the controller until SIGTERM or SIGINT.
///
/// # Errors
///
/// Where the key file or the way to the API server is missing, and where another replica took the lease over.
pub async fn run(args: RunArgs) -> anyhow::Result<()> {
    let key = read_key(&args.network_key_file)?;
    let namespace = args.namespace();
    let client = Client::try_from(config(&args).await?).context("the way to the API server cannot be used")?;
    let me = replica_name(&args)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), network = %key.id(), namespace, me, "starting");

    let metrics = Metrics::default();
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let health = Arc::new(Health::default());
    let leadership = Leadership::new();
    let (stop, stopped) = watch::channel(false);
    let (give_back, given_back) = watch::channel(false);

    let index = Index::new(key.id(), args.settings(), metrics.clone());
    let (_watching, updates) = watches::start(&client, &namespace, args.watch_life, &metrics);
    let (reporters, named) = watch::channel(Vec::new());
    let (report, reported) = mpsc::channel(REPORTS);
    let driver = Driver::new(Wiring {
        index,
        updates,
        reports: reported,
        reporters,
        applier: Applier::new(client.clone(), namespace.clone(), key, leadership.clone()),
        recorder: Recorder::start(client.clone(), me.clone(), metrics.clone()),
        leadership: leadership.clone(),
        metrics: metrics.clone(),
        health: health.clone(),
    });
    let asking = reports::run(named, report, args.report_port, args.report_interval(), metrics);
    let leases = Api::<Lease>::namespaced(client, &namespace);
    let place = http::place(args.metrics_listen);
    if let Err(error) = &place {
        tracing::warn!(%error, "where this replica serves metrics is not told to others on the same network");
    }
    let me = Replica { name: me, place: place.ok() };

    // Order at the end: no write is sent any longer, and only then the lease is given back.
    let (asking, serving) =
        (tokio::spawn(asking), tokio::spawn(http::serve(args.metrics_listen, registry, health, leadership.sights())));
    let mut electing = tokio::spawn(async move { lease::run(leases, LEADER_LEASE, me, &leadership, given_back).await });
    let mut driving = tokio::spawn(driver.run(stopped));
    let mut ended = None;
    tokio::select! {
        signal = end_requested() => tracing::info!(signal = signal?, "ending"),
        lost = &mut electing => ended = Some(lost),
        driven = &mut driving => driven.context("the loop ended")?,
    }
    stop.send_replace(true);
    if !driving.is_finished() {
        driving.await.context("the loop failed")?;
    }
    give_back.send_replace(true);
    let election = match ended {
        Some(election) => election,
        None => electing.await,
    };
    asking.abort();
    serving.abort();
    election.context("the election failed")?.context("ending, so that nothing is written twice")
}

async fn config(args: &RunArgs) -> anyhow::Result<Config> {
    let mut config = if let Some(path) = &args.kubeconfig {
        let file = Kubeconfig::read_from(path).with_context(|| format!("the kubeconfig {}", path.display()))?;
        Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
            .await
            .with_context(|| format!("the kubeconfig {}", path.display()))?
    } else {
        Config::infer().await.context(
            "there is no way to an API server: run this in a pod with a ServiceAccount, or name a file with --kubeconfig",
        )?
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    Ok(config)
}

/// A name for the lease: a person's or the host's, and something that no other process has, so that a restarted
/// replica is another one.
fn replica_name(args: &RunArgs) -> anyhow::Result<String> {
    let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned());
    let mut name = match &args.name {
        Some(name) => name.clone(),
        None => host().context("the host's name; choose another with --name")?,
    };
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(|error| anyhow::anyhow!("the system has no randomness: {error}"))?;
    name.push('_');
    for byte in random {
        write!(name, "{byte:02x}").expect("a String takes everything");
    }
    Ok(name)
}

async fn end_requested() -> anyhow::Result<&'static str> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    })
}
