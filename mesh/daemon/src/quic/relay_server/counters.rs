//! What a relay counts.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use keystone_mesh_core::relay::{Code, RelayDrop, Role};

/// A relay's counters; they only grow.
#[derive(Debug, Default)]
pub struct RelayCounters {
    forwarded_datagrams: AtomicU64,
    forwarded_bytes: AtomicU64,
    drops: [AtomicU64; RelayDrop::ALL.len()],
    networks: AtomicU64,
    nodes: AtomicU64,
    joiners: AtomicU64,
    refused_malformed: AtomicU64,
    refused_other: AtomicU64,
    replaced: AtomicU64,
    cut: AtomicU64,
    malformed_messages: AtomicU64,
    splices: AtomicU64,
    splices_refused: AtomicU64,
    spliced_bytes: AtomicU64,
}

/// A relay's counters and gauges at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RelaySnapshot {
    /// Clients that exchange datagrams, at present.
    pub clients: usize,
    /// Joiners, at present.
    pub joiners: usize,
    /// Datagrams forwarded.
    pub forwarded_datagrams: u64,
    /// Their bytes, frame headers included.
    pub forwarded_bytes: u64,
    /// Datagrams dropped, by [`RelayDrop::label`].
    pub drops: Vec<(&'static str, u64)>,
    /// Connections admitted: of the network itself, of nodes, of joiners.
    pub admitted: [u64; 3],
    /// Connections refused for what they said first.
    pub refused_malformed: u64,
    /// Connections refused for another reason.
    pub refused_other: u64,
    /// Connections whose place another one with the same identity took.
    pub replaced: u64,
    /// Joiners whose time was over.
    pub cut: u64,
    /// Messages after the greeting that were none.
    pub malformed_messages: u64,
    /// Splices made.
    pub splices: u64,
    /// Splices refused.
    pub splices_refused: u64,
    /// Bytes spliced, both ways.
    pub spliced_bytes: u64,
}

impl RelaySnapshot {
    /// Datagrams dropped for a reason.
    pub fn dropped(&self, reason: RelayDrop) -> u64 {
        self.drops.iter().find(|(label, _)| *label == reason.label()).map_or(0, |(_, count)| *count)
    }
}

impl RelayCounters {
    pub(super) fn forwarded(&self, datagrams: u64, bytes: u64) {
        self.forwarded_datagrams.fetch_add(datagrams, Relaxed);
        self.forwarded_bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn dropped(&self, reason: RelayDrop) {
        self.drops[reason as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn admitted(&self, role: Role) {
        match role {
            Role::Network => &self.networks,
            Role::Node => &self.nodes,
            Role::Joiner => &self.joiners,
        }
        .fetch_add(1, Relaxed);
    }

    pub(super) fn refused(&self, code: Code) {
        if code == Code::Malformed { &self.refused_malformed } else { &self.refused_other }.fetch_add(1, Relaxed);
    }

    pub(super) fn replaced(&self) {
        self.replaced.fetch_add(1, Relaxed);
    }

    pub(super) fn cut(&self) {
        self.cut.fetch_add(1, Relaxed);
    }

    pub(super) fn malformed_message(&self) {
        self.malformed_messages.fetch_add(1, Relaxed);
    }

    pub(super) fn spliced(&self) {
        self.splices.fetch_add(1, Relaxed);
    }

    pub(super) fn splice_refused(&self) {
        self.splices_refused.fetch_add(1, Relaxed);
    }

    pub(super) fn spliced_bytes(&self, bytes: u64) {
        self.spliced_bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn snapshot(&self, clients: usize, joiners: usize) -> RelaySnapshot {
        let drops = RelayDrop::ALL.iter().map(|reason| (reason.label(), self.drops[*reason as usize].load(Relaxed)));
        RelaySnapshot {
            clients,
            joiners,
            forwarded_datagrams: self.forwarded_datagrams.load(Relaxed),
            forwarded_bytes: self.forwarded_bytes.load(Relaxed),
            drops: drops.collect(),
            admitted: [&self.networks, &self.nodes, &self.joiners].map(|counter| counter.load(Relaxed)),
            refused_malformed: self.refused_malformed.load(Relaxed),
            refused_other: self.refused_other.load(Relaxed),
            replaced: self.replaced.load(Relaxed),
            cut: self.cut.load(Relaxed),
            malformed_messages: self.malformed_messages.load(Relaxed),
            splices: self.splices.load(Relaxed),
            splices_refused: self.splices_refused.load(Relaxed),
            spliced_bytes: self.spliced_bytes.load(Relaxed),
        }
    }
}
