//! The lab's own parts, each against what its name promises. Every test runs in a sandbox of its own.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Result;
use keystone_lab::ping::Pinger;
use keystone_lab::sandbox::in_own_world;
use keystone_lab::{Host, Inbound, Nat, Router, RouterSpec, Upstream, Wire, World, probe};

const PATIENCE: Duration = Duration::from_secs(5);
const EVERY: Duration = Duration::from_millis(10);
const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// A world with two public hosts, a router of the given kind and one host behind it.
struct Street {
    world: World,
    a: Host,
    b: Host,
    router: Router,
    home: Host,
}

fn street(spec: RouterSpec) -> Result<Street> {
    let world = World::new(Wire::Offloaded)?;
    let (a, b) = (world.public_host("a")?, world.public_host("b")?);
    let router = world.router("router", spec)?;
    let home = router.host("home")?;
    Ok(Street { world, a, b, router, home })
}

fn kind(nat: Nat) -> RouterSpec {
    RouterSpec { nat, ..RouterSpec::default() }
}

fn socket(host: &Host) -> Result<UdpSocket> {
    let socket = host.udp(ANY)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(socket)
}

#[test]
fn every_kind_of_nat_behaves_as_it_is_called() {
    in_own_world("every_kind_of_nat_behaves_as_it_is_called", || {
        let world = World::new(Wire::Offloaded)?;
        let (a, b) = (world.public_host("a")?, world.public_host("b")?);
        for (number, nat) in Nat::ALL.into_iter().enumerate() {
            let home = world.router(&format!("router-{number}"), kind(nat))?.host(&format!("home-{number}"))?;
            assert_eq!(probe::nat_behaviour(&home, &a, &b)?, nat.promise(), "{nat}");
        }
        Ok(())
    });
}

#[test]
fn a_router_behind_a_carriers_nat_shows_the_harder_of_both() {
    in_own_world("a_router_behind_a_carriers_nat_shows_the_harder_of_both", || {
        let world = World::new(Wire::Offloaded)?;
        let (a, b) = (world.public_host("a")?, world.public_host("b")?);
        for (number, (inner, outer, seen)) in [
            (Nat::PortRestricted, Nat::PortRestricted, Nat::PortRestricted),
            (Nat::PortRestricted, Nat::Symmetric, Nat::Symmetric),
            (Nat::Symmetric, Nat::PortRestricted, Nat::Symmetric),
            (Nat::FullCone, Nat::FullCone, Nat::FullCone),
            (Nat::PortRestricted, Nat::FullCone, Nat::PortRestricted),
        ]
        .into_iter()
        .enumerate()
        {
            let carrier_lan = "100.64.0.1/24".parse()?;
            let carrier = world.router(&format!("carrier-{number}"), RouterSpec { lan: carrier_lan, ..kind(outer) })?;
            let upstream = Upstream::Behind(carrier);
            let router = world.router(&format!("router-{number}"), RouterSpec { upstream, ..kind(inner) })?;
            let home = router.host(&format!("home-{number}"))?;
            assert_eq!(probe::nat_behaviour(&home, &a, &b)?, seen.promise(), "{inner} behind {outer}");
        }
        Ok(())
    });
}

#[test]
fn two_hosts_of_one_lan_with_the_same_port_keep_apart() {
    in_own_world("two_hosts_of_one_lan_with_the_same_port_keep_apart", || {
        let Street { a, router, home, .. } = street(kind(Nat::PortRestricted))?;
        let second = router.host("second")?;
        let server = socket(&a)?;
        let (first, second) = (home.udp("0.0.0.0:51840".parse()?)?, second.udp("0.0.0.0:51840".parse()?)?);
        let outer = probe::outer_address(&first, &server, &a)?;
        assert_eq!(outer, SocketAddr::new(router.wan_v4().into(), 51840), "the first one keeps its port");
        assert_ne!(probe::outer_address(&second, &server, &a)?.port(), 51840);
        Ok(())
    });
}

/// Both ends send; each opens its own router for the other.
fn punch(a: &Host, b: &Host, server: &Host) -> Result<bool> {
    let (left, right, seer) = (socket(a)?, socket(b)?, socket(server)?);
    let left_outer = probe::outer_address(&left, &seer, server)?;
    let right_outer = probe::outer_address(&right, &seer, server)?;
    left.send_to(b"open", right_outer)?;
    right.send_to(b"open", left_outer)?;
    probe::is_let_in(&left, left_outer, &right, &seer)
}

#[test]
fn holes_are_punched_where_both_sides_map_alike_and_a_router_that_answers_spoils_it() {
    in_own_world("holes_are_punched_where_both_sides_map_alike_and_a_router_that_answers_spoils_it", || {
        let world = World::new(Wire::Offloaded)?;
        let server = world.public_host("server")?;
        let home = world.router("home-router", kind(Nat::PortRestricted))?.host("home")?;
        let cloud = world.router("cloud-router", kind(Nat::PortRestricted))?.host("cloud")?;
        let hard = world.router("hard-router", kind(Nat::Symmetric))?.host("hard")?;
        let answers = RouterSpec { inbound: Inbound::Answer, ..kind(Nat::PortRestricted) };
        let rude = world.router("rude-router", answers)?.host("rude")?;
        assert!(punch(&home, &cloud, &server)?, "port-restricted and port-restricted");
        assert!(!punch(&home, &hard, &server)?, "port-restricted and symmetric");
        assert!(!punch(&home, &rude, &server)?, "the early packet takes the port");
        Ok(())
    });
}

#[test]
fn a_cut_cable_stops_traffic_until_it_is_plugged_in_again() {
    in_own_world("a_cut_cable_stops_traffic_until_it_is_plugged_in_again", || {
        let Street { a, router, home, .. } = street(kind(Nat::PortRestricted))?;
        let pinger = Pinger::start(&home, a.v4(), EVERY)?;
        pinger.first_reply(PATIENCE)?;
        for cable in [home.uplink(), router.uplink(), a.uplink()] {
            cable.cut()?;
            let cut = Instant::now();
            pinger.reply_to_request_after(cut, Duration::from_millis(200)).expect_err("a reply through a cut cable");
            cable.join()?;
            pinger.reply_to_request_after(Instant::now(), PATIENCE)?;
            assert!(pinger.trace().longest_gap(cut, Instant::now()) >= Duration::from_millis(200));
        }
        Ok(())
    });
}

#[test]
fn blocked_udp_between_two_sites_leaves_all_else() {
    in_own_world("blocked_udp_between_two_sites_leaves_all_else", || {
        let Street { world, a, b, home, .. } = street(kind(Nat::PortRestricted))?;
        let (inside, at_a, at_b) = (socket(&home)?, socket(&a)?, socket(&b)?);
        let outer = probe::outer_address(&inside, &at_a, &a)?;
        probe::outer_address(&inside, &at_b, &b)?;
        assert!(probe::is_let_in(&inside, outer, &at_a, &at_b)?);
        world.block_udp(&home, &a)?;
        assert!(!probe::is_let_in(&inside, outer, &at_a, &at_b)?);
        Pinger::start(&home, a.v4(), EVERY)?.first_reply(PATIENCE)?;
        world.unblock_udp(&home, &a)?;
        assert!(probe::is_let_in(&inside, outer, &at_a, &at_b)?);
        Ok(())
    });
}

#[test]
fn a_router_comes_back_with_another_address_and_without_its_mappings() {
    in_own_world("a_router_comes_back_with_another_address_and_without_its_mappings", || {
        for nat in [Nat::PortRestricted, Nat::FullCone] {
            let Street { a, router, home, .. } = street(kind(nat))?;
            let (inside, server) = (socket(&home)?, socket(&a)?);
            let before = probe::outer_address(&inside, &server, &a)?;
            router.reboot()?;
            assert_ne!(before.ip(), IpAddr::V4(router.wan_v4()));
            let same_port = SocketAddr::new(router.wan_v4().into(), before.port());
            server.send_to(b"late", same_port)?;
            inside.recv_from(&mut [0; 8]).expect_err("the mapping survived a reboot");
            assert_eq!(probe::outer_address(&inside, &server, &a)?.ip(), IpAddr::V4(router.wan_v4()));
        }
        Ok(())
    });
}

#[test]
fn an_idle_mapping_lives_as_long_as_the_router_was_told() {
    in_own_world("an_idle_mapping_lives_as_long_as_the_router_was_told", || {
        let udp_timeout = Duration::from_secs(1);
        let Street { a, b, home, .. } = street(RouterSpec { udp_timeout, ..kind(Nat::PortRestricted) })?;
        let (inside, at_a, at_b) = (socket(&home)?, socket(&a)?, socket(&b)?);
        let outer = probe::outer_address(&inside, &at_a, &a)?;
        probe::outer_address(&inside, &at_b, &b)?;
        at_b.send_to(b"early", outer)?;
        assert_eq!(inside.recv_from(&mut [0; 8])?.0, 5);
        // A reply makes a's mapping live as a stream; b's was a reply too, so a fresh one-way mapping is needed.
        let fresh = socket(&home)?;
        let outer = probe::outer_address(&fresh, &at_a, &a)?;
        let opened = Instant::now();
        keystone_lab::wait::until("a mapping of one second ends", PATIENCE, Duration::from_millis(100), || {
            // Only the passing of time may be asked here: a datagram would renew the mapping.
            Ok((opened.elapsed() > 2 * udp_timeout).then_some(()))
        })?;
        at_a.send_to(b"late", outer)?;
        fresh.recv_from(&mut [0; 8]).expect_err("the mapping outlives its time");
        Ok(())
    });
}

#[test]
fn loss_and_rate_are_about_what_was_asked() {
    in_own_world("loss_and_rate_are_about_what_was_asked", || {
        let Street { world, a, home, .. } = street(kind(Nat::PortRestricted))?;
        world.set_loss(&home, 300)?;
        let pinger = Pinger::start(&home, a.v4(), Duration::from_millis(1))?;
        let start = Instant::now();
        keystone_lab::wait::until("400 pings", PATIENCE, EVERY, || {
            Ok((pinger.trace().counts(start, Instant::now()).0 > 400).then_some(()))
        })?;
        let (sent, answered) = pinger.trace().counts(start, Instant::now() - Duration::from_millis(50));
        let share = answered as f64 / sent as f64;
        assert!((0.3..0.7).contains(&share), "30 % lost each way leaves 49 %, not {share}");
        drop(pinger);
        world.set_loss(&home, 0)?;

        home.uplink().set_rate(Some(8))?;
        let (bytes, took) = transfer(&home, &a, 500_000)?;
        let mbit = bytes as f64 * 8e-6 / took.as_secs_f64();
        assert!((2.0..10.0).contains(&mbit), "{mbit} Mbit/s through a link of 8");
        home.uplink().set_rate(None)
    });
}

/// Sends so many bytes over TCP and returns how many arrived, and in what time.
fn transfer(from: &Host, to: &Host, bytes: usize) -> Result<(u64, Duration)> {
    let listener = to.enter(|| TcpListener::bind("0.0.0.0:0"))?;
    let target = SocketAddr::new(to.v4().into(), listener.local_addr()?.port());
    let sink = std::thread::spawn(move || io::copy(&mut listener.accept()?.0, &mut io::sink()));
    let start = Instant::now();
    let mut stream = from.enter(|| TcpStream::connect(target))?;
    stream.write_all(&vec![0; bytes])?;
    drop(stream);
    let arrived = sink.join().expect("the sink reads to the end")?;
    Ok((arrived, start.elapsed()))
}

#[test]
fn tcp_passes_a_narrower_link_in_the_middle() {
    in_own_world("tcp_passes_a_narrower_link_in_the_middle", || {
        let Street { a, router, home, .. } = street(kind(Nat::PortRestricted))?;
        router.uplink().set_mtu(1280)?;
        assert_eq!(transfer(&home, &a, 1 << 20)?.0, 1 << 20);
        assert_eq!(transfer(&home, &a, 1 << 20)?.0, 1 << 20);
        Ok(())
    });
}

#[test]
fn frames_are_no_longer_than_the_mtu_where_the_wire_is_ethernet() {
    in_own_world("frames_are_no_longer_than_the_mtu_where_the_wire_is_ethernet", || {
        for (wire, whole) in [(Wire::Ethernet, true), (Wire::Offloaded, false)] {
            let world = World::new(wire)?;
            let (a, b) = (world.public_host("a")?, world.public_host("b")?);
            assert_eq!(transfer(&a, &b, 4_000_000)?.0, 4_000_000);
            let count = |name: &str| -> Result<u64> {
                let shown =
                    a.run(std::process::Command::new("ip").args(["-json", "-stats", "link", "show", "eth0"]))?;
                let shown: serde_json::Value = serde_json::from_str(&shown)?;
                Ok(shown[0]["stats64"]["tx"][name].as_u64().unwrap_or(0))
            };
            let mean = count("bytes")? / count("packets")?;
            assert_eq!(mean <= 1514, whole, "{wire:?}: {mean} bytes a frame");
        }
        Ok(())
    });
}

#[test]
fn ipv6_reaches_a_dual_stack_site_through_its_filter_only_as_an_answer() {
    in_own_world("ipv6_reaches_a_dual_stack_site_through_its_filter_only_as_an_answer", || {
        let Street { a, b, home, .. } = street(RouterSpec { ipv6: true, ..kind(Nat::PortRestricted) })?;
        let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
        let six = |host: &Host| host.v6().map(IpAddr::V6).expect("the host has IPv6");
        let (inside, at_a, at_b) = (home.udp(any)?, a.udp(any)?, b.udp(any)?);
        at_a.set_read_timeout(Some(PATIENCE))?;
        inside.set_read_timeout(Some(Duration::from_millis(200)))?;
        inside.send_to(b"hello", SocketAddr::new(six(&a), at_a.local_addr()?.port()))?;
        let (_, seen) = at_a.recv_from(&mut [0; 8])?;
        assert_eq!(seen, SocketAddr::new(six(&home), inside.local_addr()?.port()), "IPv6 is not translated");
        at_b.send_to(b"stray", seen)?;
        inside.recv_from(&mut [0; 8]).expect_err("a stranger is let in");
        at_a.send_to(b"reply", seen)?;
        assert_eq!(inside.recv_from(&mut [0; 8])?.0, 5);
        Ok(())
    });
}

#[test]
fn a_world_is_up_within_two_seconds() {
    in_own_world("a_world_is_up_within_two_seconds", || {
        let start = Instant::now();
        let world = World::new(Wire::Offloaded)?;
        for number in 0..5 {
            world.public_host(&format!("public-{number}"))?;
            world.router(&format!("router-{number}"), RouterSpec::default())?.host(&format!("home-{number}"))?;
        }
        println!("16 namespaces in {:?}", start.elapsed());
        // Ten times what it takes on an idle machine.
        assert!(start.elapsed() < 10 * Duration::from_secs(2));
        Ok(())
    });
}
