//! The custom resources, as far as decisions need them.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use ipnet::IpNet;
use keystone_mesh_api::{JoinToken, JoinTokenStatus, Member, MemberStatus, Peer, PeerStatus};
use keystone_mesh_core::annotations::{self, Decoded};
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::plain_peer::{PlainPeer, SignedPlainPeer};
use keystone_mesh_core::relay::address::HostPort;
use keystone_mesh_core::token::NamePattern;
use keystone_mesh_core::{NodeId, PublicKey};

use super::border::{Meta, millis, networks};
use super::{Now, ObjectFault};

/// The Member condition that says whether there is a Node of its name.
pub(crate) const NODE: &str = "Node";

/// The Member condition that says that a machine which is no Node is out of reach.
pub(crate) const REACHED: &str = "Reached";

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
    /// The statement of ours with the highest serial that it ever carried.
    pub stated: Option<PlainPeer>,
    /// Whether it carries that one at this moment.
    pub carried: bool,
    /// As it stands.
    pub status: PeerStatus,
}

impl MemberView {
    /// Whether there was a Node of its name, as its status says.
    pub fn had_node(&self) -> bool {
        self.status.conditions.iter().any(|condition| condition.type_ == NODE && condition.status == "True")
    }

    /// Reads a Member, and what of it does not read. One whose identity does not read vouches for nobody.
    pub(super) fn parse(meta: Meta, member: &Member) -> Result<(Self, Vec<ObjectFault>), ObjectFault> {
        let mut faults = Vec::new();
        let Meta { name, uid, created, deleting } = meta;
        let none = BTreeMap::new();
        let mesh = annotations::decode(&name, member.metadata.annotations.as_ref().unwrap_or(&none));
        let parsed = Self {
            identity: field("identity", &member.spec.identity)?,
            token: member.spec.token.clone().filter(|token| !token.is_empty()),
            routes: networks(&member.spec.routes, "routes", &mut faults),
            mesh,
            status: member.status.clone().unwrap_or_default(),
            name,
            uid,
            created,
            deleting,
        };
        Ok((parsed, faults))
    }
}

impl PeerView {
    /// Reads a Peer, and what of it does not read. `known` is the best statement that it carried before.
    pub(super) fn parse(meta: Meta, peer: &Peer, ours: NodeId, known: Option<PlainPeer>) -> (Self, Vec<ObjectFault>) {
        let mut faults = Vec::new();
        let Meta { name, uid, created, .. } = meta;
        let none = BTreeMap::new();
        let annotations = peer.metadata.annotations.as_ref().unwrap_or(&none);
        let statement = SignedPlainPeer::from_annotations(&name, annotations);
        let found = match statement {
            Ok(Some(signed)) if signed.get().network == ours => Some(signed.get().clone()),
            Ok(Some(signed)) => {
                faults.push(ObjectFault::OtherNetwork { found: signed.get().network, ours });
                None
            }
            Ok(None) => None,
            Err(malformed) => {
                faults.push(malformed.into());
                None
            }
        };
        let carried_serial = found.as_ref().map(|found| found.serial);
        let stated = known.into_iter().chain(found).max_by_key(|statement| statement.serial);
        let spec = PlainSpec::parse(peer);
        faults.extend(spec.as_ref().err().cloned());
        let parsed = Self {
            carried: stated.is_some() && carried_serial == stated.as_ref().map(|stated| stated.serial),
            stated,
            spec,
            generation: peer.metadata.generation,
            status: peer.status.clone().unwrap_or_default(),
            name,
            uid,
            created,
        };
        (parsed, faults)
    }
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

impl PlainSpec {
    fn parse(peer: &Peer) -> Result<Self, ObjectFault> {
        let spec = &peer.spec;
        let mut faults = Vec::new();
        let routes = networks(&spec.routes, "routes", &mut faults);
        if let Some(fault) = faults.pop() {
            return Err(fault);
        }
        Ok(Self {
            public_key: field("publicKey", &spec.public_key)?,
            node: spec.node.as_deref().filter(|node| !node.is_empty()).map(|node| field("node", node)).transpose()?,
            endpoint: spec.endpoint.as_deref().map(|endpoint| field("endpoint", endpoint)).transpose()?,
            routes,
            persistent_keepalive: spec.persistent_keepalive.filter(|seconds| *seconds != 0),
        })
    }
}

impl TokenView {
    pub(super) fn parse(token: &JoinToken) -> Result<Self, ObjectFault> {
        let (meta, spec) = (&token.metadata, &token.spec);
        let mut faults = Vec::new();
        let routes = networks(&spec.routes, "routes", &mut faults);
        if let Some(fault) = faults.pop() {
            return Err(fault);
        }
        Ok(Self {
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            resource_version: meta.resource_version.clone().unwrap_or_default(),
            expires: spec.expires.as_ref().map(millis),
            uses: spec.uses,
            names: spec.name_pattern.as_deref().map(|pattern| field("namePattern", pattern)).transpose()?,
            routes,
            revoked: spec.revoked,
            status: token.status.clone().unwrap_or_default(),
        })
    }
}

fn field<T: FromStr<Err: Display>>(key: &str, text: &str) -> Result<T, ObjectFault> {
    text.parse().map_err(|why: T::Err| ObjectFault::Object(format!("`{key}`: {why}")))
}
