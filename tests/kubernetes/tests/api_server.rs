//! The API server of the tests: what it does for a test, and what a test may do to it.

#![expect(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use keystone_kubelab::{Options, with_api_server};
use keystone_lab::wait;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(100);

fn node(name: &str) -> Node {
    serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap()
}

#[test]
fn everybody_is_who_their_credential_says() {
    with_api_server("everybody_is_who_their_credential_says", Options::default(), |server| {
        let whoami = |access: &keystone_kubelab::Access| {
            let file = std::env::temp_dir().join(format!("kubelab-{}", std::process::id()));
            access.write_kubeconfig(&file)?;
            let said = server.kubectl(&["--kubeconfig", file.to_str().unwrap(), "auth", "whoami", "--output", "json"]);
            std::fs::remove_file(&file)?;
            let said: serde_json::Value = serde_json::from_str(&said?)?;
            anyhow::Ok(said["status"]["userInfo"].clone())
        };
        assert_eq!(whoami(server.admin())?["username"], "admin");
        let kubelet = whoami(&server.user("system:node:a", Some("system:nodes"))?)?;
        assert_eq!(kubelet["username"], "system:node:a");
        assert!(kubelet["groups"].as_array().unwrap().contains(&json!("system:nodes")), "{kubelet}");
        let free = whoami(&server.service_account("mesh", "agent")?)?;
        assert_eq!(free["username"], "system:serviceaccount:mesh:agent");
        assert_eq!(free["extra"]["authentication.kubernetes.io/node-name"], json!(null));
        // Twice, for what is there already.
        for _ in 0..2 {
            let bound = whoami(&server.service_account_on("worker-1", "mesh", "agent")?)?;
            assert_eq!(bound["username"], "system:serviceaccount:mesh:agent");
            assert_eq!(bound["extra"]["authentication.kubernetes.io/node-name"], json!(["worker-1"]));
        }
        // Nobody has rights that were not given.
        let nobody = server.user("nobody", None)?;
        let refused = server.with_client(&nobody, async |client| {
            Ok(Api::<Node>::all(client).list_metadata(&ListParams::default()).await)
        });
        assert!(matches!(refused?, Err(kube::Error::Api(status)) if status.is_forbidden()));
        Ok(())
    });
}

#[test]
fn writes_are_counted_by_kind_and_recorded_by_user() {
    let options = Options { audit: true, ..Options::default() };
    with_api_server("writes_are_counted_by_kind_and_recorded_by_user", options, |server| {
        let before = server.metrics()?.writes("nodes");
        let writer = server.user("writer", Some("system:masters"))?;
        server.with_client(&writer, async |client| {
            let nodes = Api::<Node>::all(client);
            nodes.create(&PostParams::default(), &node("a")).await?;
            let note = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "annotations": { "a/b": "c" } } });
            nodes.patch_metadata("a", &PatchParams::apply("test"), &Patch::Apply(&note)).await?;
            nodes.list_metadata(&ListParams::default()).await?;
            Ok(())
        })?;
        assert_eq!(server.metrics()?.writes("nodes") - before, 2);
        let of_writer = |server: &keystone_kubelab::ApiServer| {
            let events = server.audit()?;
            let verbs = events.iter().filter(|event| event["user"]["username"] == "writer");
            anyhow::Ok(
                verbs
                    .filter(|event| event["stage"] == "ResponseComplete")
                    .map(|event| event["verb"].clone())
                    .collect::<Vec<_>>(),
            )
        };
        wait::until("the audit has all three", PATIENCE, POLL, || {
            let verbs = of_writer(server)?;
            Ok((verbs == [json!("create"), json!("patch"), json!("list")]).then_some(()))
        })
    });
}

#[test]
fn what_was_written_survives_every_kind_of_death() {
    with_api_server("what_was_written_survives_every_kind_of_death", Options::default(), |server| {
        server.apply(r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}}"#)?;
        let nodes = |server: &keystone_kubelab::ApiServer| server.kubectl(&["get", "nodes", "--output", "name"]);

        server.kill()?;
        assert!(server.get("/readyz").is_err());
        server.restart()?;
        assert_eq!(nodes(server)?, "node/a\n");

        server.kill_etcd()?;
        server.restart()?;
        wait::until("the API server finds its etcd again", PATIENCE, POLL, || Ok(nodes(server).ok()))?;

        server.kill()?;
        server.kill_etcd()?;
        server.restart()?;
        assert_eq!(nodes(server)?, "node/a\n");
        Ok(())
    });
}

#[test]
fn a_watch_from_before_a_compaction_is_gone() {
    with_api_server("a_watch_from_before_a_compaction_is_gone", Options::default(), |server| {
        let admin = server.admin().clone();
        let old = server.with_client(&admin, async |client| {
            let maps = Api::<ConfigMap>::namespaced(client.clone(), "default");
            let old = maps.list_metadata(&ListParams::default()).await?.metadata.resource_version.unwrap();
            let map =
                |number: u32| serde_json::from_value(json!({ "metadata": { "name": format!("m{number}") } })).unwrap();
            for number in 0..3 {
                maps.create(&PostParams::default(), &map(number)).await?;
            }
            Ok(old)
        })?;
        server.compact()?;
        server.kill()?;
        server.restart()?;
        server.with_client(&admin, async |client| {
            use futures_util::StreamExt;
            let maps = Api::<ConfigMap>::namespaced(client, "default");
            let mut events = Box::pin(maps.watch_metadata(&WatchParams::default(), &old).await?);
            let event = events.next().await.unwrap()?;
            assert!(matches!(&event, WatchEvent::Error(status) if status.code == 410), "{event:?}");
            Ok(())
        })
    });
}

#[test]
fn a_frozen_server_says_nothing_until_it_goes_on() {
    with_api_server("a_frozen_server_says_nothing_until_it_goes_on", Options::default(), |server| {
        let silence = Duration::from_millis(500);
        server.freeze()?;
        let start = Instant::now();
        let admin = server.admin().clone();
        let asked = server.with_client(&admin, async |client| {
            let nodes = Api::<Node>::all(client);
            Ok(tokio::time::timeout(silence, nodes.list_metadata(&ListParams::default())).await.is_err())
        })?;
        assert!(asked && start.elapsed() >= silence);
        server.thaw()?;
        server.get("/readyz").map(drop)
    });
}
