//! Whether the mesh reaches a node: the condition, the startup taint, who is asked, what is counted.

use keystone_mesh_api::STARTUP_TAINT;

use super::world::*;
use crate::decide::{Action, Effect};
use crate::view::{APPROVED_CONDITION, READY_CONDITION, ROUTES_CONDITION, Reach, Settings};

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

/// The status writes of Nodes among some actions, by the conditions that each carries.
fn status_writes(actions: &[Action]) -> Vec<Vec<String>> {
    let of = |action: &Action| {
        let Effect::NodeConditions { conditions, .. } = &action.effect else { return None };
        Some(conditions.iter().map(|condition| condition.type_.clone()).collect())
    };
    actions.iter().filter_map(of).collect()
}

#[test]
fn all_that_there_is_to_say_about_a_node_costs_one_write() {
    let mut world = World::new(Settings::default());
    world.node("worker-1");
    world.publish("worker-1", 2);
    let mut writes = Vec::new();
    for _ in 0..4 {
        let actions = world.decide().actions;
        writes.extend(status_writes(&actions));
        world.apply(&actions);
    }
    assert_eq!(writes, [[APPROVED_CONDITION, READY_CONDITION]]);
    assert_eq!(world.taints("worker-1"), [STARTUP_TAINT]);
    // A write carries also what stays, for what is not applied again is taken away.
    world.vouch("worker-1", 2);
    world.pods("worker-1", &["10.98.0.0/24"]);
    world.settle();
    world.pods("worker-1", &[]);
    let writes = status_writes(&world.decide().actions);
    assert_eq!(writes, [[APPROVED_CONDITION, READY_CONDITION, ROUTES_CONDITION]]);
}

#[test]
fn a_taint_that_cannot_be_put_on_hides_no_condition_for_long() {
    let mut world = World::new(Settings::default());
    world.node("worker-1");
    world.publish("worker-1", 2);
    let decision = world.decide();
    assert!(status_writes(&decision.actions).is_empty());
    world.now = decision.again_at.unwrap();
    assert_eq!(status_writes(&world.decide().actions), [[APPROVED_CONDITION]]);
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
