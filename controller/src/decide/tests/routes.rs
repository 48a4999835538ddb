//! Which networks lead to whom, and what people wish.

use keystone_mesh_core::annotations::{self, Writer};

use super::world::*;
use crate::view::{ROUTES_CONDITION, Settings, WISHES_CONDITION};

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
        ("126.0.0.0/7", "RouteNotPossible"),
        ("169.0.0.0/8", "RouteNotPossible"),
        ("192.0.0.0/2", "RouteNotPossible"),
        ("128.0.0.0/1", "RouteNotPossible"),
        ("8.8.8.0/24", "OutsidePodCIDRs"),
        ("2001:db8::/64", "OutsidePodCIDRs"),
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
fn pods_in_public_space_are_there_when_people_say_so() {
    let settings = Settings { pod_cidrs: nets(&["2001:db8::/32"]), startup_taint: false, ..Settings::default() };
    let mut world = World::new(settings);
    world.approved("worker-1", 2);
    world.pods("worker-1", &["2001:db8:0:1::/64"]);
    world.settle();
    assert_eq!(world.pod_cidrs("worker-1"), ["2001:db8:0:1::/64"]);
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
