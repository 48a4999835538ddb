//! As many nodes as a scheduler may ask for at once come and go, again and again. Nothing may stay behind: no peer, no
//! address, no route, no memory.

use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use keystone_kubelab::{Fleet, Usage};
use keystone_lab::mesh::Node;
use keystone_lab::wait;
use keystone_mesh_core::NodeId;
use serde_json::{Value, json};

use super::plane::{FLEET_PATIENCE, POLL, Plane};
use crate::scenario::join::in_millis;
use crate::story::{Story, millis};

const ROUNDS: u8 = 3;
const NODES: u32 = 198;

/// Bytes that a process may have more after the last burst than after the first: an allocator keeps some.
const GROWTH: u64 = 4 << 20;

/// The networks of pods of all these nodes lie in 10.N.0.0/16.
const PODS: u8 = 77;

pub(super) fn play(story: &mut Story, plane: &Plane, relay: NodeId, daemons: &[Arc<Node>]) -> Result<Value> {
    let mut everybody: Vec<&Node> = daemons.iter().map(AsRef::as_ref).collect();
    everybody.push(&plane.mesh.home);
    let (mut rounds, mut memory) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let fleet = Fleet::new(&format!("burst-{round}"), NODES, relay)?.with_pods(PODS);
        let times = burst(story, plane, &fleet, &everybody)?;
        let used = [plane.controller.id(), everybody[0].id().context("the daemon runs")?]
            .map(|id| Usage::of(id).map(|usage| usage.anonymous));
        memory.push(used.into_iter().collect::<Result<Vec<u64>>>()?);
        rounds.push(times);
    }
    let claims = plane.claims_of("burst-")?;
    let live = claims.iter().filter(|claim| !claim.contains(" released ")).count();
    let found = format!("{live} are held, {} are kept from others for a while", claims.len() - live);
    story.check(live == 0 && !claims.is_empty(), "no address is held", &found);
    for (number, who) in ["the controller", "a daemon"].into_iter().enumerate() {
        let sizes: Vec<u64> = memory.iter().map(|used| used[number]).collect();
        let grown = sizes[sizes.len() - 1].saturating_sub(sizes[0]);
        let told: Vec<String> = sizes.iter().map(|size| format!("{:.1}", *size as f64 / f64::from(1 << 20))).collect();
        let claim = format!("the memory of {who} does not grow with each burst");
        story.check(grown < GROWTH, &claim, &format!("{} MiB after each", told.join(", ")));
    }
    Ok(json!({ "rounds": rounds, "memory_after": memory }))
}

/// One burst, until nothing is left of it.
fn burst(story: &mut Story, plane: &Plane, fleet: &Fleet, everybody: &[&Node]) -> Result<Value> {
    let admin = plane.server.admin();
    let count = fleet.names().count();
    let prefix = fleet.names().next().and_then(|name| name.strip_suffix('0')).context("a fleet has a first node")?;
    let peers = |node: &Node, wanted: usize| {
        node.wait_until(&format!("{wanted} of the burst are its peers"), FLEET_PATIENCE, |status| {
            status.peers.iter().filter(|peer| peer.name.starts_with(prefix)).count() == wanted
        })
    };
    let routes = |wanted: usize| until_routes(everybody, wanted);

    let start = Instant::now();
    plane.server.with_client(admin, async |client| fleet.register(&client).await)?;
    plane.wait_approved(prefix, count)?;
    let approved = start.elapsed();
    everybody.iter().try_for_each(|node| peers(node, count).map(drop))?;
    routes(count)?;
    let known = start.elapsed();

    let start = Instant::now();
    plane.server.with_client(admin, async |client| fleet.delete(&client).await)?;
    let deleted = start.elapsed();
    everybody.iter().try_for_each(|node| peers(node, 0).map(drop))?;
    routes(0)?;
    let forgotten = start.elapsed();
    wait::until("their addresses are given back", FLEET_PATIENCE, POLL, || {
        let held = plane.claims_of(prefix)?;
        Ok(held.iter().all(|claim| claim.contains(" released ")).then_some(()))
    })?;
    let released = start.elapsed();
    let found = format!(
        "approved after {}, peers and routes everywhere after {}; deleted after {}, gone everywhere after {}, addresses \
         given back after {}",
        millis(approved),
        millis(known),
        millis(deleted),
        millis(forgotten),
        millis(released)
    );
    story.check(true, &format!("{count} nodes come and go, and no peer and no route stays"), &found);
    Ok(json!({
        "approved_ms": in_millis(approved),
        "known_ms": in_millis(known),
        "deleted_ms": in_millis(deleted),
        "forgotten_ms": in_millis(forgotten),
        "released_ms": in_millis(released),
    }))
}

/// Waits until each kernel has so many routes to pods of these nodes.
fn until_routes(nodes: &[&Node], wanted: usize) -> Result<()> {
    let network = format!("10.{PODS}.");
    for node in nodes {
        let mut found = 0;
        let what = format!("{} has {wanted} routes to pods", node.name());
        wait::until(&what, FLEET_PATIENCE, POLL, || {
            let table = node.host().run(Command::new("ip").args(["-4", "route", "show", "table", "all"]))?;
            found = table.lines().filter(|line| line.starts_with(&network)).count();
            Ok((found == wanted).then_some(()))
        })
        .with_context(|| format!("it has {found}"))?;
    }
    Ok(())
}
