//! Counters that all threads add to, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use keystone_mesh_core::DropReason;

/// Drops by reason, totals of what went through, and handshakes.
#[derive(Debug)]
pub(crate) struct Counters {
    drops: Vec<AtomicU64>,
    pub(crate) rx_packets: AtomicU64,
    pub(crate) rx_bytes: AtomicU64,
    pub(crate) tx_packets: AtomicU64,
    pub(crate) tx_bytes: AtomicU64,
    pub(crate) handshakes_started: AtomicU64,
    pub(crate) handshakes_completed: AtomicU64,
    pub(crate) handshakes_failed: AtomicU64,
}

impl Counters {
    pub(crate) fn new() -> Self {
        Self {
            drops: DropReason::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
            rx_packets: AtomicU64::new(0),
            rx_bytes: AtomicU64::new(0),
            tx_packets: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            handshakes_started: AtomicU64::new(0),
            handshakes_completed: AtomicU64::new(0),
            handshakes_failed: AtomicU64::new(0),
        }
    }

    /// Counts `count` packets lost.
    pub(crate) fn drop(&self, reason: DropReason, count: usize) {
        if count > 0 {
            self.drops[reason as usize].fetch_add(count as u64, Ordering::Relaxed);
        }
    }

    /// Counts packets and bytes that were opened.
    pub(crate) fn received(&self, packets: usize, bytes: usize) {
        self.rx_packets.fetch_add(packets as u64, Ordering::Relaxed);
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts datagrams and bytes that the kernel or a relay took.
    pub(crate) fn sent(&self, packets: usize, bytes: usize) {
        self.tx_packets.fetch_add(packets as u64, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts an initiation that is sent, be it a repetition.
    pub(crate) fn handshake_started(&self) {
        self.handshakes_started.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a session that has proven itself.
    pub(crate) fn handshake_completed(&self) {
        self.handshakes_completed.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a handshake that was given up.
    pub(crate) fn handshake_failed(&self) {
        self.handshakes_failed.fetch_add(1, Ordering::Relaxed);
    }

    /// The count of every reason, in order of declaration.
    pub(crate) fn drops(&self) -> Vec<(DropReason, u64)> {
        DropReason::ALL.iter().map(|reason| (*reason, self.drops[*reason as usize].load(Ordering::Relaxed))).collect()
    }
}
