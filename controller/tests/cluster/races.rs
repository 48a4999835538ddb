//! More than one controller.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, ensure};
use ipnet::IpNet;
use k8s_openapi::api::coordination::v1::Lease;
use keystone_controller::lease::DURATION;
use keystone_mesh_api::{LEADER_LEASE, NAMESPACE};
use keystone_mesh_core::node::Approval;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::world::{Controller, Machine, PATIENCE, World, create, in_world, until};

const AUTO: &[&str] = &["--approval=auto"];

/// Remembers every address that was ever approved for a machine: there may be one set only.
#[derive(Default)]
struct Witness(BTreeMap<String, Vec<IpNet>>);

impl Witness {
    fn see(&mut self, approvals: &BTreeMap<String, Approval>) -> Result<()> {
        for (name, approval) in approvals {
            let first = self.0.entry(name.clone()).or_insert_with(|| approval.addresses.clone());
            ensure!(*first == approval.addresses, "{name} was renumbered");
        }
        Ok(())
    }
}

#[test]
fn when_the_leader_is_asked_to_end_the_next_one_leads_at_once() {
    in_world("races::when_the_leader_is_asked_to_end_the_next_one_leads_at_once", |world| {
        let a = world.controller("a", 9001, AUTO)?;
        a.until_leading(PATIENCE)?;
        let b = world.controller("b", 9002, AUTO)?;
        b.until_logged("network's document is known", PATIENCE)?;
        let machines = Machine::many("w", 3);
        world.with_client(async |client| create(&client, &machines[..2]).await)?;
        world.until_approved(&machines[..2], PATIENCE)?;

        let ended = Instant::now();
        assert!(a.process.terminate(PATIENCE)?.success());
        b.until_leading(PATIENCE)?;
        assert!(ended.elapsed() < DURATION, "{:?}", ended.elapsed());
        world.with_client(async |client| create(&client, &machines[2..]).await)?;
        world.until_approved(&machines, PATIENCE)?;
        Ok(())
    });
}

#[test]
fn a_leader_killed_mid_approval_loses_and_doubles_nothing() {
    in_world("races::a_leader_killed_mid_approval_loses_and_doubles_nothing", |world| {
        let a = world.controller("a", 9001, AUTO)?;
        a.until_leading(PATIENCE)?;
        let b = world.controller("b", 9002, AUTO)?;
        b.until_logged("network's document is known", PATIENCE)?;
        let machines = Machine::many("w", 150);
        let mut witness = Witness::default();
        let (claimed, approved) = world.with_client(async |client| {
            create(&client, &machines).await?;
            until("the ledger is ahead of the approvals", PATIENCE, async || {
                let claimed = world.ledger(&client).await?.live().count();
                let approved = world.approvals(&client).await?.len();
                Ok((claimed > approved).then_some((claimed, approved)))
            })
            .await
        })?;
        a.process.kill()?;
        witness.see(&world.with_client(async |client| world.approvals(&client).await)?)?;
        ensure!(approved < machines.len(), "killed too late: {claimed} claimed, {approved} approved");

        b.until_leading(PATIENCE)?;
        witness.see(&world.until_approved(&machines, PATIENCE)?)?;
        Ok(())
    });
}

#[test]
fn two_controllers_that_both_lead_double_nothing() {
    in_world("races::two_controllers_that_both_lead_double_nothing", |world| {
        let mut running = vec![world.controller("a", 9001, AUTO)?, world.controller("b", 9002, AUTO)?];
        let machines = Machine::many("w", 120);
        let mut witness = Witness::default();
        let mut restarts = 0;
        for batch in machines.chunks(20) {
            // The lease is given to the one that does not lead. It takes that up at its next look, and the leader goes on
            // until its own.
            let names = [running[0].identity()?, running[1].identity()?];
            world.with_client(async |client| {
                let leases = Api::<Lease>::namespaced(client.clone(), NAMESPACE);
                let holder = until("one of them leads", PATIENCE, async || {
                    let lease = leases.get_opt(LEADER_LEASE).await?;
                    let holder = lease.and_then(|lease| lease.spec?.holder_identity);
                    Ok(holder.filter(|holder| names.contains(holder)))
                })
                .await?;
                let other = names.iter().find(|name| **name != holder);
                let patch = Patch::Merge(json!({"spec": {"holderIdentity": other}}));
                leases.patch(LEADER_LEASE, &PatchParams::default(), &patch).await?;
                create(&client, batch).await
            })?;
            let (before, deadline) = (restarts, Instant::now() + PATIENCE);
            while restarts == before {
                witness.see(&world.with_client(async |client| world.approvals(&client).await)?)?;
                restarts += restart_ended(&world, &mut running)?;
                ensure!(Instant::now() < deadline, "waited in vain for the leader to be displaced");
            }
        }
        let deadline = Instant::now() + PATIENCE;
        let approved = loop {
            restarts += restart_ended(&world, &mut running)?;
            if let Some(approved) = world.with_client(async |client| world.approved(&client, &machines).await)? {
                break approved;
            }
            ensure!(Instant::now() < deadline, "waited in vain for all to be approved");
        };
        witness.see(&approved)?;
        Ok(())
    });
}

/// Starts what ended again, as the kubelet does.
fn restart_ended(world: &World<'_>, running: &mut [Controller]) -> Result<usize> {
    let mut restarts = 0;
    for (number, controller) in running.iter_mut().enumerate() {
        if controller.process.ended()?.is_some() {
            restarts += 1;
            let name = format!("{}x", controller.name);
            *controller = world.controller(&name, 9001 + number as u16, AUTO)?;
        }
    }
    Ok(restarts)
}
