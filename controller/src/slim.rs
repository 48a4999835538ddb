//! A Node without what nobody here reads.
//!
//! Images, managed fields and the kubelet's own conditions are most of a Node. They are skipped while the JSON is read,
//! not dropped afterwards, so that a list of a thousand Nodes never stands in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use k8s_openapi::api::core::v1::{Node, NodeAddress, NodeCondition, NodeSpec, NodeStatus, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use keystone_mesh_core::annotations::PREFIX;
use kube::Resource;
use kube::core::ClusterResourceScope;
use serde::{Deserialize, Deserializer};

/// Conditions of a Node that are not ours, by prefix; their heartbeats change every few minutes.
const KUBELETS: [&str; 5] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable"];

/// A Node without what nobody here reads.
#[derive(Clone, Debug)]
pub struct SlimNode(pub Node);

impl SlimNode {
    /// A digest of all that is left beside the version: Nodes with the same one say the same.
    pub fn digest(&self) -> u64 {
        let meta = &self.0.metadata;
        let mut hasher = DefaultHasher::new();
        (&meta.uid, &meta.labels, &meta.annotations, meta.deletion_timestamp.is_some()).hash(&mut hasher);
        let rest = serde_json::to_vec(&(&self.0.spec, &self.0.status)).expect("maps have string keys");
        rest.hash(&mut hasher);
        hasher.finish()
    }
}

impl Resource for SlimNode {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Node::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        Node::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        Node::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Node::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.0.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.0.metadata
    }
}

impl<'de> Deserialize<'de> for SlimNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Wire { metadata, spec, status } = Wire::deserialize(deserializer)?;
        let mut annotations = metadata.annotations;
        annotations.retain(|key, _| key.starts_with(PREFIX));
        let mut conditions = status.conditions;
        conditions.retain(|condition| !KUBELETS.contains(&condition.type_.as_str()));
        Ok(Self(Node {
            metadata: ObjectMeta {
                name: metadata.name,
                uid: metadata.uid,
                resource_version: metadata.resource_version,
                creation_timestamp: metadata.creation_timestamp,
                deletion_timestamp: metadata.deletion_timestamp,
                labels: Some(metadata.labels),
                annotations: Some(annotations),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec {
                pod_cidr: spec.pod_cidr,
                pod_cidrs: spec.pod_cidrs,
                provider_id: spec.provider_id,
                taints: spec.taints,
                ..NodeSpec::default()
            }),
            status: Some(NodeStatus {
                addresses: status.addresses,
                conditions: Some(conditions),
                ..NodeStatus::default()
            }),
        }))
    }
}

/// Whatever of a Node is read; all of it may be absent, as in a watch's bookmark.
#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    metadata: WireMeta,
    #[serde(default)]
    spec: WireSpec,
    #[serde(default)]
    status: WireStatus,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct WireMeta {
    name: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
    #[serde(rename = "providerID")]
    provider_id: Option<String>,
    taints: Option<Vec<Taint>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireStatus {
    addresses: Option<Vec<NodeAddress>>,
    conditions: Vec<NodeCondition>,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(edit: impl FnOnce(&mut Value)) -> SlimNode {
        let mut node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": "w1", "uid": "u", "resourceVersion": "7", "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"a": "b"},
                "annotations": {"mesh.keystone.cluster/seq": "1", "other": "x"},
                "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:a": {}}}],
            },
            "spec": {"podCIDR": "10.42.0.0/24", "podCIDRs": ["10.42.0.0/24"], "taints": [{"key": "k", "effect": "NoExecute"}]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": "10.98.0.2"}],
                "conditions": [
                    {"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-01T00:00:00Z"},
                    {"type": "MeshReady", "status": "True"},
                ],
                "images": [{"names": ["a"], "sizeBytes": 1}],
            },
        });
        edit(&mut node);
        serde_json::from_value(node).unwrap()
    }

    #[test]
    fn what_is_read_is_kept_and_the_rest_is_not() {
        let SlimNode(node) = node(|_| {});
        assert_eq!(node.metadata.annotations.unwrap().keys().collect::<Vec<_>>(), ["mesh.keystone.cluster/seq"]);
        assert_eq!(node.metadata.managed_fields, None);
        let spec = node.spec.unwrap();
        assert_eq!(spec.pod_cidrs.unwrap(), ["10.42.0.0/24"]);
        assert_eq!(spec.taints.unwrap()[0].key, "k");
        let status = node.status.unwrap();
        assert_eq!(status.images, None);
        assert_eq!(status.conditions.unwrap()[0].type_, "MeshReady");
    }

    #[test]
    fn the_digest_sees_what_counts_and_nothing_else() {
        let digest = node(|_| {}).digest();
        assert_eq!(node(|n| n["metadata"]["resourceVersion"] = "8".into()).digest(), digest);
        assert_eq!(node(|n| n["metadata"]["annotations"]["other"] = "y".into()).digest(), digest);
        assert_eq!(
            node(|n| n["status"]["conditions"][0]["lastHeartbeatTime"] = "2026-01-01T00:05:00Z".into()).digest(),
            digest
        );
        assert_ne!(node(|n| n["metadata"]["annotations"]["mesh.keystone.cluster/seq"] = "2".into()).digest(), digest);
        assert_ne!(node(|n| n["spec"]["taints"] = json!([])).digest(), digest);
        assert_ne!(node(|n| n["status"]["conditions"][1]["status"] = "False".into()).digest(), digest);
        assert_ne!(node(|n| n["metadata"]["uid"] = "v".into()).digest(), digest);
    }
}
