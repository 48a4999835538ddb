//! A relay alone: for a small public server. No interface, no privileges, no state but its key.

use std::sync::Arc;

use anyhow::Context as _;
use keystone_mesh_core::node::SignedApproval;
use keystone_mesh_core::relay::{Code, Refusal};
use keystone_mesh_core::{Identity, NodeId};

use crate::http::listen::{self, ListenAt};
use crate::http::pages;
use crate::quic::endpoint::{EndpointLimits, QuicEndpoint};
use crate::quic::relay_server::{self, RelayServer, RelayServerConfig, Verify};
use crate::signals::Stop;

/// Runs until it is asked to stop. Status is served at `status`; a port alone means loopback, for there is no mesh here.
pub async fn run(
    identity: Identity,
    network: NodeId,
    listen: std::net::SocketAddr,
    status: &[ListenAt],
) -> anyhow::Result<()> {
    let id = identity.id();
    let endpoint = QuicEndpoint::bind(listen, identity, EndpointLimits::default()).with_context(|| {
        format!("cannot bind UDP {listen}: is another relay or daemon running here? choose another --listen")
    })?;
    let relay = RelayServer::new(id, RelayServerConfig::standalone(network, verifier(network)));
    let _status = (!status.is_empty()).then(|| {
        let server = pages::serve_relay(relay.clone());
        server.set_addresses(listen::addresses(status, &[]));
        server
    });
    let port = endpoint.local_addr()?.port();
    tracing::info!(%network, "relay ready: {id}@HOST:{port} (HOST: this server's name or public address)");
    let mut stop = Stop::new()?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        () = relay_server::serve(&endpoint, relay.clone()) => {}
        signal = stop.requested() => tracing::info!(signal, "stopping"),
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    endpoint.close().await;
    tracing::info!(counters = ?relay.snapshot(), "stopped");
    Ok(())
}

/// Accepts an approval that the network key signed for the very client that shows it.
pub fn verifier(network: NodeId) -> Verify {
    Arc::new(move |bytes, client| {
        let refused = |message: &str| Err(Refusal { code: Code::BadCredential, message: message.to_owned() });
        let approval: SignedApproval = match serde_json::from_slice(bytes) {
            Ok(approval) => approval,
            Err(error) => return refused(&format!("the approval does not hold: {error}")),
        };
        match approval.get() {
            approval if approval.network != network => refused("the approval is another network's"),
            approval if approval.identity != client => refused("the approval is another node's"),
            _ => Ok(()),
        }
    })
}

/// An approval as relays are shown it.
pub fn credential(approval: &SignedApproval) -> Vec<u8> {
    serde_json::to_vec(approval).expect("a map of texts is always JSON")
}
