//! What the controller says of this node, for people who ask on the node. The watches read metadata alone, so it is asked
//! for when somebody wants to know.

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1;
use keystone_mesh_api::Member;
use keystone_mesh_core::node::NodeName;
use kube::Api;
use kube::api::ListParams;

use super::members::within;
use crate::kube_api::access::Access;
use crate::kube_api::words;
use crate::status::Condition;

/// Begin the types of our conditions on Nodes, among the kubelet's.
const OURS: &str = "Mesh";

/// The conditions on the Node of this name, or on the Member while there is no Node. An error is a sentence for a person.
pub(super) async fn of(access: &Access, name: &NodeName) -> Result<Vec<Condition>, String> {
    within(async {
        let client = access.client().await.map_err(|error| error.to_string())?;
        // The agents' role has no `get`.
        let one = ListParams::default().fields(&format!("metadata.name={name}")).limit(1);
        let nodes = Api::<Node>::all(client.clone()).list(&one).await.map_err(|error| words(&error))?;
        if let Some(node) = nodes.items.into_iter().next() {
            let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default().into_iter();
            let ours = conditions.filter(|condition| condition.type_.starts_with(OURS)).map(|condition| Condition {
                kind: condition.type_,
                status: condition.status,
                reason: condition.reason.unwrap_or_default(),
                message: condition.message.unwrap_or_default(),
            });
            let mut ours: Vec<Condition> = ours.collect();
            // Whoever wrote last stands last there.
            ours.sort_by(|a, b| a.kind.cmp(&b.kind));
            return Ok(ours);
        }
        let members = Api::<Member>::all(client).list(&one).await.map_err(|error| words(&error))?;
        let member = members.items.into_iter().next();
        let conditions = member.and_then(|member| member.status).map(|status| status.conditions).unwrap_or_default();
        let plain = |condition: v1::Condition| Condition {
            kind: condition.type_,
            status: condition.status,
            reason: condition.reason,
            message: condition.message,
        };
        Ok(conditions.into_iter().map(plain).collect())
    })
    .await
}
