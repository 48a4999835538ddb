//! Who is let in, and who is not.

use keystone_mesh_core::admission::QUARANTINE;
use keystone_mesh_core::annotations::{self, Writer};
use keystone_mesh_core::node::Approval;

use super::world::*;
use crate::view::{APPROVED_CONDITION, CloudClaim, CloudKind, Reach};

#[test]
fn nothing_is_decided_before_everything_was_listed() {
    let mut world = World::auto();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.controller.view.handle_network(&network_document());
    world.controller.view.handle_node(&world.api.nodes["worker-1"]);
    let decision = crate::decide::reconcile(&world.controller.view, world.now);
    assert!(decision.actions.is_empty());
    assert!(!world.decide().actions.is_empty());
}

#[test]
fn nothing_is_decided_without_the_networks_own_document() {
    let mut world = World::auto();
    let mut foreign = network_document();
    foreign.data.as_mut().unwrap().insert("ipv4".into(), "10.99.0.0/16".into());
    world.api.network = Some(foreign);
    world.node("worker-1");
    world.publish("worker-1", 2);
    assert!(world.decide().actions.is_empty());
    assert_eq!(world.controller.view.faults().count(), 1);
}

#[test]
fn a_node_that_nobody_vouches_for_waits_and_says_how_it_is_let_in() {
    let mut world = World::plain();
    world.node("worker-1");
    world.publish("worker-1", 2);
    let events = world.settle();
    assert!(world.approval("worker-1").is_none());
    assert_eq!(world.says("worker-1", APPROVED_CONDITION), "False/WaitingForApproval");
    let message = world.condition("worker-1", APPROVED_CONDITION).unwrap().message.unwrap();
    assert!(message.contains("keystone-mesh approve worker-1") && message.contains(&id(2).to_string()), "{message}");
    assert_eq!(reasons(&events), ["WaitingForApproval"]);
}

#[test]
fn a_person_lets_a_waiting_node_in() {
    let mut world = World::plain();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    world.vouch("worker-1", 2);
    let events = world.settle();
    assert_eq!(world.address("worker-1"), "10.98.0.1");
    assert_eq!(world.says("worker-1", APPROVED_CONDITION), "True/Approved");
    assert_eq!(world.member_says("worker-1", "Approved"), "True/Approved");
    assert_eq!(world.member_says("worker-1", "Node"), "True/NodeFound");
    assert_eq!(reasons(&events), ["Approved"]);
}

#[test]
fn the_automatic_policy_lets_the_first_record_in_and_pins_its_identity() {
    let mut world = World::auto();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    let approval = world.approval("worker-1").unwrap();
    assert_eq!(approval.identity, id(2));
    assert_eq!(approval.addresses.len(), 2, "one of each family");
    assert_eq!(world.ledger().pinned(&"worker-1".parse().unwrap()), Some((1, id(2))));
}

#[test]
fn the_claim_is_acknowledged_before_anything_is_approved() {
    let mut world = World::auto();
    world.node("worker-1");
    world.publish("worker-1", 2);
    let first = world.decide().actions;
    assert_eq!(first.len(), 1, "{first:?}");
    assert!(matches!(first[0].effect, crate::decide::Effect::Ledger { .. }));
    world.apply(&first);
    let second = world.decide().actions;
    assert!(matches!(second[0].effect, crate::decide::Effect::Approve { .. }));
}

#[test]
fn the_control_planes_own_host_needs_nobodys_word() {
    let mut world = World::plain();
    world.home();
    assert_eq!(world.approval("home").unwrap().identity, id(1));
}

#[test]
fn another_identity_on_an_approved_node_waits_and_the_approved_one_stays_in_force() {
    for mut world in [World::plain(), World::auto()] {
        world.approved("worker-1", 2);
        let before = world.approval("worker-1");
        world.publish("worker-1", 3);
        let events = world.settle();
        assert_eq!(world.approval("worker-1"), before);
        assert_eq!(world.says("worker-1", APPROVED_CONDITION), "False/IdentityChanged");
        let message = world.condition("worker-1", APPROVED_CONDITION).unwrap().message.unwrap();
        assert!(message.contains(&id(2).to_string()) && message.contains(&id(3).to_string()), "{message}");
        assert_eq!(reasons(&events), ["IdentityChanged"]);
    }
}

#[test]
fn a_person_lets_a_reinstalled_machine_in_and_it_gets_an_address_of_its_own() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.publish("worker-1", 3);
    world.settle();
    world.api.members.remove("worker-1");
    world.settle();
    assert_eq!(world.approval("worker-1").unwrap().identity, id(2), "a Member that went changes nothing by itself");
    world.vouch("worker-1", 3);
    world.settle();
    let approval = world.approval("worker-1").unwrap();
    assert_eq!(approval.identity, id(3));
    assert_eq!(world.address("worker-1"), "10.98.0.2", "the address of the other machine rests");
    assert_eq!(world.says("worker-1", APPROVED_CONDITION), "True/Approved");
}

#[test]
fn a_token_cannot_take_the_name_of_a_node_that_is_in() {
    let mut world = World::auto();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    world.token("t", |_| {});
    world.join("worker-1", 3, "t");
    world.publish("worker-1", 3);
    world.settle();
    assert_eq!(world.approval("worker-1").unwrap().identity, id(2));
    assert_eq!(world.member_says("worker-1", "Approved"), "False/NameTaken");
    assert_eq!(world.api.tokens["t"].status, None, "no use is spent");
}

#[test]
fn a_member_of_another_identity_keeps_a_fresh_node_out() {
    let mut world = World::auto();
    world.vouch("worker-1", 2);
    world.node("worker-1");
    world.publish("worker-1", 3);
    world.settle();
    assert!(world.approval("worker-1").is_none());
    assert_eq!(world.says("worker-1", APPROVED_CONDITION), "False/IdentityChanged");
}

#[test]
fn a_join_by_token_spends_a_use_before_it_is_approved() {
    let mut world = World::plain();
    world.token("t", |token| token.uses = Some(1));
    world.join("worker-1", 2, "t");
    let actions = world.decide().actions;
    assert!(matches!(&actions[..], [only] if matches!(only.effect, crate::decide::Effect::TokenStatus { .. })));
    world.settle();
    assert_eq!(world.address("worker-1"), "10.98.0.1");
    assert_eq!(world.api.members["worker-1"].status.as_ref().unwrap().addresses[0], "10.98.0.1");
    let status = world.api.tokens["t"].status.clone().unwrap();
    assert_eq!((status.used, status.joined), (1, vec![id(2).to_string()]));
    world.join("worker-2", 3, "t");
    world.settle();
    assert!(world.approval("worker-2").is_none());
    assert_eq!(world.member_says("worker-2", "Approved"), "False/TokenUsedUp");
}

#[test]
fn a_machine_that_asks_again_costs_no_second_use() {
    let mut world = World::plain();
    world.token("t", |token| token.uses = Some(1));
    world.join("worker-1", 2, "t");
    world.settle();
    world.api.members.remove("worker-1");
    world.settle();
    world.join("worker-1", 2, "t");
    world.settle();
    assert_eq!(world.address("worker-1"), "10.98.0.1", "and it gets the same address");
    assert_eq!(world.api.tokens["t"].status.as_ref().unwrap().used, 1);
}

#[test]
fn uses_of_a_token_for_any_number_are_counted_once_each() {
    let mut world = World::plain();
    world.token("t", |_| {});
    for byte in 2..12 {
        world.join(&format!("worker-{byte}"), byte, "t");
        world.settle();
        assert!(world.is_in(&format!("worker-{byte}")));
    }
    let status = world.api.tokens["t"].status.clone().unwrap();
    assert_eq!(status.used, 10);
    assert_eq!(status.joined.len(), 1, "those who are in need no note");
}

#[test]
fn two_that_race_for_the_last_use_of_a_token_get_one_approval() {
    let mut world = World::plain();
    world.token("t", |token| token.uses = Some(1));
    world.join("worker-2", 3, "t");
    world.pass(SECOND);
    world.join("worker-1", 2, "t");
    world.settle();
    assert!(world.is_in("worker-2"), "the elder gets it");
    assert_eq!(world.member_says("worker-1", "Approved"), "False/TokenUsedUp");
}

#[test]
fn tokens_that_are_not_good_are_refused_with_their_code() {
    for (expected, expires, revoked, names) in [
        ("False/TokenExpired", Some(START - SECOND), false, None),
        ("False/TokenRevoked", None, true, None),
        ("False/NameNotAllowed", None, false, Some("db-*")),
    ] {
        let mut world = World::plain();
        world.token("t", |token| {
            token.expires = expires.map(time);
            token.revoked = revoked;
            token.name_pattern = names.map(str::to_owned);
        });
        world.join("worker-1", 2, "t");
        let events = world.settle();
        assert_eq!(world.member_says("worker-1", "Approved"), expected);
        assert!(world.approval("worker-1").is_none());
        assert_eq!(world.api.tokens["t"].status, None);
        assert_eq!(reasons(&events), [expected.split_once('/').unwrap().1]);
    }
}

#[test]
fn a_token_that_expires_after_the_join_was_good() {
    let mut world = World::plain();
    world.token("t", |token| token.expires = Some(time(START + SECOND)));
    world.join("worker-1", 2, "t");
    world.pass(MINUTE);
    world.settle();
    assert!(world.is_in("worker-1"));
}

#[test]
fn a_token_that_is_not_seen_yet_is_waited_for() {
    let mut world = World::plain();
    world.join("worker-1", 2, "t");
    let decision = world.decide();
    assert!(decision.actions.is_empty());
    assert_eq!(decision.again_at, Some(START + 10 * SECOND));
    world.pass(10 * SECOND);
    world.settle();
    assert_eq!(world.member_says("worker-1", "Approved"), "False/TokenUnknown");
    world.token("t", |_| {});
    world.settle();
    assert!(world.is_in("worker-1"));
}

#[test]
fn a_copied_disk_image_is_told() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.node("worker-2");
    world.publish("worker-2", 2);
    world.vouch("worker-2", 2);
    world.settle();
    assert_eq!(world.says("worker-2", APPROVED_CONDITION), "False/IdentityKnown");

    let mut same_key = record("worker-3", 3);
    same_key.public_key = record("worker-1", 2).public_key;
    world.node("worker-3");
    world.publish_record(same_key, 3);
    world.vouch("worker-3", 3);
    world.settle();
    assert_eq!(world.says("worker-3", APPROVED_CONDITION), "False/KeyTaken");
    assert!(world.approval("worker-2").is_none() && world.approval("worker-3").is_none());
}

#[test]
fn of_two_copies_that_come_at_once_the_elder_is_let_in() {
    let mut world = World::auto();
    world.node("worker-9");
    world.publish("worker-9", 2);
    world.pass(SECOND);
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    assert!(world.is_in("worker-9") && world.approval("worker-1").is_none());
}

#[test]
fn a_member_is_handed_over_to_its_node_with_its_address() {
    let mut world = World::plain();
    world.token("t", |_| {});
    world.join("worker-1", 2, "t");
    world.settle();
    let before = world.approval("worker-1").unwrap();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    assert_eq!(world.approval("worker-1").unwrap(), before, "the very same approval stands on the Node");
    assert_eq!(world.member_says("worker-1", "Node"), "True/NodeFound");
}

#[test]
fn a_deleted_node_takes_its_member_along_and_its_address_rests() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.api.nodes.remove("worker-1");
    let events = world.settle();
    assert!(world.api.members.is_empty());
    assert_eq!(reasons(&events), ["MemberDeleted"]);
    assert_eq!(world.ledger().live().count(), 0);
    world.approved("worker-2", 3);
    assert_eq!(world.address("worker-2"), "10.98.0.2", "the address of the first rests");
}

#[test]
fn a_node_that_comes_back_gets_its_address_again() {
    let mut world = World::auto();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    world.api.nodes.remove("worker-1");
    world.settle();
    world.pass(QUARANTINE * SECOND / 2);
    world.approved("worker-2", 3);
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    assert_eq!(world.address("worker-1"), "10.98.0.1");
}

#[test]
fn a_node_that_went_while_no_controller_ran_is_noticed_by_its_claim() {
    let mut world = World::auto();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    world.api.nodes.remove("worker-1");
    world.restart();
    world.settle();
    world.now = world.decide().again_at.unwrap();
    world.settle();
    assert_eq!(world.ledger().live().count(), 0);
}

#[test]
fn what_a_new_leader_does_not_see_yet_is_not_gone() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    world.peer("phone", 50, |peer| peer.node = Some("worker-1".into()));
    world.settle();
    let node = world.api.nodes.remove("worker-1").unwrap();
    let peer = world.api.peers.remove("phone").unwrap();
    world.restart();
    world.pass(SECOND);
    assert!(world.decide().actions.is_empty(), "the watch of Nodes is behind that of Members and of the ledger");
    let before = world.ledger();
    world.api.nodes.insert("worker-1".into(), node);
    world.api.peers.insert("phone".into(), peer);
    world.settle();
    assert_eq!(world.ledger(), before);
    assert!(world.is_in("worker-1"));
    // But what was seen to go is gone.
    world.api.nodes.remove("worker-1");
    world.settle();
    world.api.peers.remove("phone");
    world.settle();
    assert!(world.api.members.is_empty());
    assert_eq!(world.ledger().live().count(), 0);
}

#[test]
fn a_successor_of_a_deleted_node_is_no_impostor() {
    let mut world = World::auto();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    // Deleted and made anew by another machine before the controller looks again.
    world.node("worker-1");
    world.publish("worker-1", 3);
    world.settle();
    assert_eq!(world.approval("worker-1").unwrap().identity, id(3));
    assert_eq!(world.address("worker-1"), "10.98.0.2");
    // But from then on the identity is pinned again.
    world.publish("worker-1", 2);
    world.settle();
    assert_eq!(world.approval("worker-1").unwrap().identity, id(3));
}

#[test]
fn approvals_of_before_there_was_a_ledger_are_taken_over() {
    let mut world = World::plain();
    world.node("worker-1");
    world.publish("worker-1", 2);
    let old = Approval {
        network: id(1),
        name: "worker-1".parse().unwrap(),
        identity: id(2),
        addresses: nets(&["10.98.0.77/32"]),
        routes: vec![],
        pod_cidrs: vec![],
        endpoints: vec![],
        relays: vec![],
        location: None,
        serial: 3,
    };
    world.annotate("worker-1", &annotations::of_approval(&old.sign(&secret(1).identity())), Writer::Controller);
    world.settle();
    assert_eq!(world.address("worker-1"), "10.98.0.77");
    assert_eq!(world.approval("worker-1").unwrap().addresses.len(), 2, "the other family comes along");
    assert_eq!(world.ledger().pinned(&"worker-1".parse().unwrap()), Some((77, id(2))));
}

#[test]
fn an_approval_that_somebody_kept_is_revoked_when_it_is_brought_back() {
    let mut world = World::plain();
    world.approved("worker-1", 2);
    let kept = annotations::of_approval(&world.signed_approval("worker-1").unwrap());
    world.api.nodes.remove("worker-1");
    world.settle();
    world.pass(MINUTE);
    world.restart();
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.annotate("worker-1", &kept, Writer::Controller);
    let events = world.settle();
    assert!(!world.is_in("worker-1"));
    assert!(world.approval("worker-1").unwrap().is_revoked());
    assert!(reasons(&events).contains(&"Revoked"));
    world.pass(MINUTE);
    world.vouch("worker-1", 2);
    world.settle();
    assert_eq!(world.address("worker-1"), "10.98.0.1", "a person's word of later lets it in again");
}

#[test]
fn a_machine_whose_cloud_claim_was_deleted_is_out_at_once_and_stays_out() {
    let mut world = World::auto();
    let claim = CloudClaim {
        kind: CloudKind::NodeClaim,
        name: "default-x7k2p".into(),
        node: None,
        provider_id: Some("test://worker-1".into()),
        instance_type: None,
        gone: None,
    };
    world.api.claims.insert((claim.kind, claim.name.clone()), claim.clone());
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.vouch("worker-1", 2);
    world.settle();
    assert!(world.is_in("worker-1"));
    world.pass(MINUTE);
    world.api.claims.clear();
    let events = world.settle();
    assert!(world.approval("worker-1").unwrap().is_revoked());
    assert_eq!(reasons(&events), ["Revoked", "MemberDeleted"]);
    assert_eq!(world.says("worker-1", APPROVED_CONDITION), "False/CloudGone");
    assert_eq!(world.ledger().live().count(), 0);
    assert!(world.api.members.is_empty());
    world.restart();
    world.settle();
    assert!(!world.is_in("worker-1"), "also for a controller that did not see it happen");
    assert_eq!(world.says("worker-1", APPROVED_CONDITION), "False/Revoked");
}

#[test]
fn a_member_without_a_node_goes_with_its_cloud_claim() {
    let mut world = World::plain();
    let claim = CloudClaim {
        kind: CloudKind::Machine,
        name: "cluster/worker-1".into(),
        node: Some("worker-1".into()),
        provider_id: None,
        instance_type: None,
        gone: None,
    };
    world.api.claims.insert((claim.kind, claim.name.clone()), claim.clone());
    world.token("t", |_| {});
    world.join("worker-1", 2, "t");
    world.settle();
    world.pass(MINUTE);
    world.api.claims.clear();
    world.settle();
    assert!(world.api.members.is_empty());
    assert_eq!(world.ledger().live().count(), 0);
}

#[test]
fn a_successor_of_a_deleted_cloud_machine_is_let_in() {
    let mut world = World::auto();
    let claim = |name: &str| CloudClaim {
        kind: CloudKind::NodeClaim,
        name: name.into(),
        node: Some("worker-1".into()),
        provider_id: None,
        instance_type: None,
        gone: None,
    };
    world.api.claims.insert((CloudKind::NodeClaim, "a".into()), claim("a"));
    world.settle();
    world.api.claims.clear();
    world.settle();
    world.pass(MINUTE);
    world.node("worker-1");
    world.publish("worker-1", 2);
    world.settle();
    assert!(world.is_in("worker-1"));
}

#[test]
fn a_node_that_is_being_deleted_keeps_its_approval_and_gets_no_first_one() {
    let mut world = World::auto();
    world.approved("worker-1", 2);
    world.api.edit_node("worker-1", |node| node.metadata.deletion_timestamp = Some(time(START)));
    world.node("worker-2");
    world.publish("worker-2", 3);
    world.api.edit_node("worker-2", |node| node.metadata.deletion_timestamp = Some(time(START)));
    world.settle();
    assert!(world.is_in("worker-1") && world.approval("worker-2").is_none());
}

#[test]
fn when_addresses_run_out_it_is_told_and_looked_after() {
    let mut world = World::auto();
    let small = keystone_mesh_core::network::Network {
        id: id(1),
        ipv4: "10.98.0.0/29".parse().unwrap(),
        ipv6: keystone_mesh_core::network::default_ipv6(id(1)),
        relays: vec![],
        gateways: vec![],
        serial: 2,
    };
    let small = small.sign(&secret(1).identity()).unwrap();
    world.api.network.as_mut().unwrap().data = Some(small.to_map());
    for byte in 2..9 {
        world.node(&format!("worker-{byte}"));
        world.publish(&format!("worker-{byte}"), byte);
        world.pass(SECOND);
    }
    world.settle();
    assert!(world.is_in("worker-7"));
    assert_eq!(world.says("worker-8", APPROVED_CONDITION), "False/AddressesExhausted");
    assert_eq!(world.decide().again_at, Some(world.now + MINUTE));
    world.api.nodes.remove("worker-3");
    world.settle();
    assert!(!world.is_in("worker-8"), "the address rests first");
    world.pass(QUARANTINE * SECOND);
    world.settle();
    assert_eq!(world.address("worker-8"), "10.98.0.2");
}

#[test]
fn a_member_that_is_no_node_is_told_to_be_absent_and_stays() {
    const DAY: u64 = 24 * 60 * MINUTE;
    let mut world = World::plain();
    world.home();
    world.token("t", |_| {});
    world.join("laptop", 2, "t");
    world.settle();
    assert!(world.is_in("laptop"));
    // It is reached, and that is no news; then it is not.
    world.report("home", &[("laptop", Reach::Reached)]);
    world.settle();
    assert_eq!(world.member_says("laptop", "Reached"), "");
    world.pass(SECOND);
    world.report("home", &[("laptop", Reach::Unreached)]);
    assert_eq!(world.decide().actions, []);
    world.now = world.decide().again_at.unwrap();
    let events = world.settle();
    assert_eq!(reasons(&events), ["Unreached"]);
    assert_eq!(world.member_says("laptop", "Reached"), "False/Unreached");
    let status = world.api.members["laptop"].status.clone().unwrap();
    let message = &status.conditions.iter().find(|condition| condition.type_ == "Reached").unwrap().message;
    assert!(message.contains("keystone-mesh remove laptop"), "{message}");
    // After a day it is counted, also by a controller that starts anew; whether it is gone for good only people know.
    let gone = world.now;
    world.restart();
    world.pass(DAY - 1);
    assert_eq!(world.decide().gauges.members_absent, 0);
    assert_eq!(world.decide().again_at, Some(gone / SECOND * SECOND + DAY));
    world.pass(SECOND);
    assert_eq!(world.decide().gauges.members_absent, 1);
    world.pass(1000 * DAY);
    world.settle();
    assert!(world.is_in("laptop"));
    // It comes back.
    world.report("home", &[("laptop", Reach::Reached)]);
    world.pass(MINUTE);
    world.report("home", &[("laptop", Reach::Reached)]);
    world.settle();
    assert_eq!(world.member_says("laptop", "Reached"), "True/Reached");
    assert_eq!(world.decide().gauges.members_absent, 0);
    // As a Node it has the Node's conditions.
    world.node("laptop");
    world.publish("laptop", 2);
    world.settle();
    assert_eq!(world.member_says("laptop", "Reached"), "");
}

#[test]
fn a_member_whose_machine_never_came_says_so() {
    let mut world = World::plain();
    world.vouch("laptop", 2);
    world.settle();
    assert_eq!(world.member_says("laptop", "Approved"), "", "its record may be on its way");
    world.now = world.decide().again_at.unwrap();
    world.settle();
    assert_eq!(world.member_says("laptop", "Approved"), "Unknown/NoRecord");
    world.pass(25 * 60 * MINUTE);
    assert_eq!(world.decide().gauges.members_absent, 1);
    world.publish("laptop", 2);
    world.settle();
    assert_eq!(world.member_says("laptop", "Approved"), "True/Approved");
    assert_eq!(world.decide().gauges.members_absent, 0);
}
