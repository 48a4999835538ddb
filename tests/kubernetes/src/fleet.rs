//! Simulated nodes: Node objects with genuine records, as their daemons would write them, and nobody behind them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Node;
use keystone_mesh_api::AGENT_MANAGER;
use keystone_mesh_core::annotations;
use keystone_mesh_core::key::{NodeId, Secret};
use keystone_mesh_core::node::{NodeName, NodeRecord};
use keystone_mesh_core::path::{Candidate, CandidateKind, Nat};
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::json;

/// Requests under way at a time: as many as an autoscaler's burst makes, and far from what the API server sheds.
const PARALLEL: usize = 16;

/// Nodes that exist in the API only.
pub struct Fleet {
    nodes: Vec<Simulated>,
    relay: NodeId,
    /// One counter for all, so that a number names a change.
    changes: AtomicU64,
}

struct Simulated {
    name: NodeName,
    secret: Secret,
    endpoint: Ipv4Addr,
    /// `spec.podCIDRs`.
    pods: Vec<String>,
}

impl Fleet {
    /// `count` nodes called `PREFIX-0` and so on, which listen on `relay`; nothing is written yet.
    pub fn new(prefix: &str, count: u32, relay: NodeId) -> Result<Self> {
        let nodes = (0..count).map(|number| {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            bytes[4..4 + prefix.len().min(28)].copy_from_slice(&prefix.as_bytes()[..prefix.len().min(28)]);
            let name =
                format!("{prefix}-{number}").parse().with_context(|| format!("{prefix} is no part of a name"))?;
            // Addresses of 198.18.0.0/15, which belong to nobody (RFC 2544).
            let endpoint = Ipv4Addr::from_bits(0xc612_0000 + number);
            Ok(Simulated { name, secret: Secret::from_bytes(bytes), endpoint, pods: Vec::new() })
        });
        Ok(Self { nodes: nodes.collect::<Result<_>>()?, relay, changes: AtomicU64::new(0) })
    }

    /// Each with a network of pods, 10.SECOND.0.0/24 and so on; for at most 256 nodes.
    #[must_use]
    pub fn with_pods(mut self, second: u8) -> Self {
        for (third, node) in (0..=u8::MAX).zip(&mut self.nodes) {
            node.pods = vec![format!("10.{second}.{third}.0/24")];
        }
        self
    }

    /// The names of the Nodes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().map(|node| node.name.as_str())
    }

    /// Makes all Nodes, each with its record.
    pub async fn register(&self, client: &kube::Client) -> Result<()> {
        let writes = stream::iter(0..self.nodes.len()).map(|index| self.change(client, index));
        writes.buffer_unordered(PARALLEL).try_for_each(|_number| std::future::ready(Ok(()))).await
    }

    /// One node says something else of itself: another port. Returns the record's sequence number, which no other record
    /// of this fleet has.
    pub async fn change(&self, client: &kube::Client, index: usize) -> Result<u64> {
        let node = self.nodes.get(index).with_context(|| format!("there is no simulated node {index}"))?;
        let seq = self.changes.fetch_add(1, Ordering::Relaxed) + 1;
        let port = u16::try_from(1024 + seq % 60_000).unwrap_or(u16::MAX);
        let (identity, key) = (node.secret.identity(), node.secret.wireguard(0));
        let candidate = |addr: IpAddr, kind| Candidate { addr: SocketAddr::new(addr, port), kind };
        let record = NodeRecord {
            name: node.name.clone(),
            identity: identity.id(),
            public_key: key.public_key(),
            endpoints: vec![
                candidate(node.endpoint.into(), CandidateKind::Reflexive),
                candidate(Ipv4Addr::new(192, 168, 1, 2).into(), CandidateKind::Host),
            ],
            nat: Nat::EndpointIndependent,
            relays: vec![self.relay],
            routes: Vec::new(),
            seq,
        };
        let annotations = annotations::of_record(&record.sign(&identity));
        let metadata = json!({ "name": node.name, "annotations": annotations });
        let mut patch = json!({ "apiVersion": "v1", "kind": "Node", "metadata": metadata });
        if let Some(first) = node.pods.first() {
            patch["spec"] = json!({ "podCIDR": first, "podCIDRs": node.pods });
        }
        let params = PatchParams::apply(AGENT_MANAGER).force();
        let nodes = Api::<Node>::all(client.clone());
        let written = nodes.patch_metadata(node.name.as_str(), &params, &Patch::Apply(&patch)).await;
        written.with_context(|| format!("write the record of {}", node.name))?;
        Ok(seq)
    }

    /// Deletes all Nodes, as an autoscaler that scales down.
    pub async fn delete(&self, client: &kube::Client) -> Result<()> {
        let nodes = Api::<Node>::all(client.clone());
        let deletions = stream::iter(self.names()).map(|name| {
            let nodes = nodes.clone();
            async move { nodes.delete(name, &DeleteParams::default()).await.with_context(|| format!("delete {name}")) }
        });
        deletions.buffer_unordered(PARALLEL).try_for_each(|_status| std::future::ready(Ok(()))).await
    }
}
