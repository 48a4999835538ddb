//! Streams from clients to the control plane.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use keystone_mesh_core::NodeId;
use keystone_mesh_core::relay::admission::check_splice;
use keystone_mesh_core::relay::message::{ClientMessage, CloseCode, MAX_MESSAGE, RelayMessage};
use keystone_mesh_core::relay::{Code, Refusal};
use quinn::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use super::{Client, MESSAGE_TIMEOUT, RelayServer};
use crate::quic::endpoint::canonical;
use crate::quic::frames;
use crate::quic::splice::{self, SplicedStream};

/// How long the control plane's connection may take to let a stream through.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);
/// Streams of one client, whatever their state; beyond its splices only such as are about to be refused.
const STREAMS: usize = 8;

type Halves = (Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>);

impl RelayServer {
    /// Serves a client's streams until its connection ends.
    pub(super) async fn accept_splices(self: &Arc<Self>, client: &Arc<Client>) {
        let mut tasks = JoinSet::new();
        while let Ok((mut send, receive)) = client.connection.accept_bi().await {
            while tasks.try_join_next().is_some() {}
            if tasks.len() >= STREAMS {
                self.counters.splice_refused(Code::Busy);
                let _ = send.reset(CloseCode::Busy.number().into());
                continue;
            }
            let (relay, client) = (self.clone(), client.clone());
            tasks.spawn(async move { relay.splice(&client, send, receive).await });
        }
    }

    async fn splice(&self, client: &Client, mut send: SendStream, mut receive: RecvStream) {
        let place = SplicePlace::take(client);
        let (far, _permit) = match self.reach_control_plane(client, place.others, &mut receive).await {
            Ok(far) => far,
            Err(refusal) => {
                self.counters.splice_refused(refusal.code);
                tracing::debug!(client = %client.id.short(), %refusal, "splice refused");
                let _ = frames::write(&mut send, &RelayMessage::Refused(refusal), MAX_MESSAGE).await;
                return;
            }
        };
        if frames::write(&mut send, &RelayMessage::Spliced {}, MAX_MESSAGE).await.is_err() {
            return;
        }
        self.counters.spliced();
        // An error is an end as well: both streams end with it, and TLS inside notices what is missing.
        if let Ok((there, back)) = splice::pipe((receive, send), far, client.grant.quota).await {
            self.counters.spliced_bytes(there + back);
        }
    }

    async fn reach_control_plane(
        &self,
        client: &Client,
        open: usize,
        receive: &mut RecvStream,
    ) -> Result<(Halves, OwnedSemaphorePermit), Refusal> {
        let to = match frames::read_within(receive, MAX_MESSAGE, MESSAGE_TIMEOUT).await {
            Ok(ClientMessage::Connect { to }) => to,
            Ok(ClientMessage::Hello { .. } | ClientMessage::CheckAddress {}) => {
                let message = "a stream begins with Connect".into();
                return Err(Refusal { code: Code::Malformed, message });
            }
            Err(error) => {
                self.counters.malformed_message();
                return Err(Refusal { code: Code::Malformed, message: format!("reading Connect: {error}") });
            }
        };
        check_splice(&client.grant, open, self.config.network, to)?;
        let busy = |_| Refusal { code: Code::Busy, message: "too many streams through this relay; try again".into() };
        let permit = self.splices.clone().try_acquire_owned().map_err(busy)?;
        Ok((self.open_far_end(client, to).await?, permit))
    }

    async fn open_far_end(&self, client: &Client, to: NodeId) -> Result<Halves, Refusal> {
        let addr = canonical(client.connection.remote_address());
        if let Some(gateway) = &self.config.gateway {
            let (near, far) = tokio::io::duplex(splice::BUFFER);
            let stream = SplicedStream { relay: self.id, from: client.id, addr, io: Box::new(far) };
            gateway.clone().accept_spliced(stream);
            let (receive, send) = tokio::io::split(near);
            return Ok((Box::new(receive), Box::new(send)));
        }
        let absent = |message: &str| Refusal { code: Code::NotConnected, message: message.into() };
        let control_plane =
            self.client(to).ok_or_else(|| absent("the control plane is not connected to this relay"))?;
        let opening = tokio::time::timeout(OPEN_TIMEOUT, control_plane.connection.open_bi()).await;
        let Ok(Ok((mut send, receive))) = opening else {
            return Err(absent("the control plane takes no stream through this relay at present"));
        };
        let incoming = RelayMessage::Incoming { from: client.id, addr };
        frames::write(&mut send, &incoming, MAX_MESSAGE)
            .await
            .map_err(|_| absent("the control plane's connection to this relay broke"))?;
        Ok((Box::new(receive), Box::new(send)))
    }
}

/// Counts a client's open streams.
struct SplicePlace<'a> {
    client: &'a Client,
    others: usize,
}

impl<'a> SplicePlace<'a> {
    fn take(client: &'a Client) -> Self {
        Self { client, others: client.open_splices.fetch_add(1, Ordering::Relaxed) }
    }
}

impl Drop for SplicePlace<'_> {
    fn drop(&mut self) {
        self.client.open_splices.fetch_sub(1, Ordering::Relaxed);
    }
}
