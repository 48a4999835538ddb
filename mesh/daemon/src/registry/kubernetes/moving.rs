//! Brings an embedded registry over to Kubernetes, once.
//!
//! Every node becomes a Member whose annotations carry its record and its approval, so that the controller takes its
//! address over; every good token becomes a JoinToken. From then on Kubernetes is the truth, and the store is kept for
//! the network's document alone. A move that breaks off is begun again and finds what it has made.

use keystone_mesh_api::{CONTROLLER_MANAGER, GATEWAY_MANAGER, JoinToken, Member, MemberSpec};
use keystone_mesh_core::annotations;
use keystone_mesh_core::node::Entry;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;

use super::gateway::join_token;
use crate::clock::unix_now;
use crate::kube_api::access::Access;
use crate::kube_api::{status_code, words};
use crate::store::Store;

/// HTTP: it is there already.
const CONFLICT: u16 = 409;

/// Moves all of the store. An error says what stood in the way; then nothing is lost, and all of it may be done again.
pub async fn move_all(store: &Store, access: &Access) -> Result<(), String> {
    let client = access.client().await.map_err(|error| error.to_string())?;
    let (members, tokens) = (Api::<Member>::all(client.clone()), Api::<JoinToken>::all(client));
    let entries = store.watch().entries;
    for entry in &entries {
        let moved = member(&members, entry).await;
        moved.map_err(|why| format!("node `{}`: {why}", entry.name()))?;
    }
    let now = unix_now();
    let good = store.tokens().map_err(|error| error.to_string())?.into_iter().filter(|token| {
        !token.revoked && token.uses_left != Some(0) && token.expires.is_none_or(|expires| expires > now)
    });
    for token in good {
        let params = PostParams { field_manager: Some(GATEWAY_MANAGER.into()), ..PostParams::default() };
        match tokens.create(&params, &join_token(&token)?).await {
            Ok(_) => {}
            Err(error) if status_code(&error) == Some(CONFLICT) => {}
            Err(error) => return Err(format!("token {}: {}", token.id, words(&error))),
        }
    }
    store.set_moved().map_err(|error| error.to_string())?;
    tracing::info!(nodes = entries.len(), "the registry was moved to Kubernetes");
    Ok(())
}

async fn member(members: &Api<Member>, entry: &Entry) -> Result<(), String> {
    let (record, name) = (entry.record.get(), entry.name().as_str());
    let approved = entry.approval.as_ref().map(|approval| approval.get().routes.clone()).unwrap_or_default();
    let spec = MemberSpec {
        identity: record.identity.to_string(),
        token: None,
        routes: approved.iter().map(ToString::to_string).collect(),
    };
    let mut member = Member::new(name, spec);
    member.metadata.annotations = Some(annotations::of_record(&entry.record));
    let params = PostParams { field_manager: Some(GATEWAY_MANAGER.into()), ..PostParams::default() };
    match members.create(&params, &member).await {
        Ok(_) => {}
        Err(error) if status_code(&error) == Some(CONFLICT) => {
            let there = members.get(name).await.map_err(|error| words(&error))?;
            if there.spec.identity != member.spec.identity {
                return Err(format!(
                    "there is a Member of this name for another machine ({}); delete it, or remove the node here",
                    there.spec.identity
                ));
            }
        }
        Err(error) => return Err(words(&error)),
    }
    let Some(approval) = &entry.approval else { return Ok(()) };
    // As the controller writes it, whose own approval then takes its place.
    let patch = json!({
        "apiVersion": "mesh.keystone.cluster/v1alpha1",
        "kind": "Member",
        "metadata": { "name": name, "annotations": annotations::of_approval(approval) },
    });
    let params = PatchParams::apply(CONTROLLER_MANAGER).force();
    match members.patch_metadata(name, &params, &Patch::Apply(patch)).await {
        Ok(_) => Ok(()),
        Err(error) if status_code(&error) == Some(403) => Err(format!(
            "{} (approvals are brought over once, which needs an administrator's kubeconfig; k3s' own is found by itself, \
             another is named with --kubeconfig)",
            words(&error)
        )),
        Err(error) => Err(words(&error)),
    }
}
