//! Measures how a NAT behaves, by RFC 5780's method: two public hosts with two ports each tell what they see, and try who
//! gets through.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::host::Host;
use crate::nat::{Behaviour, Dependence};

/// Long for a datagram inside one kernel, short for a person.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often an answer that a filter may eat is tried before it counts as eaten.
const TRIES: u8 = 3;

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// Finds mapping and filtering of what stands between `client` and the internet. `a` and `b` are public hosts.
pub fn nat_behaviour(client: &Host, a: &Host, b: &Host) -> Result<Behaviour> {
    Ok(Behaviour { mapping: mapping(client, a, b)?, filtering: filtering(client, a, b)? })
}

/// The address and port under which `server` sees what `client` sends; `server` is a socket on the public host `at`.
pub fn outer_address(client: &UdpSocket, server: &UdpSocket, at: &Host) -> Result<SocketAddr> {
    let target = SocketAddr::new(at.v4().into(), server.local_addr()?.port());
    client.send_to(b"who am I", target).context("send a probe")?;
    let (_, seen) = receive(server, b"who am I")?.with_context(|| format!("no probe arrives at {target}"))?;
    Ok(seen)
}

/// True if a datagram that `from` sends to `outer` comes out at `client`. `friend` is a socket to which the client wrote
/// last, so it gets through: its datagram, sent after the one in question, tells when waiting is over.
pub fn is_let_in(client: &UdpSocket, outer: SocketAddr, from: &UdpSocket, friend: &UdpSocket) -> Result<bool> {
    for attempt in 0..TRIES {
        let (question, fence) = ([b'?', attempt], [b'!', attempt]);
        // A router that answers makes the second send fail with what the first one met; that is "not let in".
        let _refused = from.send_to(&question, outer);
        friend.send_to(&fence, outer).context("send the fence")?;
        let start = Instant::now();
        let mut seen = [0; 64];
        loop {
            match client.recv_from(&mut seen) {
                Ok((length, _)) if seen[..length] == question => return Ok(true),
                Ok((length, _)) if seen[..length] == fence => break,
                Ok(_) => {}
                Err(err) if is_timeout(&err) => ensure!(start.elapsed() < PATIENCE, "a solicited datagram is lost"),
                Err(err) => return Err(err).context("receive at the client"),
            }
        }
    }
    Ok(false)
}

fn mapping(client: &Host, a: &Host, b: &Host) -> Result<Dependence> {
    let inside = socket(client)?;
    let (a1, a2, b1) = (socket(a)?, socket(a)?, socket(b)?);
    let first = outer_address(&inside, &a1, a)?;
    let other_port = outer_address(&inside, &a2, a)?;
    let other_host = outer_address(&inside, &b1, b)?;
    Ok(match (first == other_port, first == other_host) {
        (true, true) => Dependence::Endpoint,
        (true, false) => Dependence::Address,
        (false, _) => Dependence::AddressAndPort,
    })
}

fn filtering(client: &Host, a: &Host, b: &Host) -> Result<Dependence> {
    let inside = socket(client)?;
    let (a1, a2, b1) = (socket(a)?, socket(a)?, socket(b)?);
    let outer = outer_address(&inside, &a1, a)?;
    let stranger = is_let_in(&inside, outer, &b1, &a1)?;
    let neighbour = is_let_in(&inside, outer, &a2, &a1)?;
    Ok(match (stranger, neighbour) {
        (true, _) => Dependence::Endpoint,
        (false, true) => Dependence::Address,
        (false, false) => Dependence::AddressAndPort,
    })
}

fn socket(host: &Host) -> Result<UdpSocket> {
    let socket = host.udp(ANY)?;
    socket.set_read_timeout(Some(Duration::from_millis(100))).context("set a timeout")?;
    Ok(socket)
}

/// The next datagram with exactly this content; None if none comes in time.
fn receive(socket: &UdpSocket, wanted: &[u8]) -> Result<Option<(usize, SocketAddr)>> {
    let start = Instant::now();
    let mut seen = [0; 64];
    while start.elapsed() < PATIENCE {
        match socket.recv_from(&mut seen) {
            Ok((length, from)) if &seen[..length] == wanted => return Ok(Some((length, from))),
            Ok(_) => {}
            Err(err) if is_timeout(&err) => {}
            Err(err) => return Err(err).context("receive a probe"),
        }
    }
    Ok(None)
}

fn is_timeout(err: &io::Error) -> bool {
    matches!(err.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::ConnectionRefused)
}
