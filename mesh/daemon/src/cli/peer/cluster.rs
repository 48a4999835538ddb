//! What these commands ask of the API server.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use keystone_mesh_api::{Member, NETWORK_CONFIG_MAP, Peer, PeerSpec};
use keystone_mesh_core::directory::{Carrier, Directory, Object};
use keystone_mesh_core::network::{Network, SignedNetwork};
use keystone_mesh_core::node::{Entry, NodeName};
use keystone_mesh_core::plain_peer::{PlainPeer, SignedPlainPeer};
use keystone_mesh_core::{NodeId, PublicKey};
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;

use crate::kube_api::access::Access;
use crate::kube_api::{status_code, words};

/// Field manager of what people do with this program.
const MANAGER: &str = "keystone-mesh-cli";
/// Between two looks at an object that is waited for.
const POLL: Duration = Duration::from_millis(250);
/// Objects in one answer of a list.
const PAGE: u32 = 500;

/// The cluster, as its peers are seen from here.
pub(super) struct Cluster {
    client: Client,
    namespace: String,
}

impl Cluster {
    pub(super) async fn connect(kubeconfig: Option<&Path>, namespace: Option<&str>) -> anyhow::Result<Self> {
        let access = Access::find(kubeconfig, namespace)?;
        Ok(Self { client: access.client().await?, namespace: access.namespace().to_owned() })
    }

    pub(super) async fn create(&self, name: &NodeName, spec: PeerSpec) -> anyhow::Result<()> {
        let params = PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() };
        match self.peers().create(&params, &Peer::new(name.as_str(), spec)).await {
            Ok(_) => Ok(()),
            Err(error) if status_code(&error) == Some(409) => bail!(
                "there is a peer `{name}` already; `keystone-mesh peer config {name} --new-key` gives it a new key, \
                 `keystone-mesh peer remove {name}` removes it"
            ),
            Err(error) => Err(explained(&error)).context(format!("peer `{name}` cannot be made")),
        }
    }

    pub(super) async fn get(&self, name: &NodeName) -> anyhow::Result<Peer> {
        self.peers().get(name.as_str()).await.map_err(|error| about(name, &error))
    }

    pub(super) async fn list(&self) -> anyhow::Result<Vec<Peer>> {
        let mut peers = Vec::new();
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let page = self.peers().list(&params).await.map_err(|error| explained(&error))?;
            peers.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(peers),
            }
        }
    }

    pub(super) async fn remove(&self, name: &NodeName) -> anyhow::Result<()> {
        let removed = self.peers().delete(name.as_str(), &DeleteParams::default()).await;
        removed.map(drop).map_err(|error| about(name, &error))
    }

    pub(super) async fn set_key(&self, name: &NodeName, key: &PublicKey) -> anyhow::Result<()> {
        let patch = serde_json::json!({ "spec": { "publicKey": key.to_string() } });
        let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
        let patched = self.peers().patch(name.as_str(), &params, &Patch::Merge(&patch)).await;
        patched.map(drop).map_err(|error| about(name, &error))
    }

    /// What the network states of the peer: for this key where one is given, otherwise for the object's own.
    pub(super) async fn stated(
        &self,
        name: &NodeName,
        key: Option<&PublicKey>,
        patience: Duration,
    ) -> anyhow::Result<PlainPeer> {
        let deadline = Instant::now() + patience;
        loop {
            let peer = self.get(name).await?;
            if let Some(stated) = statement(name, &peer, key)? {
                return Ok(stated);
            }
            if Instant::now() >= deadline || is_final(&peer) {
                return Err(not_stated(name, &peer, &self.namespace, patience));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The network's document.
    pub(super) async fn network(&self) -> anyhow::Result<Network> {
        let name = format!("{}/{NETWORK_CONFIG_MAP}", self.namespace);
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let map = match maps.get(NETWORK_CONFIG_MAP).await {
            Ok(map) => map,
            Err(error) if status_code(&error) == Some(404) => bail!(
                "there is no ConfigMap {name}: the control-plane host's daemon writes it when it runs with \
                 `registry = \"kubernetes\"`; with another namespace, name it with --namespace"
            ),
            Err(error) => return Err(explained(&error).context(format!("cannot read ConfigMap {name}"))),
        };
        let network = SignedNetwork::from_map(&map.data.unwrap_or_default());
        let network = network.map_err(|why| anyhow!("ConfigMap {name} is not the network's document: {why}"))?;
        Ok(network.get().clone())
    }

    /// Every node with a valid record, from Nodes and Members.
    pub(super) async fn entries(&self, network: NodeId) -> anyhow::Result<Vec<Entry>> {
        let mut directory = Directory::new(network, Vec::new(), Vec::new());
        directory.handle_listed(Carrier::Node, &self.objects::<Node>("Nodes").await?);
        directory.handle_listed(Carrier::Member, &self.objects::<Member>("Members").await?);
        Ok(directory.entries().cloned().collect())
    }

    /// Names and annotations of every object of a kind.
    async fn objects<K>(&self, kind: &str) -> anyhow::Result<Vec<Object>>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let api: Api<K> = Api::all(self.client.clone());
        let mut objects = Vec::new();
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let page = api.list_metadata(&params).await;
            let page = page.map_err(|error| explained(&error).context(format!("cannot list {kind}")))?;
            objects.extend(page.items.into_iter().map(|object| of_metadata(object.metadata)));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(objects),
            }
        }
    }

    fn peers(&self) -> Api<Peer> {
        Api::all(self.client.clone())
    }
}

/// The controller's verdict on a peer, if there is one yet.
pub(super) fn ready(peer: &Peer) -> Option<&Condition> {
    peer.status.as_ref()?.conditions.iter().find(|condition| condition.type_ == "Ready")
}

/// The statement that a Peer object carries, where it is for `key` (none: the object's own) and of the object's spec.
fn statement(name: &NodeName, peer: &Peer, key: Option<&PublicKey>) -> anyhow::Result<Option<PlainPeer>> {
    let annotations = peer.metadata.annotations.clone().unwrap_or_default();
    let stated = SignedPlainPeer::from_annotations(name, &annotations);
    let stated = stated.map_err(|why| anyhow!("what the network states of peer `{name}` does not hold: {why}"))?;
    let wanted = key.map_or_else(|| peer.spec.public_key.clone(), ToString::to_string);
    Ok(stated
        .map(|stated| stated.get().clone())
        .filter(|stated| stated.public_key.to_string() == wanted && !stated.is_revoked()))
}

/// Whether the controller has seen the object as it is and says no; what it says may change with the cluster, not soon.
fn is_final(peer: &Peer) -> bool {
    ready(peer).is_some_and(|verdict| {
        verdict.status == "False"
            && verdict.observed_generation.is_some_and(|seen| Some(seen) >= peer.metadata.generation)
    })
}

/// Why a peer that was waited for has no statement.
fn not_stated(name: &NodeName, peer: &Peer, namespace: &str, patience: Duration) -> anyhow::Error {
    let seconds = patience.as_secs();
    match ready(peer).filter(|condition| condition.status != "True") {
        Some(verdict) => anyhow!("the controller says of peer `{name}`: {} ({})", verdict.message, verdict.reason),
        None => anyhow!(
            "the controller has given peer `{name}` no address within {seconds} s; does it run? \
             `kubectl -n {namespace} get pods,leases` tells"
        ),
    }
}

fn of_metadata(metadata: ObjectMeta) -> Object {
    let annotations: BTreeMap<String, String> = metadata.annotations.unwrap_or_default();
    Object { name: metadata.name.unwrap_or_default(), annotations }
}

fn about(name: &NodeName, error: &kube::Error) -> anyhow::Error {
    if status_code(error) == Some(404) {
        return anyhow!("there is no peer `{name}`; `keystone-mesh peer list` lists them");
    }
    explained(error).context(format!("peer `{name}`"))
}

fn explained(error: &kube::Error) -> anyhow::Error {
    anyhow!("{}", words(error))
}
