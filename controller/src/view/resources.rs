//! The custom resources, as far as decisions need them.

use ipnet::IpNet;
use keystone_mesh_api::{JoinTokenStatus, MemberStatus, PeerStatus};
use keystone_mesh_core::annotations::Decoded;
use keystone_mesh_core::facts::Malformed;
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use keystone_mesh_core::relay::address::HostPort;
use keystone_mesh_core::token::NamePattern;
use keystone_mesh_core::{NodeId, PublicKey};

use super::{Now, ObjectFault};

/// A Member.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberView {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.creationTimestamp`.
    pub created: Now,
    /// Whether `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// Whose it is.
    pub identity: NodeId,
    /// The token that let it in.
    pub token: Option<String>,
    /// Networks that it may be the way to.
    pub routes: Vec<IpNet>,
    /// The mesh's annotations.
    pub mesh: Decoded,
    /// As it stands.
    pub status: MemberStatus,
}

/// A Peer.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerView {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.creationTimestamp`.
    pub created: Now,
    /// `metadata.generation`, for the conditions.
    pub generation: Option<i64>,
    /// What is asked for, or what is wrong with it.
    pub spec: Result<PlainSpec, ObjectFault>,
    /// The statement that it carries.
    pub statement: Result<Option<SignedPlainPeer>, Malformed>,
    /// As it stands.
    pub status: PeerStatus,
}

/// A Peer's specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainSpec {
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// The node that is to serve it.
    pub node: Option<NodeName>,
    /// Where it is reached.
    pub endpoint: Option<HostPort>,
    /// Networks behind it.
    pub routes: Vec<IpNet>,
    /// Seconds between keepalives.
    pub persistent_keepalive: Option<u16>,
}

/// A JoinToken. Its hash is the gateway's business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenView {
    /// `metadata.name`: the token's id.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub resource_version: String,
    /// Until when it is good.
    pub expires: Option<Now>,
    /// How many machines may join with it.
    pub uses: Option<u32>,
    /// Which names it is good for.
    pub names: Option<NamePattern>,
    /// Networks that its machines may be the way to.
    pub routes: Vec<IpNet>,
    /// Whether it was taken back.
    pub revoked: bool,
    /// As it stands.
    pub status: JoinTokenStatus,
}
