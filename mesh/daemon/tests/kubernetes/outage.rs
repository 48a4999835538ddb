//! What happens to the API server, and that nothing is torn down by it.

use std::time::Duration;

use anyhow::Context as _;
use keystone_kubelab::{ApiServer, Options, with_api_server};
use keystone_lab::wait;
use keystone_mesh::kube_api::watch::Pace;
use keystone_mesh::registry::kubernetes::KubernetesRegistry;
use keystone_mesh::registry::{Event, Registry as _};
use keystone_mesh_core::annotations::PREFIX;

use crate::world::*;

/// Hears until a Node called `name` is told, be it alone or among all; nothing may be removed meanwhile.
async fn hear_node(registry: &mut KubernetesRegistry, name: &str) -> anyhow::Result<()> {
    hear(registry, name, |event| match event {
        Event::Snapshot { entries, .. } => entries.iter().any(|entry| entry.name().as_str() == name).then_some(()),
        Event::Changed(entry) => (entry.name().as_str() == name).then_some(()),
        Event::Removed(gone) => panic!("{gone} was removed"),
        _ => None,
    })
    .await
    .context(name.to_owned())
}

async fn hear_stale(registry: &mut KubernetesRegistry) -> anyhow::Result<String> {
    hear(registry, "that it is stale", |event| match event {
        Event::Stale { why } => Some(why.clone()),
        Event::Removed(gone) => panic!("{gone} was removed"),
        _ => None,
    })
    .await
}

fn seq_of(server: &ApiServer, name: &str) -> anyhow::Result<String> {
    let path = format!("jsonpath={{.metadata.annotations.{}seq}}", PREFIX.replace('.', "\\."));
    server.kubectl(&["get", "node", name, "--output", &path])
}

#[test]
fn nothing_is_torn_down_while_the_api_server_is_away_or_forgets_or_is_silent() {
    let name = "outage::nothing_is_torn_down_while_the_api_server_is_away_or_forgets_or_is_silent";
    with_api_server(name, Options::default(), |server| {
        install_resources(server)?;
        apply_network(server)?;
        server.apply(&approved_node(2, "a"))?;
        server.apply(&node("w", &Default::default()))?;
        let access = access(server, "outage")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let silence = Duration::from_secs(6);
        let pace = Pace { silence, answer: Duration::from_secs(5), ..hasty() };
        let (hub, mut registry) = runtime.block_on(async {
            let hub = hub(access, pace);
            let registry = registry(&hub, 3, "w");
            (hub, registry)
        });
        runtime.block_on(hear_node(&mut registry, "a"))?;

        // Killed: it is told, what is published waits, and everything follows once it is back.
        server.kill()?;
        let why = runtime.block_on(hear_stale(&mut registry))?;
        assert!(why.contains("cannot be reached"), "{why}");
        registry.publish(record(3, "w", 7));
        server.restart()?;
        server.apply(&approved_node(4, "b"))?;
        runtime.block_on(hear_node(&mut registry, "b"))?;
        wait::until("the record stands", PATIENCE, Duration::from_millis(100), || {
            Ok((seq_of(server, "w")? == "7").then_some(()))
        })?;

        // Away while the history is forgotten: 410 Gone, and everything is listed again.
        server.kill()?;
        runtime.block_on(hear_stale(&mut registry))?;
        server.compact()?;
        server.restart()?;
        server.apply(&approved_node(5, "c"))?;
        server.compact()?;
        runtime.block_on(hear_node(&mut registry, "c"))?;

        // Alive but silent: no answer, no end. The watch is opened again by itself.
        server.freeze()?;
        let why = runtime.block_on(hear_stale(&mut registry))?;
        assert!(why.contains("did not answer"), "{why}");
        server.thaw()?;
        server.apply(&approved_node(6, "d"))?;
        runtime.block_on(hear_node(&mut registry, "d"))?;
        drop(hub);
        Ok(())
    });
}

#[test]
fn a_forbidden_write_says_which_rule_and_a_missing_one_is_no_fault() {
    let name = "outage::a_forbidden_write_says_which_rule_and_a_missing_one_is_no_fault";
    with_api_server(name, Options::default(), |server| {
        // No custom resources here: as on a cluster without the chart. The network is known from the disk.
        server.apply(&node("w", &Default::default()))?;
        server.apply(&approved_node(2, "a"))?;
        server.apply(
            &serde_json::json!({
                "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "keystone-mesh" }
            })
            .to_string(),
        )?;
        apply_network(server)?;
        server.kubectl(&["create", "clusterrole", "reader", "--verb=get,list,watch", "--resource=nodes,configmaps"])?;
        server.kubectl(&["create", "clusterrolebinding", "reader", "--clusterrole=reader", "--user=reader"])?;
        let custom = r#"{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "custom"},
            "rules": [{"apiGroups": ["mesh.keystone.cluster"], "resources": ["*"], "verbs": ["get", "list", "watch"]}]}"#;
        server.apply(custom)?;
        server.kubectl(&["create", "clusterrolebinding", "custom", "--clusterrole=custom", "--user=reader"])?;
        let access = access_of(&server.user("reader", None)?, "reader")?;
        run(async move {
            let hub = hub(access, hasty());
            let mut registry = registry(&hub, 3, "w");
            registry.publish(record(3, "w", 1));
            hear_node(&mut registry, "a").await?;
            let deadline = tokio::time::Instant::now() + PATIENCE;
            loop {
                let warnings = registry.warnings();
                if let Some(warning) = warnings.first() {
                    assert!(warning.contains("cannot patch resource \"nodes\""), "{warning}");
                    return Ok(());
                }
                anyhow::ensure!(tokio::time::Instant::now() < deadline, "no warning");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
    });
}
