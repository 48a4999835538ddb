//! What the threads of the data plane share.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};

use arc_swap::ArcSwap;
use keystone_mesh_core::{DropReason, NodeId, PublicKey};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc;

use super::DataEvent;
use super::counters::Counters;
use super::keeper::Job;
use super::remote::Remote;
use super::table::Table;
use super::wg::Engine;
use crate::sys::eventfd::EventFd;
use crate::udp::UdpSocket;
use crate::udp::quic::QuicSocket;

/// How long an egress thread waits for a full socket buffer before it drops: the time that the buffer takes to drain
/// at 3 Mbit/s would be seconds, and old packets are worth nothing.
const SEND_PATIENCE_MS: u8 = 20;

/// Takes sealed packets to a relay.
pub trait RelaySink: Send + Sync {
    /// Sends `packets`, in order, to `to` through `relay`, without waiting. Gives how many were dropped because the
    /// queue is full or the relay is not connected.
    fn send(&self, relay: NodeId, to: NodeId, packets: &mut dyn Iterator<Item = &[u8]>) -> usize;
}

/// No relays: everything is dropped.
#[derive(Debug, Default)]
pub struct NoRelays;

impl RelaySink for NoRelays {
    fn send(&self, _relay: NodeId, _to: NodeId, packets: &mut dyn Iterator<Item = &[u8]>) -> usize {
        packets.count()
    }
}

pub(crate) struct Shared {
    pub(crate) table: ArcSwap<Table>,
    pub(crate) engine: Engine,
    /// One per shard.
    pub(crate) sockets: Vec<Arc<UdpSocket>>,
    pub(crate) relay: Arc<dyn RelaySink>,
    pub(crate) quic: Arc<QuicSocket>,
    pub(crate) events: mpsc::Sender<DataEvent>,
    pub(crate) jobs: SyncSender<Job>,
    pub(crate) counters: Counters,
    /// Raised once, never cleared: every thread polls it.
    pub(crate) stop: EventFd,
}

impl Shared {
    /// Sends a run of datagrams of `stride` bytes and counts what is lost. Where the socket's buffer is full, waits a
    /// little if `patient`.
    pub(crate) fn send(&self, shard: usize, to: &Remote, run: &[u8], stride: usize, patient: bool) {
        let datagrams = run.len().div_ceil(stride.max(1));
        let lost = match to {
            Remote::Relay { relay, node } => {
                let lost = self.relay.send(*relay, *node, &mut run.chunks(stride)).min(datagrams);
                self.counters.drop(DropReason::RelayQueueFull, lost);
                lost
            }
            Remote::Direct(addr) => {
                let socket = &self.sockets[shard];
                let lost = match send_direct(socket, *addr, run, stride, patient) {
                    Ok(()) => 0,
                    // Segmentation failed, or the path is too narrow for some of them: those that fit still go.
                    Err(error) if datagrams > 1 && may_fit_alone(&error) => run
                        .chunks(stride)
                        .filter(|datagram| send_direct(socket, *addr, datagram, stride, patient).is_err())
                        .count(),
                    Err(_) => datagrams,
                };
                self.counters.drop(DropReason::SendFailed, lost);
                lost
            }
        };
        if lost < datagrams {
            self.counters.sent(datagrams - lost, run.len());
        }
    }

    /// Tells the control side, or counts that it could not be told.
    pub(crate) fn event(&self, event: DataEvent) {
        if self.events.try_send(event).is_err() {
            self.counters.drop(DropReason::ControlQueueFull, 1);
        }
    }

    /// A session with this peer has proven itself.
    pub(crate) fn proven(&self, peer: PublicKey) {
        self.counters.handshake_completed();
        self.event(DataEvent::Handshake { peer });
    }

    /// Gives the keeper a job; false if it has too many.
    pub(crate) fn job(&self, job: Job) -> bool {
        match self.jobs.try_send(job) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        }
    }
}

fn send_direct(
    socket: &UdpSocket,
    to: std::net::SocketAddr,
    run: &[u8],
    stride: usize,
    patient: bool,
) -> io::Result<()> {
    match socket.send(to, run, stride) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock && patient => {
            let mut writable = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
            // However the wait ends, the second attempt tells.
            let _ = poll(&mut writable, PollTimeout::from(SEND_PATIENCE_MS));
            socket.send(to, run, stride)
        }
        result => result,
    }
}

fn may_fit_alone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE))
}
