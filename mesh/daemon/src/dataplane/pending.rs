//! Packets that wait for a handshake or a path.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Packets per peer: a burst of TCP openings, pings and name lookups.
const MAX_PACKETS: usize = 128;
/// Bytes over all peers.
const MAX_BYTES: usize = 4 << 20;

/// What all queues together hold.
#[derive(Debug, Default)]
pub(crate) struct Budget(AtomicUsize);

/// One peer's queue. The oldest packets give way when it is full; new ones when all queues together are.
#[derive(Debug)]
pub(crate) struct Pending {
    packets: VecDeque<Box<[u8]>>,
    budget: Arc<Budget>,
}

impl Budget {
    fn take(&self, bytes: usize) -> bool {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|used| *used <= MAX_BYTES)
            })
            .is_ok()
    }

    fn give(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Pending {
    pub(crate) fn new(budget: Arc<Budget>) -> Self {
        Self { packets: VecDeque::new(), budget }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Adds a packet and gives how many were lost for it, itself included.
    pub(crate) fn push(&mut self, packet: &[u8]) -> usize {
        let mut lost = 0;
        while self.packets.len() >= MAX_PACKETS {
            self.pop();
            lost += 1;
        }
        if !self.budget.take(packet.len()) {
            return lost + 1;
        }
        self.packets.push_back(packet.into());
        lost
    }

    /// The packet that has waited longest.
    pub(crate) fn first(&self) -> Option<&[u8]> {
        self.packets.front().map(|packet| &**packet)
    }

    /// Removes the packet that has waited longest.
    pub(crate) fn pop(&mut self) {
        if let Some(packet) = self.packets.pop_front() {
            self.budget.give(packet.len());
        }
        if self.packets.is_empty() {
            // Most peers wait once; their queues need not keep memory.
            self.packets = VecDeque::new();
        }
    }

    /// Removes all and gives how many there were.
    pub(crate) fn clear(&mut self) -> usize {
        let count = self.packets.len();
        while !self.is_empty() {
            self.pop();
        }
        count
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_gives_way_in_a_full_queue() {
        let mut pending = Pending::new(Arc::default());
        for byte in 0..=MAX_PACKETS {
            assert_eq!(pending.push(&[byte as u8; 10]), usize::from(byte == MAX_PACKETS));
        }
        assert_eq!(pending.first(), Some(&[1u8; 10][..]));
        assert_eq!(pending.clear(), MAX_PACKETS);
        assert_eq!(pending.first(), None);
    }

    #[test]
    fn all_queues_share_a_budget_and_give_it_back() {
        let budget = Arc::new(Budget::default());
        let mut queues: Vec<_> = (0..100).map(|_| Pending::new(Arc::clone(&budget))).collect();
        let lost: usize = queues.iter_mut().flat_map(|queue| (0..50).map(|_| queue.push(&[0; 1400]))).sum();
        assert_eq!(lost, 5000 - MAX_BYTES / 1400);
        drop(queues);
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
    }
}
