//! What a relay counts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use keystone_mesh_core::relay::{Code, RelayDrop, Role};
use serde::{Deserialize, Serialize};

/// Every code of a refusal, in order of declaration, with its label in metrics.
pub const REFUSALS: [(Code, &str); 6] = [
    (Code::UnsupportedVersion, "unsupported_version"),
    (Code::BadCredential, "bad_credential"),
    (Code::NotAllowed, "not_allowed"),
    (Code::Busy, "busy"),
    (Code::NotConnected, "not_connected"),
    (Code::Malformed, "malformed"),
];

/// A relay's counters; they only grow.
#[derive(Debug, Default)]
pub struct RelayCounters {
    forwarded_datagrams: AtomicU64,
    forwarded_bytes: AtomicU64,
    drops: [AtomicU64; RelayDrop::ALL.len()],
    networks: AtomicU64,
    nodes: AtomicU64,
    joiners: AtomicU64,
    refused: [AtomicU64; REFUSALS.len()],
    replaced: AtomicU64,
    cut: AtomicU64,
    malformed_messages: AtomicU64,
    splices: AtomicU64,
    splices_refused: [AtomicU64; REFUSALS.len()],
    spliced_bytes: AtomicU64,
}

/// A relay's counters and gauges at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct RelaySnapshot {
    /// Clients that exchange datagrams, at present.
    pub clients: usize,
    /// Joiners, at present.
    pub joiners: usize,
    /// Datagrams forwarded.
    pub forwarded_datagrams: u64,
    /// Their bytes, frame headers included.
    pub forwarded_bytes: u64,
    /// Splices open, at present.
    pub open_splices: usize,
    /// Datagrams dropped, by [`RelayDrop::label`].
    pub drops: BTreeMap<String, u64>,
    /// Connections admitted: of the network itself, of nodes, of joiners.
    pub admitted: [u64; 3],
    /// Connections refused, by the label in [`REFUSALS`].
    pub refused: BTreeMap<String, u64>,
    /// Connections whose place another one with the same identity took.
    pub replaced: u64,
    /// Joiners whose time was over.
    pub cut: u64,
    /// Messages after the greeting that were none.
    pub malformed_messages: u64,
    /// Splices made.
    pub splices: u64,
    /// Splices refused, by the label in [`REFUSALS`].
    pub splices_refused: BTreeMap<String, u64>,
    /// Bytes spliced, both ways.
    pub spliced_bytes: u64,
}

impl RelaySnapshot {
    /// Datagrams dropped for a reason.
    pub fn dropped(&self, reason: RelayDrop) -> u64 {
        self.drops.get(reason.label()).copied().unwrap_or(0)
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
        self.refused[code as usize].fetch_add(1, Relaxed);
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

    pub(super) fn splice_refused(&self, code: Code) {
        self.splices_refused[code as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn spliced_bytes(&self, bytes: u64) {
        self.spliced_bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn snapshot(&self, clients: usize, joiners: usize, open_splices: usize) -> RelaySnapshot {
        let load = |counter: &AtomicU64| counter.load(Relaxed);
        let drops =
            RelayDrop::ALL.iter().map(|reason| (reason.label().to_owned(), load(&self.drops[*reason as usize])));
        let by_code = |counters: &[AtomicU64]| {
            REFUSALS.iter().map(|(code, label)| ((*label).to_owned(), load(&counters[*code as usize]))).collect()
        };
        RelaySnapshot {
            clients,
            joiners,
            open_splices,
            forwarded_datagrams: self.forwarded_datagrams.load(Relaxed),
            forwarded_bytes: self.forwarded_bytes.load(Relaxed),
            drops: drops.collect(),
            admitted: [&self.networks, &self.nodes, &self.joiners].map(|counter| counter.load(Relaxed)),
            refused: by_code(&self.refused),
            replaced: self.replaced.load(Relaxed),
            cut: self.cut.load(Relaxed),
            malformed_messages: self.malformed_messages.load(Relaxed),
            splices: self.splices.load(Relaxed),
            splices_refused: by_code(&self.splices_refused),
            spliced_bytes: self.spliced_bytes.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_is_counted_under_its_own_code() {
        let counters = RelayCounters::default();
        for (code, label) in REFUSALS {
            counters.refused(code);
            assert_eq!(serde_json::to_value(code).unwrap(), label, "the label in metrics is the code on the wire");
        }
        let snapshot = counters.snapshot(0, 0, 0);
        assert!(snapshot.refused.len() == REFUSALS.len() && snapshot.refused.values().all(|count| *count == 1));
    }
}
