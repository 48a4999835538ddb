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
