//! Rubbish and replays at the port, while traffic flows.

use std::fs;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use keystone_lab::wait;
use keystone_lab::wireguard::End;

use crate::stage::{PATIENCE, POLL, Pair, both_reply, drops, status, wait_until};
use crate::{OURS, in_world, talking_pair};

/// How many datagrams are thrown at the port.
const FLOOD: usize = 1_000_000;
/// Between two pauses of the thrower, and how long they are: some 100,000 a second. Faster ones would fill the socket's
/// buffer, which is a matter between the kernel and the sender.
const BURST: usize = 100;
const PAUSE: Duration = Duration::from_millis(1);

/// Growth of a daemon that keeps nothing of the flood: allocator and caches, in KiB.
const GROWTH: u64 = 8 << 10;
/// A busy machine loses a ping now and then; a daemon that stands still loses all.
const LOST_PERCENT: usize = 5;

#[test]
fn a_million_datagrams_are_counted_and_nothing_is_down() {
    in_world("datagrams::a_million_datagrams_are_counted_and_nothing_is_down", |world| {
        let (pair, pings) = talking_pair(world)?;
        let stranger = world.public_host("stranger")?;
        let socket = stranger.udp(SocketAddr::from(([0, 0, 0, 0], 0)))?;
        let to = SocketAddr::from((pair.ours.host().v4(), pair.ours.settings().listen_port));

        // Caches and pools fill at first; that is no growth.
        throw(&socket, to, FLOOD / 20)?;
        let (before, start) = (resident_kib(&pair.ours)?, Instant::now());
        throw(&socket, to, FLOOD)?;
        let took = start.elapsed();
        let after = resident_kib(&pair.ours)?;

        let last = Instant::now();
        both_reply(&pings, last, PATIENCE).context("pings after the flood")?;
        let (sent, answered) = pings[0].trace().counts(start, last - Duration::from_millis(500));
        let told = wait_until(&pair.ours, "its own session lives", |s| s.data_plane.live_sessions == 1)?;
        println!("{FLOOD} datagrams in {:.1} s; {answered} of {sent} pings answered", took.as_secs_f64());
        println!("resident: {before} KiB before, {after} KiB after; drops: {:?}", told.data_plane.drops);

        ensure!((sent - answered) * 100 <= sent * LOST_PERCENT, "{answered} of {sent} pings were answered");
        ensure!(after <= before + GROWTH, "it grew from {before} to {after} KiB");
        for reason in ["unknown_datagram", "malformed_wireguard", "bad_mac", "unknown_session", "bad_probe"] {
            ensure!(drops(&told, reason) > FLOOD as u64 / 100, "{reason} is counted: {told:?}");
        }
        ensure!(told.peers[0].via.as_deref() == Some(&outside(&pair)), "nobody moved the peer: {told:?}");
        Ok(())
    });
}

#[test]
fn a_replayed_initiation_is_counted_and_changes_nothing() {
    in_world("datagrams::a_replayed_initiation_is_counted_and_changes_nothing", |world| {
        // The other calls us through somebody in the middle, who keeps what he sees.
        let mut pair = Pair::new(world, "0", crate::Shape { we_call: false, ..OURS })?;
        let us = SocketAddr::from((pair.ours.host().v4(), pair.ours.settings().listen_port));
        let middle = world.public_host("middle")?;
        let any = SocketAddr::from(([0, 0, 0, 0], 0));
        let (towards_other, towards_us) = (middle.udp(any)?, middle.udp(any)?);
        let at = SocketAddr::from((middle.v4(), towards_other.local_addr()?.port()));
        pair.other.settings_mut().peers[0].endpoint = Some(at);
        let seen = relay(towards_other, towards_us.try_clone()?, us);
        pair.start()?;
        let pings = pair.ping_us()?;
        both_reply(&pings, Instant::now(), PATIENCE)?;
        let initiation = seen.recv_timeout(PATIENCE).context("an initiation was seen")?;

        let before = status(&pair.ours)?;
        let start = Instant::now();
        let stranger = world.public_host("stranger")?.udp(any)?;
        for _ in 0..200 {
            // From where it came, and from elsewhere. Paced, so that no cookie is asked for.
            towards_us.send_to(&initiation, us)?;
            stranger.send_to(&initiation, us)?;
            thread::sleep(Duration::from_millis(10));
        }
        let told = wait_until(&pair.ours, "each is counted", |s| drops(s, "replayed_handshake") >= 390)?;
        stranger.set_nonblocking(true)?;
        ensure!(stranger.recv(&mut [0; 256]).is_err(), "a replay is not answered");
        both_reply(&pings, Instant::now(), PATIENCE)?;
        let (sent, answered) = pings[0].trace().counts(start, Instant::now() - Duration::from_secs(1));
        println!("drops: {:?}; {answered} of {sent} pings answered", told.data_plane.drops);
        ensure!(sent - answered <= 1, "{answered} of {sent} pings were answered");
        ensure!(told.peers[0].via == before.peers[0].via, "the peer is where it was");
        let (was, is) = (before.peers[0].last_handshake_s, told.peers[0].last_handshake_s);
        ensure!(is > was, "the session is the same one: {was:?} s and {is:?} s old");
        Ok(())
    });
}

fn outside(pair: &Pair) -> String {
    format!("{}:{}", pair.other.host().v4(), pair.other.settings().listen_port)
}

/// Carries datagrams between us and whoever calls; tells the first initiation.
fn relay(towards_other: UdpSocket, towards_us: UdpSocket, us: SocketAddr) -> mpsc::Receiver<Vec<u8>> {
    let (tell, seen) = mpsc::sync_channel(1);
    let (towards_other, towards_us) = (Arc::new(towards_other), Arc::new(towards_us));
    let caller = Arc::new(std::sync::Mutex::new(None));
    let (other, ours, known) = (towards_other.clone(), towards_us.clone(), caller.clone());
    thread::spawn(move || -> io::Result<()> {
        let mut buffer = [0; 2048];
        loop {
            let (length, from) = other.recv_from(&mut buffer)?;
            *known.lock().expect("nobody panics with it") = Some(from);
            if buffer[0] == 1 {
                let _not_the_first = tell.try_send(buffer[..length].to_vec());
            }
            ours.send_to(&buffer[..length], us)?;
        }
    });
    thread::spawn(move || -> io::Result<()> {
        let mut buffer = [0; 2048];
        loop {
            let (length, _) = towards_us.recv_from(&mut buffer)?;
            let to = *caller.lock().expect("nobody panics with it");
            if let Some(to) = to {
                towards_other.send_to(&buffer[..length], to)?;
            }
        }
    });
    seen
}

/// Throws rubbish of every kind: random bytes, and such that look like WireGuard, QUIC and probes.
fn throw(socket: &UdpSocket, to: SocketAddr, count: usize) -> Result<()> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut datagram = [0; 1500];
    for number in 0..count {
        let length = shape(number, &mut random, &mut datagram);
        // The way out may be full for a moment.
        let _lost = socket.send_to(&datagram[..length], to);
        if number % BURST == 0 {
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}

fn shape(number: usize, random: &mut Random, datagram: &mut [u8; 1500]) -> usize {
    let any = 1 + random.below(datagram.len() - 1);
    let (head, length): (&[u8], usize) = match number % 10 {
        0 => (&[], any),
        1 => (&[0], any),
        2 => (&[1, 0, 0, 0], 148),
        3 => (&[2, 0, 0, 0], 92),
        4 => (&[3, 0, 0, 0], 64),
        5 => (&[4, 0, 0, 0], any.max(32)),
        6 => (&[1 + (number / 10 % 4) as u8, 0, 0, 0], any),
        7 => (&[5], any),
        // A long header of QUIC version 1 (RFC 9000, section 17.2), and a short one.
        8 => (&[0xc0, 0, 0, 0, 1], any.max(1200)),
        _ => (&[0x40], any),
    };
    random.fill(&mut datagram[..length]);
    let head = &head[..head.len().min(length)];
    datagram[..head.len()].copy_from_slice(head);
    length
}

/// xorshift64: repeatable, and random enough for rubbish.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// `VmRSS` of proc(5), once it has come to rest.
fn resident_kib(end: &End) -> Result<u64> {
    let read = || -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", end.id()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        line.trim().trim_end_matches(" kB").parse().context("a number")
    };
    let mut last = 0;
    wait::until("memory comes to rest", PATIENCE, POLL * 10, || {
        let kib = read()?;
        Ok((std::mem::replace(&mut last, kib) == kib).then_some(kib))
    })
}
