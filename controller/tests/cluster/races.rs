//! More than one controller.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use k8s_openapi::api::coordination::v1::Lease;
use keystone_controller::lease::DURATION;
use keystone_lab::wait;
use keystone_mesh_api::{LEADER_LEASE, NAMESPACE};
use keystone_mesh_core::node::Approval;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::world::{Controller, Machine, PATIENCE, POLL, World, create, in_world, until};

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
        for batch in machines.chunks(20) {
            // The lease is given to the one that does not lead. It takes that up at its next look, and the leader goes on
            // until its own.
            let names = [running[0].identity()?, running[1].identity()?];
            let leader = world.until("one of them leads", PATIENCE, async |client| {
                let lease = Api::<Lease>::namespaced(client.clone(), NAMESPACE).get_opt(LEADER_LEASE).await?;
                let holder = lease.and_then(|lease| lease.spec?.holder_identity);
                // Whoever was given the lease leads when it has taken it up.
                let holder = names.iter().position(|name| holder.as_ref() == Some(name));
                Ok(holder.filter(|number| running[*number].log().contains("this replica leads")))
            })?;
            world.with_client(async |client| {
                let leases = Api::<Lease>::namespaced(client.clone(), NAMESPACE);
                let patch = Patch::Merge(json!({"spec": {"holderIdentity": names[1 - leader]}}));
                leases.patch(LEADER_LEASE, &PatchParams::default(), &patch).await?;
                create(&client, batch).await
            })?;
            let deadline = Instant::now() + PATIENCE;
            let mut displaced = 0;
            while displaced == 0 {
                witness.see(&world.with_client(async |client| world.approvals(&client).await)?)?;
                displaced = restart_ended(&world, &mut running)?;
                ensure!(Instant::now() < deadline, "waited in vain for the leader to be displaced");
            }
        }
        let deadline = Instant::now() + PATIENCE;
        let approved = loop {
            restart_ended(&world, &mut running)?;
            if let Some(approved) = world.with_client(async |client| world.approved(&client, &machines).await)? {
                break approved;
            }
            ensure!(Instant::now() < deadline, "waited in vain for all to be approved");
        };
        witness.see(&approved)?;
        Ok(())
    });
}

#[test]
fn the_metrics_port_of_a_shared_host_is_the_leaders() {
    in_world("races::the_metrics_port_of_a_shared_host_is_the_leaders", |world| {
        // While a third one holds the lease, the first of two that wait takes the port.
        let lease = |holder: &str| {
            json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": LEADER_LEASE, "namespace": NAMESPACE},
                "spec": {"holderIdentity": holder, "leaseDurationSeconds": 3600},
            })
            .to_string()
        };
        world.server.apply(&lease("third"))?;
        let waiting = world.controller("a", 9001, AUTO)?;
        waiting.until_logged("serving metrics", PATIENCE)?;
        let leader = world.controller("b", 9001, AUTO)?;
        leader.until_logged("metrics cannot be served yet", PATIENCE)?;
        let seen = |name: &str| waiting.metric(&format!("keystone_controller_{name}"), &[]);
        assert_eq!((seen("leader"), seen("leader_seen")), (Some(0.0), Some(1.0)));

        // The lease is given to the one without.
        world.server.apply(&lease(&leader.identity()?))?;
        let leads = |controller: &Controller| {
            wait::until("the leader's metrics are served", PATIENCE, POLL, || {
                Ok((controller.metric("keystone_controller_leader", &[]) == Some(1.0)).then_some(()))
            })
            .with_context(|| controller.process.log_tail(20))
        };
        leads(&leader)?;
        waiting.until_logged("leaves it the port", PATIENCE)?;
        leader.until_logged("serving metrics", PATIENCE)?;

        // And whoever follows gets it back.
        assert!(leader.process.terminate(PATIENCE)?.success());
        waiting.until_leading(PATIENCE)?;
        leads(&waiting)?;
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
