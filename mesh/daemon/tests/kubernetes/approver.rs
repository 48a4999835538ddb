//! Someone who approves, as the controller does but without a thought: every Member and every Node.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::Node;
use keystone_mesh_api::{CONTROLLER_MANAGER, Member};
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::{Identity, annotations};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::json;

use crate::world::approval_of;

const EVERY: Duration = Duration::from_millis(100);

/// Approves until it is aborted; what goes wrong meanwhile (another wrote first) is tried again.
pub(crate) fn start(client: Client, network: Identity) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            if let Err(error) = run(client.clone(), &network).await {
                eprintln!("the approver begins again: {error:#}");
            }
            tokio::time::sleep(EVERY).await;
        }
    })
}

/// Approves for ever. A Member called `unwanted` is refused.
async fn run(client: Client, network: &Identity) -> Result<()> {
    let (members, nodes) = (Api::<Member>::all(client.clone()), Api::<Node>::all(client));
    let (mut hosts, mut serial) = (BTreeMap::new(), 1000);
    loop {
        let mut all: BTreeMap<String, Option<Member>> = BTreeMap::new();
        all.extend(nodes.list_metadata(&ListParams::default()).await?.into_iter().map(|node| (node.name_any(), None)));
        all.extend(
            members.list(&ListParams::default()).await?.into_iter().map(|member| (member.name_any(), Some(member))),
        );
        for (name, member) in all {
            if name == "unwanted" {
                let condition = json!({
                    "type": "Approved", "status": "False", "reason": "TokenUsedUp", "message": "the token is used up",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                });
                let patch = json!({ "status": { "conditions": [condition] } });
                members.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch)).await?;
                continue;
            }
            let node = nodes.get_metadata_opt(&name).await?;
            let (kind, api_version) = match node {
                Some(_) => ("Node", "v1"),
                None => ("Member", "mesh.keystone.cluster/v1alpha1"),
            };
            let of_member = || member.and_then(|member| member.metadata.annotations);
            let found = node.map_or_else(of_member, |node| node.metadata.annotations);
            let found = found.unwrap_or_default();
            let node_name: NodeName = name.parse()?;
            let Ok(Some(record)) = annotations::record(&node_name, &found) else { continue };
            let identity = record.get().identity;
            let approved = annotations::approval(&node_name, &found);
            if matches!(approved, Ok(Some(approval)) if approval.get().identity == identity) {
                continue;
            }
            let free = u8::try_from(hosts.len() + 2)?;
            let host = *hosts.entry(identity).or_insert(free);
            serial += 1;
            let patch = json!({
                "apiVersion": api_version, "kind": kind,
                "metadata": { "name": name, "annotations": annotations::of_approval(&approval_of(network, identity, &name, host, serial)) },
            });
            let params = PatchParams::apply(CONTROLLER_MANAGER).force();
            match kind {
                "Node" => drop(nodes.patch_metadata(&name, &params, &Patch::Apply(patch)).await?),
                _ => drop(members.patch_metadata(&name, &params, &Patch::Apply(patch)).await?),
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}
