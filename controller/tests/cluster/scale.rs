//! What a large cluster costs. Figures are printed; the limits are an order of magnitude away.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use keystone_mesh_core::annotations;
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::world::{Controller, Machine, PATIENCE, World, create_all, in_world, until};

const AUTO: &[&str] = &["--approval=auto"];
/// KiB.
const MEMORY: u64 = 150 << 10;

/// A Node as large as real ones are: images, conditions, labels, managed fields.
fn large(machine: &Machine) -> Node {
    let image = |number: u32| {
        let name = format!("registry.example.org/team/application-{number}");
        json!({"names": [format!("{name}@sha256:{:064x}", number), format!("{name}:v1.{number}")], "sizeBytes": 123456789})
    };
    let condition = |kind: &str| {
        json!({
            "type": kind, "status": "False", "reason": "Kubelet", "message": "kubelet has sufficient of everything",
            "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z",
        })
    };
    let conditions = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"].map(condition);
    let mut node = serde_json::to_value(machine.node()).unwrap();
    node["metadata"]["labels"] =
        (0..20).map(|number| (format!("example.org/label-{number}"), json!("some-value"))).collect();
    node["status"] = json!({
        "images": (0..50).map(image).collect::<Vec<_>>(),
        "conditions": conditions,
        "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}, {"type": "Hostname", "address": machine.name()}],
        "capacity": {"cpu": "8", "memory": "32Gi", "pods": "110"},
    });
    serde_json::from_value(node).unwrap()
}

#[test]
fn two_hundred_nodes() {
    in_world("scale::two_hundred_nodes", |world| measure(&world, 200));
}

#[test]
fn a_thousand_nodes() {
    in_world("scale::a_thousand_nodes", |world| measure(&world, 1000));
}

fn measure(world: &World<'_>, count: u16) -> anyhow::Result<()> {
    let controller = world.controller("a", 9001, AUTO)?;
    controller.until_leading(PATIENCE)?;
    let empty = controller.memory()?;
    let mut machines = Machine::many("w", count);
    let began = Instant::now();
    world.with_client(async |client| create_all(&client, &machines, large).await)?;
    let made = began.elapsed();
    world.until_approved(&machines, 3 * PATIENCE)?;
    let approved = began.elapsed();
    println!(
        "{count} nodes: made in {made:?}, approved in {approved:?}; memory {empty} KiB empty, {} KiB full; CPU {} ms; \
         a decision takes {:.2} ms",
        controller.memory()?,
        controller.cpu()? * 10,
        decision_ms(&controller),
    );

    // One more node, many times: from its creation to its approval, and from its end to the release of its address.
    let (mut approvals, mut releases) = (Vec::new(), Vec::new());
    world.with_client(async |client| {
        let nodes = Api::<Node>::all(client.clone());
        for number in 0..20 {
            let machine = Machine::new("late", number);
            let (approved, released) = come_and_go(world, &client, &machine).await?;
            approvals.push(approved);
            releases.push(released);
        }
        // A change of every node's record, and a heartbeat of every kubelet.
        for machine in &mut machines {
            machine.publish(&client).await?;
        }
        fence(world, &client, "published").await?;
        let before = controller.cpu()?;
        for machine in &machines {
            let beat = json!({"status": {"conditions": [
                {"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-02T00:00:00Z"}]}});
            nodes.patch_status(machine.name(), &PatchParams::default(), &Patch::Strategic(beat)).await?;
        }
        fence(world, &client, "beaten").await?;
        println!("{count} nodes: a heartbeat of each costs {} ms of CPU", (controller.cpu()? - before) * 10);
        Ok(())
    })?;
    approvals.sort();
    releases.sort();
    println!(
        "{count} nodes: one more is approved in {:?} (median; longest {:?}), its address released in {:?} ({:?}); \
         afterwards {} KiB, CPU {} ms, a decision {:.2} ms",
        approvals[10],
        approvals[19],
        releases[10],
        releases[19],
        controller.memory()?,
        controller.cpu()? * 10,
        decision_ms(&controller),
    );
    assert!(controller.memory()? < MEMORY, "{} KiB", controller.memory()?);
    Ok(())
}

/// How long it takes until a Node that comes is approved, and until the address of one that goes is released.
async fn come_and_go(world: &World<'_>, client: &Client, machine: &Machine) -> anyhow::Result<(Duration, Duration)> {
    let nodes = Api::<Node>::all(client.clone());
    let came = Instant::now();
    nodes.create(&PostParams::default(), &large(machine)).await?;
    until("it is approved", PATIENCE, async || {
        let node = nodes.get_metadata(machine.name()).await?;
        let name = machine.name().parse()?;
        Ok(annotations::approval(&name, node.metadata.annotations.as_ref().unwrap())?)
    })
    .await?;
    let (approved, went) = (came.elapsed(), Instant::now());
    nodes.delete(machine.name(), &DeleteParams::default()).await?;
    until("its address is released", PATIENCE, async || {
        let ledger = world.ledger(client).await?;
        Ok(ledger.pinned(&machine.name().parse()?).is_none().then_some(()))
    })
    .await?;
    Ok((approved, went.elapsed()))
}

/// Whatever was written before has been seen to when this returns: a later Node came and went.
async fn fence(world: &World<'_>, client: &Client, name: &str) -> anyhow::Result<()> {
    come_and_go(world, client, &Machine::new(name, 0)).await.map(drop)
}

fn decision_ms(controller: &Controller) -> f64 {
    let metric = |name| controller.metric(name, &[]).unwrap_or(f64::NAN);
    1000.0 * metric("keystone_controller_reconcile_duration_seconds_sum")
        / metric("keystone_controller_reconcile_duration_seconds_count")
}
