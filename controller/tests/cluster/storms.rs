//! Many writers, many nodes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node;
use keystone_mesh_api::Member;
use kube::CustomResourceExt;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::watch;

use crate::world::{Machine, PATIENCE, create, delete, in_world, until};

const AUTO: &[&str] = &["--approval=auto"];
/// Patches a second of the other writer.
const STORM: u64 = 100;
/// Its patches between two changes of what a machine says.
const BETWEEN: u64 = 30;
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
            let (count, counted) = watch::channel(0);
            let storm = tokio::spawn(storm(client.clone(), machines.clone(), count));
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
                let far = counted.borrow().saturating_add(BETWEEN);
                let mut counted = counted.clone();
                let on = counted.wait_for(|count| *count >= far);
                tokio::time::timeout(PATIENCE, on).await.context("the storm goes on")?.context("the storm ended")?;
            }
            let written = *counted.borrow();
            drop(counted);
            storm.await??;
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

/// Patches annotations of the nodes for as long as somebody listens to their number.
async fn storm(client: kube::Client, machines: Vec<Machine>, count: watch::Sender<u64>) -> Result<()> {
    let nodes = Api::<Node>::all(client);
    let mut tick = tokio::time::interval(Duration::from_millis(1000 / STORM));
    for (number, machine) in (0_u64..).zip(machines.iter().cycle()) {
        tick.tick().await;
        if count.is_closed() {
            break;
        }
        let patch = json!({"metadata": {"annotations": {"someone.else/count": number.to_string()}}});
        nodes.patch(machine.name(), &PatchParams::default(), &Patch::Merge(patch)).await?;
        count.send_replace(number + 1);
    }
    Ok(())
}

#[test]
fn a_write_that_changes_nothing_is_not_repeated_without_end() {
    in_world("storms::a_write_that_changes_nothing_is_not_repeated_without_end", |world| {
        // Members of an older version, whose status knows no addresses.
        let mut definition = serde_json::to_value(Member::crd())?;
        let schema = &mut definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let status = schema["properties"]["status"]["properties"].as_object_mut().context("the status")?;
        status.remove("addresses").context("addresses")?;
        world.server.apply(&definition.to_string())?;
        let controller = world.controller("a", 9001, AUTO)?;
        let machines = Machine::many("w", 1);
        let member =
            json!({"metadata": {"name": machines[0].name()}, "spec": {"identity": machines[0].id().to_string()}});
        world.with_client(async |client| {
            let member: Member = serde_json::from_value(member)?;
            Api::<Member>::all(client.clone()).create(&PostParams::default(), &member).await?;
            create(&client, &machines).await
        })?;
        controller.until_logged("the object stays as it was", PATIENCE)?;
        // Nothing else waits for it, and it took a few writes of thousands that were possible until now.
        let others = Machine::many("v", 20);
        world.with_client(async |client| create(&client, &others).await)?;
        world.until_approved(&[machines, others].concat(), PATIENCE)?;
        let count = |result| {
            let labels = [("kind", "member-status"), ("result", result)];
            controller.metric("keystone_controller_actions_total", &labels).context("its metrics")
        };
        let (done, futile) = (count("done")?, count("futile")?);
        ensure!(futile >= 3.0 && done < 20.0, "{done} done, {futile} futile");
        Ok(())
    });
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
