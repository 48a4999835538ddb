//! A client's control stream after the greeting.

use keystone_mesh_core::relay::message::{ClientMessage, CloseCode, MAX_MESSAGE, RelayMessage};
use quinn::{RecvStream, SendStream};
use tokio::sync::watch;

use super::{Client, RelayServer};
use crate::quic::endpoint::canonical;
use crate::quic::frames::{self, StreamError};

impl Client {
    /// Compares the client's address with what it was told.
    pub(super) fn note_address(&self) {
        let addr = canonical(self.connection.remote_address());
        self.observed.send_if_modified(|told| std::mem::replace(told, addr) != addr);
    }
}

impl RelayServer {
    /// Answers the client and tells it of its address; returns how the connection is to be closed.
    pub(super) async fn converse(
        &self,
        client: &Client,
        control: &mut SendStream,
        messages: &mut RecvStream,
    ) -> (CloseCode, String) {
        let observed = client.observed.subscribe();
        tokio::select! {
            end = listen(client, messages) => {
                if matches!(end.0, CloseCode::Malformed) {
                    self.counters.malformed_message();
                }
                end
            }
            end = tell(control, observed) => end,
        }
    }
}

async fn listen(client: &Client, messages: &mut RecvStream) -> (CloseCode, String) {
    loop {
        match frames::read(messages, MAX_MESSAGE).await {
            Ok(ClientMessage::CheckAddress {}) => {
                // Said again even where it is the same: the client waits for an answer.
                client.observed.send_replace(canonical(client.connection.remote_address()));
            }
            Ok(ClientMessage::Hello { .. } | ClientMessage::Connect { .. }) => {
                return (CloseCode::Malformed, "only CheckAddress is said after the greeting".into());
            }
            Err(StreamError::Closed) => return (CloseCode::Done, "the client closed its control stream".into()),
            Err(error) => return (CloseCode::Malformed, format!("on the control stream: {error}")),
        }
    }
}

async fn tell(control: &mut SendStream, mut observed: watch::Receiver<std::net::SocketAddr>) -> (CloseCode, String) {
    loop {
        if observed.changed().await.is_err() {
            return (CloseCode::Done, "the client has left".into());
        }
        let addr = *observed.borrow_and_update();
        if let Err(error) = frames::write(control, &RelayMessage::Observed { addr }, MAX_MESSAGE).await {
            return (CloseCode::Done, format!("the control stream failed: {error}"));
        }
    }
}
