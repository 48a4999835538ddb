//! Which networks lead to whom, and what people wish.

use super::world::*;
use crate::view::{ROUTES_CONDITION, Settings, WISHES_CONDITION};

#[test]
fn pod_cidrs_become_routes() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.pods("worker-1", &["10.42.1.0/24", "fd00:42:0:1::/64"]);
    let serial = world.approval("worker-1").unwrap().serial;
    world.pass(SECOND);
    world.settle();
    assert_eq!(world.routes("worker-1"), ["10.42.1.0/24", "fd00:42:0:1::/64"]);
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
    assert_eq!(world.routes("worker-9"), ["10.42.1.0/24"]);
    assert_eq!(world.routes("worker-1"), ["10.43.0.0/24"], "the rest of its routes works");
    assert_eq!(world.says("worker-1", ROUTES_CONDITION), "False/RouteOverlap");
    let message = world.condition("worker-1", ROUTES_CONDITION).unwrap().message.unwrap();
    for part in ["10.42.0.0/16", "10.42.1.0/24", "worker-9"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(reasons(&events), ["RouteOverlap"]);
    // And when the earlier holder goes, the other gets it, and the bad news ends.
    world.api.nodes.remove("worker-9");
    world.settle();
    assert_eq!(world.routes("worker-1"), ["10.42.0.0/16", "10.43.0.0/24"]);
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
    assert_eq!(world.routes("worker-2"), ["10.42.1.0/24"]);
    assert!(world.routes("worker-1").is_empty());
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
        assert!(world.routes("worker-1").is_empty(), "{cidr}");
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
    assert!(world.routes("worker-1").is_empty());
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
    world.pods("worker-1", &["10.42.1.0/24"]);
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
