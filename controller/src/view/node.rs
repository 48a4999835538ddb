//! A Node, as far as decisions need it.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{NodeAddress, NodeCondition, Taint};
use keystone_mesh_core::annotations::Decoded;
use keystone_mesh_core::node::NodeName;

use super::Now;

/// A Node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// `metadata.name`.
    pub name: NodeName,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.creationTimestamp`.
    pub created: Now,
    /// Whether `metadata.deletionTimestamp` is set.
    pub deleting: bool,

    /// The mesh's annotations.
    pub mesh: Decoded,

    /// `spec.podCIDRs` (or `podCIDR`), those that read, without host bits.
    pub pod_cidrs: Vec<IpNet>,
    /// `spec.providerID`, where it is not empty.
    pub provider_id: Option<String>,
    /// `spec.taints`.
    pub taints: Vec<Taint>,

    /// The labels that decisions look at: topology, instance type, roles.
    pub labels: BTreeMap<String, String>,
    /// Our conditions in `status.conditions`, by type.
    pub conditions: BTreeMap<String, NodeCondition>,
    /// `status.addresses`.
    pub addresses: Vec<NodeAddress>,
}
