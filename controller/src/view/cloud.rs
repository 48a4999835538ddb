//! What autoscalers say of the machines that they own.

use kube::core::DynamicObject;

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
        let _ = (kind, object);
        todo!()
    }
}
