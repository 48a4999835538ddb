//! Becoming direct: every pair of NATs, and what else stands between two nodes.

use std::time::Instant;

use keystone_mesh_core::path::{Nat, Observations, Outcome, Reason, State};
use keystone_mesh_core::{NodeId, Via};

use crate::world::nat::{Filtering, Mapping};
use crate::world::{Place, Relay, World, ms, secs};

pub const FULL_CONE: Place = Place::Behind(Mapping::EndpointIndependent, Filtering::EndpointIndependent);
pub const RESTRICTED: Place = Place::Behind(Mapping::EndpointIndependent, Filtering::AddressDependent);
pub const PORT_RESTRICTED: Place = Place::Behind(Mapping::EndpointIndependent, Filtering::AddressAndPortDependent);
pub const SYMMETRIC: Place = Place::Behind(Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent);

/// What must become direct: endpoint-independent mapping on one side at least, against anything but symmetric with a
/// filter by port on this side.
fn can_be_punched(a: Place, b: Place) -> bool {
    let beats_symmetric = |place| [Place::Public, FULL_CONE, RESTRICTED].contains(&place);
    match (a == SYMMETRIC, b == SYMMETRIC) {
        (true, true) => false,
        (true, false) => beats_symmetric(b),
        (false, true) => beats_symmetric(a),
        (false, false) => true,
    }
}

#[test]
fn every_pair_of_nats_becomes_direct_within_two_seconds_or_stays_relayed_where_it_must() {
    let places = [Place::Public, FULL_CONE, RESTRICTED, PORT_RESTRICTED, SYMMETRIC];
    for a in places {
        for b in places {
            for starts in [0, 1] {
                let mut world = World::new([a, b], 7);
                world.flow(starts, ms(50));
                let took = world.run_until(secs(30), World::both_direct);
                let pair = format!("{a:?} x {b:?}, {starts} starts");
                if can_be_punched(a, b) {
                    assert!(took.is_some_and(|took| took <= secs(2)), "{pair}: {took:?}");
                } else {
                    assert_eq!(took, None, "{pair}");
                    assert_eq!(world.state(0), State::Relayed, "{pair}");
                    let reason = world.nodes[0].agent.status(world.now).reason;
                    assert!(matches!(reason, Some(Reason::NoAnswer { .. })), "{pair}: {reason:?}");
                }
            }
        }
    }
}

#[test]
fn a_slow_relay_delays_punching_but_two_seconds_suffice() {
    let mut world = World::new([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    world.relays[0].latency = ms(300);
    world.net.latency = ms(100);
    world.flow(0, ms(50));
    assert!(world.run_until(secs(2), World::both_direct).is_some());
}

#[test]
fn the_relay_is_selected_before_the_first_packet() {
    let mut world = World::new([PORT_RESTRICTED, SYMMETRIC], 1);
    for node in &world.nodes {
        assert_eq!(node.selections, [(world.start, Some(Via::Relay(world.relays[0].id)))]);
    }
    world.flow(0, ms(50));
    world.run(ms(60));
    assert_eq!(world.nodes[1].arrived, [(world.now, Via::Relay(world.relays[0].id))]);
}

#[test]
fn a_node_without_the_peers_record_becomes_direct_by_its_punch() {
    let mut world = World::without_records([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    for n in 0..2 {
        let candidates = world.candidates(n);
        world.nodes[n].agent.set_local(candidates.into(), world.now);
    }
    world.flow(0, ms(50));
    assert!(world.run_until(secs(2), World::both_direct).is_some());
}

#[test]
fn nodes_of_one_lan_meet_there_although_the_nat_does_not_hairpin() {
    let mut world = World::new([SYMMETRIC, Place::SameLan], 1);
    world.flow(0, ms(50));
    assert!(world.run_until(secs(1), World::both_direct).is_some());
    assert_eq!(world.nodes[0].selected, Some(Via::Direct(world.nodes[1].v4)));
}

#[test]
fn ipv6_beats_two_hard_nats() {
    let mut world = World::without_records([SYMMETRIC, SYMMETRIC], 1);
    for n in 0..2 {
        world.nodes[n].v6 = Some(format!("[2001:db8::{}]:51840", n + 1).parse().unwrap());
    }
    world.exchange_records();
    world.flow(0, ms(50));
    assert!(world.run_until(secs(1), World::both_direct).is_some());
    assert_eq!(world.nodes[0].selected, world.nodes[1].v6.map(Via::Direct));
}

#[test]
fn without_a_relay_a_public_peer_is_reached() {
    let mut world = World::without_records([SYMMETRIC, Place::Public], 1);
    world.set_relay(false);
    world.exchange_records();
    assert_eq!(world.nodes[0].selected, None);
    world.flow(0, ms(50));
    assert!(world.run_until(ms(500), World::both_direct).is_some());
}

#[test]
fn without_a_relay_and_without_a_way_the_reason_says_so_and_a_relay_helps_at_once() {
    let mut world = World::new([SYMMETRIC, PORT_RESTRICTED], 1);
    world.set_relay(false);
    world.flow(0, ms(50));
    world.run(secs(60));
    let status = world.nodes[0].agent.status(world.now);
    assert_eq!((status.state, status.reason), (State::Connecting, Some(Reason::NoPath)));
    world.set_relay(true);
    assert_eq!(world.nodes[0].selected, Some(Via::Relay(world.relays[0].id)));
}

#[test]
fn thirty_percent_of_loss_delays_but_does_not_prevent_direct() {
    for seed in 0..20 {
        let mut world = World::new([PORT_RESTRICTED, RESTRICTED], seed);
        world.net.loss = 300;
        world.talk();
        assert!(world.run_until(secs(30), World::both_direct).is_some(), "seed {seed}");
    }
}

#[test]
fn where_large_packets_are_lost_traffic_stays_on_the_relay_and_the_reason_says_so() {
    let mut world = World::new([FULL_CONE, Place::Public], 1);
    world.net.largest = [1200; 2];
    world.talk();
    world.run(secs(60));
    for n in 0..2 {
        let status = world.nodes[n].agent.status(world.now);
        assert_eq!(status.state, State::Relayed);
        assert!(matches!(status.reason, Some(Reason::LargeProbesLost { len: 1312, .. })), "{:?}", status.reason);
        assert!(status.tried.iter().any(|tried| tried.outcome == Outcome::LargeProbesLost));
    }
    let probes = world.nodes[0].probes.len();
    assert!(probes < 250, "asking each other about it does not end: {probes} probes a minute");

    world.net.largest = [1472; 2];
    assert!(world.run_until(secs(150), World::both_direct).is_some());
}

#[test]
fn a_way_that_is_too_narrow_in_one_direction_is_used_in_the_other_and_not_asked_without_end() {
    let mut world = World::new([FULL_CONE, Place::Public], 1);
    world.net.largest = [1200, 1472];
    world.talk();
    world.run(secs(60));
    assert!(!world.direct(0) && world.direct(1));
    let from = world.now;
    world.run(secs(600));
    let large = |(at, _, len): &&(Instant, Via, usize)| *at > from && *len == 1312;
    let probes = world.nodes[0].probes.iter().filter(large).count();
    assert!(probes <= 150, "{probes} full-size probes in 10 minutes");
}

#[test]
fn a_peer_that_names_no_address_is_relayed_for_that_reason() {
    let mut world = World::without_records([Place::Public, Place::Public], 1);
    world.nodes[0].agent.set_eager(true, world.now);
    world.net.up = [false; 2];
    world.run(secs(20));
    assert_eq!(world.nodes[0].agent.status(world.now).reason, Some(Reason::NoCandidates));
}

#[test]
fn of_two_relays_the_one_where_the_peer_answers_carries_traffic() {
    let mut world = World::new([SYMMETRIC, SYMMETRIC], 1);
    let deaf = NodeId::from_bytes([8; 32]);
    let answering = world.relays[0].id;
    world.relays.insert(0, Relay { id: deaf, up: true, latency: secs(3600) });
    world.relays_changed();
    world.flow(0, ms(50));
    assert!(world.run_until(secs(1), |world| world.nodes[0].selected == Some(Via::Relay(answering))).is_some());
}

#[test]
fn status_explains_itself_while_probing_and_once_direct() {
    let mut world = World::new([PORT_RESTRICTED, PORT_RESTRICTED], 1);
    let idle = world.nodes[0].agent.status(world.now);
    assert_eq!((idle.state, idle.reason), (State::Idle, Some(Reason::NoDemand)));
    world.flow(0, ms(50));
    world.run(ms(110));
    let probing = world.nodes[0].agent.status(world.now);
    assert!(matches!(probing.reason, Some(Reason::Probing { addresses: 2, .. })), "{:?}", probing.reason);
    world.run(secs(10));
    let direct = world.nodes[0].agent.status(world.now);
    assert_eq!((direct.state, direct.reason), (State::Direct, None));
    assert_eq!(direct.rtt, Some(ms(40)));
    let seen_as = direct.seen_as.unwrap();
    assert_eq!(seen_as.ip(), world.nats[0].public);

    let mut observations = Observations::default();
    observations.record("192.0.2.1:443".parse().unwrap(), seen_as);
    observations.record("203.0.113.11:1".parse().unwrap(), seen_as);
    assert_eq!(observations.nat(&[world.nodes[0].v4]), Nat::EndpointIndependent);
}
