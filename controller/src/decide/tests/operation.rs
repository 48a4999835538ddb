//! What is given to those who are in: routes, wishes, plain peers, readiness, initialisation.

use std::collections::BTreeMap;

use keystone_mesh_api::STARTUP_TAINT;
use keystone_mesh_core::annotations::{self, Writer};

use super::world::*;
use crate::view::{
    APPROVED_CONDITION, CloudClaim, CloudKind, READY_CONDITION, ROUTES_CONDITION, Reach, Settings, WISHES_CONDITION,
};

const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";

// --- routes ---

#[test]
fn pod_cidrs_are_approved_as_such_and_not_as_routes() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.pods("worker-1", &["10.42.1.0/24", "fd00:42:0:1::/64"]);
    let serial = world.approval("worker-1").unwrap().serial;
    world.pass(SECOND);
    world.settle();
    assert_eq!(world.pod_cidrs("worker-1"), ["10.42.1.0/24", "fd00:42:0:1::/64"]);
    assert!(world.routes("worker-1").is_empty());
    assert!(world.approval("worker-1").unwrap().serial > serial);
    assert_eq!(world.says("worker-1", ROUTES_CONDITION), "", "nothing was refused");
}

#[test]
fn routes_that_people_or_records_ask_for_have_to_be_allowed() {
    let settings = Settings { allowed_routes: nets(&["192.168.0.0/16"]), startup_taint: false, ..Settings::default() };
    let mut world = World::new(settings);
    world.node("worker-1");
    let mut asking = record("worker-1", 2);
    asking.routes = nets(&["192.168.7.0/24", "172.16.9.0/24", "172.16.0.0/24"]);
    world.publish_record(asking, 2);
    let routes = vec!["172.16.0.0/24".to_owned()];
    world.member("worker-1", keystone_mesh_api::MemberSpec { identity: id(2).to_string(), token: None, routes });
    world.wish("worker-1", "routes-extra", "192.168.9.0/24, 10.0.0.0/8");
    let events = world.settle();
    assert_eq!(world.routes("worker-1"), ["172.16.0.0/24", "192.168.7.0/24", "192.168.9.0/24"]);
    assert_eq!(world.says("worker-1", ROUTES_CONDITION), "False/RouteNotAllowed");
    let message = world.condition("worker-1", ROUTES_CONDITION).unwrap().message.unwrap();
    assert!(message.contains("10.0.0.0/8") && message.contains("172.16.9.0/24"), "{message}");
    assert!(reasons(&events).contains(&"RouteNotAllowed"));
}

#[test]
fn an_overlap_is_refused_naming_both_sides_and_the_earlier_holder_keeps() {
    let mut world = World::plain();
    world.approved("worker-9", 2);
    world.pods("worker-9", &["10.42.1.0/24"]);
    world.settle();
    world.pass(SECOND);
    world.approved("worker-1", 3);
    world.pods("worker-1", &["10.42.0.0/16", "10.43.0.0/24"]);
    let events = world.settle();
    assert_eq!(world.pod_cidrs("worker-9"), ["10.42.1.0/24"]);
    assert_eq!(world.pod_cidrs("worker-1"), ["10.43.0.0/24"], "the rest of its pods is reached");
    assert_eq!(world.says("worker-1", ROUTES_CONDITION), "False/RouteOverlap");
    let message = world.condition("worker-1", ROUTES_CONDITION).unwrap().message.unwrap();
    for part in ["10.42.0.0/16", "10.42.1.0/24", "worker-9"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(reasons(&events), ["RouteOverlap"]);
    // And when the earlier holder goes, the other gets it, and the bad news ends.
    world.api.nodes.remove("worker-9");
    world.settle();
    assert_eq!(world.pod_cidrs("worker-1"), ["10.42.0.0/16", "10.43.0.0/24"]);
    assert_eq!(world.says("worker-1", ROUTES_CONDITION), "True/Accepted");
}

#[test]
fn the_earlier_holder_keeps_though_the_controller_starts_anew_and_the_other_is_elder() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.pass(SECOND);
    world.approved("worker-2", 3);
    world.pods("worker-2", &["10.42.1.0/24"]);
    world.settle();
    world.restart();
    world.pods("worker-1", &["10.42.1.0/24"]);
    world.settle();
    assert_eq!(world.pod_cidrs("worker-2"), ["10.42.1.0/24"]);
    assert!(world.pod_cidrs("worker-1").is_empty());
}

#[test]
fn a_pod_cidr_of_a_node_that_went_goes_to_its_next_node_and_is_never_approved_twice() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.approved("worker-2", 3);
    world.pods("worker-1", &["10.42.1.0/24"]);
    world.settle();
    let before = world.approval("worker-1").unwrap().serial;

    // The clock goes back by an hour, and the next node is there before anybody sees that the first one went.
    world.now -= 60 * MINUTE;
    world.pods("worker-2", &["10.42.1.0/24"]);
    world.settle();
    assert!(world.pod_cidrs("worker-2").is_empty());
    world.api.nodes.remove("worker-1");
    for round in 0.. {
        let actions = world.decide().actions;
        if actions.is_empty() {
            break;
        }
        for action in actions {
            world.apply(&[action]);
            let holders =
                ["worker-1", "worker-2"].map(|name| world.approval(name).is_some_and(|a| !a.pod_cidrs.is_empty()));
            assert_ne!(holders, [true; 2], "round {round}");
        }
    }
    assert_eq!(world.pod_cidrs("worker-2"), ["10.42.1.0/24"]);
    assert!(
        world.approval("worker-2").unwrap().serial > before,
        "readers that still know the other side with this one"
    );
}

#[test]
fn a_network_that_moves_between_nodes_that_stay_is_taken_from_the_one_before_the_other_has_it() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.approved("worker-2", 3);
    for (from, to) in [("worker-1", "worker-2"), ("worker-2", "worker-1")] {
        world.pods(to, &[]);
        world.pods(from, &["10.42.1.0/24"]);
        world.settle();
        world.pods(from, &[]);
        world.pods(to, &["10.42.0.0/16"]);
        let first = world.decide();
        assert_eq!(world.decide().actions.len(), 1, "one gives it away, and nobody is told of an overlap");
        let told = world.apply(&first.actions);
        assert!(world.pod_cidrs(from).is_empty() && world.pod_cidrs(to).is_empty() && told.is_empty());
        world.settle();
        assert_eq!(world.pod_cidrs(to), ["10.42.0.0/16"]);
        assert_eq!(world.says(to, ROUTES_CONDITION), "");
        assert!(world.approval(to).unwrap().serial > world.approval(from).unwrap().serial);
    }
}

#[test]
fn an_approval_that_somebody_brings_back_to_a_silent_node_keeps_no_network_from_anybody() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.pods("worker-1", &["10.42.1.0/24"]);
    world.settle();
    let kept = annotations::of_approval(&world.signed_approval("worker-1").unwrap());
    world.api.nodes.remove("worker-1");
    world.settle();
    world.node("worker-1");
    world.annotate("worker-1", &kept, Writer::Controller);
    world.approved("worker-2", 3);
    world.pods("worker-2", &["10.42.1.0/24"]);
    world.settle();
    assert_eq!(world.pod_cidrs("worker-2"), ["10.42.1.0/24"]);
}

#[test]
fn networks_that_lead_to_no_node_are_refused() {
    for (cidr, reason) in [
        ("10.98.4.0/24", "RouteOverlap"),
        ("10.0.0.0/8", "RouteOverlap"),
        ("0.0.0.0/0", "RouteNotPossible"),
        ("::/0", "RouteNotPossible"),
        ("127.0.0.0/8", "RouteNotPossible"),
        ("169.254.169.254/32", "RouteNotPossible"),
        ("224.0.0.0/4", "RouteNotPossible"),
        ("fe80::/64", "RouteNotPossible"),
    ] {
        let mut world = World::plain();
        world.approved("worker-1", 2);
        world.pods("worker-1", &[cidr]);
        world.settle();
        assert!(world.pod_cidrs("worker-1").is_empty(), "{cidr}");
        assert_eq!(world.says("worker-1", ROUTES_CONDITION), format!("False/{reason}"), "{cidr}");
    }
}

#[test]
fn pod_cidrs_stay_inside_of_those_that_there_are() {
    let settings = Settings { pod_cidrs: nets(&["10.42.0.0/16"]), startup_taint: false, ..Settings::default() };
    let mut world = World::new(settings);
    world.approved("worker-1", 2);
    world.pods("worker-1", &["192.168.1.0/24"]);
    // Nor does it help to ask for it in the record.
    let mut asking = record("worker-1", 2);
    asking.routes = nets(&["192.168.1.0/24"]);
    asking.seq = 2;
    world.publish_record(asking, 2);
    world.settle();
    assert!(world.pod_cidrs("worker-1").is_empty() && world.routes("worker-1").is_empty());
    assert_eq!(world.says("worker-1", ROUTES_CONDITION), "False/OutsidePodCIDRs");
}

#[test]
fn a_node_gets_no_more_routes_than_an_approval_holds() {
    let settings = Settings { allowed_routes: nets(&["172.16.0.0/12"]), startup_taint: false, ..Settings::default() };
    let mut world = World::new(settings);
    world.approved("worker-1", 2);
    let mut asking = record("worker-1", 2);
    asking.seq = 2;
    asking.routes = (0..64).map(|n| format!("172.16.{n}.0/24").parse().unwrap()).collect();
    world.publish_record(asking, 2);
    let pods: Vec<String> = (0..17).map(|n| format!("10.42.{n}.0/24")).collect();
    world.pods("worker-1", &pods.iter().map(String::as_str).collect::<Vec<_>>());
    world.settle();
    assert_eq!((world.routes("worker-1").len(), world.pod_cidrs("worker-1").len()), (64, 16));
    world.wish("worker-1", "routes-extra", "172.17.0.0/24");
    world.settle();
    assert_eq!(world.routes("worker-1").len(), 64);
    assert_eq!(world.says("worker-1", ROUTES_CONDITION), "False/TooManyRoutes");
}

// --- wishes ---

#[test]
fn wishes_of_people_are_folded_into_the_approval_and_bad_ones_are_told_once() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.wish("worker-1", "force-endpoint", "vpn.example.org:51840");
    world.wish("worker-1", "relay-force", &format!("{},{}", relay(), id(9)));
    world.wish("worker-1", "location", "eu-west-1/eu-west-1a");
    let events = world.settle();
    let approval = world.approval("worker-1").unwrap();
    assert_eq!(approval.endpoints, ["vpn.example.org:51840".parse().unwrap()]);
    assert_eq!(approval.relays, [relay()]);
    assert_eq!(approval.location.unwrap().as_str(), "eu-west-1/eu-west-1a");
    assert_eq!(world.says("worker-1", WISHES_CONDITION), "False/WishRefused");
    assert!(world.condition("worker-1", WISHES_CONDITION).unwrap().message.unwrap().contains(&id(9).to_string()));
    assert_eq!(reasons(&events), ["WishRefused"]);
    world.wish("worker-1", "location", "NOT A PLACE");
    world.wish("worker-1", "relay-force", &relay().to_string());
    world.settle();
    assert_eq!(world.approval("worker-1").unwrap().location, None);
    world.wish("worker-1", "location", "office");
    world.settle();
    assert_eq!(world.says("worker-1", WISHES_CONDITION), "True/Accepted");
}

// --- who may patch Nodes ---

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

// --- plain peers ---

#[test]
fn a_plain_peer_is_served_by_the_control_plane_and_routed_there() {
    let mut world = World::plain();
    world.home();
    world.peer("laptop", 50, |peer| peer.routes = vec!["192.168.50.0/24".into()]);
    let events = world.settle();
    let statement = world.statement("laptop").unwrap().get().clone();
    assert_eq!(statement.node.as_str(), "home");
    assert_eq!(statement.addresses[0], "10.98.0.2/32".parse().unwrap());
    assert_eq!(statement.routes, nets(&["192.168.50.0/24"]));
    assert_eq!(world.routes("home")[..2], ["10.98.0.2/32", "192.168.50.0/24"]);
    assert_eq!(world.peer_says("laptop", "Ready"), "True/Served");
    assert_eq!(world.api.peers["laptop"].status.as_ref().unwrap().node.as_deref(), Some("home"));
    assert_eq!(reasons(&events), ["Served"]);
    // Other peers' addresses are never a route.
    world.peer("thief", 51, |peer| peer.routes = vec!["10.98.0.2/32".into(), "192.168.50.0/25".into()]);
    world.settle();
    assert!(world.statement("thief").unwrap().get().routes.is_empty());
    assert_eq!(world.peer_says("thief", "RoutesAccepted"), "False/RouteOverlap");
    assert_eq!(world.peer_says("thief", "Ready"), "True/Served");
}

#[test]
fn a_plain_peer_that_goes_gives_everything_back() {
    let mut world = World::plain();
    world.home();
    world.peer("laptop", 50, |_| {});
    world.settle();
    world.api.peers.remove("laptop");
    world.settle();
    assert!(world.routes("home").is_empty());
    assert_eq!(world.ledger().live().count(), 1);
}

#[test]
fn a_plain_peer_that_nobody_serves_says_so() {
    let mut world = World::plain();
    world.peer("phone", 50, |_| {});
    world.peer("lost", 51, |peer| peer.node = Some("nowhere".into()));
    world.settle();
    assert_eq!(world.peer_says("phone", "Ready"), "False/NoControlPlane");
    assert_eq!(world.peer_says("lost", "Ready"), "False/NodeUnknown");
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.peer("early", 52, |peer| peer.node = Some("worker-1".into()));
    world.settle();
    assert_eq!(world.peer_says("early", "Ready"), "False/NodeNotApproved");
    world.vouch("worker-1", 2);
    world.settle();
    assert_eq!(world.peer_says("early", "Ready"), "True/Served");
    world.home();
    world.settle();
    assert_eq!(world.peer_says("phone", "Ready"), "True/Served");
}

#[test]
fn a_plain_peer_cannot_have_somebody_elses_key() {
    let mut world = World::plain();
    world.home();
    world.approved("worker-1", 2);
    world.peer("laptop", 2, |_| {});
    world.peer("phone", 50, |_| {});
    world.settle();
    world.pass(SECOND);
    world.peer("copy", 50, |_| {});
    world.settle();
    assert_eq!(world.peer_says("laptop", "Ready"), "False/KeyTaken");
    assert_eq!(world.peer_says("copy", "Ready"), "False/KeyTaken");
    assert_eq!(world.peer_says("phone", "Ready"), "True/Served");
    assert!(world.statement("laptop").is_none() && world.statement("copy").is_none());
    // One that changes to another's key loses what was stated.
    let stolen = world.api.peers["phone"].spec.public_key.clone();
    world.peer("tablet", 51, |_| {});
    world.settle();
    world.api.edit_peer("tablet", |peer| peer.spec.public_key = stolen);
    world.settle();
    assert!(world.statement("tablet").unwrap().get().is_revoked());
    assert_eq!(world.peer_says("phone", "Ready"), "True/Served");
}

#[test]
fn a_node_cannot_come_with_a_plain_peers_key() {
    let mut world = World::plain();
    world.home();
    world.peer("phone", 50, |_| {});
    world.settle();
    world.node("worker-1");
    world.publish("worker-1", 50);
    world.vouch("worker-1", 50);
    world.settle();
    assert_eq!(world.says("worker-1", APPROVED_CONDITION), "False/KeyTaken");
}

#[test]
fn a_plain_peer_whose_specification_breaks_keeps_what_was_stated() {
    let mut world = World::plain();
    world.home();
    world.peer("phone", 50, |_| {});
    world.settle();
    let before = world.statement("phone");
    world.api.edit_peer("phone", |peer| peer.spec.endpoint = Some("nonsense".into()));
    world.settle();
    assert_eq!(world.statement("phone"), before);
    assert_eq!(world.peer_says("phone", "Ready"), "False/Invalid");
    assert!(!world.routes("home").is_empty());
}

#[test]
fn a_plain_peer_moves_with_its_specification() {
    let mut world = World::plain();
    world.home();
    world.approved("worker-1", 2);
    world.peer("phone", 50, |_| {});
    world.settle();
    let address = world.statement("phone").unwrap().get().addresses.clone();
    world.pass(SECOND);
    world.api.edit_peer("phone", |peer| peer.spec.node = Some("worker-1".into()));
    world.settle();
    assert_eq!(world.statement("phone").unwrap().get().addresses, address);
    assert!(world.routes("home").is_empty());
    assert_eq!(world.routes("worker-1").len(), 2);
}

#[test]
fn a_plain_peer_and_a_node_of_one_name_do_not_disturb_each_other() {
    let mut world = World::plain();
    world.home();
    world.peer("worker-1", 50, |_| {});
    world.approved("worker-1", 2);
    assert_eq!(world.peer_says("worker-1", "Ready"), "True/Served");
    assert_ne!(world.address("worker-1"), world.statement("worker-1").unwrap().get().addresses[0].addr().to_string());
}

// --- readiness ---

#[test]
fn a_fresh_node_is_tainted_until_the_mesh_reaches_it() {
    let mut world = World::new(Settings::default());
    world.home();
    assert!(world.taints("home").is_empty(), "what runs on the control plane does not wait for the mesh");
    world.node("worker-1");
    world.settle();
    assert_eq!(world.taints("worker-1"), [STARTUP_TAINT]);
    world.publish("worker-1", 2);
    world.vouch("worker-1", 2);
    world.settle();
    assert_eq!(world.says("worker-1", READY_CONDITION), "Unknown/NoReport");
    assert_eq!(world.taints("worker-1"), [STARTUP_TAINT]);
    world.pass(5 * SECOND);
    world.report("home", &[("worker-1", Reach::Reached)]);
    let events = world.settle();
    assert_eq!(world.says("worker-1", READY_CONDITION), "True/Reached");
    assert!(world.taints("worker-1").is_empty());
    assert!(reasons(&events).contains(&"MeshReady"));
    // Never again, also where it is unready while it is young.
    for _ in 0..20 {
        world.pass(3 * SECOND);
        world.report("home", &[("worker-1", Reach::Unreached)]);
        world.settle();
    }
    assert_eq!(world.says("worker-1", READY_CONDITION), "False/Unreached");
    assert!(world.taints("worker-1").is_empty());
}

#[test]
fn a_node_of_old_is_not_tainted_and_a_taint_of_others_stays() {
    let mut world = World::new(Settings::default());
    world.node("worker-1");
    world.taint("worker-1", "example.org/busy");
    world.pass(11 * MINUTE);
    world.settle();
    assert_eq!(world.taints("worker-1"), ["example.org/busy"]);
    // One that registers with the taint has it lifted like any other.
    world.taint("worker-1", STARTUP_TAINT);
    world.publish("worker-1", 2);
    world.vouch("worker-1", 2);
    world.home();
    world.report("home", &[("worker-1", Reach::Reached)]);
    world.settle();
    assert_eq!(world.taints("worker-1"), ["example.org/busy"]);
}

#[test]
fn readiness_does_not_flap() {
    let mut world = World::plain();
    world.home();
    world.approved("worker-1", 2);
    world.report("home", &[("worker-1", Reach::Reached)]);
    world.settle();
    assert_eq!(world.says("worker-1", READY_CONDITION), "True/Reached");
    let mut writes = 0;
    for step in 0..600 {
        world.pass(SECOND);
        // Out of reach for half of every minute.
        let reach = if step % 60 < 30 { Reach::Unreached } else { Reach::Reached };
        world.report("home", &[("worker-1", reach)]);
        writes += world.decide().actions.len();
        world.settle();
    }
    assert_eq!(writes, 0, "shorter than `unready_after`");
    for step in 0..600 {
        world.pass(SECOND);
        let reach = if step % 60 < 50 { Reach::Unreached } else { Reach::Reached };
        world.report("home", &[("worker-1", reach)]);
        writes += world.decide().actions.len();
        world.settle();
    }
    assert_eq!(writes, 1, "never reached for as long as `ready_after` then");
}

#[test]
fn time_alone_turns_readiness_when_the_decision_said() {
    let mut world = World::plain();
    world.home();
    world.approved("worker-1", 2);
    world.report("home", &[("worker-1", Reach::Reached)]);
    world.settle();
    world.pass(SECOND);
    world.report("home", &[("worker-1", Reach::Unreached)]);
    let again = world.decide().again_at.unwrap();
    assert_eq!(again, world.now + 40 * SECOND);
    world.now = again - 1;
    assert!(world.decide().actions.is_empty());
    world.now = again;
    world.settle();
    assert_eq!(world.says("worker-1", READY_CONDITION), "False/Unreached");
    // And without further reports nobody knows.
    let again = world.decide().again_at.unwrap();
    world.now = again;
    world.settle();
    assert_eq!(world.says("worker-1", READY_CONDITION), "Unknown/NoReport");
    assert_eq!(world.says("home", READY_CONDITION), "Unknown/NoReport");
    assert_eq!(world.decide().again_at, None);
}

#[test]
fn one_reporter_that_reaches_a_node_is_enough_and_a_reporter_that_answers_is_reached() {
    let mut world = World::plain();
    world.home();
    world.approved("worker-1", 2);
    world.approved("worker-2", 3);
    for _ in 0..60 {
        world.pass(SECOND);
        world.report("home", &[("worker-1", Reach::Unreached), ("worker-2", Reach::Unreached)]);
        world.report("worker-2", &[("worker-1", Reach::Reached)]);
        world.settle();
    }
    for node in ["home", "worker-1", "worker-2"] {
        assert_eq!(world.says(node, READY_CONDITION), "True/Reached", "{node}");
    }
}

#[test]
fn a_controller_that_starts_anew_does_not_call_everyone_unknown() {
    let mut world = World::plain();
    world.home();
    world.approved("worker-1", 2);
    world.report("home", &[("worker-1", Reach::Reached)]);
    world.settle();
    world.pass(10 * MINUTE);
    world.restart();
    world.pass(MINUTE);
    assert!(world.decide().actions.is_empty());
    world.report("home", &[("worker-1", Reach::Reached)]);
    assert!(world.decide().actions.is_empty());
}

#[test]
fn a_node_that_is_not_in_the_network_is_not_ready() {
    let mut world = World::plain();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    assert_eq!(world.says("worker-1", READY_CONDITION), "False/NotApproved");
}

#[test]
fn a_node_without_a_daemon_has_no_conditions_of_the_mesh() {
    let mut world = World::plain();
    world.node("other");
    world.settle();
    assert_eq!(world.api.nodes["other"].status, None);
}

#[test]
fn the_control_plane_is_asked_and_else_three_others() {
    let mut world = World::plain();
    for byte in 2..8 {
        world.approved(&format!("worker-{byte}"), byte);
    }
    world.decide();
    let names = |world: &World| -> Vec<String> {
        crate::decide::reporters(&world.controller.view).iter().map(|reporter| reporter.name.to_string()).collect()
    };
    assert_eq!(names(&world), ["worker-2", "worker-3", "worker-4"]);
    world.label("worker-7", "node-role.kubernetes.io/control-plane", "");
    world.home();
    world.decide();
    assert_eq!(names(&world), ["home", "worker-7"]);
    let addresses = crate::decide::reporters(&world.controller.view)[0].addresses.clone();
    assert_eq!(addresses[0].to_string(), "10.98.0.7");
    assert_eq!(addresses.len(), 2);
}

#[test]
fn an_idle_cluster_is_left_alone() {
    let mut world = World::new(Settings { node_init: true, ..Settings::default() });
    world.home();
    world.approved("worker-1", 2);
    world.peer("phone", 50, |_| {});
    world.settle();
    for _ in 0..120 {
        world.pass(10 * SECOND);
        world.report("home", &[("worker-1", Reach::Reached)]);
        world.settle();
    }
    for _ in 0..60 {
        world.pass(10 * SECOND);
        world.report("home", &[("worker-1", Reach::Reached)]);
        assert!(world.decide().actions.is_empty());
    }
}

// --- initialisation ---

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

// --- metrics ---

#[test]
fn every_state_is_counted() {
    let mut world = World::plain();
    world.home();
    world.approved("worker-1", 2);
    world.node("waiting");
    world.publish("waiting", 3);
    world.node("silent");
    world.token("t", |token| token.revoked = true);
    world.peer("phone", 50, |_| {});
    world.pods("worker-1", &["10.98.0.0/24"]);
    world.settle();
    let gauges = world.decide().gauges;
    let of = |state: &str| gauges.machines[state];
    assert_eq!((of("approved"), of("waiting"), of("without_record"), of("refused")), (2, 1, 1, 0));
    assert_eq!((gauges.peers["true"], gauges.tokens["revoked"], gauges.routes_refused), (1, 1, 1));
    assert_eq!((gauges.addresses_held, gauges.addresses_total), (3, 65534));
    assert_eq!(gauges.ready["unknown"], 2);
}
