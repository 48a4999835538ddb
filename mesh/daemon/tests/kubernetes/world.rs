//! What these tests have in common: custom resources, nodes, hubs, and someone who approves.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use keystone_kubelab::ApiServer;
use keystone_mesh::kube_api::access::Access;
use keystone_mesh::kube_api::watch::Pace;
use keystone_mesh::registry::kubernetes::KubernetesRegistry;
use keystone_mesh::registry::kubernetes::hub::{Hub, Known, Start};
use keystone_mesh::registry::{Event, Registry as _};
use keystone_mesh_api::{JoinToken, Member, Peer};
use keystone_mesh_core::network::{DEFAULT_IPV4, Network, SignedNetwork, default_ipv6};
use keystone_mesh_core::node::{Approval, NodeRecord, SignedApproval, SignedRecord};
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::{Identity, NodeId, Secret, annotations};
use kube::CustomResourceExt as _;
use serde_json::json;

/// For what takes a moment on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The network key of these tests.
pub(crate) fn network_key() -> Identity {
    secret(1).identity()
}

pub(crate) fn secret(byte: u8) -> Secret {
    Secret::from_bytes([byte; 32])
}

pub(crate) fn network() -> SignedNetwork {
    let id = network_key().id();
    let network = Network {
        id,
        ipv4: DEFAULT_IPV4.parse().unwrap(),
        ipv6: default_ipv6(id),
        relays: vec![],
        gateways: vec!["192.0.2.1:51840".parse().unwrap()],
        serial: 1,
    };
    network.sign(&network_key()).unwrap()
}

/// What machine `byte` says of itself.
pub(crate) fn record(byte: u8, name: &str, seq: u64) -> SignedRecord {
    let record = NodeRecord {
        name: name.parse().unwrap(),
        identity: secret(byte).identity().id(),
        public_key: secret(byte).wireguard(0).public_key(),
        endpoints: vec!["host 192.0.2.7:51840".parse().unwrap()],
        nat: Nat::Unknown,
        relays: vec![],
        routes: vec![],
        seq,
    };
    record.sign(&secret(byte).identity())
}

/// What the controller would let machine `byte` do.
pub(crate) fn approval(byte: u8, name: &str, serial: u64) -> SignedApproval {
    approval_of(&network_key(), secret(byte).identity().id(), name, byte, serial)
}

pub(crate) fn approval_of(network: &Identity, identity: NodeId, name: &str, host: u8, serial: u64) -> SignedApproval {
    let approval = Approval {
        network: network.id(),
        name: name.parse().unwrap(),
        identity,
        addresses: vec![format!("10.98.0.{host}/32").parse().unwrap()],
        routes: vec![],
        pod_cidrs: vec![],
        endpoints: vec![],
        relays: vec![],
        location: None,
        serial,
    };
    approval.sign(network)
}

/// Applies our custom resources and waits until they are served.
pub(crate) fn install_resources(server: &ApiServer) -> Result<()> {
    for crd in [Member::crd(), Peer::crd(), JoinToken::crd()] {
        server.apply(&serde_json::to_string(&crd)?)?;
        let name = format!("crd/{}", crd.metadata.name.unwrap());
        server.kubectl(&["wait", "--for=condition=Established", "--timeout=30s", &name])?;
    }
    server
        .apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "keystone-mesh" } }).to_string())
}

/// Makes the network's ConfigMap, as the control-plane host does.
pub(crate) fn apply_network(server: &ApiServer) -> Result<()> {
    let object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": keystone_mesh_api::NETWORK_CONFIG_MAP, "namespace": "keystone-mesh" },
        "data": network().to_map(),
    });
    server.apply(&object.to_string())
}

/// A Node or Member with these annotations.
pub(crate) fn node(name: &str, annotations: &std::collections::BTreeMap<String, String>) -> String {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "annotations": annotations } }).to_string()
}

/// A Node with record and approval of machine `byte`.
pub(crate) fn approved_node(byte: u8, name: &str) -> String {
    let mut all = annotations::of_record(&record(byte, name, 1));
    all.extend(annotations::of_approval(&approval(byte, name, 1)));
    node(name, &all)
}

/// Short waits, so that a test sees them pass.
pub(crate) fn hasty() -> Pace {
    Pace {
        answer: Duration::from_secs(10),
        silence: Duration::from_secs(180),
        life: 300..=600,
        absent: Duration::from_secs(1),
    }
}

/// Access as the administrator.
pub(crate) fn access(server: &ApiServer, name: &str) -> Result<Access> {
    access_of(server.admin(), name)
}

pub(crate) fn access_of(access: &keystone_kubelab::Access, name: &str) -> Result<Access> {
    let file: PathBuf = std::env::temp_dir().join(format!("{name}-{}.kubeconfig", std::process::id()));
    access.write_kubeconfig(&file)?;
    Ok(Access::find(Some(&file), None)?)
}

/// A hub that knows nothing of old.
pub(crate) fn hub(access: Access, pace: Pace) -> std::sync::Arc<Hub> {
    hub_with(access, pace, Known::default(), false)
}

pub(crate) fn hub_with(access: Access, pace: Pace, known: Known, founder: bool) -> std::sync::Arc<Hub> {
    Hub::start(Start { access, network: network_key().id(), known, founder, first: None, pace, seed: 7 }).into()
}

/// The part of machine `byte`.
pub(crate) fn registry(hub: &std::sync::Arc<Hub>, byte: u8, name: &str) -> KubernetesRegistry {
    KubernetesRegistry::new(hub.clone(), name.parse().unwrap(), secret(byte).identity().id())
}

/// The first event that `wanted` makes something of.
pub(crate) async fn hear<T>(
    registry: &mut KubernetesRegistry,
    what: &str,
    mut wanted: impl FnMut(&Event) -> Option<T>,
) -> Result<T> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut last = None;
    loop {
        let Ok(event) = tokio::time::timeout_at(deadline, registry.next()).await else {
            bail!("not heard: {what}; the last was {last:?}");
        };
        if let Some(found) = wanted(&event) {
            return Ok(found);
        }
        last = Some(event);
    }
}

/// Runs `work` to its end.
pub(crate) fn run<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(work)
}
