//! Members: machines that a token or a person let in.

use std::time::Duration;

use keystone_mesh_api::Member;
use keystone_mesh_core::NodeId;
use keystone_mesh_core::node::NodeName;
use kube::Api;
use kube::api::{DeleteParams, Preconditions};

use super::hub::Hub;
use crate::kube_api::access::Access;
use crate::kube_api::{status_code, words};

/// How long all of it may take.
const PATIENCE: Duration = Duration::from_secs(8);

/// Takes the node `name` with this identity out of the network, by its own wish.
pub async fn leave(hub: &Hub, name: &NodeName, identity: NodeId) -> Result<(), String> {
    if hub.is_node(name) {
        return Err(format!(
            "`{name}` is a Node of the cluster, and its membership ends with that: run `kubectl drain {name}` and `kubectl \
             delete node {name}`, then leave again"
        ));
    }
    hub.forget(name.clone());
    within(delete(hub.access(), name, Some(identity))).await
}

/// Takes a node out of the network, by a person's wish.
pub async fn remove(hub: &Hub, name: &NodeName) -> Result<(), String> {
    if hub.is_node(name) {
        return Err(format!(
            "`{name}` is a Node of the cluster, and its membership ends with that: run `kubectl delete node {name}`"
        ));
    }
    hub.forget(name.clone());
    within(delete(hub.access(), name, None)).await
}

/// Deletes the Member, where it is that of `identity`.
async fn delete(access: &Access, name: &NodeName, identity: Option<NodeId>) -> Result<(), String> {
    let client = access.client().await.map_err(|error| error.to_string())?;
    let members: Api<Member> = Api::all(client);
    let found = members.get_opt(name.as_str()).await.map_err(|error| words(&error))?;
    let Some(member) = found else {
        return match identity {
            Some(_) => Ok(()),
            None => Err(format!("there is no node `{name}`; `keystone-mesh peers` lists them")),
        };
    };
    if identity.is_some_and(|identity| member.spec.identity != identity.to_string()) {
        return Err(format!("the Member `{name}` is another machine's; nothing was changed"));
    }
    // The very one that was looked at.
    let preconditions = Some(Preconditions { uid: member.metadata.uid, resource_version: None });
    let params = DeleteParams { preconditions, ..DeleteParams::default() };
    match members.delete(name.as_str(), &params).await {
        Ok(_) => Ok(()),
        Err(error) if status_code(&error) == Some(404) => Ok(()),
        Err(error) => Err(words(&error)),
    }
}

pub(super) async fn within<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let late = || Err(format!("the API server did not answer within {} s", PATIENCE.as_secs()));
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| late())
}
