//! What autoscalers say of the machines that they own.

use kube::core::DynamicObject;

use super::node::INSTANCE_TYPE;
use super::{Now, ObjectFault};

/// Whose object it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CloudKind {
    /// `karpenter.sh/v1` NodeClaim: `status.nodeName`, `status.providerID`, the instance type among its labels.
    NodeClaim,
    /// `cluster.x-k8s.io` Machine: `status.nodeRef.name`, `spec.providerID`.
    Machine,
}

/// A machine in a cloud, as its autoscaler knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudClaim {
    /// Whose object.
    pub kind: CloudKind,
    /// `metadata.name`, with the namespace before it (`NAMESPACE/NAME`) where it has one.
    pub name: String,
    /// The Node that it became.
    pub node: Option<String>,
    /// The machine's provider ID.
    pub provider_id: Option<String>,
    /// What kind of machine it is.
    pub instance_type: Option<String>,
    /// When it was seen to be gone; a claim that is gone is kept for an hour.
    pub gone: Option<Now>,
}

impl CloudClaim {
    /// Reads what is known so far; all of it may come later.
    pub fn parse(kind: CloudKind, object: &DynamicObject) -> Result<Self, ObjectFault> {
        let name = object.metadata.name.clone().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| ObjectFault::Object("a cloud claim without a name".to_owned()))?;
        let text = |pointer: &str| {
            let found = object.data.pointer(pointer).and_then(serde_json::Value::as_str);
            found.filter(|text| !text.is_empty()).map(str::to_owned)
        };
        let (node, provider_id) = match kind {
            CloudKind::NodeClaim => (text("/status/nodeName"), text("/status/providerID")),
            CloudKind::Machine => (text("/status/nodeRef/name"), text("/spec/providerID")),
        };
        let instance_type = object.metadata.labels.as_ref().and_then(|labels| labels.get(INSTANCE_TYPE).cloned());
        let name = match &object.metadata.namespace {
            Some(namespace) => format!("{namespace}/{name}"),
            None => name,
        };
        Ok(Self { kind, name, node, provider_id, instance_type, gone: None })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(kind: CloudKind, object: serde_json::Value) -> Result<CloudClaim, ObjectFault> {
        CloudClaim::parse(kind, &serde_json::from_value(object).unwrap())
    }

    #[test]
    fn a_node_claim_tells_its_node_its_machine_and_its_type() {
        let claim = parse(
            CloudKind::NodeClaim,
            json!({
                "apiVersion": "karpenter.sh/v1", "kind": "NodeClaim",
                "metadata": {"name": "default-x7k2p", "labels": {"node.kubernetes.io/instance-type": "m7g.large"}},
                "status": {"nodeName": "ip-10-0-0-1", "providerID": "aws:///eu-west-1a/i-0abc"},
            }),
        )
        .unwrap();
        assert_eq!((claim.name.as_str(), claim.node.as_deref()), ("default-x7k2p", Some("ip-10-0-0-1")));
        assert_eq!(claim.provider_id.as_deref(), Some("aws:///eu-west-1a/i-0abc"));
        assert_eq!(claim.instance_type.as_deref(), Some("m7g.large"));
    }

    #[test]
    fn a_machine_is_named_with_its_namespace_and_may_know_nothing_yet() {
        let machine = |status| {
            let metadata = json!({"name": "md-0-abc", "namespace": "clusters"});
            let kind = ("cluster.x-k8s.io/v1beta1", "Machine");
            parse(
                CloudKind::Machine,
                json!({"apiVersion": kind.0, "kind": kind.1, "metadata": metadata, "status": status}),
            )
        };
        let claim = machine(json!({"nodeRef": {"name": "worker-1"}})).unwrap();
        assert_eq!((claim.name.as_str(), claim.node.as_deref()), ("clusters/md-0-abc", Some("worker-1")));
        for strange in [json!(null), json!("text"), json!({"nodeRef": 7}), json!({"nodeRef": {"name": ""}})] {
            assert_eq!(machine(strange).unwrap().node, None);
        }
        let nameless = json!({"apiVersion": "cluster.x-k8s.io/v1beta1", "kind": "Machine", "metadata": {}});
        assert!(parse(CloudKind::Machine, nameless).is_err());
    }
}
