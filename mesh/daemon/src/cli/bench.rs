//! `ping` and `bench`: what a person feels, measured through the mesh.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpStream, UdpSocket};

use super::inspect::fetch;
use super::output::{print, print_json};
use super::{BenchArgs, PingArgs};
use crate::config::Places;
use crate::control::{self, Request};
use crate::service::{self, Cpu, PORT, Received, Transfer};
use crate::status::{Peer, Status};

/// Echoes for the latency of `bench`.
const ECHOES: u32 = 100;
/// Pause between them.
const ECHO_PAUSE: Duration = Duration::from_millis(10);
/// A connection through the mesh is up within this, or never.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// One answer of a ping.
#[derive(Debug, Serialize)]
struct Reply {
    seq: u32,
    rtt_ms: Option<f64>,
    path: String,
    via: Option<String>,
}

pub(super) async fn ping(places: &Places, args: &PingArgs) -> anyhow::Result<ExitCode> {
    let (_, peer) = find(places, &args.node).await?;
    let mut echo = Echo::connect(address_of(&peer)?).await?;
    let mut replies = Vec::new();
    for seq in 1..=args.count {
        let started = Instant::now();
        let interval = Duration::from_millis(args.interval);
        let rtt = echo.round_trip(interval).await?;
        let (_, now) = find(places, &args.node).await?;
        let reply = Reply { seq, rtt_ms: rtt.map(millis), path: now.path, via: now.via };
        if !args.json {
            print(&line(&args.node, &reply))?;
        }
        replies.push(reply);
        if seq < args.count {
            tokio::time::sleep(interval.saturating_sub(started.elapsed())).await;
        }
    }
    let answered = replies.iter().filter(|reply| reply.rtt_ms.is_some()).count();
    if args.json {
        print_json(
            &serde_json::json!({ "node": args.node, "sent": replies.len(), "answered": answered, "replies": replies }),
        )?;
    } else {
        print(&format!("{} of {} answered\n", answered, replies.len()))?;
    }
    Ok(if answered > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn line(node: &str, reply: &Reply) -> String {
    let way = reply.via.as_ref().map_or(reply.path.clone(), |via| format!("{} via {via}", reply.path));
    match reply.rtt_ms {
        Some(rtt) => format!("{node}: seq {} in {rtt:.2} ms, {way}\n", reply.seq),
        None => format!("{node}: seq {} not answered, {way}\n", reply.seq),
    }
}

/// What `bench` found.
#[derive(Debug, Serialize)]
struct Report {
    node: String,
    path: String,
    via: Option<String>,
    mtu: u16,
    latency_ms: Latency,
    upload: Direction,
    download: Direction,
}

#[derive(Debug, Serialize)]
struct Latency {
    p50: f64,
    p99: f64,
    lost: u32,
}

#[derive(Debug, Serialize)]
struct Direction {
    /// Gigabits of payload each second.
    gbit_s: f64,
    /// CPU seconds of this node's data plane for a GiB.
    cpu_here_s_per_gib: f64,
    /// CPU seconds of the other node's data plane for a GiB.
    cpu_there_s_per_gib: f64,
}

pub(super) async fn bench(places: &Places, args: &BenchArgs) -> anyhow::Result<()> {
    let (status, peer) = find(places, &args.node).await?;
    let address = address_of(&peer)?;
    let latency = latency(address).await?;
    let upload = measure(places, address, args.seconds, true).await?;
    let download = measure(places, address, args.seconds, false).await?;
    let (_, after) = find(places, &args.node).await?;
    let report = Report {
        node: args.node.clone(),
        path: after.path,
        via: after.via,
        mtu: status.node.mtu,
        latency_ms: latency,
        upload,
        download,
    };
    if args.json { print_json(&report) } else { print(&describe(&report)) }
}

fn describe(report: &Report) -> String {
    let direction = |name: &str, d: &Direction| {
        format!(
            "  {name:<9} {:.2} Gbit/s, CPU {:.2} s/GiB here, {:.2} s/GiB there\n",
            d.gbit_s, d.cpu_here_s_per_gib, d.cpu_there_s_per_gib
        )
    };
    let via = report.via.as_ref().map_or(String::new(), |via| format!(" via {via}"));
    let Latency { p50, p99, lost } = report.latency_ms;
    format!(
        "{}: {}{via}, MTU {}\n  latency   p50 {p50:.2} ms, p99 {p99:.2} ms, {lost} of {ECHOES} lost\n{}{}",
        report.node,
        report.path,
        report.mtu,
        direction("upload", &report.upload),
        direction("download", &report.download)
    )
}

async fn latency(address: IpAddr) -> anyhow::Result<Latency> {
    let mut echo = Echo::connect(address).await?;
    // The first one makes the session and is not counted.
    echo.round_trip(CONNECT_PATIENCE).await?;
    let mut times = Vec::new();
    for _ in 0..ECHOES {
        times.extend(echo.round_trip(Duration::from_secs(1)).await?.map(millis));
        tokio::time::sleep(ECHO_PAUSE).await;
    }
    let lost = ECHOES - u32::try_from(times.len()).unwrap_or(ECHOES);
    times.sort_by(f64::total_cmp);
    let at =
        |share: f64| times.get(((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1))).copied();
    let none =
        || anyhow!("no echo came back: the mesh does not carry traffic to this node; see `keystone-mesh doctor`");
    Ok(Latency { p50: at(0.5).ok_or_else(none)?, p99: at(0.99).ok_or_else(none)?, lost })
}

async fn measure(places: &Places, address: IpAddr, seconds: u64, upload: bool) -> anyhow::Result<Direction> {
    let (here, there) = (fetch(places).await?.data_plane.cpu_s, far_cpu(address).await?);
    let received = if upload {
        let mut stream = open(address, Transfer::Upload).await?;
        service::send_for(&mut stream, Duration::from_secs(seconds)).await?;
        answer::<Received>(stream).await?
    } else {
        let mut stream = open(address, Transfer::Download { seconds }).await?;
        service::drain(&mut stream).await?
    };
    let (here, there) = (fetch(places).await?.data_plane.cpu_s - here, far_cpu(address).await? - there);
    let gib = received.bytes as f64 / f64::from(1_u32 << 30);
    if received.seconds <= 0.0 || gib <= 0.0 {
        return Err(anyhow!("nothing was transferred"));
    }
    Ok(Direction {
        gbit_s: received.bytes as f64 * 8.0 / received.seconds / 1e9,
        cpu_here_s_per_gib: here / gib,
        cpu_there_s_per_gib: there / gib,
    })
}

async fn far_cpu(address: IpAddr) -> anyhow::Result<f64> {
    let stream = open(address, Transfer::Cpu).await?;
    Ok(answer::<Cpu>(stream).await?.seconds)
}

async fn open(address: IpAddr, transfer: Transfer) -> anyhow::Result<TcpStream> {
    let connecting = TcpStream::connect(SocketAddr::new(address, PORT));
    let connected = tokio::time::timeout(CONNECT_PATIENCE, connecting).await;
    let mut stream = connected.map_err(|_| anyhow!("no connection to {address} within {CONNECT_PATIENCE:?}"))??;
    stream.write_all(format!("{}\n", serde_json::to_string(&transfer)?).as_bytes()).await?;
    Ok(stream)
}

async fn answer<T: serde::de::DeserializeOwned>(stream: TcpStream) -> anyhow::Result<T> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await?;
    serde_json::from_str(&line).context("the node's answer is not understood (busy with other transfers?)")
}

/// A UDP socket towards a node's echo.
struct Echo {
    socket: UdpSocket,
    seq: u64,
}

impl Echo {
    async fn connect(address: IpAddr) -> anyhow::Result<Self> {
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect((address, PORT)).await?;
        Ok(Self { socket, seq: 0 })
    }

    /// One echo; none where it did not come back in time.
    async fn round_trip(&mut self, patience: Duration) -> anyhow::Result<Option<Duration>> {
        self.seq += 1;
        let (sent, marker) = (Instant::now(), self.seq.to_be_bytes());
        // Refused by an earlier datagram's ICMP error: the next one may do better.
        if self.socket.send(&marker).await.is_err() {
            self.socket.send(&marker).await?;
        }
        let answered = async {
            let mut buffer = [0; 16];
            loop {
                match self.socket.recv(&mut buffer).await {
                    Ok(8) if buffer[..8] == marker => return sent.elapsed(),
                    Ok(_) => {}
                    Err(_) => tokio::time::sleep(ECHO_PAUSE).await,
                }
            }
        };
        Ok(tokio::time::timeout(patience, answered).await.ok())
    }
}

/// Finds a peer by name, and has the daemon begin to connect.
async fn find(places: &Places, node: &str) -> anyhow::Result<(Status, Peer)> {
    let mut status = fetch(places).await?;
    let at = status.peers.iter().position(|peer| peer.name == node);
    let at = at.with_context(|| format!("there is no peer `{node}`; `keystone-mesh peers` lists them"))?;
    control::ask(&places.socket(), &Request::Connect { name: node.to_owned() }).await?;
    let peer = status.peers.swap_remove(at);
    Ok((status, peer))
}

fn address_of(peer: &Peer) -> anyhow::Result<IpAddr> {
    let address = peer.addresses.first().map(ipnet::IpNet::addr);
    address.with_context(|| format!("peer `{}` has no mesh address: a plain WireGuard peer answers no echo", peer.name))
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
