//! What the threads read without a lock: the peers by index and by key, and the allowed IPs.
//!
//! The control side builds a whole new [`Table`] for every change and swaps a pointer; a thread keeps the table it
//! took for a batch. A peer that is gone from the table is no longer found, and goes away with the last batch that
//! still knew it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use keystone_mesh_core::{AllowedIps, PublicKey};

use super::peer::PeerCell;
use super::pending::Budget;

/// Bits of an index that name the shard: up to 16 shards, a million peers each.
const SHARD_BITS: u32 = 4;
/// The most shards there can be.
pub(crate) const MAX_SHARDS: usize = 1 << SHARD_BITS;
const MAX_SLOTS: usize = 1 << (24 - SHARD_BITS);

/// A peer's number: 24 bits that its peer repeats in every message to us, above 8 bits that count sessions.
///
/// ```text
///    31                        12 11      8 7        0
///   [ slot: place in the shard  ][ shard   ][ session ]   receiver index on the wire, little-endian
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerIndex(u32);

impl PeerIndex {
    pub(crate) fn new(shard: usize, slot: usize) -> Option<Self> {
        (shard < MAX_SHARDS && slot < MAX_SLOTS).then_some(Self((slot << SHARD_BITS | shard) as u32))
    }

    /// From a receiver index as it stands in a message.
    pub(crate) fn from_wire(index: [u8; 4]) -> Self {
        Self(u32::from_le_bytes(index) >> 8)
    }

    /// The 24 bits.
    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    pub(crate) fn shard(self) -> usize {
        self.0 as usize & (MAX_SHARDS - 1)
    }

    pub(crate) fn slot(self) -> usize {
        (self.0 >> SHARD_BITS) as usize
    }
}

/// An immutable view of all peers.
#[derive(Default)]
pub(crate) struct Table {
    routes: AllowedIps<PeerIndex>,
    shards: Vec<Vec<Option<Arc<PeerCell>>>>,
    by_key: BTreeMap<PublicKey, Arc<PeerCell>>,
}

impl Table {
    /// The peer whose allowed IPs cover an address.
    pub(crate) fn route(&self, addr: IpAddr) -> Option<PeerIndex> {
        self.routes.get(addr)
    }

    /// The peer of an index, which may come from the wire and be anything.
    pub(crate) fn peer(&self, index: PeerIndex) -> Option<&Arc<PeerCell>> {
        self.shards.get(index.shard())?.get(index.slot())?.as_ref()
    }

    /// The peer of a key.
    pub(crate) fn by_key(&self, key: &PublicKey) -> Option<&Arc<PeerCell>> {
        self.by_key.get(key)
    }

    /// All peers, by key.
    pub(crate) fn peers(&self) -> impl Iterator<Item = &Arc<PeerCell>> {
        self.by_key.values()
    }
}

/// The control side's copy, from which tables are built.
pub(crate) struct Roster {
    members: BTreeMap<PublicKey, Member>,
    /// Per shard, the slots in use. Index slots are reused, the lowest first, so that arrays stay short.
    taken: Vec<Vec<bool>>,
    budget: Arc<Budget>,
}

struct Member {
    cell: Arc<PeerCell>,
    allowed_ips: Vec<IpNet>,
}

impl Roster {
    pub(crate) fn new(shards: usize) -> Self {
        Self { members: BTreeMap::new(), taken: vec![Vec::new(); shards], budget: Arc::default() }
    }

    /// The peer of a key, which is made if it does not exist; none if a million peers share its shard.
    pub(crate) fn upsert(&mut self, key: PublicKey, allowed_ips: Vec<IpNet>) -> Option<Arc<PeerCell>> {
        if let Some(member) = self.members.get_mut(&key) {
            member.allowed_ips = allowed_ips;
            return Some(Arc::clone(&member.cell));
        }
        let cell = Arc::new(PeerCell::new(key, self.take_index(&key)?, Arc::clone(&self.budget)));
        self.members.insert(key, Member { cell: Arc::clone(&cell), allowed_ips });
        Some(cell)
    }

    pub(crate) fn remove(&mut self, key: &PublicKey) -> Option<Arc<PeerCell>> {
        let member = self.members.remove(key)?;
        let index = member.cell.index;
        self.taken[index.shard()][index.slot()] = false;
        Some(member.cell)
    }

    pub(crate) fn build(&self) -> Table {
        let mut shards: Vec<Vec<Option<Arc<PeerCell>>>> =
            self.taken.iter().map(|slots| vec![None; slots.len()]).collect();
        for member in self.members.values() {
            let index = member.cell.index;
            shards[index.shard()][index.slot()] = Some(Arc::clone(&member.cell));
        }
        let routes = self.members.values().flat_map(|member| {
            let index = member.cell.index;
            member.allowed_ips.iter().map(move |net| (*net, index))
        });
        Table {
            routes: AllowedIps::new(routes),
            shards,
            by_key: self.members.iter().map(|(key, member)| (*key, Arc::clone(&member.cell))).collect(),
        }
    }

    /// A free index in the shard that the key falls to; a peer stays on its shard whatever other peers do.
    fn take_index(&mut self, key: &PublicKey) -> Option<PeerIndex> {
        let shard = usize::from(key.as_bytes()[0]) % self.taken.len();
        let slots = &mut self.taken[shard];
        let slot = slots.iter().position(|taken| !taken).unwrap_or(slots.len());
        let index = PeerIndex::new(shard, slot)?;
        if slot == slots.len() {
            slots.push(false);
        }
        slots[slot] = true;
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey::from_bytes([byte; 32])
    }

    #[test]
    fn an_index_survives_the_wire() {
        let index = PeerIndex::new(3, 70_000).unwrap();
        let wire = (index.bits() << 8 | 0x5a).to_le_bytes();
        assert_eq!(PeerIndex::from_wire(wire), index);
        assert_eq!((index.shard(), index.slot()), (3, 70_000));
        assert!(PeerIndex::new(MAX_SHARDS, 0).is_none());
        assert!(PeerIndex::new(0, MAX_SLOTS).is_none());
    }

    #[test]
    fn peers_are_found_by_index_key_and_address_until_removed() {
        let mut roster = Roster::new(2);
        for byte in 0..10 {
            roster.upsert(key(byte), vec![format!("10.98.0.{byte}/32").parse().unwrap()]).unwrap();
        }
        let table = roster.build();
        for byte in 0..10 {
            let index = table.route(format!("10.98.0.{byte}").parse().unwrap()).unwrap();
            assert_eq!(index.shard(), usize::from(byte) % 2);
            assert_eq!(table.peer(index).unwrap().key, key(byte));
            assert_eq!(table.by_key(&key(byte)).unwrap().index, index);
        }
        assert!(table.peer(PeerIndex::from_wire([0xff; 4])).is_none());

        let gone = roster.remove(&key(4)).unwrap().index;
        assert!(roster.build().peer(gone).is_none());
        let reused = roster.upsert(key(40), Vec::new()).unwrap().index;
        assert_eq!(reused, gone);
        assert!(roster.remove(&key(4)).is_none());
    }

    #[test]
    fn changing_a_peer_keeps_its_index_and_replaces_its_routes() {
        let mut roster = Roster::new(1);
        let index = roster.upsert(key(1), vec!["10.0.0.0/8".parse().unwrap()]).unwrap().index;
        assert_eq!(roster.upsert(key(1), vec!["11.0.0.0/8".parse().unwrap()]).unwrap().index, index);
        let table = roster.build();
        assert_eq!(table.route("10.0.0.1".parse().unwrap()), None);
        assert_eq!(table.route("11.0.0.1".parse().unwrap()), Some(index));
    }
}
