//! Credentials that the API server stops to accept.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use keystone_kubelab::{ApiServer, Options, with_api_server};
use keystone_lab::{sandbox, wait};
use keystone_mesh::kube_api::access::{Access, ServiceAccount};
use keystone_mesh::kube_api::watch::Pace;
use keystone_mesh::registry::Event;
use keystone_mesh::registry::kubernetes::KubernetesRegistry;
use keystone_mesh::registry::kubernetes::hub::Hub;

use crate::world::*;

/// Puts a token of the pod on this Node where the daemon finds its own.
fn put_token(server: &ApiServer, dir: &Path, node: &str) -> Result<keystone_kubelab::Access> {
    let access = server.service_account_on(node, "keystone-mesh", "keystone-mesh")?;
    fs::write(dir.join("ca.crt"), access.authority())?;
    fs::write(dir.join("namespace"), "keystone-mesh")?;
    fs::write(dir.join("token"), access.token().context("a token")?)?;
    Ok(access)
}

fn delete(server: &ApiServer, what: &str) -> Result<()> {
    server.kubectl(&["delete", "--namespace", "keystone-mesh", "--force", what]).map(drop)
}

/// Whether the API server still takes these credentials, which it remembers for some seconds.
fn takes(server: &ApiServer, access: &keystone_kubelab::Access) -> Result<bool> {
    server.with_client(access, async |client| match client.apiserver_version().await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 401 => Ok(false),
        Err(error) => Err(error.into()),
    })
}

/// Hears until this Node is told; nothing may be removed or lost meanwhile.
async fn hear_node(registry: &mut KubernetesRegistry, name: &str) -> Result<()> {
    hear(registry, name, |event| match event {
        Event::Snapshot { entries, .. } => entries.iter().any(|entry| entry.name().as_str() == name).then_some(()),
        Event::Changed(entry) => (entry.name().as_str() == name).then_some(()),
        Event::Removed(gone) => panic!("{gone} was removed"),
        Event::Stale { why } => panic!("it was lost: {why}"),
        _ => None,
    })
    .await
}

fn knows(hub: &Hub, name: &str) -> bool {
    hub.look(|_, entries| entries.keys().any(|known| known.as_str() == name))
}

#[test]
fn a_token_that_is_refused_is_read_again_and_without_another_nothing_is_torn_down() {
    let name = "credentials::a_token_that_is_refused_is_read_again_and_without_another_nothing_is_torn_down";
    with_api_server(name, Options::default(), |server| {
        install_resources(server)?;
        apply_network(server)?;
        server.apply(&approved_node(2, "a"))?;
        let rights = ["--clusterrole=cluster-admin", "--group=system:serviceaccounts"];
        server.kubectl(&["create", "clusterrolebinding", "all", rights[0], rights[1]])?;
        let dir = Path::new(sandbox::SCRATCH).join("account");
        fs::create_dir_all(&dir)?;
        let first = put_token(server, &dir, "w")?;
        let account = ServiceAccount { server: "https://127.0.0.1:6443".into(), dir: dir.clone() };
        let access = Access::service_account(account, None)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        // Watches that stand go on after their token; these are opened again every other second.
        let (hub, mut registry): (Arc<Hub>, _) = runtime.block_on(async {
            let hub = hub(access, Pace { life: 1..=2, ..hasty() });
            let registry = registry(&hub, 3, "w");
            (hub, registry)
        });
        runtime.block_on(hear_node(&mut registry, "a"))?;

        // Another token stands in the file when the first one is refused: nobody is alarmed.
        put_token(server, &dir, "w2")?;
        delete(server, "pod/keystone-mesh-w")?;
        wait::until("the first token is refused", PATIENCE, Duration::from_millis(100), || {
            Ok((!takes(server, &first)?).then_some(()))
        })?;
        server.apply(&approved_node(4, "b"))?;
        runtime.block_on(hear_node(&mut registry, "b"))?;

        // The account goes: it is told, and what is known stays.
        delete(server, "serviceaccount/keystone-mesh")?;
        let stale = hear(&mut registry, "that it is lost", |event| match event {
            Event::Stale { why } => Some(why.clone()),
            Event::Removed(gone) => panic!("{gone} was removed"),
            _ => None,
        });
        let why = runtime.block_on(stale)?;
        assert!(why.contains("does not accept the credentials"), "{why}");
        assert!(knows(&hub, "a") && knows(&hub, "b"));

        // It comes back, as somebody else of that name, with another token.
        delete(server, "pod/keystone-mesh-w2")?;
        put_token(server, &dir, "w2")?;
        server.apply(&approved_node(5, "c"))?;
        let heard = hear(&mut registry, "c", |event| match event {
            Event::Snapshot { entries, .. } => entries.iter().any(|entry| entry.name().as_str() == "c").then_some(()),
            Event::Changed(entry) => (entry.name().as_str() == "c").then_some(()),
            Event::Removed(gone) => panic!("{gone} was removed"),
            _ => None,
        });
        runtime.block_on(heard)
    });
}
