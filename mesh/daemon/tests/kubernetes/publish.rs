//! Publishing and watching.

use std::time::Duration;

use keystone_kubelab::{Options, with_api_server};
use keystone_lab::wait;
use keystone_mesh::registry::{Event, Registry as _};
use keystone_mesh_core::annotations::{self, PREFIX};
use serde_json::Value;

use crate::world::*;

fn annotations_of(server: &keystone_kubelab::ApiServer, kind: &str, name: &str) -> anyhow::Result<Value> {
    let text = server.kubectl(&["get", kind, name, "--output", "json", "--show-managed-fields"])?;
    let object: Value = serde_json::from_str(&text)?;
    Ok(object["metadata"]["annotations"].clone())
}

fn stands(server: &keystone_kubelab::ApiServer, name: &str, seq: &str) -> anyhow::Result<Option<()>> {
    Ok((annotations_of(server, "node", name)?[format!("{PREFIX}seq")] == seq).then_some(()))
}

#[test]
fn a_record_is_published_once_and_put_right_and_others_are_seen() {
    with_api_server(
        "publish::a_record_is_published_once_and_put_right_and_others_are_seen",
        Options::default(),
        |server| {
            let poll = Duration::from_millis(100);
            install_resources(server)?;
            apply_network(server)?;
            server.apply(&approved_node(2, "other"))?;
            server.apply(&node("w", &Default::default()))?;
            let broken = std::collections::BTreeMap::from([(format!("{PREFIX}seq"), "nonsense".to_owned())]);
            server.apply(&node("broken", &broken))?;
            let access = access(server, "admin")?;
            let server = &*server;
            run(async move {
                let hub = hub(access, hasty());
                let mut registry = registry(&hub, 3, "w");
                registry.publish(record(3, "w", 1));
                let entries = hear(&mut registry, "everything", |event| match event {
                    Event::Snapshot { entries, .. } => Some(entries.clone()),
                    _ => None,
                })
                .await?;
                assert!(entries.iter().any(|entry| entry.name().as_str() == "other" && entry.approval.is_some()));
                let writes = tokio::task::block_in_place(|| {
                    wait::until("the record stands", PATIENCE, poll, || stands(server, "w", "1"))?;
                    server.metrics().map(|metrics| metrics.writes("nodes"))
                })?;
                // The next one is one write, and what stood was not written again before it.
                registry.publish(record(3, "w", 2));
                tokio::task::block_in_place(|| {
                    wait::until("the next record stands", PATIENCE, poll, || stands(server, "w", "2"))?;
                    assert_eq!(server.metrics()?.writes("nodes"), writes + 1);
                    let managers = server.kubectl(&[
                        "get",
                        "node",
                        "w",
                        "--show-managed-fields",
                        "--output=jsonpath={.metadata.managedFields[*].manager}",
                    ])?;
                    assert!(
                        managers.split(' ').any(|manager| manager == keystone_mesh_api::AGENT_MANAGER),
                        "{managers}"
                    );

                    // Somebody changes it, and somebody adds what would break the signature.
                    let change = [format!("{PREFIX}seq=9"), format!("{PREFIX}routes-wanted=10.0.0.0/8")];
                    server.kubectl(&["annotate", "--overwrite", "node/w", &change[0], &change[1]])?;
                    wait::until("it is put right", PATIENCE, poll, || {
                        let found = annotations_of(server, "node", "w")?;
                        let right = annotations::of_record(&record(3, "w", 2));
                        Ok((found == serde_json::to_value(right)?).then_some(()))
                    })?;
                    // The Node goes and comes again.
                    server.kubectl(&["delete", "node", "w"])?;
                    server.apply(&approved_node(4, "later"))
                })?;
                hear(&mut registry, "what came later", |event| match event {
                    Event::Snapshot { entries, .. } => {
                        entries.iter().any(|entry| entry.name().as_str() == "later").then_some(())
                    }
                    Event::Changed(entry) => (entry.name().as_str() == "later").then_some(()),
                    _ => None,
                })
                .await?;
                tokio::task::block_in_place(|| {
                    assert!(server.kubectl(&["get", "node", "w"]).is_err(), "a Node is not made by us");
                    server.apply(&node("w", &Default::default()))?;
                    wait::until("the record stands again", PATIENCE, poll, || stands(server, "w", "2"))
                })
            })
        },
    );
}

#[test]
fn what_the_controller_says_of_a_node_is_read_from_its_node_or_else_its_member() {
    let name = "publish::what_the_controller_says_of_a_node_is_read_from_its_node_or_else_its_member";
    with_api_server(name, Options::default(), |server| {
        install_resources(server)?;
        apply_network(server)?;
        let member = serde_json::json!({
            "apiVersion": "mesh.keystone.cluster/v1alpha1", "kind": "Member", "metadata": { "name": "w" },
            "spec": { "identity": secret(3).identity().id().to_string() },
        });
        server.apply(&member.to_string())?;
        let condition = |kind: &str, status: &str, message: &str| {
            serde_json::json!({
                "type": kind, "status": status, "reason": "Because", "message": message,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            })
        };
        let say = |object: &str, conditions: Value| {
            let patch = serde_json::json!({ "status": { "conditions": conditions } }).to_string();
            server.kubectl(&["patch", object, "w", "--subresource=status", "--type=merge", "--patch", &patch])
        };
        say("member", serde_json::json!([condition("Approved", "False", "it waits")]))?;
        let asked = || {
            // A client lives no longer than the runtime that it was made in.
            let access = access(server, "conditions")?;
            run(async move {
                let registry = registry(&hub(access, hasty()), 3, "w");
                let asked = registry.conditions().unwrap();
                asked.await.map_err(anyhow::Error::msg)
            })
        };
        let of_member = asked()?;
        assert_eq!((of_member[0].kind.as_str(), of_member[0].message.as_str()), ("Approved", "it waits"));

        server.apply(&node("w", &Default::default()))?;
        let all = [
            condition("MeshReady", "True", "reached"),
            condition("Ready", "True", "the kubelet's"),
            condition("MeshApproved", "True", "let in"),
        ];
        say("node", serde_json::json!(all))?;
        let kinds: Vec<String> = asked()?.into_iter().map(|condition| condition.kind).collect();
        assert_eq!(kinds, ["MeshApproved", "MeshReady"], "ours alone, by type");
        Ok(())
    });
}
