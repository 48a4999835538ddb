//! What an agent must not do: send when nobody asked, send too much, believe too much.

use std::sync::Arc;

use keystone_mesh_core::path::{Candidate, CandidateKind, Config, Output, PathAgent, State};
use keystone_mesh_core::probe::{KeyHint, full_size};
use keystone_mesh_core::{Secret, Via};

use crate::nats::{FULL_CONE, PORT_RESTRICTED, SYMMETRIC};
use crate::world::{MTU, Place, World, ms, secs};

#[test]
fn idle_agents_send_nothing_and_have_no_timer() {
    let mut world = World::new([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    world.run(secs(86_400));
    for node in &mut world.nodes {
        assert!(node.probes.is_empty());
        assert_eq!(node.agent.poll_output(world.now), Output::Idle);
    }
}

#[test]
fn both_agents_go_idle_after_five_minutes_without_traffic_and_do_not_wake_each_other() {
    let mut world = World::new([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    world.talk();
    world.run(secs(60));
    world.hush();
    world.run(secs(290));
    assert!(world.both_direct());
    world.run(secs(120));
    let probes = [0, 1].map(|n| world.nodes[n].probes.len());
    for n in 0..2 {
        assert_eq!(world.state(n), State::Idle);
        assert_eq!(world.nodes[n].selected, Some(Via::Relay(world.relays[0].id)));
    }
    world.run(secs(3600));
    assert_eq!(probes, [0, 1].map(|n| world.nodes[n].probes.len()));
}

#[test]
fn traffic_wakes_idle_agents_and_they_are_direct_again() {
    let mut world = World::new([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    for _ in 0..3 {
        let from = world.now;
        world.talk();
        assert!(world.run_until(secs(2), World::both_direct).is_some());
        assert!(world.longest_gap(0, from) <= ms(120), "the relay carries the first packets");
        world.hush();
        world.run(secs(900));
        assert_eq!((world.state(0), world.state(1)), (State::Idle, State::Idle));
    }
}

#[test]
fn an_eager_agent_keeps_the_path_direct_without_traffic() {
    let mut world = World::new([PORT_RESTRICTED, SYMMETRIC], 1);
    world.nodes[0].agent.set_eager(true, world.now);
    world.drain();
    world.run(secs(7200));
    assert_eq!((world.state(0), world.state(1)), (State::Relayed, State::Relayed));
    world.nodes[0].agent.set_eager(false, world.now);
    world.drain();
    world.run(secs(61));
    assert_eq!((world.state(0), world.state(1)), (State::Idle, State::Idle));

    let mut world = World::new([PORT_RESTRICTED, FULL_CONE], 1);
    world.nodes[0].agent.set_eager(true, world.now);
    world.drain();
    world.run(secs(7200));
    assert!(world.both_direct());
    // Keepalives every 15 s, the relay every 20 s, and as many answers.
    let probes = world.nodes[0].probes.len();
    assert!(probes < 7200 / 4, "{probes} probes in two hours");
}

/// Every direct datagram of a real conversation, replayed from an address of the attacker's.
#[test]
fn replayed_probes_move_nothing_and_are_not_amplified() {
    let mut world = World::new([FULL_CONE, Place::Public], 1);
    world.talk();
    world.run(secs(60));
    let selections = world.nodes[1].selections.len();
    let victim = Via::Direct("192.0.2.66:9".parse().unwrap());
    let recorded: Vec<_> = world.captured.iter().filter(|(by, _)| *by == 0).map(|(_, bytes)| bytes.clone()).collect();
    let mut injected = 0;
    for _ in 0..40 {
        for bytes in &recorded {
            injected += bytes.len();
            world.inject(1, victim, bytes.clone());
        }
        world.run(ms(500));
    }
    world.run(secs(60));
    assert_eq!(world.nodes[1].selections.len(), selections);
    let sent: usize = world.nodes[1].probes.iter().filter(|(_, via, _)| *via == victim).map(|(_, _, len)| len).sum();
    assert!(sent > 0 && sent < injected / 2, "{sent} bytes to the victim for {injected} injected");
    let largest = world.nodes[1].probes.iter().filter(|(_, via, _)| *via == victim).map(|(_, _, len)| len).max();
    assert!(largest < Some(&100), "never a full-size probe to an address that did not answer");
}

#[test]
fn a_flood_of_replayed_pings_from_many_addresses_is_answered_within_the_budget() {
    let mut world = World::new([FULL_CONE, Place::Public], 1);
    world.talk();
    world.run(secs(60));
    let (_, ping) = world.captured.iter().find(|(by, _)| *by == 0).cloned().unwrap();
    let before = world.nodes[1].probes.len();
    for n in 0..20_000u32 {
        let [.., a, b] = n.to_be_bytes();
        let source = Via::Direct(([192, 0, a, b], 4000).into());
        world.inject(1, source, ping.clone());
        if n % 20 == 0 {
            world.run(ms(10));
        }
    }
    // 10 s: pongs and pings have a budget of 64 + 32/s each; checks of what works come out of the same.
    let sent = world.nodes[1].probes.len() - before;
    assert!(sent <= 2 * (64 + 330), "{sent} probes in 10 s");
    assert!(world.both_direct());
}

#[test]
fn punches_that_cross_on_a_slow_relay_do_not_answer_each_other_for_ever() {
    let mut world = World::new([SYMMETRIC, SYMMETRIC], 1);
    world.relays[0].latency = secs(2);
    world.talk();
    for _ in 0..5 {
        (0..2).for_each(|n| world.nodes[n].agent.handle_network_changed(world.now));
        world.run(ms(500));
    }
    world.run(secs(400));
    let from = world.now;
    world.run(secs(100));
    let probes = world.nodes[0].probes.iter().filter(|(at, ..)| *at > from).count();
    assert!(probes < 60, "{probes} probes in 100 s");
}

#[test]
fn the_worst_case_stays_within_the_probe_budget() {
    // Sixteen addresses that never answer, no relay, traffic, and the network changing every 100 ms.
    let mut world = World::without_records([Place::Public, Place::Public], 1);
    let dead: Vec<_> =
        (1..200u8).map(|n| Candidate { kind: CandidateKind::Host, addr: ([198, 18, 0, n], 51840).into() }).collect();
    world.nodes[0].agent.set_remote(&dead, world.now);
    world.flow(0, ms(50));
    for _ in 0..600 {
        world.nodes[0].agent.handle_network_changed(world.now);
        world.run(ms(100));
    }
    // Asking and answering have a budget each.
    let probes = world.nodes[0].probes.len();
    assert!(probes <= 2 * (64 + 32 * 60 + 1), "{probes} probes in a minute");
}

#[test]
fn without_events_the_worst_case_is_few_probes() {
    let mut world = World::without_records([Place::Public, Place::Public], 1);
    world.set_relay(false);
    let dead: Vec<_> =
        (1..200u8).map(|n| Candidate { kind: CandidateKind::Host, addr: ([198, 18, 0, n], 51840).into() }).collect();
    world.nodes[0].agent.set_remote(&dead, world.now);
    world.flow(0, ms(50));
    world.run(secs(600));
    // 12 addresses, 6 pings each, a round every 15 s.
    let probes = world.nodes[0].probes.len();
    assert!(probes <= 12 * 6 * (600 / 12 + 3), "{probes} probes in 10 minutes");
}

#[test]
fn addresses_of_the_mesh_itself_and_of_nobody_are_never_probed() {
    let mut world = World::without_records([Place::Public, Place::Public], 1);
    let bad = ["10.98.0.7:51840", "127.0.0.1:51840", "169.254.169.254:80", "224.0.0.1:1", "[fe80::1]:51840"];
    let bad: Vec<_> =
        bad.iter().map(|addr| Candidate { kind: CandidateKind::Host, addr: addr.parse().unwrap() }).collect();
    world.nodes[0].agent.set_remote(&bad, world.now);
    world.nodes[1].agent.set_local(bad.clone().into(), world.now);
    world.flow(0, ms(50));
    world.run(secs(300));
    for (_, via, _) in &world.nodes[0].probes {
        assert!(bad.iter().all(|bad| *via != Via::Direct(bad.addr)), "{via}");
    }
}

#[test]
fn an_agents_own_address_in_the_peers_record_is_not_probed() {
    let mut world = World::without_records([Place::Public, Place::Public], 1);
    let own = Candidate { kind: CandidateKind::Host, addr: "172.17.0.1:51840".parse().unwrap() };
    world.nodes[0].agent.set_local(Arc::new([own]), world.now);
    world.nodes[0].agent.set_remote(&[own], world.now);
    world.flow(0, ms(50));
    world.run(secs(60));
    assert!(world.nodes[0].probes.iter().all(|(_, via, _)| *via != Via::Direct(own.addr)));
}

#[test]
fn a_thousand_idle_agents_are_small() {
    let key = Secret::from_bytes([1; 32]).wireguard(0).public_key();
    let config = Arc::new(Config { own: KeyHint::of(&key), full_size: full_size(MTU), excluded: vec![] });
    let idle = PathAgent::new(config, [0; 16]);
    let size = size_of_val(&idle);
    assert!(size <= 384, "{size} bytes");
}
