//! Networks of pods: approved as the API server's Nodes have them, and moved without a moment of two holders.

use std::collections::BTreeMap;
use std::pin::pin;

use anyhow::{Context as _, Result, ensure};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use keystone_mesh_core::directory::{Carrier, Directory, Object};
use keystone_mesh_core::node::{Entry, NodeName};
use keystone_mesh_core::plan::plan;
use kube::api::{Api, DeleteParams, PostParams, WatchEvent, WatchParams};
use kube::{Client, ResourceExt as _};

use crate::world::{Machine, PATIENCE, World, create_all, in_world};

const AUTO: &[&str] = &["--approval=auto", "--pod-cidrs=10.42.0.0/16,fd00:42::/48"];

#[test]
fn a_pod_cidr_moves_to_the_next_node_and_no_reader_ever_sees_it_twice() {
    in_world("pods::a_pod_cidr_moves_to_the_next_node_and_no_reader_ever_sees_it_twice", |world| {
        let _controller = world.controller("a", 9001, AUTO)?;
        let machines = Machine::many("w", 2);
        let (reader, first) = (&machines[0], &machines[1]);
        let with_pods = |machine: &Machine, cidrs: &[&str]| {
            let mut node = machine.node();
            let spec = node.spec.get_or_insert_default();
            spec.pod_cidr = Some(cidrs[0].to_owned());
            spec.pod_cidrs = Some(cidrs.iter().map(|cidr| (*cidr).to_owned()).collect());
            node
        };
        let node = |machine: &Machine| match machine.name() == reader.name() {
            true => with_pods(machine, &["10.42.0.0/24"]),
            false => with_pods(machine, &["10.42.1.0/24", "fd00:42:0:1::/64"]),
        };
        world.with_client(async |client| create_all(&client, &machines, node).await)?;
        world.until("pod CIDRs are approved", PATIENCE, async |client| {
            let approvals = world.approvals(client).await?;
            let pods = |machine: &Machine| approvals.get(machine.name()).map_or(0, |approval| approval.pod_cidrs.len());
            Ok((pods(reader) == 1 && pods(first) == 2).then_some(()))
        })?;

        // The next one is there with the same networks before the first one goes.
        let next = Machine::new("next", 7);
        world.with_client(async |client| {
            let nodes = Api::<Node>::all(client.clone());
            nodes.create(&PostParams::default(), &with_pods(&next, &["10.42.1.0/24", "fd00:42:0:1::/64"])).await?;
            let seen = follow(&world, &client, reader, &next, async || {
                nodes.delete(first.name(), &DeleteParams::default()).await.map(drop).context("delete")
            });
            tokio::time::timeout(PATIENCE, seen).await.context("the networks never came to the next node")?
        })
    });
}

/// Watches as a daemon does, from before `act` until `next` is the way to both networks: at every step at most one is.
async fn follow(
    world: &World<'_>,
    client: &Client,
    reader: &Machine,
    next: &Machine,
    act: impl AsyncFnOnce() -> Result<()>,
) -> Result<()> {
    let moving: [IpNet; 2] = ["10.42.1.0/24".parse()?, "fd00:42:0:1::/64".parse()?];
    let nodes = Api::<Node>::all(client.clone());
    let listed = nodes.list(&Default::default()).await?;
    let version = listed.metadata.resource_version.clone().context("a list has a version")?;
    let mut directory = Directory::new(world.key.id(), vec![], vec![]);
    let object = |node: &Node| Object { name: node.name_any(), annotations: node.annotations().clone() };
    directory.handle_listed(Carrier::Node, &listed.items.iter().map(object).collect::<Vec<_>>());
    let mut events = pin!(nodes.watch(&WatchParams::default(), &version).await?);
    act().await?;
    loop {
        let entries: BTreeMap<NodeName, Entry> =
            directory.entries().map(|entry| (entry.name().clone(), entry.clone())).collect();
        let plan = plan(reader.id(), &world.network, &entries, &BTreeMap::new());
        let ways = |net: &IpNet| -> Vec<String> {
            let leads = plan.members.values().filter(|member| member.config.allowed_ips.contains(net));
            leads.map(|member| member.name.to_string()).collect()
        };
        for net in &moving {
            ensure!(ways(net).len() <= 1, "{net} leads to {:?}", ways(net));
        }
        if moving.iter().all(|net| ways(net) == [next.name()]) {
            return Ok(());
        }
        match events.try_next().await?.context("the watch ended")? {
            WatchEvent::Added(node) | WatchEvent::Modified(node) => {
                directory.handle_object(Carrier::Node, &object(&node));
            }
            WatchEvent::Deleted(node) => drop(directory.handle_deleted(Carrier::Node, &node.name_any())),
            WatchEvent::Bookmark(_) => {}
            WatchEvent::Error(error) => anyhow::bail!("the watch failed: {error:?}"),
        }
    }
}

#[test]
fn overlaps_are_refused_with_both_sides_named() {
    in_world("pods::overlaps_are_refused_with_both_sides_named", |world| {
        let _controller = world.controller("a", 9001, AUTO)?;
        let machines = Machine::many("w", 3);
        let mut cidrs = ["10.42.1.0/24", "10.42.0.0/16", "10.98.7.0/24"].into_iter().map(str::to_owned);
        for machine in &machines {
            let cidr = cidrs.next();
            world.with_client(async |client| {
                let mut node = machine.node();
                let spec = node.spec.get_or_insert_default();
                (spec.pod_cidr, spec.pod_cidrs) = (cidr.clone(), cidr.clone().map(|cidr| vec![cidr]));
                Api::<Node>::all(client).create(&PostParams::default(), &node).await?;
                Ok(())
            })?;
            world.until("the machine is approved", PATIENCE, async |client| {
                Ok(world.approvals(client).await?.contains_key(machine.name()).then_some(()))
            })?;
        }
        for (machine, parts) in [
            (&machines[1], &["10.42.0.0/16", "10.42.1.0/24", "node `w-0`"][..]),
            (&machines[2], &["10.98.7.0/24 (spec.podCIDRs) is outside"][..]),
        ] {
            world.until("a condition names both sides", PATIENCE, async |client| {
                let node = Api::<Node>::all(client.clone()).get(machine.name()).await?;
                let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
                let said = conditions.into_iter().find(|condition| condition.type_ == "MeshRoutes");
                let said = said.and_then(|condition| condition.message).unwrap_or_default();
                Ok(parts.iter().all(|part| said.contains(part)).then_some(()))
            })?;
        }
        let approvals = world.with_client(async |client| world.approvals(&client).await)?;
        assert!(
            approvals[machines[1].name()].pod_cidrs.is_empty() && approvals[machines[2].name()].pod_cidrs.is_empty()
        );
        Ok(())
    });
}
