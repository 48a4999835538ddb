//! `kubernetes-scale`: what many nodes cost. Real daemons, simulated nodes and watches all meet at one real API server; what
//! is asked is how much is written while nothing happens, how soon a change is everywhere, and how much memory it takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Node as KubernetesNode;
use keystone_kubelab::{Fleet, Usage, Watchers};
use keystone_lab::mesh::Node;
use keystone_lab::{Process, wait};
use keystone_mesh_core::NodeId;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};

use super::bursts;
use super::plane::{FLEET_PATIENCE, PATIENCE, Plane};
use super::{GONE_GOAL, TOLERANCE, until_gone};
use crate::scenario::Options;
use crate::scenario::join::in_millis;
use crate::scenario::spread::Spread;
use crate::scenario::stage::Stage;
use crate::story::{Story, millis};

/// Goals; those of memory are for so many nodes. One about time fails at [`TOLERANCE`] times as much only: the machine may be
/// busy with other things.
const CONTROLLER_MEMORY: u64 = 150 << 20;
const AGENT_MEMORY: u64 = 40 << 20;
const MEMORY_NODES: u32 = 1000;
const CHANGE_P99: Duration = Duration::from_secs(2);

/// Daemons that stay for the simulated nodes: each of them verifies every record and every approval.
const AGENTS: usize = 5;

/// Changes of which each is waited for everywhere before the next.
const CHANGES: usize = 50;

/// Nodes that come and go while all daemons are asked for them.
const COMINGS: u32 = 20;

/// Distance of the questions whether a peer is there: the error of the measurement.
const ASK_EVERY: Duration = Duration::from_millis(10);

pub(in crate::scenario) fn play(stage: &mut Stage, story: &mut Story, options: &Options) -> Result<Value> {
    story.chapter(&format!("A control plane, and {} daemons with Kubernetes as their registry", options.daemons));
    let founders = stage.public_founders()?;
    let plane = Plane::start(founders, story, &["--approval", "auto"])?;
    let mut daemons = start_daemons(stage, story, &plane, options.daemons)?;

    story.chapter(&format!("Nothing happens for {}", millis(options.duration)));
    let idle = idle(story, &plane, options.duration)?;

    story.chapter("A Node is deleted");
    let gone = delete(story, &plane, &mut daemons)?;

    story.chapter("Nodes come and go in bursts");
    daemons.split_off(AGENTS.min(daemons.len())).iter().try_for_each(|daemon| daemon.kill())?;
    story.step(&format!("{} daemons stay", daemons.len()));
    let relay: NodeId = plane.mesh.relay_address.split('@').next().unwrap_or_default().parse()?;
    let bursts = bursts::play(story, &plane, relay, &daemons)?;

    story.chapter(&format!("{} simulated nodes, and {} watches of them", options.nodes, options.watches));
    let fleet = Fleet::new("sim", options.nodes, relay)?;
    let mut bill = Bill::begin(&plane, &daemons)?;
    let registered = register(story, &plane, &fleet, &daemons)?;
    bill.tell(story, "all of that")?;
    plane.wait_calm()?;
    bill.tell(story, "what followed until nothing more was written")?;
    let changes = changes(story, &plane, &fleet, options)?;
    bill.tell(story, &format!("{CHANGES} changes"))?;

    story.chapter("Single nodes come and go");
    let comings = comings(story, &plane, relay, &daemons)?;
    bill.tell(story, &format!("{COMINGS} comings and goings"))?;
    let memory = memory(story, &plane.controller, &daemons, options.nodes)?;
    Ok(json!({
        "daemons": options.daemons,
        "nodes": options.nodes,
        "idle": idle,
        "gone_ms": in_millis(gone),
        "bursts": bursts,
        "registered": registered,
        "changes": changes,
        "comings": comings,
        "memory": memory,
    }))
}

fn start_daemons(stage: &mut Stage, story: &mut Story, plane: &Plane, count: u32) -> Result<Vec<Arc<Node>>> {
    let start = Instant::now();
    let names = (1..=count).map(|number| format!("node-{number}"));
    let daemons = names.map(|name| {
        let host = stage.public_host(&name)?;
        let node = plane.enroll(stage, &host)?;
        plane.up(&node)?;
        anyhow::Ok(node)
    });
    let daemons = daemons.collect::<Result<Vec<_>>>()?;
    story.step(&format!("all are started after {}", millis(start.elapsed())));
    // Everybody else, and home.
    let peers = daemons.len();
    for daemon in &daemons {
        daemon.wait_until("it knows everybody", PATIENCE, |status| status.peers.len() == peers)?;
    }
    let took = start.elapsed();
    story.check(true, "everybody is approved and knows everybody", &format!("{} after the first start", millis(took)));
    Ok(daemons)
}

fn idle(story: &mut Story, plane: &Plane, duration: Duration) -> Result<Value> {
    plane.wait_calm()?;
    let usage = || Usage::of(plane.server.id().context("the API server runs")?);
    let (before, cpu) = (plane.server.metrics()?, usage()?.cpu);
    std::thread::sleep(duration);
    let (after, cpu) = (plane.server.metrics()?, usage()?.cpu.saturating_sub(cpu));
    let writes = |resource| after.writes(resource) - before.writes(resource);
    let nodes = writes("nodes");
    story.check(nodes == 0, "no Node is written to", &format!("{nodes} writes in {}", millis(duration)));
    let all = ["members", "peers", "jointokens", "configmaps", "events"].map(|resource| (resource, writes(resource)));
    let others: u64 = all.iter().map(|(_, count)| count).sum();
    story.check(others == 0, "nor is anything else of the mesh, but the controller's lease", &format!("{all:?}"));
    let leases = writes("leases");
    story.step(&format!("{leases} writes to leases; the API server used {} of CPU", millis(cpu)));
    Ok(json!({
        "seconds": duration.as_secs_f64(),
        "node_writes": nodes,
        "other_writes": others,
        "lease_writes": leases,
        "api_server_cpu_ms": in_millis(cpu),
    }))
}

fn delete(story: &mut Story, plane: &Plane, daemons: &mut Vec<Arc<Node>>) -> Result<Duration> {
    let goes = daemons.pop().context("there are daemons")?;
    goes.kill()?;
    let mut others: Vec<&Node> = daemons.iter().map(AsRef::as_ref).collect();
    others.push(&plane.mesh.home);
    let start = Instant::now();
    plane.delete_node(goes.name())?;
    let gone = until_gone(goes.name(), &others, start)?;
    let found = format!("{} after the request (goal {})", millis(gone), millis(GONE_GOAL));
    let claim = format!("the peer is gone from all {} others", others.len());
    story.check(gone <= GONE_GOAL * TOLERANCE, &claim, &found);
    let claim = plane.wait_quarantined(goes.name())?;
    story.check(true, "its address is kept from others for a while", claim.rsplit(' ').next().unwrap_or_default());
    Ok(gone)
}

fn register(story: &mut Story, plane: &Plane, fleet: &Fleet, daemons: &[Arc<Node>]) -> Result<Value> {
    let start = Instant::now();
    let admin = plane.server.admin();
    plane.server.with_client(admin, async |client| fleet.register(&client).await)?;
    let written = start.elapsed();
    story.step(&format!("all have published their records after {}", millis(written)));
    let all = fleet.names().count();
    plane.wait_approved("sim-", all)?;
    let approved = start.elapsed();
    story.step(&format!("all are approved after {}", millis(approved)));
    for daemon in daemons {
        daemon.wait_until("it knows all of them", FLEET_PATIENCE, |status| status.peers.len() >= all)?;
    }
    let known = start.elapsed();
    story.step(&format!("all daemons know all of them after {}", millis(known)));
    Ok(json!({
        "written_ms": in_millis(written),
        "approved_ms": in_millis(approved),
        "known_ms": in_millis(known),
    }))
}

/// Nodes change what they say of themselves, one after the other; all watches must hear of it.
fn changes(story: &mut Story, plane: &Plane, fleet: &Fleet, options: &Options) -> Result<Value> {
    let admin = plane.server.admin();
    let server = plane.server.id().context("the API server runs")?;
    let (times, bytes, cpu) = plane.server.with_client(admin, async |client| {
        let nodes = Api::<KubernetesNode>::all(client.clone());
        let listed = nodes.list_metadata(&ListParams::default().limit(1)).await?;
        let version = listed.metadata.resource_version.context("a list has a version")?;
        let mut watchers = Watchers::start(admin, &version, options.watches as usize).await?;
        let (before, mut times, bytes) = (Usage::of(server)?, Vec::new(), watchers.bytes());
        for number in 0..CHANGES {
            let sent = Instant::now();
            let change = fleet.change(&client, number * 7 % options.nodes as usize).await?;
            let heard = watchers.heard(change, PATIENCE).await?;
            times.extend(heard.into_iter().map(|at| in_millis(at.duration_since(sent))));
        }
        Ok((times, watchers.bytes() - bytes, Usage::of(server)?.cpu.saturating_sub(before.cpu)))
    })?;
    let spread = Spread::of(times.into_iter());
    let claim = format!("a change reaches all of {} watches", options.watches);
    let found =
        format!("p99 {:.0} ms (goal 2000 ms), median {:.0} ms, slowest {:.0} ms", spread.p99, spread.p50, spread.max);
    story.check(spread.p99 <= in_millis(CHANGE_P99 * TOLERANCE), &claim, &found);
    let each = bytes / (CHANGES as u64 * u64::from(options.watches));
    let cpu = cpu / u32::try_from(CHANGES)?;
    story.step(&format!("a change takes {} of the API server's CPU and {each} bytes for each watch", millis(cpu)));
    Ok(json!({ "reach_ms": spread, "bytes_for_each_watch": each, "api_server_cpu_ms": in_millis(cpu) }))
}

/// A node comes and is approved, and goes again; all real daemons must come to know it, and forget it.
fn comings(story: &mut Story, plane: &Plane, relay: NodeId, daemons: &[Arc<Node>]) -> Result<Value> {
    let (mut come, mut gone) = (Vec::new(), Vec::new());
    for number in 0..COMINGS {
        let one = Fleet::new(&format!("late-{number}"), 1, relay)?;
        let name = one.names().next().unwrap_or_default().to_owned();
        let sent = Instant::now();
        plane.server.with_client(plane.server.admin(), async |client| one.register(&client).await)?;
        come.extend(each_until(daemons, &name, true, sent)?);
        let sent = Instant::now();
        plane.delete_node(&name)?;
        gone.extend(each_until(daemons, &name, false, sent)?);
    }
    let mut told = |what: &str, times: Vec<f64>| {
        let spread = Spread::of(times.into_iter());
        let claim = format!("every daemon {what}");
        let found = format!(
            "p99 {:.0} ms (goal 2000 ms), median {:.0} ms, slowest {:.0} ms",
            spread.p99, spread.p50, spread.max
        );
        story.check(spread.p99 <= in_millis(CHANGE_P99 * TOLERANCE), &claim, &found);
        spread
    };
    let come = told("comes to know a node that was approved", come);
    let gone = told("forgets a node that was deleted", gone);
    Ok(json!({ "come_ms": come, "gone_ms": gone }))
}

/// For each daemon how long after `start` it knows `peer`, or does not.
fn each_until(daemons: &[Arc<Node>], peer: &str, known: bool, start: Instant) -> Result<Vec<f64>> {
    let mut waiting: Vec<&Arc<Node>> = daemons.iter().collect();
    let mut times = Vec::new();
    wait::until(&format!("all daemons have heard of {peer}"), PATIENCE, ASK_EVERY, || {
        let mut left = Vec::new();
        for daemon in waiting.drain(..) {
            if daemon.knows(peer)? == known {
                times.push(in_millis(start.elapsed()));
            } else {
                left.push(daemon);
            }
        }
        waiting = left;
        Ok(waiting.is_empty().then_some(()))
    })?;
    Ok(times)
}

/// Tells who used how much CPU since the last time.
struct Bill {
    processes: Vec<(&'static str, u32, Duration)>,
}

impl Bill {
    fn begin(plane: &Plane, daemons: &[Arc<Node>]) -> Result<Self> {
        let ids = [
            ("API server", plane.server.id()),
            ("controller", Some(plane.controller.id())),
            ("home's daemon", plane.mesh.home.id()),
            ("another daemon", daemons.first().and_then(|daemon| daemon.id())),
            ("this program", Some(std::process::id())),
        ];
        let read = |(name, id): (_, Option<u32>)| id.map(|id| Ok((name, id, Usage::of(id)?.cpu)));
        Ok(Self { processes: ids.into_iter().filter_map(read).collect::<Result<_>>()? })
    }

    fn tell(&mut self, story: &Story, what: &str) -> Result<()> {
        let mut parts = Vec::new();
        for (name, id, before) in &mut self.processes {
            let cpu = Usage::of(*id)?.cpu;
            parts.push(format!("{name} {}", millis(cpu.saturating_sub(*before))));
            *before = cpu;
        }
        story.step(&format!("CPU of {what}: {}", parts.join(", ")));
        Ok(())
    }
}

fn memory(story: &mut Story, controller: &Process, daemons: &[Arc<Node>], nodes: u32) -> Result<Value> {
    let megabytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    // A debug build's code alone is larger than what a release takes in all.
    let counted = |usage: Usage| if cfg!(debug_assertions) { usage.anonymous } else { usage.rss };
    let mut told = |who: &str, limit: u64, usage: Usage| {
        let found = format!("{}, {} of it its own", megabytes(usage.rss), megabytes(usage.anonymous));
        if nodes <= MEMORY_NODES {
            let claim = format!("{who} takes less than {}", megabytes(limit));
            story.check(counted(usage) < limit, &claim, &found);
        } else {
            story.step(&format!("{who} takes {found}"));
        }
    };
    let controller = Usage::of(controller.id())?;
    told("the controller", CONTROLLER_MEMORY, controller);
    let usages = daemons.iter().filter_map(|daemon| daemon.id()).map(Usage::of);
    let largest = usages.collect::<Result<Vec<_>>>()?.into_iter().max_by_key(|usage| usage.rss);
    let largest = largest.context("there are daemons")?;
    told("the largest daemon", AGENT_MEMORY, largest);
    let both = |usage: Usage| json!({ "rss": usage.rss, "anonymous": usage.anonymous });
    Ok(json!({ "controller_bytes": both(controller), "largest_daemon_bytes": both(largest) }))
}
