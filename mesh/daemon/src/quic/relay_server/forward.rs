//! Datagrams from one client to another, in batches.
//!
//! Packets mostly come in runs to the same destination, so the table and the destination's datagram size are looked
//! up once per run.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use keystone_mesh_core::NodeId;
use keystone_mesh_core::relay::frame::RELAY_ID;
use keystone_mesh_core::relay::{Frame, Meter, Reassembly, RelayDrop};

use super::{Client, Deliver, RelayServer};
use crate::quic::datagrams::{self, NotSent};

/// The node that the relay runs inside of: reached without a connection.
pub struct LocalNode {
    id: NodeId,
    deliver: Deliver,
    reassembly: Mutex<Reassembly>,
}

impl LocalNode {
    pub(super) fn new(id: NodeId, deliver: Deliver) -> Self {
        Self { id, deliver, reassembly: Mutex::default() }
    }
}

/// Where a run of datagrams goes.
enum Route<'a> {
    Client { client: Arc<Client>, max_datagram: usize },
    Local { node: &'a LocalNode, packets: Vec<Bytes> },
    Nowhere,
}

impl RelayServer {
    /// Forwards what a client sends, until its connection ends.
    pub(super) async fn forward_datagrams(&self, client: &Client, wanted: bool) {
        let allowed = wanted && client.grant.datagrams();
        let mut meter = Meter::new(client.grant.quota, Instant::now());
        let mut batch = Vec::with_capacity(datagrams::BATCH);
        while datagrams::receive_batch(&client.connection, &mut batch).await.is_ok() {
            if allowed {
                self.forward_batch(client.id, &batch, Some(&mut meter), Instant::now());
            } else {
                batch.iter().for_each(|_| self.counters.dropped(RelayDrop::NotAllowed));
            }
            tokio::task::coop::consume_budget().await;
        }
    }

    /// Sends packets of the node that the relay runs inside of. Returns how many were dropped. Callable from any
    /// thread; never waits.
    pub fn send_from_local(&self, to: NodeId, packets: &mut dyn Iterator<Item = &[u8]>) -> usize {
        let mut route = self.route(to);
        let (mut dropped, mut forwarded, mut bytes) = (0, 0, 0);
        for packet in packets {
            let frame = Frame::Data { peer: self.id, packet };
            match self.send_along(&mut route, frame, None, Instant::now()) {
                Ok(()) => {
                    forwarded += 1;
                    bytes += frame.encoded_len() as u64;
                }
                Err(reason) => {
                    self.counters.dropped(reason);
                    dropped += 1;
                }
            }
        }
        self.counters.forwarded(forwarded, bytes);
        route.finish(self.id, self.id);
        dropped
    }

    fn forward_batch(&self, from: NodeId, batch: &[Bytes], mut meter: Option<&mut Meter>, now: Instant) {
        let mut run: Option<(NodeId, Route<'_>)> = None;
        let (mut forwarded, mut bytes) = (0, 0);
        for datagram in batch {
            let Ok(frame) = Frame::decode(datagram) else {
                self.counters.dropped(RelayDrop::Malformed);
                continue;
            };
            if meter.as_mut().is_some_and(|meter| !meter.admit(datagram.len(), now)) {
                self.counters.dropped(RelayDrop::Quota);
                continue;
            }
            let to = frame.peer();
            if run.as_ref().is_none_or(|(present, _)| *present != to)
                && let Some((_, ended)) = run.replace((to, self.route(to)))
            {
                ended.finish(self.id, from);
            }
            let Some((_, route)) = &mut run else { continue };
            match self.send_along(route, frame.readdressed(from), Some(datagram), now) {
                Ok(()) => {
                    forwarded += 1;
                    bytes += datagram.len() as u64;
                }
                Err(reason) => self.counters.dropped(reason),
            }
        }
        if let Some((_, ended)) = run {
            ended.finish(self.id, from);
        }
        self.counters.forwarded(forwarded, bytes);
    }

    fn route(&self, to: NodeId) -> Route<'_> {
        if let Some(node) = self.local.as_ref().filter(|node| node.id == to) {
            return Route::Local { node, packets: Vec::new() };
        }
        match self.client(to) {
            Some(client) => {
                let max_datagram = datagrams::max_datagram_size(&client.connection);
                Route::Client { client, max_datagram }
            }
            None => Route::Nowhere,
        }
    }

    /// `datagram` holds the frame's bytes where they came off the wire, so that they need not be copied.
    fn send_along(
        &self,
        route: &mut Route<'_>,
        frame: Frame<'_>,
        datagram: Option<&Bytes>,
        now: Instant,
    ) -> Result<(), RelayDrop> {
        let owned = |bytes: &[u8]| datagram.map_or_else(|| Bytes::copy_from_slice(bytes), |d| d.slice_ref(bytes));
        match (route, frame) {
            (Route::Nowhere, _) => Err(RelayDrop::UnknownDestination),
            (Route::Client { client, max_datagram }, frame) => {
                let id = RELAY_ID | client.next_id.fetch_add(1, Ordering::Relaxed);
                datagrams::send(&client.connection, frame, id, max_datagram).map_err(|not_sent| match not_sent {
                    NotSent::QueueFull => RelayDrop::QueueFull,
                    NotSent::Unsendable => RelayDrop::Unsendable,
                })
            }
            (Route::Local { packets, .. }, Frame::Data { packet, .. }) => {
                packets.push(owned(packet));
                Ok(())
            }
            (Route::Local { node, packets }, Frame::Fragment { peer, place, part }) => {
                let mut reassembly = node.reassembly.lock().unwrap_or_else(PoisonError::into_inner);
                packets.extend(reassembly.handle_fragment(peer, place, part, now).map(Bytes::from));
                Ok(())
            }
        }
    }
}

impl Route<'_> {
    fn finish(self, relay: NodeId, from: NodeId) {
        match self {
            Route::Local { node, packets } if !packets.is_empty() => (node.deliver)(relay, from, packets),
            Route::Local { .. } | Route::Client { .. } | Route::Nowhere => {}
        }
    }
}
