//! Brings up the data plane with peers from flags, for benchmarks and interoperability tests.
//!
//! `static_peer --tun ks0 --port 51840 --key FILE --peer KEY,192.0.2.2:51820,10.98.0.2/32+fd98::2/128[,psk=FILE][,keepalive=25]`
//!
//! It follows peers that move, as stock WireGuard does, and prints `ready` when the interface exists. Addresses and MTU
//! are the caller's to set. SIGUSR1 prints statistics to standard error.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser;
use keystone_mesh::dataplane::{Config, DataEvent, DataPlane, NoRelays};
use keystone_mesh::tun::{Tun, TunConfig};
use keystone_mesh::udp::{UdpConfig, UdpSocket};
use keystone_mesh_core::io::{PeerConfig, PeerOp};
use keystone_mesh_core::{PresharedKey, PrivateKey, PublicKey, Via};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

#[derive(Parser)]
struct Flags {
    /// The interface.
    #[arg(long, default_value = "ks0")]
    tun: String,
    /// The UDP port.
    #[arg(long, default_value_t = 51840)]
    port: u16,
    /// The file with our private key, as `wg genkey` writes it.
    #[arg(long)]
    key: PathBuf,
    /// TUN queues and sockets.
    #[arg(long, default_value_t = 1)]
    shards: usize,
    /// A peer: its key, endpoint (`-` for none), and allowed IPs joined by `+`.
    #[arg(long)]
    peer: Vec<Peer>,
}

#[derive(Clone)]
struct Peer {
    endpoint: Option<SocketAddr>,
    config: PeerConfig,
}

impl FromStr for Peer {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut parts = text.split(',');
        let mut part = |what| parts.next().with_context(|| format!("no {what} in `{text}`"));
        let key: PublicKey = part("key")?.parse()?;
        let endpoint = match part("endpoint")? {
            "-" => None,
            addr => Some(addr.parse().context("the endpoint")?),
        };
        let allowed_ips = part("allowed IPs")?.split('+').map(str::parse).collect::<Result<_, _>>()?;
        let mut config =
            PeerConfig { key, identity: None, preshared_key: None, persistent_keepalive: None, allowed_ips };
        for option in parts {
            match option.split_once('=') {
                Some(("psk", file)) => {
                    config.preshared_key = Some(std::fs::read_to_string(file)?.parse::<PresharedKey>()?);
                }
                Some(("keepalive", seconds)) => config.persistent_keepalive = Some(seconds.parse()?),
                _ => anyhow::bail!("`{option}` is neither psk=FILE nor keepalive=SECONDS"),
            }
        }
        Ok(Self { endpoint, config })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let private_key: PrivateKey = std::fs::read_to_string(&flags.key).context("the key file")?.parse()?;
    let config = TunConfig { name: flags.tun.clone(), queues: flags.shards, persistent: false };
    let (tun, _claim) = Tun::open(&config)?.into_queues();
    let config = UdpConfig { port: flags.port, fwmark: None, shared: flags.shards > 1 };
    let sockets = (0..flags.shards).map(|_| UdpSocket::bind(&config).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
    let (events, mut receiver) = mpsc::channel(256);
    let plane = DataPlane::start(Config { tun, sockets, private_key, relay: Arc::new(NoRelays), events })?;
    let ops: Vec<_> = flags.peer.iter().map(|peer| PeerOp::Set(peer.config.clone())).collect();
    plane.apply(&ops);
    for peer in &flags.peer {
        plane.set_path(&peer.config.key, peer.endpoint.map(Via::Direct));
    }
    writeln!(std::io::stdout(), "ready")?;

    let mut asked = signal(SignalKind::user_defined1())?;
    let mut stop = signal(SignalKind::terminate())?;
    loop {
        tokio::select! {
            event = receiver.recv() => {
                if let Some(DataEvent::Roamed { peer, via }) = event {
                    plane.set_path(&peer, Some(via));
                }
            }
            _ = asked.recv() => print_stats(&plane)?,
            _ = stop.recv() => return Ok(()),
        }
    }
}

fn print_stats(plane: &DataPlane) -> std::io::Result<()> {
    let stats = plane.stats();
    let mut out = std::io::stderr();
    writeln!(out, "rx {} packets {} bytes", stats.rx_packets, stats.rx_bytes)?;
    writeln!(out, "tx {} packets {} bytes", stats.tx_packets, stats.tx_bytes)?;
    writeln!(out, "{} peers, {} with a session", stats.peers.len(), stats.live_sessions)?;
    for (reason, count) in stats.drops.iter().filter(|(_, count)| *count > 0) {
        writeln!(out, "dropped {} {count}", reason.label())?;
    }
    Ok(())
}
