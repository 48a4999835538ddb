//! A Node, as far as decisions need it.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, NodeAddress, NodeCondition, Taint};
use keystone_mesh_core::annotations::{self, Decoded};
use keystone_mesh_core::node::NodeName;

use super::border::{Meta, networks};
use super::{Now, ObjectFault};

/// Our conditions and the labels that decisions look at; a view of thousands of Nodes keeps nothing else.
pub(crate) const CONDITIONS: [&str; 4] =
    [super::READY_CONDITION, super::APPROVED_CONDITION, super::ROUTES_CONDITION, super::WISHES_CONDITION];
/// Says that a Node is of the control plane.
pub(crate) const CONTROL_PLANE: &str = "node-role.kubernetes.io/control-plane";
/// Well-known labels.
pub(crate) const REGION: &str = "topology.kubernetes.io/region";
pub(crate) const ZONE: &str = "topology.kubernetes.io/zone";
pub(crate) const INSTANCE_TYPE: &str = "node.kubernetes.io/instance-type";
const LABELS: [&str; 4] = [CONTROL_PLANE, REGION, ZONE, INSTANCE_TYPE];

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
    /// Our conditions in `status.conditions`, by type: approval, readiness, routes, wishes.
    pub conditions: BTreeMap<String, NodeCondition>,
    /// `status.addresses`.
    pub addresses: Vec<NodeAddress>,
}

impl NodeView {
    /// Reads a Node, and what of it does not read.
    pub(super) fn parse(meta: Meta, node: &Node) -> (Self, Vec<ObjectFault>) {
        let none = BTreeMap::new();
        let mut faults = Vec::new();
        let spec = node.spec.clone().unwrap_or_default();
        let status = node.status.clone().unwrap_or_default();
        let Meta { name, uid, created, deleting } = meta;
        let mesh = annotations::decode(&name, node.metadata.annotations.as_ref().unwrap_or(&none));
        let pod_cidrs = spec.pod_cidrs.unwrap_or_else(|| spec.pod_cidr.into_iter().collect());
        let labels = node.metadata.labels.clone().unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default().into_iter();
        let parsed = Self {
            name,
            uid,
            created,
            deleting,
            mesh,
            pod_cidrs: networks(&pod_cidrs, "podCIDRs", &mut faults),
            provider_id: spec.provider_id.filter(|id| !id.is_empty()),
            taints: spec.taints.unwrap_or_default(),
            labels: labels.into_iter().filter(|(key, _)| LABELS.contains(&key.as_str())).collect(),
            conditions: conditions
                .filter(|condition| CONDITIONS.contains(&condition.type_.as_str()))
                .map(|condition| (condition.type_.clone(), condition))
                .collect(),
            addresses: status.addresses.unwrap_or_default(),
        };
        (parsed, faults)
    }

    /// Whether it is of the control plane.
    pub fn is_control_plane(&self) -> bool {
        self.labels.contains_key(CONTROL_PLANE)
    }
}
