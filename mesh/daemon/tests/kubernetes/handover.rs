//! From the gateway to Kubernetes and back.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, bail};
use keystone_kubelab::{ApiServer, Options, with_api_server};
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

/// What the pod on this Node hands over.
fn grant_on(server: &ApiServer, node: &str) -> Result<Grant> {
    let agent = server.service_account_on(node, "keystone-mesh", "keystone-mesh")?;
    Ok(Grant {
        server: "https://127.0.0.1:6443".into(),
        ca: agent.authority().to_owned(),
        token: Zeroizing::new(agent.token().unwrap().to_owned()),
        expires: None,
        namespace: "keystone-mesh".into(),
        node: node.into(),
    })
}

/// A mesh with one node beside `w`, in which every service account may do everything.
fn prepare(server: &ApiServer) -> Result<()> {
    install_resources(server)?;
    apply_network(server)?;
    server.apply(&approved_node(2, "a"))?;
    server.apply(&node("w", &Default::default()))?;
    let rights = ["--clusterrole=cluster-admin", "--group=system:serviceaccounts"];
    server.kubectl(&["create", "clusterrolebinding", "all", rights[0], rights[1]]).map(drop)
}

/// Begins with a gateway, which counts in `published` what is published to it.
fn handover(published: &Arc<Mutex<Vec<u64>>>) -> Result<Handover> {
    let published = published.clone();
    let snapshot = Event::Snapshot { network: network(), entries: vec![], peers: vec![] };
    let open = move || -> Box<dyn Registry> {
        Box::new(Gateway { told: false, snapshot: snapshot.clone(), published: published.clone() })
    };
    let identity = secret(3).identity().id();
    let own = Own { network: network_key().id(), name: "w".parse()?, identity, seed: 3 };
    Ok(Handover::new(own, Box::new(open)))
}

fn known() -> Known {
    Known { network: Some(network()), ..Known::default() }
}

#[test]
fn access_that_is_granted_and_ends_changes_the_registry_and_takes_nothing_away() {
    let name = "handover::access_that_is_granted_and_ends_changes_the_registry_and_takes_nothing_away";
    with_api_server(name, Options::default(), |server| {
        prepare(server)?;
        let grant = grant_on(server, "w")?;
        let server = &*server;
        run(async move {
            let published = Arc::new(Mutex::new(Vec::new()));
            let mut registry = handover(&published)?;
            registry.publish(record(3, "w", 1));
            assert!(next_snapshot(&mut registry).await?.is_empty());
            assert_eq!(registry.kind(), "gateway");

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
            assert_eq!(*published.lock().unwrap(), [1, 1], "the gateway has the record again");

            // Access that ends soon is left in time.
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
            registry.grant(Grant { expires: Some(now + 8), ..grant }, known);
            next_snapshot(&mut registry).await?;
            assert_eq!(registry.kind(), "kubernetes");
            next_snapshot(&mut registry).await?;
            assert_eq!(registry.kind(), "gateway");
            Ok(())
        })
    });
}

#[test]
fn access_that_is_refused_is_left_for_the_gateway_and_not_tried_again() {
    let name = "handover::access_that_is_refused_is_left_for_the_gateway_and_not_tried_again";
    with_api_server(name, Options::default(), |server| {
        prepare(server)?;
        let grant = grant_on(server, "w")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let _inside = runtime.enter();
        let published = Arc::new(Mutex::new(Vec::new()));
        let mut registry = handover(&published)?;
        registry.publish(record(3, "w", 1));
        runtime.block_on(next_snapshot(&mut registry))?;
        registry.grant(grant.clone(), known);
        runtime.block_on(next_snapshot(&mut registry))?;
        assert_eq!(registry.kind(), "kubernetes");

        // The account goes. Watches that stand would go on for minutes, and an API server away is no reason to leave it.
        server.kubectl(&["delete", "serviceaccount", "--namespace", "keystone-mesh", "keystone-mesh"])?;
        server.kill()?;
        server.restart()?;
        runtime.block_on(next_snapshot(&mut registry))?;
        assert_eq!(registry.kind(), "gateway");
        assert_eq!(*published.lock().unwrap(), [1, 1], "the gateway has the record again");

        registry.grant(grant, known);
        let patience = Duration::from_secs(3);
        let changed = runtime.block_on(async { tokio::time::timeout(patience, next_snapshot(&mut registry)).await });
        assert!(changed.is_err(), "what was refused is not tried again: {changed:?}");

        // A fresh token of a fresh account.
        server.kubectl(&["delete", "pod", "--namespace", "keystone-mesh", "--force", "keystone-mesh-w"])?;
        registry.grant(grant_on(server, "w")?, known);
        runtime.block_on(next_snapshot(&mut registry))?;
        assert_eq!(registry.kind(), "kubernetes");
        Ok(())
    });
}
