//! Our daemon against wireguard-go and boringtun-cli, as a plain peer of either.
//!
//! Every test has a sandbox of its own. Where the other implementations are not installed (`make test-peers`) the tests
//! say so and are skipped; with CI set that is a failure.
#![expect(clippy::print_stdout, reason = "helpers of tests print as tests do")]

mod long;
#[path = "../stage/mod.rs"]
mod stage;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use keystone_lab::sandbox::in_own_world;
use keystone_lab::wireguard::Maker;
use keystone_lab::{Host, RouterSpec, Wire, World, wait};
use keystone_mesh_core::PresharedKey;
use stage::{PATIENCE, POLL, Pair, Shape, both_reply, drops, program, status, wait_until};

const OTHERS: [Maker; 2] = [Maker::WireguardGo, Maker::Boringtun];

#[test]
fn sessions_last_across_a_rekey_and_come_back_after_a_kill() {
    with_others("sessions_last_across_a_rekey_and_come_back_after_a_kill", long::play);
}

#[test]
fn a_peer_that_moves_is_followed() {
    with_others("a_peer_that_moves_is_followed", |world| {
        for (number, other) in OTHERS.into_iter().enumerate() {
            let shape = Shape { other, we_call: false, psk: false, over_v6: false };
            let home = world.router(&format!("r-{number}"), RouterSpec::default())?;
            let hosts = [world.public_host(&format!("k-{number}"))?, home.host(&format!("o-{number}"))?];
            let mut pair = Pair::on(&hosts, shape)?;
            pair.start()?;
            let pings = pair.ping_us()?;
            both_reply(&pings, Instant::now(), PATIENCE)?;
            let first = status(&pair.ours)?.peers[0].via.clone();

            pair.other.wg(&["set", pair.other.interface(), "listen-port", "40000"])?;
            let moved = Instant::now();
            let port_gap = both_reply(&pings, moved, PATIENCE)?.duration_since(moved);
            let second = wait_until(&pair.ours, "another port is used", |s| s.peers[0].via != first)?;
            let second = second.peers[0].via.clone();

            home.reboot()?;
            let moved = Instant::now();
            let address_gap = both_reply(&pings, moved, PATIENCE)?.duration_since(moved);
            wait_until(&pair.ours, "another address is used", |s| s.peers[0].via != second)?;
            let (port, address) = (millis(port_gap), millis(address_gap));
            println!("{}: traffic by another port after {port:.0} ms, address {address:.0} ms", other.label());
            let counted = status(&pair.ours)?;
            ensure!(counted.data_plane.live_sessions == 1, "one session: {counted:?}");
        }
        Ok(())
    });
}

#[test]
fn another_preshared_key_makes_no_session_and_says_so() {
    with_others("another_preshared_key_makes_no_session_and_says_so", |world| {
        for (number, other) in OTHERS.into_iter().enumerate() {
            let shape = Shape { other, we_call: true, psk: true, over_v6: false };
            let mut pair = Pair::new(world, &number.to_string(), shape)?;
            pair.other.settings_mut().peers[0].preshared_key = Some(PresharedKey::from_bytes([78; 32]));
            pair.start()?;
            let pings = pair.ping_other()?;
            let counted = wait_until(&pair.ours, "the answers are refused", |s| drops(s, "bad_handshake") >= 2)?;
            ensure!(counted.data_plane.live_sessions == 0, "no session: {counted:?}");
            ensure!(counted.peers[0].last_handshake_s.is_none(), "no handshake: {counted:?}");
            ensure!(pings[0].first_reply(Duration::ZERO).is_err(), "nothing passes");

            pair.other.kill()?;
            pair.other.settings_mut().peers[0].preshared_key = Some(PresharedKey::from_bytes([77; 32]));
            pair.other.start()?;
            both_reply(&pings, Instant::now(), PATIENCE)?;
        }
        Ok(())
    });
}

#[test]
fn keepalives_hold_a_session_without_traffic() {
    with_others("keepalives_hold_a_session_without_traffic", |world| {
        for (number, other) in OTHERS.into_iter().enumerate() {
            for we_keep in [true, false] {
                let shape = Shape { other, we_call: we_keep, psk: false, over_v6: false };
                let mut pair = Pair::new(world, &format!("{number}-{we_keep}"), shape)?;
                let keeper = if we_keep { &mut pair.ours } else { &mut pair.other };
                keeper.settings_mut().peers[0].keepalive = Some(1);
                pair.start()?;
                wait_until(&pair.ours, "a session without a packet", |s| s.data_plane.live_sessions == 1)?;
                let told = |pair: &Pair| -> Result<u64> {
                    if we_keep { datagrams(pair.other.host()) } else { Ok(status(&pair.ours)?.peers[0].rx_bytes / 32) }
                };
                let (before, start) = (told(&pair)?, Instant::now());
                wait::until("three keepalives", PATIENCE, POLL, || Ok((told(&pair)? >= before + 3).then_some(())))?;
                let took = start.elapsed();
                println!("{}, {}: three in {:.1} s", other.label(), who(we_keep), took.as_secs_f64());
                // One may have been on its way.
                ensure!(took >= Duration::from_millis(1500), "one a second, not more: {took:?}");
            }
        }
        Ok(())
    });
}

/// How many UDP datagrams the host has received (`InDatagrams` of snmp in proc(5)); IPv4 alone.
fn datagrams(host: &Host) -> Result<u64> {
    let snmp = host.enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))?;
    let values = snmp.lines().filter(|line| line.starts_with("Udp:")).nth(1).context("counters of UDP")?;
    values.split_whitespace().nth(1).context("datagrams received")?.parse().context("a number")
}

fn who(we: bool) -> &'static str {
    if we { "ours keeps alive" } else { "the other keeps alive" }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn with_others(name: &str, test: impl FnOnce(&World) -> Result<()>) {
    let missing = OTHERS.into_iter().find_map(|maker| program(maker).err());
    if let Some(why) = missing {
        assert!(std::env::var_os("CI").is_none(), "nothing is skipped in CI: {why:#}");
        println!("SKIPPED {name}: {why:#}");
        return;
    }
    in_own_world(name, || test(&World::new(Wire::Offloaded)?));
}
