//! Simulated nodes and watches of them.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use keystone_kubelab::{Fleet, Options, Watchers, with_api_server};
use keystone_mesh_core::annotations;
use keystone_mesh_core::key::Secret;
use kube::api::{Api, ListParams};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_change_of_a_simulated_node_reaches_every_watch() {
    with_api_server("a_change_of_a_simulated_node_reaches_every_watch", Options::default(), |server| {
        let fleet = Fleet::new("sim", 20, Secret::from_bytes([1; 32]).identity().id())?;
        let access = server.admin().clone();
        server.with_client(&access, async |client| {
            fleet.register(&client).await?;
            let nodes = Api::<Node>::all(client.clone());
            let listed = nodes.list_metadata(&ListParams::default()).await?;
            assert_eq!(listed.items.len(), 20);
            for node in &listed.items {
                let name = node.metadata.name.as_deref().unwrap().parse()?;
                let record = annotations::record(&name, node.metadata.annotations.as_ref().unwrap())?;
                assert!(record.is_some(), "{node:?}");
            }
            let version = listed.metadata.resource_version.unwrap();
            let mut watchers = Watchers::start(&access, &version, 30).await?;
            let sent = Instant::now();
            let change = fleet.change(&client, 7).await?;
            let heard = watchers.heard(change, PATIENCE).await?;
            assert!(heard.iter().all(|at| *at > sent) && heard.len() == 30);
            assert!(watchers.bytes() > 30 * 500, "{}", watchers.bytes());
            fleet.delete(&client).await?;
            assert!(nodes.list_metadata(&ListParams::default()).await?.items.is_empty());
            Ok(())
        })
    });
}
