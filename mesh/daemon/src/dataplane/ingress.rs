//! From the wire to the TUN: one thread per shard.
//!
//! Receives runs of datagrams, from the socket or from relays, opens what is data straight into a buffer, puts packets
//! of one flow together there, and writes them to the TUN. A run is one sender's, so nearly always one lock serves it.
//! What is not data goes elsewhere: QUIC to quinn, probes to the control side, handshakes to the keeper.

use std::io::{self, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use keystone_mesh_core::DropReason;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use quinn_udp::RecvMeta;

use super::DataEvent;
use super::inbox::Inbox;
use super::keeper::Job;
use super::peer::{Peer, PeerCell};
use super::remote::Remote;
use super::shared::Shared;
use super::table::{PeerIndex, Table};
use super::wg::{self, Message, Opened, Refusal};
use crate::tun::TunQueue;
use crate::tun::coalesce::Coalescer;
use crate::udp::{DatagramKind, canonical};

/// Runs per system call. A run of bulk traffic fills its 64 KiB; more buffers would only push each other out of the
/// cache.
const RECV_RUNS: usize = 4;
/// The longest run: what UDP GRO puts together.
const RUN_BYTES: usize = 65535;
/// Opened packets that wait to be written; a little more than one call to the socket gives.
const ARENA_BYTES: usize = (RECV_RUNS + 1) * (RUN_BYTES + 1);
/// Calls to the socket in a row before relays and the stop signal are looked at.
const BATCH: usize = 16;

pub(crate) struct Ingress {
    shared: Arc<Shared>,
    shard: usize,
    tun: Arc<TunQueue>,
    inbox: Arc<Inbox>,
    arena: Box<[u8]>,
    used: usize,
    coalescer: Coalescer,
    now: Instant,
}

/// The peer that a run is from, locked, and what the run brought so far.
struct Held<'a> {
    cell: &'a Arc<PeerCell>,
    peer: MutexGuard<'a, Peer>,
    last_source: Option<IpAddr>,
    last_session: [u8; 4],
    packets: usize,
    bytes: usize,
}

impl Ingress {
    pub(crate) fn new(shared: Arc<Shared>, shard: usize, tun: Arc<TunQueue>, inbox: Arc<Inbox>) -> Self {
        let coalescer = Coalescer::new(tun.offload());
        let arena = vec![0; ARENA_BYTES].into_boxed_slice();
        Self { shared, shard, tun, inbox, arena, used: 0, coalescer, now: Instant::now() }
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let inbox = Arc::clone(&self.inbox);
        let socket = Arc::clone(&shared.sockets[self.shard]);
        let mut buffers: [Box<[u8]>; RECV_RUNS] = std::array::from_fn(|_| vec![0; RUN_BYTES].into());
        loop {
            let mut fds = [
                PollFd::new(socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(inbox.event().as_fd(), PollFlags::POLLIN),
                PollFd::new(shared.stop.as_fd(), PollFlags::POLLIN),
            ];
            // An interrupted wait is one that found nothing.
            let _ = poll(&mut fds, PollTimeout::NONE);
            if fds[2].any() == Some(true) {
                return;
            }
            let [from_socket, from_relays] = [0, 1].map(|i| fds[i].any() == Some(true));
            if from_relays {
                self.drain_inbox();
            }
            if from_socket {
                self.drain_socket(&mut buffers);
            }
        }
    }

    fn drain_socket(&mut self, buffers: &mut [Box<[u8]>; RECV_RUNS]) {
        let shared = Arc::clone(&self.shared);
        let mut metas = [RecvMeta::default(); RECV_RUNS];
        for _ in 0..BATCH {
            let mut slices = buffers.each_mut().map(|buffer| IoSliceMut::new(buffer));
            let received = match shared.sockets[self.shard].recv(&mut slices, &mut metas) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // An error of an earlier send that the kernel reports here (RFC 1122 section 4.1.3.3); reading clears it.
                Err(_) => continue,
            };
            self.now = Instant::now();
            let table = shared.table.load();
            for (slice, meta) in slices.iter().zip(&metas[..received]) {
                let from = Remote::Direct(canonical(meta.addr));
                self.run_of_datagrams(&table, &from, Some(meta), &slice[..meta.len], meta.stride);
            }
            self.flush();
        }
    }

    fn drain_inbox(&mut self) {
        let shared = Arc::clone(&self.shared);
        let inbox = Arc::clone(&self.inbox);
        self.now = Instant::now();
        let table = shared.table.load();
        for _ in 0..BATCH {
            let Some((from, batch)) = inbox.pop() else { break };
            for packet in batch.0.iter().filter(|packet| packet.len() <= RUN_BYTES) {
                self.run_of_datagrams(&table, &from, None, packet, packet.len());
            }
        }
        self.flush();
    }

    /// Handles datagrams of `stride` bytes each from one sender.
    fn run_of_datagrams(&mut self, table: &Table, from: &Remote, meta: Option<&RecvMeta>, run: &[u8], stride: usize) {
        if self.used + run.len() > self.arena.len() {
            self.flush();
        }
        let stride = stride.max(1);
        let mut held = None;
        let mut rest = run;
        loop {
            let (datagram, behind) = rest.split_at(stride.min(rest.len()));
            let mut next = behind;
            match DatagramKind::of(datagram) {
                DatagramKind::WireGuard => self.wireguard(table, from, datagram, &mut held),
                DatagramKind::Quic => {
                    let len = quic_len(rest, stride);
                    self.quic(meta, &rest[..len], stride);
                    next = &rest[len..];
                }
                DatagramKind::Probe => {
                    let (via, from) = (from.via(), from.node());
                    self.shared.event(DataEvent::Probe { via, from, bytes: datagram.to_vec() });
                }
                DatagramKind::Unknown => self.drop(DropReason::UnknownDatagram),
            }
            if next.is_empty() {
                break;
            }
            rest = next;
        }
        self.release(held, from);
    }

    fn wireguard<'t>(&mut self, table: &'t Table, from: &Remote, datagram: &[u8], held: &mut Option<Held<'t>>) {
        match Message::parse(datagram) {
            Some(Message::Data(index)) => {
                if held.as_ref().is_none_or(|held| held.cell.index != index) {
                    self.release(held.take(), from);
                    let Some(cell) = table.peer(index) else { return self.drop(DropReason::UnknownSession) };
                    *held = Some(Held::new(cell));
                }
                if let Some(held) = held {
                    self.data(table, index, datagram, held);
                }
            }
            Some(Message::Initiation | Message::Response(_) | Message::CookieReply(_)) => {
                self.handshake(from, datagram);
            }
            None => self.drop(DropReason::MalformedWireGuard),
        }
    }

    /// Opens a data message into the arena.
    fn data(&mut self, table: &Table, index: PeerIndex, message: &[u8], held: &mut Held<'_>) {
        let (start, room) = (self.used, message.len());
        match held.peer.open(message, &mut self.arena[start..start + room]) {
            Opened::Packet(len, source) => {
                held.count(message);
                if held.last_source != Some(source) {
                    if table.route(source) != Some(index) {
                        return self.drop(DropReason::SourceNotAllowed);
                    }
                    held.last_source = Some(source);
                }
                self.coalescer.push(&self.arena, start..start + len);
                // Aligned, for the copies and sums that follow. The message was longer than the packet by more.
                self.used = start + len.next_multiple_of(16);
            }
            Opened::Keepalive => held.count(message),
            Opened::Refused(reason) => self.drop(reason),
        }
    }

    /// Checks a handshake message's MACs and gives it to the keeper.
    fn handshake(&mut self, from: &Remote, datagram: &[u8]) {
        let mut cookie = [0; wg::INITIATION_LEN];
        match self.shared.engine.admit(from.ip(), datagram, &mut cookie) {
            Ok(()) => {
                if !self.shared.job(Job::Handshake { from: *from, shard: self.shard, message: datagram.into() }) {
                    self.drop(DropReason::UnderLoad);
                }
            }
            Err(Refusal::Drop(reason)) => self.drop(reason),
            Err(Refusal::Cookie(len)) => {
                self.drop(DropReason::UnderLoad);
                self.shared.send(self.shard, from, &cookie[..len], len, false);
            }
        }
    }

    fn quic(&mut self, meta: Option<&RecvMeta>, run: &[u8], stride: usize) {
        // QUIC does not come through a relay: the relay is reached by QUIC.
        let Some(meta) = meta else { return self.drop(DropReason::UnknownDatagram) };
        if !self.shared.quic.push(*meta, run) {
            self.shared.counters.drop(DropReason::QuicQueueFull, run.len().div_ceil(stride));
        }
    }

    /// Lets go of a peer, and tells what its packets mean.
    fn release(&self, held: Option<Held<'_>>, from: &Remote) {
        let Some(Held { cell, mut peer, last_session, packets, bytes, .. }) = held else { return };
        if packets == 0 {
            return;
        }
        let received = peer.received(bytes, last_session, from, self.now);
        drop(peer);
        self.shared.counters.received(packets, bytes);
        if received.confirmed {
            self.shared.proven(cell.key);
        }
        if received.roamed {
            self.shared.event(DataEvent::Roamed { peer: cell.key, via: from.via() });
        }
        if received.unblocked {
            // Should the keeper be too busy, the next packet tries again.
            self.shared.job(Job::Flush { peer: Arc::clone(cell) });
        }
    }

    /// Writes what was opened to the TUN.
    fn flush(&mut self) {
        let Self { coalescer, arena, tun, shared, .. } = self;
        coalescer.drain(arena, |parts| {
            if tun.write(parts).is_err() {
                shared.counters.drop(DropReason::TunWriteFailed, parts.len() - 1);
            }
        });
        self.used = 0;
    }

    fn drop(&self, reason: DropReason) {
        self.shared.counters.drop(reason, 1);
    }
}

impl<'a> Held<'a> {
    fn new(cell: &'a Arc<PeerCell>) -> Self {
        Self { cell, peer: cell.lock(), last_source: None, last_session: [0; 4], packets: 0, bytes: 0 }
    }

    fn count(&mut self, message: &[u8]) {
        self.last_session = wg::receiver(message);
        self.packets += 1;
        self.bytes += message.len();
    }
}

/// The length of the QUIC datagrams at the start of a run, of which the first is one.
fn quic_len(run: &[u8], stride: usize) -> usize {
    run.chunks(stride).take_while(|datagram| DatagramKind::of(datagram) == DatagramKind::Quic).map(<[u8]>::len).sum()
}
