//! Many writers, many nodes.

use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use crate::world::{Machine, PATIENCE, create, delete, in_world, until};

const AUTO: &[&str] = &["--approval=auto"];
/// Patches a second of the other writer.
const STORM: u64 = 100;
/// Nodes of a burst.
const BURST: u16 = 198;

#[test]
fn a_storm_of_another_writer_starves_no_approval() {
    in_world("storms::a_storm_of_another_writer_starves_no_approval", |world| {
        let controller = world.controller("a", 9001, AUTO)?;
        controller.until_leading(PATIENCE)?;
        let mut machines = Machine::many("w", 10);
        let (written, slowest) = world.with_client(async |client| {
            create(&client, &machines).await?;
            let storm = tokio::spawn(storm(client.clone(), machines.clone()));
            let mut slowest = Duration::ZERO;
            // Each machine says something else, again and again, that its approval has to follow.
            for (round, number) in (0..machines.len()).cycle().take(20).enumerate() {
                let began = Instant::now();
                let wish = format!("192.0.2.{}:51840", round + 1);
                let patch = json!({"metadata": {"annotations": {"mesh.keystone.cluster/force-endpoint": wish}}});
                let name = machines[number].name().to_owned();
                let nodes = Api::<Node>::all(client.clone());
                nodes.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await?;
                machines[number].publish(&client).await?;
                until("the approval follows", PATIENCE, async || {
                    let approvals = world.approvals(&client).await?;
                    let endpoints = approvals.get(&name).map(|approval| &approval.endpoints);
                    Ok(endpoints.is_some_and(|all| all.iter().any(|one| one.to_string() == wish)).then_some(()))
                })
                .await?;
                slowest = slowest.max(began.elapsed());
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            let written = storm.await??;
            Ok((written, slowest))
        })?;
        println!("{written} patches of the other writer; the slowest of 20 approvals took {slowest:?}");
        world.until_approved(&machines, PATIENCE)?;
        assert!(slowest < Duration::from_secs(5), "{slowest:?}");
        // What the other writer wrote says nothing, and costs no writes.
        let approvals = controller.metric("keystone_controller_actions_total", &[("kind", "approve")]);
        assert!(approvals.is_some_and(|approvals| approvals < 60.0), "{approvals:?}");
        Ok(())
    });
}

/// Patches labels and annotations of the nodes for ten seconds.
async fn storm(client: kube::Client, machines: Vec<Machine>) -> Result<u64> {
    let nodes = Api::<Node>::all(client);
    let mut tick = tokio::time::interval(Duration::from_millis(1000 / STORM));
    let mut count = 0;
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        tick.tick().await;
        let machine = &machines[count as usize % machines.len()];
        let patch = json!({"metadata": {"annotations": {"someone.else/count": count.to_string()}}});
        nodes.patch(machine.name(), &PatchParams::default(), &Patch::Merge(patch)).await?;
        count += 1;
    }
    Ok(count)
}

#[test]
fn bursts_leave_nothing_behind() {
    in_world("storms::bursts_leave_nothing_behind", |world| {
        let controller = world.controller("a", 9001, AUTO)?;
        controller.until_leading(PATIENCE)?;
        let mut memory = Vec::new();
        for round in 0..3 {
            let machines = Machine::many(&format!("burst{round}"), BURST);
            let began = Instant::now();
            world.with_client(async |client| create(&client, &machines).await)?;
            let made = began.elapsed();
            world.until_approved(&machines, PATIENCE)?;
            let approved = began.elapsed();
            let full = controller.memory()?;
            let began = Instant::now();
            world.with_client(async |client| delete(&client, &machines).await)?;
            let deleted = began.elapsed();
            world.until_approved(&[], PATIENCE)?;
            memory.push(controller.memory()?);
            println!(
                "burst {round}: made in {made:?}, approved in {approved:?}; deleted in {deleted:?}, forgotten in {:?}; \
                 {full} KiB with {BURST} nodes, {} KiB without",
                began.elapsed(),
                memory[round],
            );
        }
        let growth = memory[2].saturating_sub(memory[0]);
        assert!(growth < 4096, "memory grows with every burst: {memory:?} KiB");
        for kind in ["node", "member", "peer"] {
            assert_eq!(controller.metric("keystone_controller_objects", &[("resource", kind)]), Some(0.0));
        }
        Ok(())
    });
}
