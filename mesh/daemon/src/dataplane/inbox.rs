//! Packets that came through a relay, on their way to the ingress thread.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::remote::Remote;
use crate::sys::eventfd::EventFd;

/// Bytes in the queue: some 20 ms at 1.5 Gbit/s.
const MAX_BYTES: usize = 4 << 20;
/// What a packet costs beside its bytes, so that many tiny ones are bounded as well.
const PACKET_BYTES: usize = 64;

/// Packets that one relay brought from one node, in order.
#[derive(Clone, Debug, Default)]
pub struct PacketBatch(pub Vec<Bytes>);

/// The queue and the event that wakes the thread.
#[derive(Debug)]
pub(crate) struct Inbox {
    queue: Mutex<Queue>,
    event: EventFd,
}

#[derive(Debug, Default)]
struct Queue {
    batches: VecDeque<(Remote, PacketBatch)>,
    bytes: usize,
}

impl Inbox {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { queue: Mutex::default(), event: EventFd::new()? })
    }

    /// The descriptor that is readable while there is something to take.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Adds a batch; false if the queue is full.
    pub(crate) fn push(&self, from: Remote, batch: PacketBatch) -> bool {
        let mut queue = self.lock();
        let bytes = queue.bytes + batch.cost();
        if bytes > MAX_BYTES {
            return false;
        }
        queue.bytes = bytes;
        queue.batches.push_back((from, batch));
        let was_empty = queue.batches.len() == 1;
        drop(queue);
        if was_empty {
            self.event.raise();
        }
        true
    }

    /// Takes the oldest batch; lowers the event with the last one.
    pub(crate) fn pop(&self) -> Option<(Remote, PacketBatch)> {
        let mut queue = self.lock();
        let Some((from, batch)) = queue.batches.pop_front() else {
            self.event.clear();
            return None;
        };
        queue.bytes -= batch.cost();
        Some((from, batch))
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PacketBatch {
    fn cost(&self) -> usize {
        self.0.iter().map(|packet| packet.len() + PACKET_BYTES).sum()
    }
}

#[cfg(test)]
mod tests {
    use keystone_mesh_core::NodeId;

    use super::*;

    #[test]
    fn batches_come_out_in_order_and_the_queue_is_bounded() {
        let inbox = Inbox::new().unwrap();
        let from = Remote::Relay { relay: NodeId::from_bytes([1; 32]), node: NodeId::from_bytes([2; 32]) };
        let batch = |byte| PacketBatch(vec![Bytes::from(vec![byte; 1000]); 100]);
        let taken = (0..255u8).take_while(|byte| inbox.push(from, batch(*byte))).count();
        assert_eq!(taken, MAX_BYTES / 106_400);
        for byte in 0..taken {
            assert_eq!(inbox.pop().unwrap().1.0[0][0], byte as u8);
        }
        assert!(inbox.pop().is_none());
        assert!(inbox.push(from, batch(0)));
    }
}
