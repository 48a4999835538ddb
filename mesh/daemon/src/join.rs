//! Joining without the daemon: proves the token, stores the membership, and is done.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use keystone_mesh_core::gateway::{FromGateway, ToGateway, VERSION};
use keystone_mesh_core::node::{NodeName, NodeRecord};
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::relay::Rendezvous;
use keystone_mesh_core::token::Token;
use keystone_mesh_core::{NodeId, Secret};

use crate::clock::unix_now_ms;
use crate::quic::endpoint::{EndpointLimits, QuicEndpoint};
use crate::quic::{frames, gateway};
use crate::registry::client::MAX_FRAME;
use crate::state::{Membership, StateDir};

/// Joins by token.
pub async fn join(
    state: &StateDir,
    token: &Token,
    name: NodeName,
    routes: Vec<IpNet>,
    patience: Duration,
) -> anyhow::Result<Membership> {
    if let Some(membership) = state.membership()? {
        refuse_other_network(&membership, token)?;
        return Ok(membership);
    }
    let secret = state.secret_or_create()?;
    let endpoint =
        QuicEndpoint::bind("[::]:0".parse()?, secret.identity(), EndpointLimits::default()).or_else(|_| {
            QuicEndpoint::bind("0.0.0.0:0".parse()?, secret.identity(), EndpointLimits::default())
                .map_err(anyhow::Error::from)
        })?;
    let mut stream = gateway::dial(&endpoint, token.network, &token.rendezvous, None, patience).await?;
    let record = first_record(&secret, name.clone(), &token.rendezvous, routes).sign(&secret.identity());
    let request = ToGateway::Join { version: VERSION, token: token.id, secret: token.secret.clone(), record };
    frames::write(&mut stream, &request, MAX_FRAME).await?;
    let heard =
        frames::read_within(&mut stream, MAX_FRAME, patience).await.context("no answer from the control plane")?;
    if let FromGateway::Refused(refusal) = heard {
        bail!(refusal.message);
    }
    let FromGateway::Joined { approval } = heard else { bail!("the control plane answered something else: {heard:?}") };
    let membership = accepted(token, name, approval)?;
    state.set_membership(&membership)?;
    drop(stream);
    endpoint.close().await;
    Ok(membership)
}

/// What a machine says of itself before it knows the network.
fn first_record(secret: &Secret, name: NodeName, rendezvous: &[Rendezvous], routes: Vec<IpNet>) -> NodeRecord {
    NodeRecord {
        name,
        identity: secret.identity().id(),
        public_key: secret.wireguard(0).public_key(),
        endpoints: vec![],
        nat: Nat::Unknown,
        relays: relays_of(rendezvous),
        routes,
        seq: unix_now_ms(),
    }
}

/// The relays among the ways to the control plane.
pub fn relays_of(rendezvous: &[Rendezvous]) -> Vec<NodeId> {
    let relays = rendezvous.iter().filter_map(|way| match way {
        Rendezvous::Relay(relay) => Some(relay.id),
        Rendezvous::Gateway(_) => None,
    });
    let mut seen = BTreeSet::new();
    relays.filter(|id| seen.insert(*id)).take(keystone_mesh_core::node::MAX_RELAYS).collect()
}

/// The membership that an approval makes, after checking that it is the pinned network's and ours.
pub fn accepted(
    token: &Token,
    name: NodeName,
    approval: keystone_mesh_core::node::SignedApproval,
) -> anyhow::Result<Membership> {
    let approved = approval.get();
    if approved.network != token.network || approved.name != name {
        bail!("the control plane answered with an approval for another network or name; nothing was changed");
    }
    Ok(Membership {
        network: token.network,
        name,
        control_plane: false,
        rendezvous: token.rendezvous.clone(),
        approval: Some(approval),
    })
}

/// A machine is in one network at a time.
pub fn refuse_other_network(membership: &Membership, token: &Token) -> anyhow::Result<()> {
    if membership.network != token.network {
        bail!(
            "this machine is in the network {} as `{}`, and the token is for {}; run `keystone-mesh leave` first",
            membership.network,
            membership.name,
            token.network
        );
    }
    Ok(())
}
