//! `bench-peers`: plain WireGuard peers side by side, ours and others', in interleaved rounds.
//!
//! ```text
//!   a ── eth0 ──────────── eth0 ── b      one veth pair; no frame longer than 1500 bytes crosses, as on a cable
//!   │                              │
//!   TUN ── program ~~~~~~ program ── TUN  MTU 1420; iperf3, one TCP stream, each direction
//! ```
//!
//! Both ends, iperf3 and the kernel's own work share the machine's cores, so only ratios within one run mean anything.
//! Nothing here fails for being slow: goals are printed with what was found, and the exit status says whether
//! everything ran.

mod idle;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use keystone_mesh_core::PrivateKey;
use serde::Serialize;
use serde_json::{Value, json};

use super::Options;
use super::stage::Stage;
use crate::story::Story;
use keystone_lab::ping::Pinger;
use keystone_lab::wireguard::{End, Maker, Peer, Settings};
use keystone_lab::{Host, iperf};

const MAKERS: [Maker; 3] = [Maker::Keystone, Maker::WireguardGo, Maker::Boringtun];

/// What fits 1500 bytes with IPv6 outside; every WireGuard's default.
const MTU: u16 = 1420;
const PORT: u16 = 51840;
const NAMES: [&str; 2] = ["bench-a", "bench-b"];
/// Addresses inside.
const INSIDE: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)];
/// Ethernet's header and the longest packet behind it.
const LONGEST_FRAME: f64 = 1514.0;

/// Seconds of traffic before anything is measured: sessions, windows, pools.
const WARM_UP: u32 = 1;
const GIB: f64 = (1_u64 << 30) as f64;

pub(super) fn play(stage: &mut Stage, story: &mut Story, options: &Options) -> Result<Value> {
    let programs: Vec<_> = MAKERS
        .into_iter()
        .map(|maker| match maker {
            Maker::Keystone => Ok((maker, stage.program()?.path().to_owned())),
            Maker::WireguardGo | Maker::Boringtun => Ok((maker, maker.program()?)),
        })
        .collect::<Result<_>>()?;
    story.step(&format!("load average before: {}", load_average()?));
    let throughput = if options.idle {
        Value::Null
    } else {
        story.chapter("TCP, one stream, over a cable that carries at most 1500 bytes at once");
        let hosts = cable(stage)?;
        let mut ends = Vec::new();
        for (maker, program) in &programs {
            ends.push(both(&hosts, *maker, program));
        }
        throughput(story, &hosts, &mut ends, options)?
    };
    story.chapter("Idling");
    let idle = idle::measure(stage, story, &programs)?;
    Ok(json!({ "throughput": throughput, "idle": idle }))
}

/// Two hosts, and a cable between them whose ends cut what is longer than a frame, as a network card without
/// segmentation of its own has it done. Receive offload stays: network cards' drivers have it.
fn cable(stage: &mut Stage) -> Result<[Host; 2]> {
    let hosts = stage.two_hosts(NAMES)?;
    for host in &hosts {
        let features = "tso off gso on gro on tx-udp-segmentation off";
        host.run(Command::new("ethtool").args(["-K", "eth0"]).args(features.split(' ')))?;
    }
    Ok(hosts)
}

fn both(hosts: &[Host; 2], maker: Maker, program: &std::path::Path) -> [End; 2] {
    [0, 1].map(|me| {
        let you = 1 - me;
        let peer = Peer {
            key: key(you).public_key(),
            preshared_key: None,
            endpoint: Some(SocketAddr::from((hosts[you].v4(), PORT))),
            allowed_ips: vec![IpAddr::from(INSIDE[you]).into()],
            keepalive: None,
        };
        let addresses = vec![IpAddr::from(INSIDE[me]).into()];
        End::new(
            &hosts[me],
            maker,
            program,
            Settings { key: key(me), listen_port: PORT, mtu: MTU, addresses, peers: vec![peer] },
        )
    })
}

fn key(number: usize) -> PrivateKey {
    PrivateKey::from_bytes([number as u8 + 1; 32])
}

/// One program's turn in one round.
#[derive(Clone, Copy, Debug, Serialize)]
struct Turn {
    /// Gbit/s from a to b, and back.
    gbit: [f64; 2],
    /// CPU seconds of both daemons for each GiB carried; none for the cable itself.
    cpu_per_gib: Option<f64>,
    /// The larger of both daemons, in MiB, right after it.
    rss_mib: Option<f64>,
}

fn throughput(story: &mut Story, hosts: &[Host; 2], ends: &mut [[End; 2]], options: &Options) -> Result<Value> {
    let mut turns: Vec<(&str, Vec<Turn>)> = vec![("raw veth", Vec::new())];
    turns.extend(ends.iter().map(|pair| (pair[0].maker().label(), Vec::new())));
    let mut longest = 0.0_f64;
    for round in 1..=options.rounds {
        let raw = both_ways(hosts, hosts.each_ref().map(Host::v4), options.seconds)?;
        turns[0].1.push(Turn { gbit: raw.map(gbit), cpu_per_gib: None, rss_mib: None });
        for (pair, (name, turns)) in ends.iter_mut().zip(&mut turns[1..]) {
            let turn = turn_of(hosts, pair, options.seconds).with_context(|| format!("{name} in round {round}"))?;
            turns.push(turn);
        }
        longest = longest.max(mean_frame(&hosts[1])?);
        let said: Vec<String> = turns.iter().map(|(name, turns)| told_briefly(name, turns)).collect();
        story.step(&format!("round {round} of {}: {} Gbit/s", options.rounds, said.join(", ")));
    }
    let claim = "frames are cut to 1514 bytes before the cable";
    story.check(longest <= LONGEST_FRAME, claim, &format!("{longest:.0} bytes on average"));
    story.step(&format!("load average after: {}", load_average()?));

    let medians: Vec<(&str, Turn)> = turns.iter().map(|(name, turns)| (*name, median_turn(turns))).collect();
    story.table(&table(&medians));
    goals(story, &medians)?;
    Ok(json!({
        "rounds": turns.iter().map(|(name, turns)| json!({ "program": name, "turns": turns })).collect::<Vec<_>>(),
        "medians": medians.iter().map(|(name, turn)| json!({ "program": name, "median": turn })).collect::<Vec<_>>(),
    }))
}

fn turn_of(hosts: &[Host; 2], pair: &mut [End; 2], seconds: u32) -> Result<Turn> {
    for end in pair.iter_mut() {
        end.start()?;
    }
    Pinger::start(&hosts[0], INSIDE[1], super::PING_EVERY)?.first_reply(super::BENCH_PATIENCE)?;
    both_ways(hosts, INSIDE, WARM_UP)?;
    let before = cpu_seconds(pair)?;
    let bits = both_ways(hosts, INSIDE, seconds)?;
    let cpu = cpu_seconds(pair)? - before;
    let bytes: f64 = bits.iter().map(|rate| rate * f64::from(seconds) / 8.0).sum();
    let mut rss = 0.0_f64;
    for end in pair.iter_mut() {
        rss = rss.max(resident_mib(end.id()?)?);
        end.remove()?;
    }
    Ok(Turn { gbit: bits.map(gbit), cpu_per_gib: Some(cpu / (bytes / GIB)), rss_mib: Some(rss) })
}

/// Bits per second from the first host to the second, and back.
fn both_ways(hosts: &[Host; 2], addresses: [Ipv4Addr; 2], seconds: u32) -> Result<[f64; 2]> {
    let mut rates = [0.0; 2];
    for (from, rate) in rates.iter_mut().enumerate() {
        let to = 1 - from;
        let _server = iperf::Server::start(&hosts[to])?;
        *rate = iperf::tcp_bits_per_second(&hosts[from], addresses[to].into(), seconds)?;
    }
    Ok(rates)
}

/// CPU time of both daemons: of every thread, in nanoseconds (schedstat of proc(5)). None of them ends its threads.
fn cpu_seconds(pair: &[End; 2]) -> Result<f64> {
    pair.iter().map(|end| cpu_seconds_of(end.id()?)).sum()
}

fn cpu_seconds_of(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let schedstat = fs::read_to_string(task?.path().join("schedstat"))?;
        nanoseconds += schedstat.split(' ').next().unwrap_or_default().parse::<u64>().context("parse schedstat")?;
    }
    Ok(nanoseconds as f64 / 1e9)
}

/// `VmRSS` of proc(5).
fn resident_mib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>().context("parse VmRSS")? / 1024.0)
}

/// Bytes per frame that the host has received.
fn mean_frame(host: &Host) -> Result<f64> {
    let links: Value = serde_json::from_str(&host.run(Command::new("ip").args([
        "-json",
        "-statistics",
        "link",
        "show",
        "dev",
        "eth0",
    ]))?)?;
    let count = |key: &str| links.pointer(&format!("/0/stats64/rx/{key}")).and_then(Value::as_f64);
    let (bytes, frames) = (count("bytes").context("bytes received")?, count("packets").context("frames received")?);
    ensure!(frames > 0.0, "nothing was received");
    Ok(bytes / frames)
}

fn load_average() -> Result<String> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

fn told_briefly(name: &str, turns: &[Turn]) -> String {
    turns.last().map_or_else(String::new, |turn| format!("{name} {:.2}/{:.2}", turn.gbit[0], turn.gbit[1]))
}

fn gbit(bits: f64) -> f64 {
    bits / 1e9
}

fn median_turn(turns: &[Turn]) -> Turn {
    Turn {
        gbit: [0, 1].map(|way| median(turns.iter().map(|turn| turn.gbit[way])).unwrap_or(0.0)),
        cpu_per_gib: median(turns.iter().filter_map(|turn| turn.cpu_per_gib)),
        rss_mib: median(turns.iter().filter_map(|turn| turn.rss_mib)),
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        even if even % 2 == 0 => Some(f64::midpoint(values[middle - 1], values[middle])),
        _ => Some(values[middle]),
    }
}

fn mean_rate(turn: &Turn) -> f64 {
    f64::midpoint(turn.gbit[0], turn.gbit[1])
}

fn of<'a>(medians: &'a [(&str, Turn)], maker: Maker) -> Result<&'a Turn> {
    let found = medians.iter().find(|(name, _)| *name == maker.label());
    found.map(|(_, turn)| turn).with_context(|| format!("{} has no turn", maker.label()))
}

fn table(medians: &[(&str, Turn)]) -> Vec<Vec<String>> {
    let head = ["", "a to b", "b to a", "CPU s/GiB", "RSS MiB", "of raw", "of wireguard-go", "of boringtun-cli"];
    let ratio_to = |turn: &Turn, name: &str| {
        let other = medians.iter().find(|(known, _)| *known == name);
        other.map_or_else(String::new, |(_, other)| format!("{:.2}", mean_rate(turn) / mean_rate(other)))
    };
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"));
    let rows = medians.iter().map(|(name, turn)| {
        vec![
            (*name).to_owned(),
            format!("{:.2} Gbit/s", turn.gbit[0]),
            format!("{:.2} Gbit/s", turn.gbit[1]),
            number(turn.cpu_per_gib),
            number(turn.rss_mib),
            ratio_to(turn, "raw veth"),
            ratio_to(turn, Maker::WireguardGo.label()),
            ratio_to(turn, Maker::Boringtun.label()),
        ]
    });
    [head.map(str::to_owned).to_vec()].into_iter().chain(rows).collect()
}

fn goals(story: &Story, medians: &[(&str, Turn)]) -> Result<()> {
    let [ours, go, boringtun] = [of(medians, MAKERS[0])?, of(medians, MAKERS[1])?, of(medians, MAKERS[2])?];
    let ratio = mean_rate(ours) / mean_rate(go);
    goal(story, ratio >= 1.0, "throughput at least that of wireguard-go", &format!("{ratio:.2} of it"));
    let ratio = mean_rate(ours) / mean_rate(boringtun);
    goal(story, ratio >= 4.0, "throughput at least four times that of boringtun-cli", &format!("{ratio:.2} of it"));
    let (Some(own), Some(its)) = (ours.cpu_per_gib, go.cpu_per_gib) else { return Ok(()) };
    let found = format!("{own:.1} s/GiB, {its:.1} s/GiB");
    goal(story, own <= its, "CPU per GiB at most that of wireguard-go", &found);
    Ok(())
}

/// Says how a goal stands; unlike a claim it does not fail the story, because the machine may be busy.
fn goal(story: &Story, met: bool, what: &str, found: &str) {
    story.text(&format!("  goal {}: {what}: {found}\n", if met { "met   " } else { "MISSED" }));
}
