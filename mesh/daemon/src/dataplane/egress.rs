//! From the TUN to the wire: one thread per shard.
//!
//! Reads packets until there are none, and seals each into the runs that are sent: one lookup, one lock and at best one
//! system call for each super packet of 64 KiB.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Instant;

use keystone_mesh_core::DropReason;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::DataEvent;
use super::batch::Runs;
use super::keeper::Job;
use super::peer::{PeerCell, Sealing};
use super::shared::Shared;
use super::table::Table;
use crate::tun::split::Segments;
use crate::tun::virtio::{HEADER_LEN, VirtioHeader};
use crate::tun::{MAX_READ, TunQueue, ip};

/// Packets read in a row before the clock and the table are looked at again.
const BATCH: usize = 64;

pub(crate) struct Egress {
    shared: Arc<Shared>,
    shard: usize,
    tun: Arc<TunQueue>,
    runs: Runs,
    max_datagrams: usize,
    now: Instant,
}

impl Egress {
    pub(crate) fn new(shared: Arc<Shared>, shard: usize, tun: Arc<TunQueue>) -> Self {
        Self { shared, shard, tun, runs: Runs::new(), max_datagrams: 1, now: Instant::now() }
    }

    /// Runs until told to stop, or until the interface is gone.
    pub(crate) fn run(mut self) {
        let mut buffer = vec![0; MAX_READ].into_boxed_slice();
        loop {
            let mut fds = [
                PollFd::new(self.tun.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.shared.stop.as_fd(), PollFlags::POLLIN),
            ];
            // An interrupted wait is one that found nothing.
            let _ = poll(&mut fds, PollTimeout::NONE);
            if fds[1].any() == Some(true) {
                return;
            }
            if !self.drain(&mut buffer) {
                self.shared.event(DataEvent::TunLost);
                return;
            }
        }
    }

    /// Handles packets until there are none; false if there will never be any.
    fn drain(&mut self, buffer: &mut [u8]) -> bool {
        loop {
            self.now = Instant::now();
            self.max_datagrams = self.shared.sockets[self.shard].max_segments();
            let shared = Arc::clone(&self.shared);
            let table = shared.table.load();
            for _ in 0..BATCH {
                match self.tun.read(buffer) {
                    Ok(len) => self.packet(&table, &mut buffer[..len]),
                    Err(error) => {
                        self.flush();
                        // EBADFD: the interface was deleted. Anything else passes.
                        return error.raw_os_error() != Some(libc::EBADFD);
                    }
                }
            }
        }
    }

    fn packet(&mut self, table: &Table, bytes: &mut [u8]) {
        let Ok(header) = VirtioHeader::decode(bytes) else {
            return self.shared.counters.drop(DropReason::MalformedInner, 1);
        };
        let packet = &mut bytes[HEADER_LEN..];
        let Some(destination) = ip::destination(packet) else {
            return self.shared.counters.drop(DropReason::MalformedInner, 1);
        };
        let Some(peer) = table.route(destination).and_then(|index| table.peer(index)) else {
            return self.shared.counters.drop(DropReason::NoRoute, 1);
        };
        match Segments::new(&header, packet) {
            Ok(segments) => self.seal(peer, segments),
            Err(_) => self.shared.counters.drop(DropReason::MalformedInner, 1),
        }
    }

    fn seal(&mut self, cell: &Arc<PeerCell>, mut segments: Segments<'_>) {
        loop {
            let mut peer = cell.lock();
            match peer.seal(&mut segments, &mut self.runs, self.max_datagrams, self.now) {
                Sealing::Done => return,
                Sealing::RunsFull => {
                    // Not while others wait for the peer.
                    drop(peer);
                    self.flush();
                }
                Sealing::NotReady => {
                    let lost = peer.hold(&mut segments);
                    let reason = if peer.has_path() { DropReason::QueueFull } else { DropReason::NoPath };
                    self.shared.counters.drop(reason, lost);
                    let demand = peer.demand_is_due(self.now);
                    if peer.request_is_due(self.now)
                        && !self.shared.job(Job::Initiate { peer: Arc::clone(cell), again: false })
                    {
                        peer.withdraw_request();
                    }
                    drop(peer);
                    if demand {
                        self.shared.event(DataEvent::Demand { peer: cell.key });
                    }
                    return;
                }
            }
        }
    }

    fn flush(&mut self) {
        let Self { runs, shared, shard, .. } = self;
        runs.drain(|to, run, stride| shared.send(*shard, to, run, stride, true));
    }
}
