//! Plain peers: who serves them, and what leads to them.

use super::world::*;
use crate::view::APPROVED_CONDITION;

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
