//! Ways that die, come back, move and mislead.

use std::time::Duration;

use keystone_mesh_core::path::{Reason, State};
use keystone_mesh_core::{NodeId, Via};

use crate::nats::{FULL_CONE, PORT_RESTRICTED, SYMMETRIC};
use crate::world::{Place, Relay, World, ms, secs};

/// Two nodes that talk directly, for a while already.
fn established(places: [Place; 2], seed: u64) -> World {
    let mut world = World::new(places, seed);
    world.talk();
    world.run_until(secs(5), World::both_direct).expect("becomes direct");
    world.run(secs(20));
    assert!(world.both_direct());
    world
}

#[test]
fn traffic_leaves_a_dead_direct_way_within_a_second() {
    for after in (0..500).step_by(20) {
        for latency in [ms(1), ms(20), ms(40)] {
            let mut world = established([PORT_RESTRICTED, FULL_CONE], after);
            world.net.latency = latency;
            world.run(secs(5) + ms(after));
            let cut = world.now;
            world.set_direct(false);
            world.run(secs(2));
            for node in &world.nodes {
                let moved = node.selections.iter().find(|(at, via)| *at > cut && matches!(via, Some(Via::Relay(_))));
                let took = moved.expect("moves to the relay").0 - cut;
                assert!(took <= secs(1), "cut after {after} ms, latency {latency:?}: {took:?}");
            }
            let gap = world.longest_gap(0, cut);
            assert!(gap <= secs(1) + ms(200), "cut after {after} ms: no data for {gap:?}");
            let reason = world.nodes[0].agent.status(world.now).reason;
            assert!(matches!(reason, Some(Reason::Died { .. })), "{reason:?}");
        }
    }
}

#[test]
fn an_end_that_only_answers_follows_the_other_to_the_relay() {
    for after in (0..500).step_by(20) {
        for latency in [ms(1), ms(20)] {
            let mut world = established([PORT_RESTRICTED, FULL_CONE], after);
            world.net.latency = latency;
            world.flow(0, ms(10));
            world.answer(1);
            world.run(secs(5) + ms(after));
            let cut = world.now;
            world.set_direct(false);
            world.run(secs(3));
            let gap = world.longest_gap(0, cut);
            assert!(gap <= secs(1) + ms(100), "cut after {after} ms, latency {latency:?}: no answer for {gap:?}");
        }
    }
}

#[test]
fn a_way_that_dies_in_one_direction_is_left_by_both() {
    let mut world = established([PORT_RESTRICTED, FULL_CONE], 1);
    world.net.up = [false, true];
    assert!(world.run_until(secs(3), |world| !world.direct(0) && !world.direct(1)).is_some());
    world.run(secs(60));
    assert!(!world.direct(0) && !world.direct(1));
}

#[test]
fn a_silent_death_is_noticed_by_the_keepalive() {
    let mut world = established([PORT_RESTRICTED, FULL_CONE], 1);
    world.hush();
    world.run(secs(5));
    world.set_direct(false);
    assert!(world.run_until(secs(30), |world| !world.direct(0) && !world.direct(1)).is_some());
}

#[test]
fn a_healed_link_is_direct_again_soon() {
    for outage in [ms(800), secs(2), secs(10), secs(40)] {
        let mut world = established([PORT_RESTRICTED, PORT_RESTRICTED], 1);
        world.set_direct(false);
        world.run(outage);
        world.set_direct(true);
        let took = world.run_until(secs(100), World::both_direct);
        let limit = outage.mul_f64(2.4) + secs(8);
        assert!(took.is_some_and(|took| took <= limit), "after {outage:?}: {took:?}");
    }
}

#[test]
fn a_link_that_comes_and_goes_does_not_drag_traffic_along() {
    let mut world = established([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    let before = world.nodes[0].selections.len();
    for _ in 0..60 {
        world.set_direct(false);
        world.run(ms(1500));
        world.set_direct(true);
        world.run(ms(500));
    }
    let moves = world.nodes[0].selections.len() - before;
    assert!(moves <= 10, "{moves} moves in two minutes");
}

#[test]
fn the_death_of_the_relay_does_not_touch_a_direct_path() {
    let mut world = established([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    let (from, selections) = (world.now, world.nodes[0].selections.len());
    world.set_relay(false);
    world.run(secs(600));
    assert_eq!(world.nodes[0].selections.len(), selections);
    assert!(world.longest_gap(1, from) <= ms(120));
}

#[test]
fn a_direct_path_without_a_relay_behind_it_is_kept_up_without_traffic() {
    let mut world = established([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    world.set_relay(false);
    world.hush();
    world.run(secs(3600));
    assert!(world.both_direct());
    let from = world.now;
    world.talk();
    world.run(secs(1));
    assert!(world.longest_gap(1, from) <= ms(120), "the first packets arrive");
}

#[test]
fn without_a_relay_a_dead_way_comes_back_when_the_link_does() {
    let mut world = established([FULL_CONE, Place::Public], 1);
    world.set_relay(false);
    world.set_direct(false);
    world.run(secs(40));
    assert_eq!(world.state(0), State::Connecting);
    world.set_direct(true);
    let took = world.run_until(secs(20), World::both_direct);
    assert!(took.is_some(), "{took:?}");
}

#[test]
fn of_two_relays_the_other_one_takes_over() {
    let mut world = World::new([SYMMETRIC, SYMMETRIC], 1);
    let spare = NodeId::from_bytes([8; 32]);
    world.relays.push(Relay { id: spare, up: true, latency: ms(90) });
    world.relays_changed();
    world.talk();
    world.run(secs(30));
    // The relay still holds its connections, and delivers nothing.
    world.relays[0].latency = secs(3600);
    let took =
        world.run_until(secs(3), |world| world.nodes.iter().all(|node| node.selected == Some(Via::Relay(spare))));
    assert!(took.is_some_and(|took| took <= ms(1200)), "{took:?}");
}

#[test]
fn a_rebooted_nat_costs_a_second_and_the_path_is_direct_again() {
    for (a, b) in [(PORT_RESTRICTED, PORT_RESTRICTED), (SYMMETRIC, FULL_CONE), (SYMMETRIC, Place::Public)] {
        let mut world = established([a, b], 1);
        let from = world.now;
        world.nats[0].reboot();
        world.run(secs(20));
        assert!(world.both_direct(), "{a:?} x {b:?}");
        for n in 0..2 {
            let gap = world.longest_gap(n, from);
            assert!(gap <= secs(1) + ms(200), "{a:?} x {b:?}: {gap:?} at node {n}");
        }
    }
}

#[test]
fn a_node_that_moves_to_another_network_is_direct_there_within_two_seconds() {
    let mut world = established([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    world.nodes[0].v4 = "10.7.0.9:51840".parse().unwrap();
    world.nats[0].public = "203.0.113.77".parse().unwrap();
    world.nats[0].reboot();
    let moved = world.now;
    let candidates = world.candidates(0);
    world.nodes[0].agent.set_local(candidates.into(), world.now);
    world.nodes[0].agent.handle_network_changed(world.now);
    world.drain();
    let new = world.nats[0].public;
    let there = |world: &World| match world.nodes[1].selected {
        Some(Via::Direct(addr)) => addr.ip() == new && world.direct(0),
        Some(Via::Relay(_)) | None => false,
    };
    assert!(world.run_until(secs(2), there).is_some());
    assert!(world.longest_gap(1, moved) <= secs(1) + ms(200));
}

#[test]
fn a_restarted_node_is_direct_again_within_two_seconds() {
    for restarted in [&[0][..], &[1], &[0, 1]] {
        let mut world = established([PORT_RESTRICTED, PORT_RESTRICTED], 1);
        restarted.iter().for_each(|n| world.restart(*n));
        let from = world.now;
        assert!(world.run_until(secs(2), World::both_direct).is_some(), "{restarted:?}");
        world.run(secs(5));
        for n in 0..2 {
            assert!(world.longest_gap(n, from) <= ms(500), "{restarted:?}");
        }
    }
}

#[test]
fn a_node_restarted_while_the_relay_is_away_finds_its_direct_way_by_the_hint() {
    // The peer's record does not have the address that worked: it was learned from the peer's ping.
    let mut world = established([FULL_CONE, FULL_CONE], 1);
    world.set_relay(false);
    world.restart(0);
    assert!(world.run_until(ms(500), World::both_direct).is_some());
}

#[test]
fn jitter_does_not_make_traffic_flap_between_equal_ways() {
    const SEEDS: usize = 10;
    let mut moves = 0;
    for seed in 0..SEEDS {
        let mut world = World::without_records([Place::Public, Place::Public], seed as u64);
        for n in 0..2 {
            world.nodes[n].v6 = Some(format!("[2001:db8::{}]:51840", n + 1).parse().unwrap());
        }
        world.exchange_records();
        world.net.jitter = ms(60);
        world.flow(0, ms(300));
        world.flow(1, ms(300));
        world.run(secs(3600));
        // The first two selections are the relay, and away from it.
        moves += world.nodes.iter().map(|node| node.selections.len() - 2).sum::<usize>();
    }
    // Round trips between 40 and 160 ms: chance alone may still move a node once in an hour.
    assert!(moves <= 2 * SEEDS, "{moves} moves in {} hours", 2 * SEEDS);
}

#[test]
fn a_lan_way_takes_over_from_one_through_the_internet() {
    let mut world = World::without_records([FULL_CONE, Place::SameLan], 1);
    for n in 0..2 {
        world.nodes[n].v6 = Some(format!("[2001:db8::{}]:51840", n + 1).parse().unwrap());
    }
    world.net.lan_up = false;
    world.exchange_records();
    world.talk();
    world.run(secs(30));
    assert_eq!(world.nodes[0].selected, world.nodes[1].v6.map(Via::Direct));
    world.net.lan_up = true;
    let lan = Some(Via::Direct(world.nodes[1].v4));
    assert!(world.run_until(secs(600), |world| world.nodes[0].selected == lan).is_some());
    world.net.lan_up = false;
    assert!(world.run_until(secs(1), |world| world.nodes[0].selected != lan).is_some());
    assert!(world.direct(0), "the other direct way stood by");
}

#[test]
fn one_way_traffic_stays_direct_and_costs_a_ping_a_second() {
    let mut world = established([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    world.hush();
    world.run(secs(1));
    world.flow(0, ms(20));
    let before = (world.nodes[0].selections.len(), world.nodes[0].probes.len());
    world.run(secs(300));
    assert_eq!(world.nodes[0].selections.len(), before.0);
    let probes = world.nodes[0].probes.len() - before.1;
    assert!(probes <= 300 * 4 / 3, "{probes} probes in 300 s");
}

#[test]
fn a_path_that_is_hardly_used_outlives_the_nats_timeout() {
    let mut world = established([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    world.hush();
    world.run(secs(1));
    world.flow(0, secs(100));
    let before = world.nodes[0].selections.len();
    world.run(secs(1000));
    assert_eq!(world.nodes[0].selections.len(), before);
    assert!(world.both_direct());
}

#[test]
fn a_way_that_becomes_too_narrow_is_left() {
    let mut world = established([PORT_RESTRICTED, FULL_CONE], 1);
    world.net.largest = [1200; 2];
    let took = world.run_until(secs(2), |world| !world.direct(0) && !world.direct(1));
    assert!(took.is_some_and(|took: Duration| took <= secs(1)), "{took:?}");
    world.run(secs(20));
    let reason = world.nodes[0].agent.status(world.now).reason;
    assert!(matches!(reason, Some(Reason::LargeProbesLost { .. })), "{reason:?}");
}
