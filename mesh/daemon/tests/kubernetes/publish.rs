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
                tokio::task::block_in_place(|| {
                    wait::until("the record stands", PATIENCE, poll, || stands(server, "w", "1"))?;
                    let writes = server.metrics()?.writes("nodes");
                    // Nothing happens to it for some seconds, and nothing is written.
                    std::thread::sleep(Duration::from_secs(3));
                    assert_eq!(server.metrics()?.writes("nodes"), writes);

                    // Somebody changes it, and somebody adds what would break the signature.
                    let change = [format!("{PREFIX}seq=9"), format!("{PREFIX}routes-wanted=10.0.0.0/8")];
                    server.kubectl(&["annotate", "--overwrite", "node/w", &change[0], &change[1]])?;
                    wait::until("it is put right", PATIENCE, poll, || {
                        let found = annotations_of(server, "node", "w")?;
                        let right = annotations::of_record(&record(3, "w", 1));
                        Ok((found == serde_json::to_value(right)?).then_some(()))
                    })?;
                    // The Node goes and comes again, and is not made by us.
                    server.kubectl(&["delete", "node", "w"])?;
                    std::thread::sleep(Duration::from_secs(1));
                    assert!(server.kubectl(&["get", "node", "w"]).is_err());
                    server.apply(&node("w", &Default::default()))?;
                    wait::until("the record stands again", PATIENCE, poll, || stands(server, "w", "1"))
                })
            })
        },
    );
}
