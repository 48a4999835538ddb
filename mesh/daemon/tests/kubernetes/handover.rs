//! From the gateway to Kubernetes and back.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, bail};
use keystone_kubelab::{Options, with_api_server};
use keystone_mesh::kube_api::access::Grant;
use keystone_mesh::registry::handover::{Handover, Own};
use keystone_mesh::registry::kubernetes::hub::Known;
use keystone_mesh::registry::{Answer, Event, Registry};
use keystone_mesh_core::node::SignedRecord;
use zeroize::Zeroizing;

use crate::world::*;

/// A gateway that knows what is given to it.
struct Gateway {
    told: bool,
    snapshot: Event,
    published: Arc<Mutex<Vec<u64>>>,
}

impl Registry for Gateway {
    fn kind(&self) -> &'static str {
        "gateway"
    }

    fn publish(&mut self, record: SignedRecord) {
        self.published.lock().unwrap().push(record.get().seq);
    }

    fn next(&mut self) -> Answer<'_, Event> {
        Box::pin(async {
            if std::mem::replace(&mut self.told, true) {
                return std::future::pending().await;
            }
            self.snapshot.clone()
        })
    }

    fn leave(&mut self) -> Answer<'_, Result<(), String>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

async fn next_snapshot(registry: &mut Handover) -> Result<Vec<String>> {
    loop {
        match tokio::time::timeout(PATIENCE, registry.next()).await? {
            Event::Snapshot { entries, .. } => {
                return Ok(entries.iter().map(|entry| entry.name().to_string()).collect());
            }
            Event::Removed(name) => bail!("{name} was removed"),
            _ => {}
        }
    }
}

#[test]
fn access_that_is_granted_and_ends_changes_the_registry_and_takes_nothing_away() {
    let name = "handover::access_that_is_granted_and_ends_changes_the_registry_and_takes_nothing_away";
    with_api_server(name, Options::default(), |server| {
        install_resources(server)?;
        apply_network(server)?;
        server.apply(&approved_node(2, "a"))?;
        server.apply(&node("w", &Default::default()))?;
        server.kubectl(&[
            "create",
            "clusterrolebinding",
            "all",
            "--clusterrole=cluster-admin",
            "--group=system:serviceaccounts",
        ])?;
        let agent = server.service_account_on("w", "keystone-mesh", "keystone-mesh")?;
        let grant = Grant {
            server: "https://127.0.0.1:6443".into(),
            ca: agent.authority().to_owned(),
            token: Zeroizing::new(agent.token().unwrap().to_owned()),
            expires: None,
            namespace: "keystone-mesh".into(),
            node: "w".into(),
        };
        let server = &*server;
        run(async move {
            let published = Arc::new(Mutex::new(Vec::new()));
            let seen = published.clone();
            let snapshot = Event::Snapshot { network: network(), entries: vec![], peers: vec![] };
            let open = move || -> Box<dyn Registry> {
                Box::new(Gateway { told: false, snapshot: snapshot.clone(), published: published.clone() })
            };
            let identity = secret(3).identity().id();
            let own = Own { network: network_key().id(), name: "w".parse()?, identity, seed: 3 };
            let mut registry = Handover::new(own, Box::new(open));
            registry.publish(record(3, "w", 1));
            assert!(next_snapshot(&mut registry).await?.is_empty());
            assert_eq!(registry.kind(), "gateway");

            let known = || Known { network: Some(network()), ..Known::default() };
            registry.grant(grant.clone(), known);
            assert_eq!(registry.kind(), "gateway", "until everything is heard");
            assert!(next_snapshot(&mut registry).await?.contains(&"a".to_owned()));
            assert_eq!(registry.kind(), "kubernetes");
            // The record stands on the Node, through the pod's own credentials.
            let seq = "jsonpath={.metadata.annotations.mesh\\.keystone\\.cluster/seq}";
            let stands = || Ok((server.kubectl(&["get", "node", "w", "--output", seq])? == "1").then_some(()));
            let waited =
                || keystone_lab::wait::until("the record stands", PATIENCE, Duration::from_millis(100), stands);
            tokio::task::block_in_place(waited)?;
            // A renewal changes nothing that shows.
            registry.grant(grant.clone(), known);
            assert_eq!(registry.kind(), "kubernetes");

            registry.withdraw();
            assert_eq!(registry.kind(), "kubernetes", "until the gateway has told everything");
            next_snapshot(&mut registry).await?;
            assert_eq!(registry.kind(), "gateway");
            assert_eq!(*seen.lock().unwrap(), [1, 1], "the gateway has the record again");

            // Access that ends soon is left in time.
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
            registry.grant(Grant { expires: Some(now + 8), ..grant.clone() }, known);
            next_snapshot(&mut registry).await?;
            assert_eq!(registry.kind(), "kubernetes");
            next_snapshot(&mut registry).await?;
            assert_eq!(registry.kind(), "gateway");

            // The pod is deleted: its token is refused, and not tried again.
            let fresh =
                tokio::task::block_in_place(|| server.service_account_on("w2", "keystone-mesh", "keystone-mesh"))?;
            let fresh = Grant { token: Zeroizing::new(fresh.token().unwrap().to_owned()), ..grant };
            registry.grant(fresh.clone(), known);
            next_snapshot(&mut registry).await?;
            assert_eq!(registry.kind(), "kubernetes");
            tokio::task::block_in_place(|| {
                server.kubectl(&["delete", "pod", "--namespace", "keystone-mesh", "--force", "keystone-mesh-w2"])
            })?;
            // Its watches go on until they end; a new connection shows that it is over.
            tokio::time::sleep(Duration::from_secs(12)).await;
            registry.withdraw();
            next_snapshot(&mut registry).await?;
            assert_eq!(registry.kind(), "gateway");
            registry.grant(fresh.clone(), known);
            let changed = tokio::time::timeout(Duration::from_secs(5), next_snapshot(&mut registry)).await;
            assert!(changed.is_err(), "the gateway stays: {changed:?}");
            Ok(())
        })
    });
}
