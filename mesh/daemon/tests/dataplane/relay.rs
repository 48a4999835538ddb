//! A relay in memory: it carries packets between data planes, and a test may look at them and play them again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;
use keystone_mesh::dataplane::{DataPlane, PacketBatch, RelaySink};
use keystone_mesh_core::NodeId;

/// The relay's identity.
pub(crate) fn relay_id() -> NodeId {
    NodeId::from_bytes([0xee; 32])
}

/// A node's identity at the relay.
pub(crate) fn node_id(number: u8) -> NodeId {
    NodeId::from_bytes([number; 32])
}

type Carried = (NodeId, NodeId, Bytes);

/// The planes that are connected, and all packets that went through.
#[derive(Default)]
pub(crate) struct Relay {
    planes: Mutex<BTreeMap<NodeId, Weak<DataPlane>>>,
    carried: Mutex<Vec<Carried>>,
}

/// One node's connection.
pub(crate) struct Connection {
    relay: Arc<Relay>,
    own: NodeId,
}

impl Relay {
    pub(crate) fn connection(self: &Arc<Self>, own: NodeId) -> Arc<Connection> {
        Arc::new(Connection { relay: Arc::clone(self), own })
    }

    pub(crate) fn attach(&self, own: NodeId, plane: &Arc<DataPlane>) {
        self.planes.lock().unwrap().insert(own, Arc::downgrade(plane));
    }

    /// All packets from one node to another so far.
    pub(crate) fn carried(&self, from: NodeId, to: NodeId) -> Vec<Bytes> {
        let carried = self.carried.lock().unwrap();
        carried.iter().filter(|packet| (packet.0, packet.1) == (from, to)).map(|packet| packet.2.clone()).collect()
    }

    pub(crate) fn deliver(&self, from: NodeId, to: NodeId, packets: Vec<Bytes>) -> bool {
        let Some(plane) = self.planes.lock().unwrap().get(&to).and_then(Weak::upgrade) else { return false };
        plane.inject(relay_id(), from, PacketBatch(packets));
        true
    }
}

impl RelaySink for Connection {
    fn send(&self, relay: NodeId, to: NodeId, packets: &mut dyn Iterator<Item = &[u8]>) -> usize {
        assert_eq!(relay, relay_id());
        let packets: Vec<_> = packets.map(Bytes::copy_from_slice).collect();
        let mut carried = self.relay.carried.lock().unwrap();
        carried.extend(packets.iter().map(|packet| (self.own, to, packet.clone())));
        drop(carried);
        let count = packets.len();
        if self.relay.deliver(self.own, to, packets) { 0 } else { count }
    }
}
