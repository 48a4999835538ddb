//! Carries out one effect: the request to the API server, and what its answer means.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Taint};
use keystone_mesh_api::{CONTROLLER_MANAGER, JoinToken, LEDGER_LABEL, LEDGER_PREFIX, Member, Peer};
use keystone_mesh_core::annotations::{self, Writer};
use keystone_mesh_core::directory::Carrier;
use keystone_mesh_core::key::Identity;
use keystone_mesh_core::ledger::PageEdit;
use keystone_mesh_core::plain_peer;
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::core::Status;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::decide::{Effect, Target};
use crate::lease::Leadership;
use crate::queue::Outcome;
use crate::slim::SlimNode;
use crate::watch::Object;
use keystone_mesh_api::errors::words;

/// A write that takes longer has failed. The API server gives itself 60 s, but whoever waits that long is better off
/// with a fresh decision.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Writes to the API server, while this replica leads.
#[derive(Clone)]
pub struct Applier {
    client: Client,
    namespace: String,
    key: std::sync::Arc<Identity>,
    leadership: Leadership,
}

/// What became of a write.
#[derive(Debug)]
pub struct Applied {
    /// In a word.
    pub outcome: Outcome,
    /// The object as it stands, where the API server said.
    pub object: Option<Object>,
    /// Why not, in its words.
    pub error: Option<String>,
    /// The HTTP status code of the error, where one came.
    pub code: Option<u16>,
}

impl Applied {
    fn done(object: Option<Object>) -> Self {
        Self { outcome: Outcome::Done, object, error: None, code: None }
    }

    fn failed(outcome: Outcome, error: String, code: Option<u16>) -> Self {
        Self { outcome, object: None, error: Some(error), code }
    }
}

impl Applier {
    /// Signs with `key`; keeps the ledger in `namespace`.
    pub fn new(client: Client, namespace: String, key: Identity, leadership: Leadership) -> Self {
        Self { client, namespace, key: key.into(), leadership }
    }

    /// Carries out an effect, unless this replica does not lead any longer.
    pub async fn apply(&self, effect: Effect) -> Applied {
        if !self.leadership.holds(Instant::now()) {
            return Applied::failed(Outcome::Dropped, "this replica does not lead any longer".into(), None);
        }
        match tokio::time::timeout(TIMEOUT, self.send(effect)).await {
            Ok(Ok(object)) => Applied::done(object),
            Ok(Err(error)) => judge(&error),
            Err(_) => Applied::failed(Outcome::Failed, format!("no answer within {TIMEOUT:?}"), None),
        }
    }

    async fn send(&self, effect: Effect) -> kube::Result<Option<Object>> {
        match effect {
            Effect::Ledger { edit, resource_version } => self.write_page(edit, resource_version).await,
            Effect::Approve { carrier, target, approval } => {
                let wanted = annotations::of_approval(&approval.sign(&self.key));
                let keys: Vec<_> = annotations::names(Writer::Controller).collect();
                match carrier {
                    Carrier::Node => self.annotate::<SlimNode>(&target, &wanted, &keys, node).await,
                    Carrier::Member => self.annotate::<Member>(&target, &wanted, &keys, member).await,
                }
            }
            Effect::StatePeer { target, peer: statement } => {
                let wanted = statement.sign(&self.key).to_annotations();
                self.annotate::<Peer>(&target, &wanted, plain_peer::KEYS, peer).await
            }
            Effect::MemberStatus { target, status } => {
                self.replace_status::<Member>(&target, json!(status), member).await
            }
            Effect::PeerStatus { target, status } => self.replace_status::<Peer>(&target, json!(status), peer).await,
            Effect::TokenStatus { name, resource_version, status } => {
                // Lists that are empty are left out of a status, and a merge would keep what stood there.
                let status = json!({"used": status.used, "joined": status.joined});
                let patch = json!({"metadata": {"resourceVersion": resource_version}, "status": status});
                let api = Api::<JoinToken>::all(self.client.clone());
                let token = api.patch_status(&name, &ours(), &Patch::Merge(patch)).await?;
                Ok(Some(Object::Token(Box::new(token))))
            }
            Effect::NodeConditions { target, conditions } => {
                let patch = identified::<SlimNode>(&target, json!({"status": {"conditions": conditions}}));
                let patch = Patch::Apply(patch);
                Ok(Some(node(self.nodes().patch_status(target.name.as_str(), &ours().force(), &patch).await?)))
            }
            Effect::NodeTaints { target, seen, wanted } => {
                let patch = json_patch(taints_patch(&target.uid, &seen, &wanted));
                Ok(Some(node(self.nodes().patch(target.name.as_str(), &ours(), &patch).await?)))
            }
            Effect::NodeInit { target, labels, provider_id } => {
                let mut patch = json!({"metadata": {"uid": target.uid, "labels": labels}});
                if let Some(provider_id) = provider_id {
                    patch["spec"] = json!({"providerID": provider_id});
                }
                Ok(Some(node(self.nodes().patch(target.name.as_str(), &ours(), &Patch::Merge(patch)).await?)))
            }
            Effect::NodeAddresses { target, addresses } => {
                let patch = json!({"metadata": {"uid": target.uid}, "status": {"addresses": addresses}});
                Ok(Some(node(self.nodes().patch_status(target.name.as_str(), &ours(), &Patch::Merge(patch)).await?)))
            }
            Effect::DeleteMember { target } => {
                let only = Preconditions { uid: Some(target.uid), ..Preconditions::default() };
                let params = DeleteParams { preconditions: Some(only), ..DeleteParams::default() };
                Api::<Member>::all(self.client.clone()).delete(target.name.as_str(), &params).await?;
                Ok(None)
            }
        }
    }

    /// The page as a whole, over the very version that was read.
    async fn write_page(&self, edit: PageEdit, resource_version: Option<String>) -> kube::Result<Option<Object>> {
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), &self.namespace);
        let name = format!("{LEDGER_PREFIX}{}", edit.page);
        let create = resource_version.is_none();
        let page = ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(self.namespace.clone()),
                labels: Some([(LEDGER_LABEL.to_owned(), edit.page.to_string())].into()),
                resource_version,
                ..ObjectMeta::default()
            },
            data: Some(edit.data),
            ..ConfigMap::default()
        };
        let params = PostParams { field_manager: Some(CONTROLLER_MANAGER.to_owned()), ..PostParams::default() };
        let written =
            if create { api.create(&params, &page).await? } else { api.replace(&name, &params, &page).await? };
        Ok(Some(Object::Page(Box::new(written))))
    }

    /// These annotations, and none of the other `keys`: an apply takes away only what is our own, and what somebody else
    /// put beside it would break the signature.
    async fn annotate<K>(
        &self,
        target: &Target,
        wanted: &BTreeMap<String, String>,
        keys: &[&str],
        object: fn(K) -> Object,
    ) -> kube::Result<Option<Object>>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let (api, name) = (Api::<K>::all(self.client.clone()), target.name.as_str());
        let patch = Patch::Apply(identified::<K>(target, json!({"metadata": {"annotations": wanted}})));
        let written = api.patch(name, &ours().force(), &patch).await?;
        let there = written.meta().annotations.clone().unwrap_or_default();
        let keys = keys.iter().map(|key| format!("{}{key}", annotations::PREFIX));
        let foreign: Map<String, Value> = keys
            .filter(|key| there.contains_key(key) && !wanted.contains_key(key))
            .map(|key| (key, Value::Null))
            .collect();
        if foreign.is_empty() {
            return Ok(Some(object(written)));
        }
        let patch = json!({"metadata": {"uid": target.uid, "annotations": foreign}});
        Ok(Some(object(api.patch(name, &ours(), &Patch::Merge(patch)).await?)))
    }

    /// The whole status. The API server takes no notice of a uid beside a custom resource's status, so it is tested.
    async fn replace_status<K>(
        &self,
        target: &Target,
        status: Value,
        object: fn(K) -> Object,
    ) -> kube::Result<Option<Object>>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let api = Api::<K>::all(self.client.clone());
        let patch = json_patch(json!([
            {"op": "test", "path": "/metadata/uid", "value": target.uid},
            {"op": "add", "path": "/status", "value": status},
        ]));
        Ok(Some(object(api.patch_status(target.name.as_str(), &ours(), &patch).await?)))
    }

    fn nodes(&self) -> Api<SlimNode> {
        Api::all(self.client.clone())
    }
}

fn node(node: SlimNode) -> Object {
    Object::Node(Box::new(node))
}

fn member(member: Member) -> Object {
    Object::Member(Box::new(member))
}

fn peer(peer: Peer) -> Object {
    Object::Peer(Box::new(peer))
}

fn ours() -> PatchParams {
    PatchParams { field_manager: Some(CONTROLLER_MANAGER.to_owned()), ..PatchParams::default() }
}

/// Server-side apply names the object in its body; with the uid it neither creates one nor hits a successor.
fn identified<K: Resource<DynamicType = ()>>(target: &Target, mut wanted: Value) -> Value {
    wanted["apiVersion"] = K::api_version(&()).into();
    wanted["kind"] = K::kind(&()).into();
    wanted["metadata"]["name"] = target.name.as_str().into();
    wanted["metadata"]["uid"] = target.uid.as_str().into();
    wanted
}

fn json_patch(operations: Value) -> Patch<()> {
    Patch::Json(serde_json::from_value(operations).expect("it has the form of RFC 6902"))
}

/// Taints are a list without keys to merge by that all writers share; so it is replaced only as it was seen.
fn taints_patch(uid: &str, seen: &[Taint], wanted: &[Taint]) -> Value {
    // An absent list tests equal to null, and to an empty one it does not.
    let seen = if seen.is_empty() { Value::Null } else { json!(seen) };
    json!([
        {"op": "test", "path": "/metadata/uid", "value": uid},
        {"op": "test", "path": "/spec/taints", "value": seen},
        {"op": "add", "path": "/spec/taints", "value": wanted},
    ])
}

fn judge(error: &kube::Error) -> Applied {
    let kube::Error::Api(status) = error else {
        return Applied::failed(Outcome::Failed, words(error), None);
    };
    let outcome = match status.code {
        404 => Outcome::Gone,
        409 => Outcome::Conflict,
        422 if is_overtaken(status) => Outcome::Conflict,
        429 => Outcome::Failed,
        400..=499 => Outcome::Refused,
        _ => Outcome::Failed,
    };
    Applied::failed(outcome, status.message.clone(), Some(status.code))
}

/// Two ways in which 422, the answer to an invalid object, says that the object is not the one that was seen: the `test`
/// of a JSON patch did not hold, which names no cause, or the uid of a merge is another's.
fn is_overtaken(status: &Status) -> bool {
    let causes = status.details.as_ref().map_or(&[][..], |details| &details.causes);
    causes.is_empty() || causes.iter().any(|cause| cause.field == "metadata.uid")
}
