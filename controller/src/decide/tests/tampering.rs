//! Who may patch Nodes gets nothing by it and takes nothing away.

use std::collections::BTreeMap;

use keystone_mesh_core::annotations::{self, Writer};

use super::world::*;
use crate::view::APPROVED_CONDITION;

#[test]
fn an_approval_that_was_changed_or_removed_is_put_back_as_it_was() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    let good = world.annotations("worker-1");
    for restarted in [false, true] {
        let mut forged = good.clone();
        forged.insert("mesh.keystone.cluster/addresses".into(), "10.98.0.9/32".into());
        for bad in [BTreeMap::new(), forged] {
            world.annotate("worker-1", &bad, Writer::Controller);
            if restarted {
                world.restart();
                world.pass(SECOND);
            }
            world.settle();
            assert_eq!(world.address("worker-1"), "10.98.0.1");
            assert_eq!(world.approval("worker-1").unwrap().identity, id(2));
        }
        assert!(restarted || world.annotations("worker-1") == good, "the very same approval");
    }
}

#[test]
fn an_older_approval_of_the_same_node_is_replaced() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    let old = annotations::of_approval(&world.signed_approval("worker-1").unwrap());
    world.pods("worker-1", &["10.42.1.0/24"]);
    world.pass(SECOND);
    world.settle();
    let newest = world.approval("worker-1");
    world.annotate("worker-1", &old, Writer::Controller);
    world.settle();
    assert_eq!(world.approval("worker-1"), newest);
}

#[test]
fn an_approval_of_another_node_gives_nothing() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.node("evil");
    world.publish("evil", 9);
    let copied = annotations::of_approval(&world.signed_approval("worker-1").unwrap());
    world.annotate("evil", &copied, Writer::Controller);
    world.controller.follow(&world.api, world.now, |_, _| true);
    let decision = crate::decide::reconcile(&world.controller.view, world.now);
    world.apply(&decision.actions);
    assert_eq!(world.says("evil", APPROVED_CONDITION), "False/WaitingForApproval");
    assert_eq!(world.address("worker-1"), "10.98.0.1");
    assert_eq!(world.ledger().live().count(), 1);
}

#[test]
fn another_networks_approval_is_replaced() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    let mut foreign = world.approval("worker-1").unwrap();
    foreign.network = id(8);
    foreign.serial = u64::MAX;
    world.annotate("worker-1", &annotations::of_approval(&foreign.sign(&secret(8).identity())), Writer::Controller);
    world.restart();
    world.settle();
    assert_eq!(world.approval("worker-1").unwrap().network, id(1));
}

#[test]
fn records_that_were_removed_or_broken_take_nothing_back() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.pods("worker-1", &["10.42.1.0/24"]);
    world.settle();
    let before = world.approval("worker-1");
    world.annotate("worker-1", &BTreeMap::new(), Writer::Node);
    world.settle();
    assert_eq!(world.approval("worker-1"), before);
    world.restart();
    world.settle();
    assert_eq!(world.approval("worker-1"), before);
    world.wish("worker-1", "identity", "rubbish");
    world.settle();
    assert_eq!(world.approval("worker-1"), before);
}

#[test]
fn a_malformed_node_disturbs_no_other() {
    let mut world = World::auto();
    for n in 0..20 {
        let name = format!("evil-{n}");
        world.node(&name);
        world.publish(&name, 9);
        world.wish(&name, ["seq", "signature", "endpoints", "public-key"][n % 4], "\u{7f}rubbish");
        world.wish(&name, "addresses", "10.98.0.1/32");
        world.pods(&name, &["not a network", "10.42.300.0/24"]);
    }
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    assert_eq!(world.address("worker-1"), "10.98.0.1");
    assert_eq!(world.controller.view.faults().count(), 20);
    assert_eq!(world.decide().gauges.faults[&"node"], 20);
}

#[test]
fn nobody_gets_what_is_anothers_by_patching_nodes() {
    let mut world = World::auto();
    world.home();
    world.approved("worker-1", 2);
    world.pods("worker-1", &["10.42.1.0/24"]);
    world.settle();
    let (before, ledger) = (world.approval("worker-1"), world.ledger());
    // The attacker is an approved worker, too, and writes whatever it likes onto every Node.
    world.approved("evil", 9);
    world.wish("evil", "routes-extra", "10.42.1.0/24, 10.98.0.2/32");
    let mut greedy = record("evil", 9);
    greedy.seq = 2;
    greedy.routes = nets(&["10.42.1.0/25", "0.0.0.0/0", "10.98.0.2/32"]);
    greedy.public_key = record("worker-1", 2).public_key;
    world.publish_record(greedy, 9);
    world.publish("worker-1", 9);
    world.wish("worker-1", "approved", &id(9).to_string());
    world.wish("home", "addresses", "10.98.0.99/32");
    world.label("evil", "node-role.kubernetes.io/control-plane", "true");
    world.peer("laptop", 50, |_| {});
    world.settle();
    assert_eq!(world.approval("worker-1"), before);
    assert!(world.approval("evil").unwrap().routes.is_empty());
    assert_eq!(world.statement("laptop").unwrap().get().node.as_str(), "home", "the label makes nobody a server");
    for (host, holder) in ledger.live() {
        assert_eq!(world.ledger().noted(host).map(|claim| &claim.holder), Some(holder));
    }
}
