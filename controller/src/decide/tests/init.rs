//! What a cloud controller would have done.

use std::collections::BTreeMap;

use keystone_mesh_api::STARTUP_TAINT;

use super::world::*;
use crate::view::{CloudClaim, CloudKind, Reach, Settings};

const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";

fn initialising() -> World {
    World::new(Settings { node_init: true, startup_taint: false, ..Settings::default() })
}

/// A Node as a kubelet registers it that waits for a cloud controller.
fn raw_node(world: &mut World, name: &str, provider_id: Option<&str>) {
    world.node(name);
    world.taint(name, UNINITIALIZED);
    let provider_id = provider_id.map(str::to_owned);
    world.api.edit_node(name, |node| node.spec.get_or_insert_default().provider_id = provider_id);
}

fn initialised(world: &World, name: &str) -> (String, BTreeMap<String, String>, Vec<String>) {
    let node = &world.api.nodes[name];
    let id = node.spec.as_ref().unwrap().provider_id.clone().unwrap_or_default();
    let addresses = node.status.clone().unwrap_or_default().addresses.unwrap_or_default();
    let addresses = addresses.into_iter().map(|address| format!("{} {}", address.type_, address.address)).collect();
    (id, node.metadata.labels.clone().unwrap(), addresses)
}

#[test]
fn a_node_is_initialised_only_after_it_is_approved_and_the_taint_goes_last() {
    let mut world = initialising();
    raw_node(&mut world, "worker-1", None);
    world.publish("worker-1", 2);
    world.settle();
    assert_eq!(initialised(&world, "worker-1").0, "");
    assert_eq!(world.taints("worker-1"), [UNINITIALIZED]);
    world.vouch("worker-1", 2);
    for _ in 0..8 {
        let actions = world.decide().actions;
        let (id, labels, addresses) = initialised(&world, "worker-1");
        if world.taints("worker-1").is_empty() {
            assert!(!id.is_empty() && !labels.is_empty() && !addresses.is_empty());
        }
        world.apply(&actions);
    }
    let (id, labels, addresses) = initialised(&world, "worker-1");
    assert_eq!(id, "keystone://home/worker-1");
    assert_eq!(labels["topology.kubernetes.io/zone"], "home");
    assert_eq!(labels["topology.kubernetes.io/region"], "home");
    assert_eq!(addresses[0], "InternalIP 10.98.0.1");
    assert!(addresses[1].starts_with("InternalIP fd"));
    assert_eq!(addresses[2], "Hostname worker-1");
    assert!(world.taints("worker-1").is_empty());
}

#[test]
fn topology_follows_from_the_provider_id_or_the_location() {
    for (provider_id, location, region, zone) in [
        (Some("aws:///eu-west-1a/i-0abc"), None, "eu-west-1", "eu-west-1a"),
        (Some("aws:///us-gov-west-1b/i-0abc"), None, "us-gov-west-1", "us-gov-west-1b"),
        (Some("aws:///us-west-2-lax-1a/i-0abc"), Some("moon"), "us-west-2", "us-west-2-lax-1a"),
        (Some("hcloud://123"), Some("eu-central/fsn1-dc14"), "eu-central", "fsn1-dc14"),
        (Some("hcloud://123"), None, "", ""),
        (Some("k3s://worker-1"), None, "", ""),
        (None, Some("eu-west-1/eu-west-1a"), "eu-west-1", "eu-west-1a"),
        (None, Some("office"), "office", "office"),
        (None, None, "home", "home"),
        (Some("aws:///rubbish/i-0abc"), None, "", ""),
        (Some("nonsense"), None, "", ""),
    ] {
        let mut world = initialising();
        raw_node(&mut world, "worker-1", provider_id);
        if let Some(location) = location {
            world.wish("worker-1", "location", location);
        }
        world.publish("worker-1", 2);
        world.vouch("worker-1", 2);
        world.settle();
        let (id, labels, _) = initialised(&world, "worker-1");
        let label = |key: &str| labels.get(&format!("topology.kubernetes.io/{key}")).cloned().unwrap_or_default();
        assert_eq!((label("region").as_str(), label("zone").as_str()), (region, zone), "{provider_id:?} {location:?}");
        assert!(!id.is_empty());
        assert!(world.taints("worker-1").is_empty(), "{provider_id:?}");
    }
}

#[test]
fn what_is_set_is_not_changed() {
    let mut world = initialising();
    raw_node(&mut world, "worker-1", Some("aws:///eu-west-1a/i-0abc"));
    world.label("worker-1", "topology.kubernetes.io/zone", "mine");
    let address = k8s_openapi::api::core::v1::NodeAddress { type_: "InternalIP".into(), address: "192.0.2.5".into() };
    world.api.edit_node("worker-1", |node| node.status.get_or_insert_default().addresses = Some(vec![address]));
    world.publish("worker-1", 2);
    world.vouch("worker-1", 2);
    world.settle();
    let (id, labels, addresses) = initialised(&world, "worker-1");
    assert_eq!(id, "aws:///eu-west-1a/i-0abc");
    assert_eq!(labels["topology.kubernetes.io/zone"], "mine");
    assert_eq!(labels["topology.kubernetes.io/region"], "eu-west-1");
    assert_eq!(addresses, ["InternalIP 192.0.2.5"]);
}

#[test]
fn what_the_autoscaler_knows_of_a_machine_is_taken_over() {
    let mut world = initialising();
    let claim = CloudClaim {
        kind: CloudKind::Machine,
        name: "ns/m".into(),
        node: Some("worker-1".into()),
        provider_id: Some("hcloud://77".into()),
        instance_type: Some("cx22".into()),
        gone: None,
    };
    world.api.claims.insert((claim.kind, claim.name.clone()), claim);
    raw_node(&mut world, "worker-1", None);
    world.publish("worker-1", 2);
    world.vouch("worker-1", 2);
    world.settle();
    let (id, labels, _) = initialised(&world, "worker-1");
    assert_eq!(id, "hcloud://77");
    assert_eq!(labels["node.kubernetes.io/instance-type"], "cx22");
}

#[test]
fn without_the_setting_nothing_is_initialised() {
    let mut world = World::plain();
    raw_node(&mut world, "worker-1", None);
    world.publish("worker-1", 2);
    world.vouch("worker-1", 2);
    world.settle();
    assert_eq!(initialised(&world, "worker-1").0, "");
    assert_eq!(world.taints("worker-1"), [UNINITIALIZED]);
}

#[test]
fn both_taints_are_lifted_one_after_the_other() {
    let mut world = World::new(Settings { node_init: true, ..Settings::default() });
    world.home();
    raw_node(&mut world, "worker-1", None);
    world.settle();
    assert_eq!(world.taints("worker-1"), [UNINITIALIZED, STARTUP_TAINT]);
    world.publish("worker-1", 2);
    world.vouch("worker-1", 2);
    world.report("home", &[("worker-1", Reach::Reached)]);
    world.settle();
    assert!(world.taints("worker-1").is_empty());
}
