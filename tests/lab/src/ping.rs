//! Pings that run in the background and remember when each reply came: the lab's clock for "how long until" and "how long
//! was it gone".

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use crate::host::Host;

/// Types of echo request and reply, of ICMP (RFC 792) and of ICMPv6 (RFC 4443).
const ECHO_V4: (u8, u8) = (8, 0);
const ECHO_V6: (u8, u8) = (128, 129);

/// Header (8 bytes), our 32-bit number (the header's 16 bits wrap in a long run), padding to the usual 56 bytes.
const PACKET: usize = 8 + 56;

/// How long the receiver sleeps at most before it looks whether it should end.
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(50);

/// Echo requests from one host to one address at a steady pace, until dropped.
pub struct Pinger {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    target: SocketAddr,
    stop: AtomicBool,
    echoes: Mutex<Vec<Echo>>,
    replied: Condvar,
}

#[derive(Clone, Copy, Debug)]
struct Echo {
    sent: Instant,
    replied: Option<Instant>,
}

impl Pinger {
    /// Starts at once, and goes on whatever happens: a missing route or device is no more than a lost reply.
    pub fn start(host: &Host, target: impl Into<IpAddr>, every: Duration) -> Result<Self> {
        let target = SocketAddr::new(target.into(), 0);
        let flags = SockFlag::SOCK_CLOEXEC;
        let (family, protocol) = match target {
            SocketAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
            SocketAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
        };
        let opened = host.enter(|| socket(family, SockType::Datagram, flags, protocol).map(UdpSocket::from));
        let out = opened.with_context(|| format!("on {}: open an ICMP socket", host.name()))?;
        out.set_read_timeout(Some(RECEIVE_TIMEOUT)).context("set a timeout")?;
        let back = out.try_clone().context("share the socket")?;
        let stop = AtomicBool::new(false);
        let shared = Arc::new(Shared { target, stop, echoes: Mutex::default(), replied: Condvar::new() });
        let (sender, receiver) = (Arc::clone(&shared), Arc::clone(&shared));
        let threads =
            vec![thread::spawn(move || sender.send(&out, every)), thread::spawn(move || receiver.receive(&back))];
        Ok(Self { shared, threads })
    }

    /// When the first reply came, waiting for it if need be.
    pub fn first_reply(&self, patience: Duration) -> Result<Instant> {
        self.reply_after(None, patience)
    }

    /// When the first reply came to a request that was sent after `since`, waiting for it if need be.
    pub fn reply_to_request_after(&self, since: Instant, patience: Duration) -> Result<Instant> {
        self.reply_after(Some(since), patience)
    }

    /// What was measured until now.
    pub fn trace(&self) -> Trace {
        Trace { echoes: self.shared.echoes().clone() }
    }

    fn reply_after(&self, since: Option<Instant>, patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        let mut echoes = self.shared.echoes();
        loop {
            let asked = echoes.iter().filter(|echo| since.is_none_or(|since| echo.sent >= since));
            if let Some(first) = asked.filter_map(|echo| echo.replied).min() {
                return Ok(first);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no ping reply within {:.1} s", patience.as_secs_f64());
            }
            echoes = self.shared.replied.wait_timeout(echoes, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

impl Shared {
    fn echoes(&self) -> MutexGuard<'_, Vec<Echo>> {
        self.echoes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Types of a request to the target and of its reply.
    fn types(&self) -> (u8, u8) {
        if self.target.is_ipv4() { ECHO_V4 } else { ECHO_V6 }
    }

    fn send(&self, socket: &UdpSocket, every: Duration) {
        let mut due = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let number = {
                let mut echoes = self.echoes();
                echoes.push(Echo { sent: Instant::now(), replied: None });
                echoes.len() - 1
            };
            let mut packet = [0; PACKET];
            packet[0] = self.types().0;
            packet[8..16].copy_from_slice(&(number as u64).to_be_bytes());
            let _no_route_yet = socket.send_to(&packet, self.target);
            due += every;
            // After a stall (a busy machine) the pace goes on from here instead of catching up in a burst.
            due = due.max(Instant::now());
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }

    fn receive(&self, socket: &UdpSocket) {
        let mut packet = [0; 256];
        while !self.stop.load(Ordering::Relaxed) {
            let Ok((length, _)) = socket.recv_from(&mut packet) else { continue };
            let replied = Instant::now();
            if length < 16 || packet[0] != self.types().1 {
                continue;
            }
            let Some(number) = packet[8..16].try_into().ok().map(u64::from_be_bytes) else { continue };
            let mut echoes = self.echoes();
            if let Some(echo) = usize::try_from(number).ok().and_then(|index| echoes.get_mut(index)) {
                echo.replied.get_or_insert(replied);
                self.replied.notify_all();
            }
        }
    }
}

/// What a [`Pinger`] measured.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    echoes: Vec<Echo>,
}

impl Trace {
    /// Requests sent between `from` and `to`, and how many of them were answered.
    pub fn counts(&self, from: Instant, to: Instant) -> (usize, usize) {
        let asked = self.between(from, to);
        (asked.clone().count(), asked.filter(|echo| echo.replied.is_some()).count())
    }

    /// The longest silence between `from` and `to`: time without a reply coming in. Both ends count as replies.
    pub fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let replies = self.echoes.iter().filter_map(|echo| echo.replied);
        let mut moments: Vec<Instant> = replies.filter(|at| (from..to).contains(at)).chain([from, to]).collect();
        moments.sort_unstable();
        let silences = moments.windows(2).map(|pair| pair[1] - pair[0]);
        silences.max().unwrap_or_default()
    }

    /// The median round trip of the answered requests sent between `from` and `to`.
    pub fn median_rtt(&self, from: Instant, to: Instant) -> Option<Duration> {
        let trips = self.between(from, to).filter_map(|echo| Some(echo.replied?.duration_since(echo.sent)));
        let mut trips: Vec<Duration> = trips.collect();
        trips.sort_unstable();
        trips.get(trips.len() / 2).copied()
    }

    fn between(&self, from: Instant, to: Instant) -> impl Iterator<Item = &Echo> + Clone {
        self.echoes.iter().filter(move |echo| (from..to).contains(&echo.sent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_the_longest_time_without_a_reply_and_reaches_to_the_edges() {
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let echo = |sent, answered: bool| Echo { sent: at(sent), replied: answered.then(|| at(sent + 1)) };
        let trace = Trace { echoes: vec![echo(0, true), echo(10, false), echo(20, false), echo(30, true)] };
        assert_eq!(trace.longest_gap(start, at(31)), Duration::from_millis(30));
        assert_eq!(trace.longest_gap(start, at(100)), Duration::from_millis(69));
        assert_eq!(trace.counts(start, at(31)), (4, 2));
        assert_eq!(trace.median_rtt(start, at(31)), Some(Duration::from_millis(1)));
    }
}
