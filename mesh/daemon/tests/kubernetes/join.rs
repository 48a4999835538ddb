//! Joining by token through the gateway, whose backend is Kubernetes; and bringing an embedded registry over.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use keystone_kubelab::{ApiServer, Options, with_api_server};
use keystone_mesh::kube_api::access::Access;
use keystone_mesh::registry::backend::{Backend as _, Change};
use keystone_mesh::registry::kubernetes::gateway::KubernetesBackend;
use keystone_mesh::registry::kubernetes::hub::{Heard, Hub, Known, Start};
use keystone_mesh::registry::kubernetes::moving::move_all;
use keystone_mesh::store::{Store, TokenTerms};
use keystone_mesh_core::gateway::Refusal;
use keystone_mesh_core::node::SignedApproval;
use keystone_mesh_core::token::{SECRET_LEN, TokenId, TokenSecret};

use crate::approver;
use crate::world::*;

fn token(byte: u8) -> (TokenId, TokenSecret) {
    (TokenId::from_bytes([byte; 8]), TokenSecret::from_bytes([byte; SECRET_LEN]))
}

async fn current(hub: &Hub) -> Result<()> {
    let mut heard = hub.heard();
    tokio::time::timeout(PATIENCE, heard.wait_for(|heard| *heard == Heard::Current)).await??;
    Ok(())
}

fn get(server: &ApiServer, what: &[&str]) -> Result<serde_json::Value> {
    let arguments: Vec<&str> = ["get", "--output", "json"].iter().chain(what).copied().collect();
    Ok(serde_json::from_str(&server.kubectl(&arguments)?)?)
}

/// Work of kubectl amid asynchronous work.
fn block<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

#[test]
fn machines_join_by_token_and_are_told_why_not_and_leave() {
    with_api_server("join::machines_join_by_token_and_are_told_why_not_and_leave", Options::default(), |server| {
        install_resources(server)?;
        let access = access(server, "join")?;
        let server = &*server;
        run(async move {
            let approving = approver::start(access.client().await?, network_key());
            let hub = hub_with(access, hasty(), Known::default(), true);
            hub.set_document(network());
            current(&hub).await?;
            let backend = KubernetesBackend::new(hub.clone(), network());
            let (id, secret_of) = token(1);
            let terms = TokenTerms { uses: Some(9), names: Some("*w*".parse().unwrap()), ..TokenTerms::default() };
            backend.create_token(id, &secret_of, terms).await.map_err(anyhow::Error::msg)?;
            let join =
                async |byte: u8, name: &str, id: TokenId, secret_of: &TokenSecret| -> Result<SignedApproval, Refusal> {
                    backend.join(secret(byte).identity().id(), record(byte, name, 1), id, secret_of).await
                };

            // A machine joins, and joins again under the same name.
            let approval = join(2, "w", id, &secret_of).await?;
            assert_eq!(approval.get().name.as_str(), "w");
            let again = join(2, "w", id, &secret_of).await?;
            assert_eq!(again.get().addresses, approval.get().addresses);
            let member = block(|| get(server, &["member", "w"]))?;
            assert_eq!(member["spec"]["identity"], secret(2).identity().id().to_string());
            assert_eq!(member["spec"]["token"], id.to_string());

            // Others do not, and learn why.
            for (byte, name, token, code) in [
                (2, "w", token(7), "token-unknown"),
                (2, "w", (id, token(7).1), "token-unknown"),
                (3, "other", token(1), "name-not-allowed"),
                (3, "w", token(1), "name-taken"),
                (2, "w2", token(1), "identity-known"),
                (4, "unwanted", token(1), "token-used-up"),
            ] {
                let refusal = join(byte, name, token.0, &token.1).await.unwrap_err();
                assert_eq!(refusal.code, code, "{name}: {refusal}");
            }
            backend.revoke_token(id).await.map_err(anyhow::Error::msg)?;
            assert_eq!(join(5, "w5", id, &secret_of).await.unwrap_err().code, "token-revoked");
            let tokens = backend.tokens().await.map_err(anyhow::Error::msg)?;
            assert!(tokens.len() == 1 && tokens[0].revoked, "{tokens:?}");

            // A record is published, heard at once, and written.
            let mine = secret(2).identity().id();
            let mut changes = hub.changes();
            backend.publish(mine, record(2, "w", 5)).await?;
            let change = tokio::time::timeout(PATIENCE, async {
                loop {
                    if let Change::Node(entry) = changes.recv().await?
                        && entry.record.get().seq == 5
                    {
                        return anyhow::Ok(());
                    }
                }
            });
            change.await??;
            let deadline = tokio::time::Instant::now() + PATIENCE;
            let seq = "mesh.keystone.cluster/seq";
            while block(|| get(server, &["member", "w"]))?["metadata"]["annotations"][seq] != "5" {
                ensure!(tokio::time::Instant::now() < deadline, "the record was not written");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            assert_eq!(backend.publish(mine, record(2, "w", 4)).await.unwrap_err().code, "stale-record");
            assert_eq!(backend.publish(mine, record(2, "x", 9)).await.unwrap_err().code, "not-member");

            // A Node of that name stays; without one the machine leaves.
            block(|| server.apply(&node("w", &Default::default())))?;
            let deadline = tokio::time::Instant::now() + PATIENCE;
            while !hub.is_node(&"w".parse()?) {
                ensure!(tokio::time::Instant::now() < deadline, "the Node was not seen");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let refusal = backend.leave(mine, &"w".parse()?).await.unwrap_err();
            assert!(refusal.code == "is-node" && refusal.message.contains("kubectl delete node w"), "{refusal}");
            block(|| server.kubectl(&["delete", "node", "w"]))?;
            while hub.is_node(&"w".parse()?) {
                ensure!(tokio::time::Instant::now() < deadline, "the Node did not go");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            backend.leave(mine, &"w".parse()?).await?;
            assert!(block(|| get(server, &["member", "w"])).is_err());
            approving.abort();
            Ok(())
        })
    });
}

#[test]
fn an_embedded_registry_is_brought_over_and_nobody_is_lost_meanwhile() {
    let name = "join::an_embedded_registry_is_brought_over_and_nobody_is_lost_meanwhile";
    with_api_server(name, Options::default(), |server| {
        let dir = tempfile::tempdir()?;
        let store = Arc::new(Store::create(&dir.path().join("registry.redb"), network_key(), network().get().clone())?);
        store.enter_own(record(1, "home", 1), 100)?;
        let (id, secret_of) = token(1);
        store.create_token(id, &secret_of, TokenTerms { uses: Some(2), ..TokenTerms::default() }, 100)?;
        let approved = store.join(secret(2).identity().id(), record(2, "w", 1), id, &secret_of, 100)?;
        let access = access(server, "moving")?;
        let known = Known { network: Some(network()), entries: store.watch().entries, peers: vec![] };
        let (moved, from) = (store.clone(), access.clone());
        let server = &*server;
        run(async move {
            let first = move || -> std::pin::Pin<Box<dyn Future<Output = Result<(), String>> + Send>> {
                let (store, access): (Arc<Store>, Access) = (moved.clone(), from.clone());
                Box::pin(async move { move_all(&store, &access).await })
            };
            let hub = Arc::new(Hub::start(Start {
                access,
                network: network_key().id(),
                known,
                founder: true,
                first: Some(Box::new(first)),
                pace: hasty(),
                seed: 7,
            }));
            hub.set_document(network());
            let mut changes = hub.changes();
            // The custom resources are missing: it cannot be done yet, and says so.
            let mut heard = hub.heard();
            let lost = heard.wait_for(|heard| matches!(heard, Heard::Lost(_)));
            tokio::time::timeout(PATIENCE, lost).await??;
            assert!(!store.is_moved()?);
            block(|| install_resources(server))?;
            current(&hub).await?;
            assert!(store.is_moved()?);
            let names = hub.look(|_, entries| entries.keys().map(ToString::to_string).collect::<Vec<_>>());
            assert_eq!(names, ["home", "w"]);
            while let Ok(change) = changes.try_recv() {
                assert!(!matches!(change, Change::Removed(_)), "{change:?}");
            }
            let member = block(|| get(server, &["member", "w"]))?;
            let annotations = &member["metadata"]["annotations"];
            let addresses = approved.get().addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            assert_eq!(annotations["mesh.keystone.cluster/addresses"], addresses);
            let token = block(|| get(server, &["jointoken", &id.to_string()]))?;
            assert_eq!(token["spec"]["uses"], 1);
            let deadline = tokio::time::Instant::now() + PATIENCE;
            while block(|| get(server, &["configmap", "--namespace", "keystone-mesh", "keystone-mesh-network"]))
                .is_err()
            {
                ensure!(tokio::time::Instant::now() < deadline, "the document was not written");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        })
    });
}
