//! What is known of one name in the [directory](super), and what of names that went.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use super::{Carrier, MEMORY};
use crate::annotations::annotation;
use crate::key::NodeId;
use crate::node::{Approval, Entry, NodeName, SignedApproval, SignedRecord};

/// The digest of a text that was read: 128 bits of SHA-256. Whoever makes two texts of one digest hides a change of
/// the object that it may write, from readers that have seen the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen([u8; 16]);

impl Seen {
    /// Digests the annotations of these names.
    pub(super) fn of(names: impl Iterator<Item = &'static str>, annotations: &BTreeMap<String, String>) -> Self {
        let mut hash = Sha256::new();
        for name in names {
            if let Some(text) = annotations.get(&annotation(name)) {
                hash.update(name.as_bytes());
                hash.update((text.len() as u64).to_be_bytes());
                hash.update(text.as_bytes());
            }
        }
        let digest: [u8; 32] = hash.finalize().into();
        let mut seen = [0; 16];
        seen.copy_from_slice(&digest[..16]);
        Self(seen)
    }
}

/// What one object of a name said when it was last read.
#[derive(Clone, Debug, Default)]
pub(super) struct Carried {
    /// The text of its record.
    pub(super) record: Option<Seen>,
    /// The text of its approval.
    pub(super) approval: Option<Seen>,
    /// Its record, where another identity is approved.
    waiting: Option<Box<SignedRecord>>,
}

/// What is known of one name.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    entry: Option<Entry>,
    /// An approval that came before any record.
    early: Option<Box<SignedApproval>>,
    /// By which objects, in the order of [`CARRIERS`].
    carried: [Option<Carried>; 2],
}

/// Every kind of object.
pub(super) const CARRIERS: [Carrier; 2] = [Carrier::Node, Carrier::Member];

impl Known {
    /// From a snapshot, which does not say which object carried it: it may be either.
    pub(super) fn of_old(mut entry: Entry, network: NodeId) -> Self {
        entry.approval = entry.approval.filter(|approval| approval.get().network == network);
        Self { entry: Some(entry), early: None, carried: CARRIERS.map(|_| Some(Carried::default())) }
    }

    pub(super) fn entry(&self) -> Option<&Entry> {
        self.entry.as_ref()
    }

    pub(super) fn approval(&self) -> Option<&Approval> {
        let known = self.entry.as_ref().and_then(|entry| entry.approval.as_ref());
        known.or(self.early.as_deref()).map(SignedApproval::get)
    }

    // --- which objects carry it ---

    pub(super) fn carried_by(&self, carrier: Carrier) -> bool {
        self.carried[carrier as usize].is_some()
    }

    pub(super) fn is_carried(&self) -> bool {
        self.carried.iter().any(Option::is_some)
    }

    /// What the object said until now; it carries the name from here on.
    pub(super) fn carried(&mut self, carrier: Carrier) -> &mut Carried {
        self.carried[carrier as usize].get_or_insert_default()
    }

    pub(super) fn forget(&mut self, carrier: Carrier) {
        self.carried[carrier as usize] = None;
    }

    // --- what counts ---

    /// An approval of our network and this name. Whether it counts.
    pub(super) fn handle_approval(&mut self, found: SignedApproval) -> bool {
        if self.approval().is_some_and(|known| known.serial >= found.get().serial) {
            return false;
        }
        match &mut self.entry {
            Some(entry) => entry.approval = Some(found),
            None => self.early = Some(Box::new(found)),
        }
        for carrier in CARRIERS {
            let waiting = self.carried[carrier as usize].as_mut().and_then(|carried| carried.waiting.take());
            if let Some(record) = waiting {
                self.handle_record(carrier, Some(*record));
            }
        }
        true
    }

    /// What an object says of the node, if anything. Whether it counts.
    pub(super) fn handle_record(&mut self, carrier: Carrier, found: Option<SignedRecord>) -> bool {
        self.carried(carrier).waiting = None;
        let Some(found) = found else { return false };
        match self.judge(&found) {
            Verdict::Counts => {
                let early = self.early.take().map(|approval| *approval);
                let approval = self.entry.take().map_or(early, |entry| entry.approval);
                self.entry = Some(Entry { record: found, approval });
                true
            }
            Verdict::Waits => {
                self.carried(carrier).waiting = Some(Box::new(found));
                false
            }
            Verdict::Known => false,
        }
    }

    /// Whom the network approves and who waits, where `carrier` has a record that waits.
    pub(super) fn waits(&self, carrier: Carrier) -> Option<(NodeId, NodeId)> {
        let record = self.carried[carrier as usize].as_ref()?.waiting.as_ref()?;
        Some((self.approval()?.identity, record.get().identity))
    }

    fn judge(&self, found: &SignedRecord) -> Verdict {
        let found = found.get();
        let approved = self.approval().filter(|approval| !approval.is_revoked()).map(|approval| approval.identity);
        if approved.is_some_and(|approved| approved != found.identity) {
            return Verdict::Waits;
        }
        match self.entry.as_ref().map(|entry| entry.record.get()) {
            Some(known) if known.identity == found.identity && known.seq >= found.seq => Verdict::Known,
            Some(_) | None => Verdict::Counts,
        }
    }
}

/// What becomes of a record.
enum Verdict {
    /// It replaces what is known.
    Counts,
    /// Another identity is approved.
    Waits,
    /// What is known is as new.
    Known,
}

/// Serials of names that went, the [`MEMORY`] highest.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory(BTreeMap<NodeName, u64>);

impl Memory {
    pub(super) fn serial(&self, name: &NodeName) -> Option<u64> {
        self.0.get(name).copied()
    }

    pub(super) fn remember(&mut self, name: &NodeName, serial: u64) {
        let last = self.0.entry(name.clone()).or_default();
        *last = serial.max(*last);
        if self.0.len() > MEMORY {
            let oldest = self.0.iter().min_by_key(|(_, serial)| **serial).map(|(name, _)| name.clone());
            oldest.and_then(|name| self.0.remove(&name));
        }
    }
}
