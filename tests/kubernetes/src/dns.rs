//! The cluster's DNS: CoreDNS behind the Service `kube-dns`, as every cluster has it.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::test_images::COREDNS;

/// Zones of names and of both families' addresses. Names outside of the cluster nobody answers for: there is no other DNS
/// in a sandbox.
const COREFILE: &str = "\
.:53 {
    errors
    health
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 30
    }
    cache 30
    loadbalance
}
";

/// Where the cluster's names are asked for.
pub struct Dns {
    /// The Service's addresses: one, or one of each family with that of the cluster's first one in front.
    pub addresses: Vec<IpAddr>,
}

impl Dns {
    /// What a kubelet tells its pods: part of its configuration.
    pub fn kubelet_configuration(&self) -> Value {
        // Pods inherit nothing of this machine's own resolv.conf.
        json!({ "clusterDNS": [self.addresses.first()], "clusterDomain": "cluster.local", "resolvConf": "" })
    }

    /// Everything that the cluster runs for it. The image is one of [`write_test_images`](crate::write_test_images)'s.
    pub fn manifests(&self) -> Value {
        let meta = json!({ "name": "coredns", "namespace": "kube-system" });
        let account = json!({ "kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system" });
        let role = "system:coredns";
        let read = |group: &str, resources: &[&str]| json!({ "apiGroups": [group], "resources": resources, "verbs": ["list", "watch"] });
        json!({ "apiVersion": "v1", "kind": "List", "items": [
            { "apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta },
            { "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": { "name": role }, "rules": [
                read("", &["endpoints", "services", "pods", "namespaces"]),
                read("discovery.k8s.io", &["endpointslices"]),
            ] },
            { "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": role },
              "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role },
              "subjects": [account] },
            { "apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": { "Corefile": COREFILE } },
            deployment(&meta),
            self.service(),
        ] })
    }

    fn service(&self) -> Value {
        let port = |name: &str, protocol: &str, port: u16| json!({ "name": name, "protocol": protocol, "port": port });
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            // Kubernetes' own tests look for this label.
            "metadata": { "name": "kube-dns", "namespace": "kube-system", "labels": { "k8s-app": "kube-dns" } },
            "spec": {
                "selector": { "k8s-app": "kube-dns" },
                "clusterIP": self.addresses.first(),
                "clusterIPs": self.addresses,
                "ipFamilyPolicy": if self.addresses.len() > 1 { "RequireDualStack" } else { "SingleStack" },
                "ports": [port("dns", "UDP", 53), port("dns-tcp", "TCP", 53), port("metrics", "TCP", 9153)],
            },
        })
    }
}

fn deployment(meta: &Value) -> Value {
    let probe = |port: u16, path: &str| json!({ "httpGet": { "port": port, "path": path }, "periodSeconds": 2, "failureThreshold": 30 });
    let labels = json!({ "k8s-app": "kube-dns" });
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": 2,
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "serviceAccountName": "coredns",
                    "dnsPolicy": "Default",
                    "terminationGracePeriodSeconds": 5,
                    // Two on one node would be as good as one.
                    "topologySpreadConstraints": [{
                        "maxSkew": 1,
                        "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "ScheduleAnyway",
                        "labelSelector": { "matchLabels": labels },
                    }],
                    "containers": [{
                        "name": "coredns",
                        "image": COREDNS,
                        "imagePullPolicy": "Never",
                        "args": ["-conf", "/etc/coredns/Corefile"],
                        "volumeMounts": [{ "name": "config", "mountPath": "/etc/coredns", "readOnly": true }],
                        "readinessProbe": probe(8181, "/ready"),
                        "livenessProbe": probe(8080, "/health"),
                    }],
                    "volumes": [{ "name": "config", "configMap": { "name": "coredns" } }],
                },
            },
        },
    })
}
