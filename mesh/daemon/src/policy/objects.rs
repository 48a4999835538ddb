//! What is kept of the cluster's objects: a thousand nodes with thirty pods each are thirty thousand pods in every daemon.
//!
//! An object is cut down while it is read, and what many have in common (labels, ports, names of namespaces and nodes) is
//! kept once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use keystone_mesh_core::policy::{Cluster, Labels, Name, NamedPort, Pod, Policy, SCTP, Stage, TCP, UDP};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    labels: Option<Labels>,
    #[serde(default)]
    deletion_timestamp: Option<IgnoredAny>,
}

/// A pod.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct PodObject {
    metadata: Meta,
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default)]
    host_network: Option<bool>,
    #[serde(default)]
    containers: Option<Vec<Container>>,
    #[serde(default)]
    init_containers: Option<Vec<Container>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    #[serde(default)]
    ports: Option<Vec<ContainerPort>>,
    #[serde(default)]
    restart_policy: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    #[serde(default)]
    name: Option<String>,
    container_port: u16,
    #[serde(default)]
    protocol: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodStatus {
    #[serde(default)]
    phase: Option<String>,
    #[serde(default, rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(default, rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Clone, Debug, Deserialize)]
struct PodIp {
    ip: String,
}

/// A namespace.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct NamespaceObject {
    metadata: Meta,
}

/// A policy.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct PolicyObject {
    metadata: Meta,
    #[serde(default)]
    spec: Value,
}

/// A node.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct NodeObject {
    #[serde(default)]
    spec: NodeSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct NodeSpec {
    #[serde(default, rename = "podCIDR")]
    pod_cidr: Option<IpNet>,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Option<Vec<IpNet>>,
}

impl NodeObject {
    /// The prefixes of its pods.
    pub(super) fn pod_cidrs(self) -> Vec<IpNet> {
        self.spec.pod_cidrs.unwrap_or_else(|| self.spec.pod_cidr.into_iter().collect())
    }
}

/// The cluster, as it is heard of.
#[derive(Clone, Debug, Default)]
pub(super) struct Store {
    /// What is known.
    pub(super) cluster: Cluster,
    labels: BTreeSet<Arc<Labels>>,
    ports: BTreeSet<Arc<[NamedPort]>>,
    words: BTreeSet<Arc<str>>,
}

impl Store {
    /// Everything that there is of a kind.
    pub(super) fn pods(&mut self, pods: Vec<PodObject>) {
        self.cluster.pods.clear();
        for pod in pods {
            self.pod(pod);
        }
        self.forget_unused();
    }

    pub(super) fn namespaces(&mut self, namespaces: Vec<NamespaceObject>) {
        self.cluster.namespaces.clear();
        for namespace in namespaces {
            self.namespace(namespace);
        }
    }

    pub(super) fn policies(&mut self, policies: Vec<PolicyObject>) {
        self.cluster.policies.clear();
        for policy in policies {
            self.policy(policy);
        }
    }

    /// A pod came or changed. Whether that changes anything here: most changes are of its conditions.
    pub(super) fn pod(&mut self, object: PodObject) -> bool {
        let name = self.name(&object.metadata);
        let pod = self.kept(object);
        let old = self.cluster.pods.insert(name, pod.clone());
        old.as_ref() != Some(&pod)
    }

    pub(super) fn pod_gone(&mut self, object: &PodObject) -> bool {
        let name = self.name(&object.metadata);
        self.cluster.pods.remove(&name).is_some()
    }

    pub(super) fn namespace(&mut self, object: NamespaceObject) -> bool {
        let labels = shared(&mut self.labels, object.metadata.labels.unwrap_or_default());
        let name = shared_text(&mut self.words, &object.metadata.name);
        self.cluster.namespaces.insert(name, labels.clone()) != Some(labels)
    }

    pub(super) fn namespace_gone(&mut self, object: &NamespaceObject) -> bool {
        self.cluster.namespaces.remove(object.metadata.name.as_str()).is_some()
    }

    pub(super) fn policy(&mut self, object: PolicyObject) -> bool {
        let PolicyObject { metadata, spec } = object;
        let name = self.name(&metadata);
        let policy = Policy::read(&spec);
        for fault in &policy.faults {
            tracing::warn!(policy = %format!("{}/{}", name.0, name.1), "{fault}; what it would allow is not allowed");
        }
        self.cluster.policies.insert(name, policy.clone()) != Some(policy)
    }

    pub(super) fn policy_gone(&mut self, object: &PolicyObject) -> bool {
        let name = self.name(&object.metadata);
        self.cluster.policies.remove(&name).is_some()
    }

    /// Drops what is shared by nobody any more.
    pub(super) fn forget_unused(&mut self) {
        self.labels.retain(|labels| Arc::strong_count(labels) > 1);
        self.ports.retain(|ports| Arc::strong_count(ports) > 1);
        self.words.retain(|word| Arc::strong_count(word) > 1);
    }

    fn name(&mut self, metadata: &Meta) -> Name {
        (shared_text(&mut self.words, &metadata.namespace), metadata.name.as_str().into())
    }

    fn kept(&mut self, object: PodObject) -> Pod {
        let PodObject { metadata, spec, status } = object;
        let stage = match status.phase.as_deref() {
            Some("Succeeded" | "Failed") => Stage::Finished,
            Some(_) | None if metadata.deletion_timestamp.is_some() => Stage::Leaving,
            Some(_) | None => Stage::Alive,
        };
        let addresses: Vec<IpAddr> = match status.pod_ips {
            Some(all) if !all.is_empty() => all.iter().filter_map(|one| one.ip.parse().ok()).collect(),
            Some(_) | None => status.pod_ip.iter().filter_map(|one| one.parse().ok()).collect(),
        };
        // An init container that stays serves like any other.
        let stays = |container: &Container| container.restart_policy.as_deref() == Some("Always");
        let staying = spec.init_containers.into_iter().flatten().filter(stays);
        let containers = spec.containers.into_iter().flatten().chain(staying);
        let ports = containers.flat_map(|container| container.ports.into_iter().flatten()).filter_map(named);
        let mut ports: Vec<NamedPort> = ports.collect();
        ports.sort_unstable();
        ports.dedup();
        Pod {
            labels: shared(&mut self.labels, metadata.labels.unwrap_or_default()),
            node: spec.node_name.map(|node| shared_text(&mut self.words, &node)),
            addresses,
            host_network: spec.host_network.unwrap_or(false),
            stage,
            ports: shared_ports(&mut self.ports, ports),
        }
    }
}

fn named(port: ContainerPort) -> Option<NamedPort> {
    let protocol = match port.protocol.as_deref() {
        None | Some("TCP") => TCP,
        Some("UDP") => UDP,
        Some("SCTP") => SCTP,
        Some(_) => return None,
    };
    Some(NamedPort { name: port.name?, protocol, port: port.container_port })
}

fn shared(all: &mut BTreeSet<Arc<Labels>>, labels: Labels) -> Arc<Labels> {
    let labels = Arc::new(labels);
    match all.get(&labels) {
        Some(known) => known.clone(),
        None => {
            all.insert(labels.clone());
            labels
        }
    }
}

fn shared_ports(all: &mut BTreeSet<Arc<[NamedPort]>>, ports: Vec<NamedPort>) -> Arc<[NamedPort]> {
    match all.get(ports.as_slice()) {
        Some(known) => known.clone(),
        None => {
            let ports: Arc<[NamedPort]> = ports.into();
            all.insert(ports.clone());
            ports
        }
    }
}

fn shared_text(all: &mut BTreeSet<Arc<str>>, text: &str) -> Arc<str> {
    match all.get(text) {
        Some(known) => known.clone(),
        None => {
            let text: Arc<str> = text.into();
            all.insert(text.clone());
            text
        }
    }
}

/// How many policies have faults, and what the first ones are.
pub(super) fn first_faults(cluster: &Cluster, most: usize) -> (usize, Vec<String>) {
    let mut by_policy: BTreeMap<&Name, Vec<&str>> = BTreeMap::new();
    for (name, fault) in cluster.faults() {
        by_policy.entry(name).or_default().push(fault);
    }
    let said = by_policy.iter().take(most).map(|((namespace, name), faults)| {
        let more = if faults.len() > 1 { format!(" (and {} more)", faults.len() - 1) } else { String::new() };
        format!("the network policy {namespace}/{name} allows less than it says: {}{more}", faults[0])
    });
    (by_policy.len(), said.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, extra: impl FnOnce(&mut Value)) -> PodObject {
        let mut pod = json!({
            "metadata": { "name": name, "namespace": "default", "labels": { "app": "web" }, "managedFields": [{ "x": 1 }] },
            "spec": {
                "nodeName": "n",
                "containers": [{ "name": "c", "ports": [
                    { "name": "web", "containerPort": 80, "protocol": "TCP" }, { "containerPort": 81 },
                ] }],
                "initContainers": [
                    { "name": "once", "ports": [{ "name": "gone", "containerPort": 1 }] },
                    { "name": "sidecar", "restartPolicy": "Always", "ports": [
                        { "name": "dns", "containerPort": 53, "protocol": "UDP" },
                    ] },
                ],
            },
            "status": { "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }] },
        });
        extra(&mut pod);
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn of_a_pod_only_what_matters_is_kept_and_once() {
        let mut store = Store::default();
        assert!(store.pod(pod("a", |_| {})));
        assert!(!store.pod(pod("a", |pod| pod["status"]["conditions"] = json!([{ "type": "Ready" }]))));
        store.pod(pod("b", |_| {}));
        let pods: Vec<&Pod> = store.cluster.pods.values().collect();
        assert!(Arc::ptr_eq(&pods[0].labels, &pods[1].labels) && Arc::ptr_eq(&pods[0].ports, &pods[1].ports));
        let ports: Vec<_> = pods[0].ports.iter().map(|port| (port.name.as_str(), port.protocol, port.port)).collect();
        assert_eq!(ports, [("dns", UDP, 53), ("web", TCP, 80)]);
        assert_eq!(pods[0].addresses.len(), 2);
        assert!(store.pod_gone(&pod("a", |_| {})) && store.pod_gone(&pod("b", |_| {})));
        store.forget_unused();
        assert!(store.labels.is_empty() && store.ports.is_empty() && store.words.is_empty());
    }

    #[test]
    fn a_pods_stage_is_its_phase_and_its_deletion() {
        let stage = |extra: fn(&mut Value)| {
            let mut store = Store::default();
            store.pod(pod("a", extra));
            store.cluster.pods.values().next().unwrap().stage
        };
        assert_eq!(stage(|_| {}), Stage::Alive);
        assert_eq!(stage(|pod| pod["status"] = json!({})), Stage::Alive);
        assert_eq!(stage(|pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z")), Stage::Leaving);
        assert_eq!(stage(|pod| pod["status"]["phase"] = json!("Failed")), Stage::Finished);
    }

    #[test]
    fn a_node_says_which_prefixes_its_pods_have() {
        let node = |spec: Value| serde_json::from_value::<NodeObject>(json!({ "spec": spec })).unwrap().pod_cidrs();
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
        assert_eq!(node(json!({ "podCIDRs": ["10.42.1.0/24", "fd00::/64"] })), nets(&["10.42.1.0/24", "fd00::/64"]));
        assert_eq!(node(json!({ "podCIDR": "10.42.1.0/24" })), nets(&["10.42.1.0/24"]));
        assert!(node(json!({})).is_empty());
    }

    #[test]
    fn thirty_thousand_pods_take_megabytes() {
        let resident = || -> usize {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        let mut store = Store::default();
        let before = resident();
        for number in 0..30_000 {
            store.pod(pod(&format!("deployment-{}-5d9c7f6b8-{number:05x}", number / 10), |pod| {
                pod["metadata"]["labels"]["pod-template-hash"] = json!(format!("{:x}", number / 10));
                pod["spec"]["nodeName"] = json!(format!("node-{}", number / 30));
                pod["status"]["podIPs"] = json!([{ "ip": format!("10.42.{}.{}", number >> 8, number & 255) },
                    { "ip": format!("fd00:42::{number:x}") }]);
            }));
        }
        let grown = resident().saturating_sub(before);
        println!("30,000 pods: {} MiB", grown / 1024);
        // Other tests run beside it; what is asserted is an order of magnitude.
        assert!(store.cluster.pods.len() == 30_000 && grown < 300 * 1024, "{grown} KiB");
    }
}
