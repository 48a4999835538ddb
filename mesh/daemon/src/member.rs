//! Membership: making a network, and what the control plane answers about tokens and nodes.

use std::path::Path;

use anyhow::{Context as _, bail};
use keystone_mesh_core::network::{Network, check_prefix, default_ipv6};
use keystone_mesh_core::node::{NodeName, NodeRecord};
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::relay::address::{HostPort, RelayAddr};
use keystone_mesh_core::token::{SECRET_LEN, Token, TokenId, TokenSecret};

use crate::clock::{unix_now, unix_now_ms};
use crate::control::{Answer, Request};
use crate::registry::backend::Backend;
use crate::state::{Membership, StateDir};
use crate::store::{Store, TokenTerms};

/// The registry's file in the state directory.
pub const REGISTRY_FILE: &str = "registry.redb";

/// What a network is made with.
#[derive(Clone, Debug)]
pub struct Founding {
    /// The control-plane host's name.
    pub name: NodeName,
    /// IPv4 prefix of the mesh.
    pub ipv4: ipnet::Ipv4Net,
    /// IPv6 prefix of the mesh; none makes one from the network key.
    pub ipv6: Option<ipnet::Ipv6Net>,
    /// Its relays.
    pub relays: Vec<RelayAddr>,
    /// Where the control-plane host is reachable from outside.
    pub gateways: Vec<HostPort>,
}

/// Makes a network; this host becomes its control plane.
pub fn init(state_dir: &Path, founding: Founding) -> anyhow::Result<Membership> {
    let state = StateDir::open(state_dir)?;
    if let Some(membership) = state.membership()? {
        bail!(
            "this machine is in the network {} already, as `{}`; to start afresh run `keystone-mesh leave` first",
            membership.network,
            membership.name
        );
    }
    let secret = state.secret_or_create()?;
    let identity = secret.identity();
    let id = identity.id();
    let network = Network {
        id,
        ipv4: founding.ipv4,
        ipv6: founding.ipv6.unwrap_or_else(|| default_ipv6(id)),
        relays: founding.relays,
        gateways: founding.gateways,
        serial: 1,
    };
    for prefix in network.prefixes() {
        check_prefix(prefix)?;
    }
    let path = state.file(REGISTRY_FILE);
    if path.exists() {
        bail!("{} exists without a membership beside it; move it away, or restore the membership", path.display());
    }
    let store = Store::create(&path, identity.clone(), network.clone())?;
    let record = NodeRecord {
        name: founding.name.clone(),
        identity: id,
        public_key: secret.wireguard(0).public_key(),
        endpoints: vec![],
        nat: Nat::Unknown,
        relays: network.relays.iter().map(|relay| relay.id).collect(),
        routes: vec![],
        seq: unix_now_ms(),
    };
    let approval = store.enter_own(record.sign(&identity), unix_now())?;
    let membership = Membership {
        network: id,
        name: founding.name,
        control_plane: true,
        rendezvous: vec![],
        approval: Some(approval),
    };
    state.set_membership(&membership)?;
    Ok(membership)
}

/// Opens the registry of the control plane on this host, while no daemon has it open.
pub fn open_store(state_dir: &Path) -> anyhow::Result<Store> {
    let state = StateDir::read_only(state_dir);
    let membership = state.membership()?.context(
        "this machine is in no network; on the control plane's host run `keystone-mesh init`, elsewhere `keystone-mesh join`",
    )?;
    if !membership.control_plane {
        bail!("this machine is not the control plane of its network; run this on that host");
    }
    let secret = state.secret()?.context("the secret is missing")?;
    let store = Store::open(&state.file(REGISTRY_FILE), secret.identity())?;
    if store.is_moved()? {
        bail!("this network's registry is Kubernetes, which the daemon speaks to; start it with `keystone-mesh up`");
    }
    Ok(store)
}

/// Answers what the control plane is asked about tokens and nodes.
pub async fn answer(backend: &dyn Backend, request: Request) -> Answer {
    let answer = match request {
        Request::TokenCreate { ttl, uses, names, routes } => {
            create_token(backend, TokenTerms { ttl, uses, names, routes }).await
        }
        Request::TokenList => {
            backend.tokens().await.map(|tokens| Answer::Tokens { tokens }).map_err(anyhow::Error::msg)
        }
        Request::TokenRevoke { id } => {
            backend.revoke_token(id).await.map(|()| Answer::Done).map_err(anyhow::Error::msg)
        }
        Request::Remove { name } => backend.remove(&name).await.map(|()| Answer::Done).map_err(anyhow::Error::msg),
        Request::Status
        | Request::Conditions
        | Request::Connect { .. }
        | Request::Leave { .. }
        | Request::UseKubernetes { .. }
        | Request::ServePods { .. }
        | Request::WithdrawKubernetes => Err(anyhow::anyhow!("this needs the running daemon")),
    };
    answer.unwrap_or_else(|error: anyhow::Error| Answer::Failed { message: format!("{error:#}") })
}

async fn create_token(backend: &dyn Backend, terms: TokenTerms) -> anyhow::Result<Answer> {
    for route in &terms.routes {
        if route.trunc() != *route {
            bail!("--route {route} has host bits set; did you mean {}?", route.trunc());
        }
    }
    let (mut id, mut secret) = ([0; 8], [0; SECRET_LEN]);
    getrandom::fill(&mut id).context("no randomness")?;
    getrandom::fill(&mut secret).context("no randomness")?;
    let (id, secret) = (TokenId::from_bytes(id), TokenSecret::from_bytes(secret));
    let network = backend.network();
    let rendezvous = network.get().rendezvous();
    if rendezvous.is_empty() {
        bail!(
            "the network has no relay and no gateway, so a joiner could not reach this host; give one: start a relay with \
             `keystone-mesh relay` on a public host and this daemon with `--relay KEY@HOST:PORT`, or `--gateway HOST:PORT` \
             where this host is reachable from outside"
        );
    }
    let record = backend.create_token(id, &secret, terms).await.map_err(anyhow::Error::msg)?;
    let token = Token { network: network.get().id, id, secret, rendezvous };
    Ok(Answer::Token { token: token.encode(), id, expires: record.expires })
}

/// The host's name as a node name: lower case, the first label where the whole is none.
pub fn host_name() -> anyhow::Result<NodeName> {
    let name = nix::unistd::gethostname()?.to_string_lossy().into_owned();
    let lower = name.to_ascii_lowercase();
    let first = lower.split('.').next().unwrap_or_default();
    lower
        .parse()
        .or_else(|_| first.parse())
        .with_context(|| format!("the host name `{name}` is no node name; give one with --name"))
}
