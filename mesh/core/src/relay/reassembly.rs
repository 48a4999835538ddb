//! Fragments to packets, in bounded memory.
//!
//! A sender may leave [`PER_SENDER`] packets unfinished, all senders together [`TOTAL`]; one more pushes out the
//! oldest. Nothing unfinished is kept longer than [`TIMEOUT`]: the packet's own protocol has sent it again by then.
//! Parts that overlap are never merged (RFC 5722 shows why): the packet is given up.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::frame::{MAX_PACKET, Place};
use crate::key::NodeId;

/// Unfinished packets of one sender. Enough for a batch in which some parts are lost.
pub const PER_SENDER: usize = 16;
/// Unfinished packets of all senders: 256 × 9 KiB is the most memory that is ever held.
pub const TOTAL: usize = 256;
/// How long a packet may stay unfinished.
pub const TIMEOUT: Duration = Duration::from_secs(1);
/// Parts of one packet: 9216 bytes in parts of a 1200-byte path, each split in two again.
const MAX_PARTS: usize = 20;

/// What became of fragments, in packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReassemblyCounters {
    /// Packets that became whole.
    pub completed: u64,
    /// Unfinished packets whose time was over.
    pub expired: u64,
    /// Unfinished packets that others pushed out.
    pub evicted: u64,
    /// Packets given up because their parts contradict each other.
    pub contradictory: u64,
}

/// The unfinished packets of one connection to a relay.
#[derive(Debug, Default)]
pub struct Reassembly {
    partial: BTreeMap<(NodeId, u16), Partial>,
    counters: ReassemblyCounters,
}

#[derive(Debug)]
struct Partial {
    packet: Vec<u8>,
    /// The parts that are here, as (first, end), sorted and disjoint.
    parts: Vec<(u16, u16)>,
    missing: usize,
    since: Instant,
}

impl Reassembly {
    /// Nothing unfinished.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one part of a packet; gives the packet when the part was the last one missing.
    pub fn handle_fragment(&mut self, from: NodeId, place: Place, part: &[u8], now: Instant) -> Option<Vec<u8>> {
        let end = usize::from(place.offset) + part.len();
        let total = usize::from(place.total);
        if part.is_empty() || end > total || total > MAX_PACKET {
            self.counters.contradictory += 1;
            return None;
        }
        let key = (from, place.id);
        // An id comes round again: a packet of another size or of long ago is another packet.
        let stale = |partial: &Partial| partial.packet.len() != total || expired(partial, now);
        if self.partial.get(&key).is_some_and(stale) {
            self.partial.remove(&key);
            self.counters.expired += 1;
        }
        if !self.partial.contains_key(&key) {
            self.make_room(from, now);
        }
        let partial = self.partial.entry(key).or_insert_with(|| Partial {
            packet: vec![0; total],
            parts: Vec::with_capacity(2),
            missing: total,
            since: now,
        });
        match partial.insert(place.offset, end, part) {
            Inserted::Complete => {
                self.counters.completed += 1;
                self.partial.remove(&key).map(|partial| partial.packet)
            }
            Inserted::Incomplete => None,
            Inserted::Contradiction => {
                self.counters.contradictory += 1;
                self.partial.remove(&key);
                None
            }
        }
    }

    /// Lets go of what is unfinished for too long. Worth calling now and then, never necessary: room is bounded.
    pub fn handle_timeout(&mut self, now: Instant) {
        let before = self.partial.len();
        self.partial.retain(|_, partial| !expired(partial, now));
        self.counters.expired += (before - self.partial.len()) as u64;
    }

    /// Packets that are unfinished.
    pub fn unfinished(&self) -> usize {
        self.partial.len()
    }

    /// What became of fragments so far.
    pub fn counters(&self) -> ReassemblyCounters {
        self.counters
    }

    fn make_room(&mut self, from: NodeId, now: Instant) {
        let of_sender = |map: &BTreeMap<(NodeId, u16), Partial>| map.range((from, 0)..=(from, u16::MAX)).count();
        if self.partial.len() >= TOTAL || of_sender(&self.partial) >= PER_SENDER {
            self.handle_timeout(now);
        }
        if of_sender(&self.partial) >= PER_SENDER {
            let oldest = self.partial.range((from, 0)..=(from, u16::MAX)).min_by_key(|(_, p)| p.since);
            self.evict(oldest.map(|(key, _)| *key));
        } else if self.partial.len() >= TOTAL {
            let oldest = self.partial.iter().min_by_key(|(_, p)| p.since);
            self.evict(oldest.map(|(key, _)| *key));
        }
    }

    fn evict(&mut self, key: Option<(NodeId, u16)>) {
        if key.and_then(|key| self.partial.remove(&key)).is_some() {
            self.counters.evicted += 1;
        }
    }
}

fn expired(partial: &Partial, now: Instant) -> bool {
    now.saturating_duration_since(partial.since) > TIMEOUT
}

enum Inserted {
    Complete,
    Incomplete,
    Contradiction,
}

impl Partial {
    fn insert(&mut self, offset: u16, end: usize, part: &[u8]) -> Inserted {
        let Ok(end_u16) = u16::try_from(end) else { return Inserted::Contradiction };
        let range = (offset, end_u16);
        // The same part twice is no contradiction: a network may duplicate.
        let Err(at) = self.parts.binary_search(&range) else { return Inserted::Incomplete };
        let overlaps_before = at > 0 && self.parts[at - 1].1 > offset;
        let overlaps_after = self.parts.get(at).is_some_and(|next| next.0 < end_u16);
        if overlaps_before || overlaps_after || self.parts.len() == MAX_PARTS {
            return Inserted::Contradiction;
        }
        self.parts.insert(at, range);
        self.packet[usize::from(offset)..end].copy_from_slice(part);
        self.missing -= part.len();
        if self.missing == 0 { Inserted::Complete } else { Inserted::Incomplete }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
mod tests {
    use super::*;
    use crate::relay::frame::Frame;
    use proptest::prelude::*;

    fn sender(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 32])
    }

    fn place(id: u16, offset: u16, total: u16) -> Place {
        Place { id, offset, total }
    }

    #[test]
    fn parts_in_any_order_and_twice_become_the_packet_once() {
        let (now, mut machine) = (Instant::now(), Reassembly::new());
        assert_eq!(machine.handle_fragment(sender(1), place(1, 2, 4), b"cd", now), None);
        assert_eq!(machine.handle_fragment(sender(1), place(1, 2, 4), b"cd", now), None);
        assert_eq!(machine.handle_fragment(sender(2), place(1, 0, 4), b"xy", now), None);
        assert_eq!(machine.handle_fragment(sender(1), place(1, 0, 4), b"ab", now), Some(b"abcd".to_vec()));
        assert_eq!(machine.unfinished(), 1);
    }

    #[test]
    fn parts_that_overlap_give_the_packet_up() {
        let (now, mut machine) = (Instant::now(), Reassembly::new());
        assert_eq!(machine.handle_fragment(sender(1), place(1, 0, 6), b"abcd", now), None);
        assert_eq!(machine.handle_fragment(sender(1), place(1, 2, 6), b"CDEF", now), None);
        assert_eq!((machine.unfinished(), machine.counters().contradictory), (0, 1));
    }

    #[test]
    fn a_packet_unfinished_for_too_long_is_not_completed_by_a_later_one_with_its_id() {
        let (now, mut machine) = (Instant::now(), Reassembly::new());
        assert_eq!(machine.handle_fragment(sender(1), place(1, 0, 4), b"ab", now), None);
        let later = now + TIMEOUT + Duration::from_millis(1);
        assert_eq!(machine.handle_fragment(sender(1), place(1, 2, 4), b"CD", later), None);
        assert_eq!(machine.handle_fragment(sender(1), place(1, 0, 4), b"AB", later), Some(b"ABCD".to_vec()));
        assert_eq!(machine.counters().expired, 1);
    }

    #[test]
    fn one_sender_cannot_push_out_another_ones_packets_before_all_room_is_taken() {
        let (now, mut machine) = (Instant::now(), Reassembly::new());
        machine.handle_fragment(sender(1), place(1, 0, 4), b"ab", now);
        for id in 0..1000 {
            machine.handle_fragment(sender(2), place(id, 0, 4), b"xy", now);
        }
        assert_eq!(machine.unfinished(), 1 + PER_SENDER);
        assert!(machine.handle_fragment(sender(1), place(1, 2, 4), b"cd", now).is_some());
        for byte in 0..=255 {
            for id in 0..2 {
                machine.handle_fragment(sender(byte), place(id, 0, 4), b"xy", now);
            }
        }
        assert_eq!(machine.unfinished(), TOTAL);
    }

    proptest! {
        #[test]
        fn packets_survive_splitting_and_shuffling(
            packet in prop::collection::vec(any::<u8>(), 1..MAX_PACKET),
            first in 1100..1500usize,
            second in 1100..1500usize,
            order in any::<u64>(),
        ) {
            let (now, mut machine) = (Instant::now(), Reassembly::new());
            let mut frames: Vec<_> = Frame::Data { peer: sender(1), packet: &packet }
                .split(1, first).unwrap().flat_map(|frame| frame.split(2, second).unwrap()).collect();
            let turn = usize::try_from(order % frames.len() as u64).unwrap();
            frames.rotate_left(turn);
            let mut whole = Vec::new();
            for frame in frames {
                match frame {
                    Frame::Data { packet, .. } => whole.push(packet.to_vec()),
                    Frame::Fragment { peer, place, part } =>
                        whole.extend(machine.handle_fragment(peer, place, part, now)),
                }
            }
            prop_assert_eq!(whole, [packet]);
            prop_assert_eq!(machine.unfinished(), 0);
        }

        #[test]
        fn any_fragments_stay_within_bounds(
            fragments in prop::collection::vec((0u8..40, 0u16..40, 0u16..200, 1u16..400, 0usize..64), 0..600),
        ) {
            let (now, mut machine) = (Instant::now(), Reassembly::new());
            for (from, id, offset, total, length) in fragments {
                machine.handle_fragment(sender(from), place(id, offset, total), &vec![0; length], now);
                prop_assert!(machine.unfinished() <= TOTAL);
            }
        }
    }
}
