//! What the gateway serves: the embedded store, or Kubernetes.

use keystone_mesh_core::NodeId;
use keystone_mesh_core::gateway::Refusal;
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::{Entry, NodeName, SignedApproval, SignedRecord};
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use keystone_mesh_core::token::{TokenId, TokenRecord, TokenSecret};
use tokio::sync::broadcast;

use super::Answer;
use crate::store::TokenTerms;

/// Changes that a slow reader may lag behind before it is told everything afresh.
pub const CHANGES: usize = 1024;

/// What changed.
#[derive(Clone, Debug)]
pub enum Change {
    /// A node came or changed.
    Node(Box<Entry>),
    /// A node went.
    Removed(NodeName),
    /// A plain peer came or changed.
    Peer(Box<SignedPlainPeer>),
    /// A plain peer went.
    PeerRemoved(NodeName),
    /// The network's document changed.
    Network(Box<SignedNetwork>),
}

/// Everything that is known, and what changes from then on, without a gap.
#[derive(Debug)]
pub struct Watched {
    /// The network's document.
    pub network: SignedNetwork,
    /// Every node.
    pub entries: Vec<Entry>,
    /// Every plain peer.
    pub peers: Vec<SignedPlainPeer>,
    /// What changes.
    pub changes: broadcast::Receiver<Change>,
}

/// The control plane's knowledge of its network.
pub trait Backend: Send + Sync {
    /// Everything, and the changes from then on.
    fn watch(&self) -> Watched;

    /// The network's document.
    fn network(&self) -> SignedNetwork;

    /// Lets a machine in whose identity TLS proved to be `client`, or says why not.
    fn join<'a>(
        &'a self,
        client: NodeId,
        record: SignedRecord,
        token: TokenId,
        secret: &'a TokenSecret,
    ) -> Answer<'a, Result<SignedApproval, Refusal>>;

    /// Takes a member's record.
    fn publish(&self, client: NodeId, record: SignedRecord) -> Answer<'_, Result<(), Refusal>>;

    /// Forgets a node that wants to leave. Nothing happens where the name is not that of `client`.
    fn leave<'a>(&'a self, client: NodeId, name: &'a NodeName) -> Answer<'a, Result<(), Refusal>>;

    /// Takes a node out of the network. An error is a sentence for a person.
    fn remove<'a>(&'a self, name: &'a NodeName) -> Answer<'a, Result<(), String>>;

    /// Keeps a token's hash and terms.
    fn create_token<'a>(
        &'a self,
        id: TokenId,
        secret: &'a TokenSecret,
        terms: TokenTerms,
    ) -> Answer<'a, Result<TokenRecord, String>>;

    /// Every token, by age.
    fn tokens(&self) -> Answer<'_, Result<Vec<TokenRecord>, String>>;

    /// Takes a token back; nodes that joined with it stay.
    fn revoke_token(&self, id: TokenId) -> Answer<'_, Result<(), String>>;
}
