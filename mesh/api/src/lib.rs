//! The Kubernetes API of Keystone Mesh: custom resources and the names of things.
//!
//! Daemon, controller and tests share it. What nodes say and are allowed stands in annotations, whose contract is
//! `keystone_mesh_core::annotations`; the resources here are for what is no Node.

#![forbid(unsafe_code)]

pub mod errors;
mod resources;

pub use resources::{
    JoinToken, JoinTokenSpec, JoinTokenStatus, Member, MemberSpec, MemberStatus, Peer, PeerSpec, PeerStatus,
};

/// API group of the resources.
pub const GROUP: &str = "mesh.keystone.cluster";
/// The namespace that the chart installs into unless told otherwise.
pub const NAMESPACE: &str = "keystone-mesh";

/// Field manager of nodes' daemons and of the gateway: records.
pub const AGENT_MANAGER: &str = "keystone-mesh";
/// Field manager of the gateway and of people's commands: Members' and JoinTokens' specs.
pub const GATEWAY_MANAGER: &str = "keystone-gateway";
/// Field manager of the controller: approvals, conditions, taints.
pub const CONTROLLER_MANAGER: &str = "keystone-controller";

/// ServiceAccount of the DaemonSet.
pub const AGENT_ACCOUNT: &str = "keystone-mesh";
/// ServiceAccount of the control-plane host's daemon, which serves the gateway.
pub const GATEWAY_ACCOUNT: &str = "keystone-gateway";
/// ServiceAccount of the controller.
pub const CONTROLLER_ACCOUNT: &str = "keystone-controller";

/// ConfigMap with the network's document: `data` is `SignedNetwork::to_map`. Written by the gateway's daemon.
pub const NETWORK_CONFIG_MAP: &str = "keystone-mesh-network";
/// Secret with the network's signing key, read by the controller alone: key [`NETWORK_KEY_FIELD`].
pub const NETWORK_KEY_SECRET: &str = "keystone-mesh-network-key";
/// The field of [`NETWORK_KEY_SECRET`]: the 32-byte seed of `Identity::seed` in Base64.
pub const NETWORK_KEY_FIELD: &str = "network.key";
/// ConfigMaps of the address ledger are called so, followed by the page's number.
pub const LEDGER_PREFIX: &str = "keystone-mesh-addresses-";
/// Label of the ledger's ConfigMaps.
pub const LEDGER_LABEL: &str = "mesh.keystone.cluster/ledger";
/// Lease of the controller's leader.
pub const LEADER_LEASE: &str = "keystone-controller";

/// Keeps pods off a node that the mesh does not reach yet. Karpenter takes every key with this prefix as passing.
pub const STARTUP_TAINT: &str = "readiness.k8s.io/keystone-mesh";
/// The Node condition that says whether peers reach the node.
pub const READY_CONDITION: &str = "MeshReady";
