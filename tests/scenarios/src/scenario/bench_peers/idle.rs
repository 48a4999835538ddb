//! What programs cost that do nothing: with one idle peer, and with a thousand that are only configured.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use keystone_mesh_core::PrivateKey;
use serde_json::{Value, json};

use super::{INSIDE, PORT, both, cpu_seconds_of, goal, key, resident_mib};
use crate::scenario::stage::Stage;
use crate::scenario::{BENCH_PATIENCE, PING_EVERY};
use crate::story::Story;
use keystone_lab::ping::Pinger;
use keystone_lab::wireguard::{End, Maker, Peer, Settings};

/// How long nothing is done.
const IDLE: Duration = Duration::from_secs(30);
/// After the last packet, until the protocol's own keepalives are through (KEEPALIVE_TIMEOUT, 10 s).
const SETTLE: Duration = Duration::from_secs(12);
const PEERS: u16 = 1000;

/// Bounds of our own daemon.
const RSS_ONE_PEER_MIB: f64 = 15.0;
const RSS_MANY_PEERS_MIB: f64 = 64.0;
const CPU_SHARE_PERCENT: f64 = 0.2;

/// What one program costs.
struct Cost {
    maker: Maker,
    one_mib: f64,
    percent: f64,
    many_mib: f64,
}

pub(super) fn measure(stage: &mut Stage, story: &mut Story, programs: &[(Maker, PathBuf)]) -> Result<Value> {
    let mut pairs = Vec::new();
    let mut crowds = Vec::new();
    for (number, (maker, program)) in programs.iter().enumerate() {
        let names = [format!("idle-a{number}"), format!("idle-b{number}")];
        let hosts = stage.two_hosts(names.each_ref().map(String::as_str))?;
        let mut pair = both(&hosts, *maker, program);
        for end in &mut pair {
            end.start()?;
        }
        Pinger::start(&hosts[0], INSIDE[1], PING_EVERY)?.first_reply(BENCH_PATIENCE)?;
        pairs.push(pair);
        let names = [format!("crowd-a{number}"), format!("crowd-b{number}")];
        let [host, _] = stage.two_hosts(names.each_ref().map(String::as_str))?;
        let mut crowd = End::new(&host, *maker, program, thousand_peers());
        crowd.start()?;
        crowds.push(crowd);
    }
    story.step(&format!("every program has had one ping; now {} s of silence", (SETTLE + IDLE).as_secs()));
    thread::sleep(SETTLE);
    let start = Instant::now();
    let before = pairs.iter().map(|pair| cpu_seconds_of(pair[0].id()?)).collect::<Result<Vec<_>>>()?;
    thread::sleep(IDLE);
    let mut costs = Vec::new();
    for ((pair, crowd), before) in pairs.iter().zip(&crowds).zip(before) {
        let (pid, seconds) = (pair[0].id()?, start.elapsed().as_secs_f64());
        let percent = (cpu_seconds_of(pid)? - before) / seconds * 100.0;
        let (one_mib, many_mib) = (resident_mib(pid)?, resident_mib(crowd.id()?)?);
        costs.push(Cost { maker: pair[0].maker(), one_mib, percent, many_mib });
    }
    tell(story, &costs);
    for pair in &pairs {
        let again = Pinger::start(pair[0].host(), INSIDE[1], PING_EVERY)?.first_reply(BENCH_PATIENCE);
        let claim = format!("{} still carries packets", pair[0].maker().label());
        story.check(again.is_ok(), &claim, if again.is_ok() { "a ping came back" } else { "no ping came back" });
    }
    Ok(costs.iter().map(Cost::json).collect())
}

fn tell(story: &Story, costs: &[Cost]) {
    let head = ["", "RSS, one peer", "CPU, one peer", "RSS, 1000 peers"].map(str::to_owned).to_vec();
    let rows = costs.iter().map(|cost| {
        vec![
            cost.maker.label().to_owned(),
            format!("{:.1} MiB", cost.one_mib),
            format!("{:.3} %", cost.percent),
            format!("{:.1} MiB", cost.many_mib),
        ]
    });
    story.table(&[head].into_iter().chain(rows).collect::<Vec<_>>());
    for cost in costs.iter().filter(|cost| cost.maker == Maker::Keystone) {
        let found = format!("{:.1} MiB", cost.one_mib);
        goal(story, cost.one_mib < RSS_ONE_PEER_MIB, "under 15 MiB with one peer", &found);
        let found = format!("{:.3} %", cost.percent);
        goal(story, cost.percent < CPU_SHARE_PERCENT, "under 0.2 % of a core with one idle peer", &found);
        let found = format!("{:.1} MiB", cost.many_mib);
        goal(story, cost.many_mib < RSS_MANY_PEERS_MIB, "under 64 MiB with 1,000 configured peers", &found);
    }
}

impl Cost {
    fn json(&self) -> Value {
        json!({
            "program": self.maker.label(),
            "rss_one_peer_mib": self.one_mib,
            "cpu_one_idle_peer_percent": self.percent,
            "rss_thousand_peers_mib": self.many_mib,
        })
    }
}

fn thousand_peers() -> Settings {
    let peer = |number: u16| {
        let [high, low] = number.to_be_bytes();
        let mut secret = [200; 32];
        // Not in the first byte, of which X25519 ignores bits (RFC 7748, section 5).
        secret[1..3].copy_from_slice(&[high, low]);
        Peer {
            key: PrivateKey::from_bytes(secret).public_key(),
            preshared_key: None,
            endpoint: None,
            allowed_ips: vec![IpAddr::from(Ipv4Addr::new(10, 78, high, low)).into()],
            keepalive: None,
        }
    };
    Settings {
        key: key(0),
        listen_port: PORT,
        mtu: super::MTU,
        addresses: vec![IpAddr::from(INSIDE[0]).into()],
        peers: (0..PEERS).map(peer).collect(),
    }
}
