//! Who is connected to a relay, and what becomes of a datagram.
//!
//! One entry per identity. A second connection with the same identity takes the place of the first: a node that
//! lost its path comes back before the relay knows that the old connection is dead. `Serial` tells the two apart, so
//! that the end of the first does not remove the second.

use std::collections::BTreeMap;

use crate::io::labelled;
use crate::key::NodeId;

labelled! {
    /// Why a relay did not forward a datagram. Each is counted under its label.
    RelayDrop {
        /// Not a frame.
        Malformed = "malformed",
        /// The sender may not send datagrams: it is not approved, or asked for streams only.
        NotAllowed = "not_allowed",
        /// The sender used up its quota.
        Quota = "quota",
        /// The destination is not connected.
        UnknownDestination = "unknown_destination",
        /// The queue to the destination is full.
        QueueFull = "queue_full",
        /// The destination's connection takes no datagrams of a useful size.
        Unsendable = "unsendable",
    }
}

/// Tells connections with the same identity apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Serial(u64);

/// The connected clients that exchange datagrams; `C` is the driver's connection.
#[derive(Debug)]
pub struct Table<C> {
    clients: BTreeMap<NodeId, (Serial, C)>,
    next: u64,
}

impl<C> Default for Table<C> {
    fn default() -> Self {
        Self { clients: BTreeMap::new(), next: 0 }
    }
}

impl<C> Table<C> {
    /// Adds a client; gives the connection whose place it took.
    pub fn insert(&mut self, id: NodeId, client: C) -> (Serial, Option<C>) {
        let serial = Serial(self.next);
        self.next += 1;
        (serial, self.clients.insert(id, (serial, client)).map(|(_, replaced)| replaced))
    }

    /// Removes a client, unless another connection has taken its place.
    pub fn remove(&mut self, id: NodeId, serial: Serial) {
        if self.clients.get(&id).is_some_and(|(present, _)| *present == serial) {
            self.clients.remove(&id);
        }
    }

    /// The connection of an identity.
    pub fn get(&self, id: NodeId) -> Option<&C> {
        self.clients.get(&id).map(|(_, client)| client)
    }

    /// Every client.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &C)> {
        self.clients.iter().map(|(id, (_, client))| (*id, client))
    }

    /// Number of clients.
    pub fn len(&self) -> usize {
        self.clients.len()
    }

    /// Whether nobody is connected.
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_replaced_connection_leaves_its_successor_in_place() {
        let (mut table, id) = (Table::default(), NodeId::from_bytes([1; 32]));
        let (first, none) = table.insert(id, "first");
        assert_eq!(none, None);
        let (second, replaced) = table.insert(id, "second");
        assert_eq!(replaced, Some("first"));
        table.remove(id, first);
        assert_eq!(table.get(id), Some(&"second"));
        table.remove(id, second);
        assert!(table.is_empty());
    }

    #[test]
    fn drop_labels_are_unique() {
        let mut labels: Vec<_> = RelayDrop::ALL.iter().map(|reason| reason.label()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), RelayDrop::ALL.len());
    }
}
