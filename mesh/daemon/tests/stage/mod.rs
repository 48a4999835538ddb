//! What tests with real daemons have in common: two hosts, a plain WireGuard peer on each, and where the programs are.
#![allow(dead_code, reason = "each test program uses its part")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use keystone_lab::ping::Pinger;
use keystone_lab::wireguard::{End, Maker, Peer, Settings};
use keystone_lab::{Host, World, wait};
use keystone_mesh::status::Status;
use keystone_mesh_core::{PresharedKey, PrivateKey};

/// The program under test.
pub(crate) const KEYSTONE_MESH: &str = env!("CARGO_BIN_EXE_keystone-mesh");

/// For what should take no time at all on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks.
pub(crate) const POLL: Duration = Duration::from_millis(50);
/// Between two pings.
pub(crate) const PING_EVERY: Duration = Duration::from_millis(100);

/// The addresses inside, of us and of the other.
pub(crate) const INSIDE: [(Ipv4Addr, Ipv6Addr); 2] = [
    (Ipv4Addr::new(10, 77, 0, 1), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1)),
    (Ipv4Addr::new(10, 77, 0, 2), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2)),
];

/// Where a program is; of another implementation what `make test-peers` installs.
pub(crate) fn program(maker: Maker) -> Result<PathBuf> {
    match maker {
        Maker::Keystone => Ok(KEYSTONE_MESH.into()),
        Maker::WireguardGo | Maker::Boringtun => maker.program(),
    }
}

/// How a pair of peers is set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Who plays the other.
    pub(crate) other: Maker,
    /// Whether we know where the other is and call it; else it is the other way round.
    pub(crate) we_call: bool,
    /// Whether both have a preshared key.
    pub(crate) psk: bool,
    /// Whether the packets outside are IPv6.
    pub(crate) over_v6: bool,
}

/// Our daemon and another, each the other's only peer, on public hosts.
pub(crate) struct Pair {
    pub(crate) ours: End,
    pub(crate) other: End,
}

impl Pair {
    /// The hosts are called `k-NAME` and `o-NAME`. Nothing is started yet.
    pub(crate) fn new(world: &World, name: &str, shape: Shape) -> Result<Self> {
        Self::on(&[world.public_host(&format!("k-{name}"))?, world.public_host(&format!("o-{name}"))?], shape)
    }

    /// On hosts of one's own choice: ours and the other's.
    pub(crate) fn on(hosts: &[Host; 2], shape: Shape) -> Result<Self> {
        let [ours, other] = [0, 1].map(|me| settings(hosts, me, shape));
        Ok(Self {
            ours: End::new(&hosts[0], Maker::Keystone, KEYSTONE_MESH.as_ref(), ours?),
            other: End::new(&hosts[1], shape.other, &program(shape.other)?, other?),
        })
    }

    pub(crate) fn start(&mut self) -> Result<()> {
        self.other.start()?;
        self.ours.start()
    }

    /// Pings from us to the other, over IPv4 and over IPv6.
    pub(crate) fn ping_other(&self) -> Result<[Pinger; 2]> {
        pingers(self.ours.host(), INSIDE[1])
    }

    /// Pings from the other to us, over IPv4 and over IPv6.
    pub(crate) fn ping_us(&self) -> Result<[Pinger; 2]> {
        pingers(self.other.host(), INSIDE[0])
    }
}

fn pingers(from: &Host, to: (Ipv4Addr, Ipv6Addr)) -> Result<[Pinger; 2]> {
    Ok([Pinger::start(from, to.0, PING_EVERY)?, Pinger::start(from, to.1, PING_EVERY)?])
}

/// The moment from which both have had replies to requests sent after `since`.
pub(crate) fn both_reply(pingers: &[Pinger; 2], since: Instant, patience: Duration) -> Result<Instant> {
    let v4 = pingers[0].reply_to_request_after(since, patience).context("IPv4 inside")?;
    let v6 = pingers[1].reply_to_request_after(since, patience).context("IPv6 inside")?;
    Ok(v4.max(v6))
}

/// The daemon's status, typed.
pub(crate) fn status(end: &End) -> Result<Status> {
    Ok(serde_json::from_value(end.status()?)?)
}

/// Waits until `so` holds of what our daemon says about itself.
pub(crate) fn wait_until(end: &End, what: &str, so: impl Fn(&Status) -> bool) -> Result<Status> {
    let mut last = None;
    let waited = wait::until(what, PATIENCE, POLL, || {
        let status = status(end)?;
        if so(&status) {
            return Ok(Some(status));
        }
        last = Some(status);
        Ok(None)
    });
    waited.with_context(|| format!("at last {last:?}\n{}", end.log_tail(20)))
}

/// How often our daemon dropped a packet for this reason.
pub(crate) fn drops(status: &Status, reason: &str) -> u64 {
    status.data_plane.drops.get(reason).copied().unwrap_or(0)
}

/// A key for each number.
pub(crate) fn key(number: u8) -> PrivateKey {
    PrivateKey::from_bytes([number; 32])
}

fn settings(hosts: &[Host; 2], me: usize, shape: Shape) -> Result<Settings> {
    let you = 1 - me;
    let calls = shape.we_call == (me == 0);
    let outside: IpAddr =
        if shape.over_v6 { hosts[you].v6().context("public hosts have IPv6")?.into() } else { hosts[you].v4().into() };
    let peer = Peer {
        key: key(you as u8 + 1).public_key(),
        preshared_key: shape.psk.then(|| PresharedKey::from_bytes([77; 32])),
        endpoint: calls.then(|| SocketAddr::new(outside, 51000 + you as u16)),
        allowed_ips: nets(INSIDE[you]),
        keepalive: None,
    };
    Ok(Settings {
        key: key(me as u8 + 1),
        listen_port: 51000 + me as u16,
        mtu: 1420,
        addresses: nets(INSIDE[me]),
        peers: vec![peer],
    })
}

fn nets((v4, v6): (Ipv4Addr, Ipv6Addr)) -> Vec<IpNet> {
    vec![IpAddr::from(v4).into(), IpAddr::from(v6).into()]
}
