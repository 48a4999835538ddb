//! Writes, as the API server is asked for them: server-side apply, by one field manager, of our annotations alone.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use keystone_mesh_api::{AGENT_MANAGER, Member, NETWORK_CONFIG_MAP};
use keystone_mesh_core::directory::Carrier;
use keystone_mesh_core::network::SignedNetwork;
use kube::Resource;
use kube::api::{Patch, PatchParams};
use kube::core::Request;
use serde_json::{Value, json};

use super::desk::{Failure, Write};
use crate::kube_api::access::Access;
use crate::kube_api::watch::Object;
use crate::kube_api::{status_code, words};

/// How long the answer to a write may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Writes a record onto the very object that was seen. The object as it is from then on.
pub(super) async fn record(access: &Access, write: &Write) -> Result<Object, Failure> {
    let (path, kind) = match write.carrier {
        Carrier::Node => (Node::url_path(&(), None), head::<Node>()),
        Carrier::Member => (Member::url_path(&(), None), head::<Member>()),
    };
    let name = write.name.as_str();
    if !write.remove.is_empty() {
        // An apply takes away only what is our own; these are somebody else's, and would break our signature.
        let nulls: serde_json::Map<String, Value> = write.remove.iter().map(|key| (key.clone(), Value::Null)).collect();
        let patch = json!({ "metadata": { "uid": write.uid, "annotations": nulls } });
        let params = PatchParams { field_manager: Some(AGENT_MANAGER.into()), ..PatchParams::default() };
        send(access, &path, name, &params, &Patch::Merge(patch), true).await?;
    }
    // With the uid an object that was deleted meanwhile is not made again.
    let metadata = json!({ "name": name, "uid": write.uid, "annotations": write.annotations });
    send(access, &path, name, &apply(), &Patch::Apply(with(kind, "metadata", metadata)), true).await
}

/// Writes the network's document, making the ConfigMap where it is missing.
pub(super) async fn document(access: &Access, network: &SignedNetwork) -> Result<Object, Failure> {
    let path = ConfigMap::url_path(&(), Some(access.namespace()));
    let patch = with(head::<ConfigMap>(), "metadata", json!({ "name": NETWORK_CONFIG_MAP }));
    let patch = with(patch, "data", json!(network.to_map()));
    let answer = send(access, &path, NETWORK_CONFIG_MAP, &apply(), &Patch::Apply(patch), false).await;
    answer.map_err(|failure| match failure {
        Failure::Moved => Failure::Unavailable(format!("there is no namespace {} (yet)", access.namespace())),
        Failure::Forbidden(_) | Failure::Invalid(_) | Failure::Unavailable(_) => failure,
    })
}

fn apply() -> PatchParams {
    PatchParams::apply(AGENT_MANAGER).force()
}

fn head<K: Resource<DynamicType = ()>>() -> Value {
    json!({ "apiVersion": K::api_version(&()), "kind": K::kind(&()) })
}

fn with(mut object: Value, key: &str, value: Value) -> Value {
    object[key] = value;
    object
}

async fn send(
    access: &Access,
    path: &str,
    name: &str,
    params: &PatchParams,
    patch: &Patch<Value>,
    metadata_only: bool,
) -> Result<Object, Failure> {
    let client = access.client().await.map_err(|error| Failure::Unavailable(error.to_string()))?;
    let request = Request::new(path);
    let request = match metadata_only {
        true => request.patch_metadata(name, params, patch),
        false => request.patch(name, params, patch),
    };
    let request = request.map_err(|error| Failure::Invalid(error.to_string()))?;
    let answer = tokio::time::timeout(PATIENCE, client.request_text(request)).await;
    let answer = answer.map_err(|_| Failure::Unavailable("the API server did not answer in time".into()))?;
    let text = answer.map_err(|error| {
        if status_code(&error) == Some(401) {
            access.renew();
        }
        failure(&error)
    })?;
    Object::from_json(&text).map_err(|error| Failure::Unavailable(format!("the answer does not read: {error}")))
}

pub(super) fn failure(error: &kube::Error) -> Failure {
    let why = words(error);
    match status_code(error) {
        Some(403) => Failure::Forbidden(why),
        // Gone, or another one of that name (the uid differs).
        Some(404 | 409) => Failure::Moved,
        Some(400 | 422) => Failure::Invalid(why),
        Some(_) | None => Failure::Unavailable(why),
    }
}
