//! What conformance leaves out, asked from pods: everything that is to reach something else does, as whom it should, with
//! every node at both ends.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use keystone_kubelab::{AGNHOST, PORT};
use keystone_lab::wait;
use serde_json::{Value, json};

use super::cluster::{Cluster, PATIENCE, POLL};
use crate::story::{Story, millis};

/// How long a question may be asked again before its answer counts: rules for Services take a moment.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

/// Ports of the pods on the pod network, of those on the host's, and by which the former are reached on their host.
pub(super) const POD_PORT: u16 = 8080;
const HOST_NETWORK_PORT: u16 = 28080;
const HOST_PORT: u16 = 18080;
const NODE_PORT: u16 = 30080;

/// Requests that would hardly all meet the same of three pods by chance: 3 × 3⁻¹².
const STICKY_REQUESTS: usize = 12;

/// A pod that answers and can ask.
#[derive(Clone)]
pub(super) struct Pod {
    pub(super) name: String,
    pub(super) node: String,
    /// IPv4 first.
    pub(super) addresses: Vec<String>,
}

/// One request of a pod, and what the answer must be.
pub(super) struct Question {
    from: String,
    url: String,
    right: Box<dyn Fn(&str) -> bool>,
}

impl Question {
    pub(super) fn new(from: &Pod, url: String, right: impl Fn(&str) -> bool + 'static) -> Self {
        Self { from: from.name.clone(), url, right: Box::new(right) }
    }
}

/// The pods that ask and answer: one on each node's pod network, and one on each node's own.
pub(super) struct Probes {
    pub(super) pods: Vec<Pod>,
    pub(super) hosts: Vec<Pod>,
}

impl Probes {
    /// Starts them and their Services.
    pub(super) fn start(cluster: &mut Cluster, story: &mut Story) -> Result<Self> {
        let start = Instant::now();
        wait::until("the default ServiceAccount is made", PATIENCE, POLL, || {
            Ok(cluster.server.kubectl(&["get", "serviceaccount", "default"]).ok())
        })?;
        cluster.apply(&[
            daemon_set("probe", false),
            daemon_set("host-probe", true),
            service("probe", json!({ "app": "probe" }), json!({ "type": "NodePort" })),
            service("sticky", json!({ "app": "probe" }), json!({ "sessionAffinity": "ClientIP" })),
            service("alone", json!({ "alone": "yes" }), json!({})),
        ])?;
        cluster.wait_rollout("default", "daemonset/probe")?;
        cluster.wait_rollout("default", "daemonset/host-probe")?;
        let found = format!("after {}", millis(start.elapsed()));
        story.check(true, "a pod on every node passes its HTTP readiness probe", &found);
        let probes = Self { pods: pods(cluster, "probe")?, hosts: pods(cluster, "host-probe")? };
        // One Service with a single pod behind it, which then reaches itself by it.
        cluster.server.kubectl(&["label", "pod", &probes.pods[0].name, "alone=yes"])?;
        Ok(probes)
    }

    /// Everything that small requests show.
    pub(super) fn ask_all(&self, cluster: &Cluster, story: &mut Story) -> Result<()> {
        self.pods_reach_pods(cluster, story)?;
        self.pods_and_hosts_reach_each_other(cluster, story)?;
        self.services_are_reached(cluster, story)?;
        self.nodes_are_reached_by_ports(cluster, story)?;
        self.names_are_found(cluster, story)
    }

    fn pods_reach_pods(&self, cluster: &Cluster, story: &mut Story) -> Result<()> {
        for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let questions = pairs(&self.pods, &self.pods).map(|(from, to)| {
                let own = from.addresses[family].clone();
                let url = format!("http://{}:{POD_PORT}/clientip", bracketed(&to.addresses[family]));
                Question::new(from, url, move |answer| is_from(answer, &own))
            });
            let claim = format!("every pod reaches the pod of every node by {name}, and is seen with its own address");
            ask(cluster, story, &claim, questions.collect())?;
        }
        Ok(())
    }

    fn pods_and_hosts_reach_each_other(&self, cluster: &Cluster, story: &mut Story) -> Result<()> {
        for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let to_pods = pairs(&self.hosts, &self.pods).map(|(from, to)| {
                let expected = to.name.clone();
                let url = format!("http://{}:{POD_PORT}/hostname", bracketed(&to.addresses[family]));
                Question::new(from, url, move |answer| answer == expected)
            });
            ask(cluster, story, &format!("every host reaches the pod of every node by {name}"), to_pods.collect())?;
            let to_hosts = pairs(&self.pods, &self.hosts).map(|(from, to)| {
                let own = from.addresses[family].clone();
                let url = format!("http://{}:{HOST_NETWORK_PORT}/clientip", bracketed(&to.addresses[family]));
                Question::new(from, url, move |answer| is_from(answer, &own))
            });
            let claim =
                format!("every pod reaches every node's own network by {name}, and is seen with its own address");
            ask(cluster, story, &claim, to_hosts.collect())?;
        }
        Ok(())
    }

    fn services_are_reached(&self, cluster: &Cluster, story: &mut Story) -> Result<()> {
        for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let url = format!("http://{}/hostname", bracketed(&service_addresses(cluster, "probe")?[family]));
            let names = self.names();
            // A host's own packets need a way before kube-proxy's rules see them, and by IPv6 a site may have none.
            let hosts = self.hosts.iter().filter(|_| family == 0 || everybody_has_ipv6(cluster));
            let questions = self.pods.iter().chain(hosts).map(|from| Question::new(from, url.clone(), known(&names)));
            let claim = format!("pods and hosts of every node reach a Service by {name}");
            ask(cluster, story, &claim, questions.collect())?;

            let alone = &self.pods[0];
            let url = format!("http://{}/hostname", bracketed(&service_addresses(cluster, "alone")?[family]));
            let expected = alone.name.clone();
            let hairpin = Question::new(alone, url, move |answer| answer == expected);
            ask(cluster, story, &format!("a pod reaches itself through its Service by {name}"), vec![hairpin])?;

            let url = format!("http://{}/hostname", bracketed(&service_addresses(cluster, "sticky")?[family]));
            let mut loyal = Vec::new();
            for from in &self.pods {
                let urls = vec![url.as_str(); STICKY_REQUESTS];
                let answers = fetch(cluster, &from.name, &urls)?;
                loyal.push(answers.iter().all(|answer| names.contains(answer) && *answer == answers[0]));
            }
            let claim = format!("a Service with session affinity keeps each client at one pod by {name}");
            story.check(
                !loyal.contains(&false),
                &claim,
                &format!("{STICKY_REQUESTS} requests of every pod: {loyal:?}"),
            );
        }
        let server = bracketed(&cluster.server_address().to_string());
        let urls = [
            "https://10.43.0.1/readyz".to_owned(),
            "https://kubernetes.default.svc/readyz".to_owned(),
            format!("https://{server}:{PORT}/readyz"),
        ];
        let ask_for = |from, url: &String| Question::new(from, url.clone(), |answer| answer == "ok");
        let questions = self.pods.iter().flat_map(|from| urls.iter().map(move |url| ask_for(from, url)));
        let claim = "pods of every node reach the API server by its Service, by name and at home";
        ask(cluster, story, claim, questions.collect())
    }

    fn nodes_are_reached_by_ports(&self, cluster: &Cluster, story: &mut Story) -> Result<()> {
        for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let names = self.names();
            let everyone: Vec<Pod> = self.pods.iter().chain(&self.hosts).cloned().collect();
            let node_port = pairs(&everyone, &self.hosts).map(|(from, to)| {
                let url = format!("http://{}:{NODE_PORT}/hostname", bracketed(&to.addresses[family]));
                Question::new(from, url, known(&names))
            });
            let claim = format!("every node answers at a Service's NodePort by {name}, to pods and hosts of all nodes");
            ask(cluster, story, &claim, node_port.collect())?;

            let host_port = pairs(&everyone, &self.hosts).filter_map(|(from, to)| {
                let there = self.pods.iter().find(|pod| pod.node == to.node)?.name.clone();
                let url = format!("http://{}:{HOST_PORT}/hostname", bracketed(&to.addresses[family]));
                Some(Question::new(from, url, move |answer| answer == there))
            });
            let claim =
                format!("every node leads its hostPort to its own pod by {name}, for pods and hosts of all nodes");
            ask(cluster, story, &claim, host_port.collect())?;
        }
        Ok(())
    }

    fn names_are_found(&self, cluster: &Cluster, story: &mut Story) -> Result<()> {
        let names = self.names();
        let questions = self.pods.iter().flat_map(|from| {
            ["probe", "probe.default", "probe.default.svc.cluster.local."]
                .map(|name| Question::new(from, format!("http://{name}/hostname"), known(&names)))
        });
        ask(cluster, story, "pods of every node find a Service by its name", questions.collect())?;
        let expected = service_addresses(cluster, "probe")?;
        let mut wrong = Vec::new();
        for from in &self.pods {
            for (kind, address) in ["A", "AAAA"].into_iter().zip(&expected) {
                for transport in ["+notcp", "+tcp"] {
                    let dig =
                        ["exec", &from.name, "--", "dig", "+short", transport, kind, "probe.default.svc.cluster.local"];
                    let found = cluster.server.kubectl(&dig).unwrap_or_else(|err| format!("{err:#}"));
                    if found.trim() != *address {
                        wrong.push(format!("{kind} {transport} from {}: {}", from.node, found.trim()));
                    }
                }
            }
        }
        let found = if wrong.is_empty() { "all right".to_owned() } else { wrong.join("; ") };
        story.check(wrong.is_empty(), "DNS has both addresses of a Service, over UDP and over TCP", &found);
        Ok(())
    }

    fn names(&self) -> Vec<String> {
        self.pods.iter().map(|pod| pod.name.clone()).collect()
    }
}

/// Asks until every answer is right, or for long enough; then that is a claim.
pub(super) fn ask(cluster: &Cluster, story: &mut Story, claim: &str, questions: Vec<Question>) -> Result<()> {
    let (start, all) = (Instant::now(), questions.len());
    let mut open = questions;
    loop {
        let mut wrong = Vec::new();
        let mut by_pod: BTreeMap<String, Vec<Question>> = BTreeMap::new();
        for question in open {
            by_pod.entry(question.from.clone()).or_default().push(question);
        }
        for (from, questions) in by_pod {
            let urls: Vec<&str> = questions.iter().map(|question| question.url.as_str()).collect();
            let answers = fetch(cluster, &from, &urls)?;
            let pairs = questions.into_iter().zip(answers);
            wrong.extend(pairs.filter(|(question, answer)| !(question.right)(answer)));
        }
        let right = all - wrong.len();
        if wrong.is_empty() || start.elapsed() > ANSWER_PATIENCE {
            let mut found = format!("{right} of {all}, in {}", millis(start.elapsed()));
            for (question, answer) in wrong.iter().take(6) {
                found += &format!("; {} gets {answer:?} from {}", question.from, question.url);
            }
            story.check(wrong.is_empty() && all > 0, claim, &found);
            return Ok(());
        }
        open = wrong.into_iter().map(|(question, _answer)| question).collect();
    }
}

/// What a pod is answered at each of `urls`, or what its curl says instead.
fn fetch(cluster: &Cluster, from: &str, urls: &[&str]) -> Result<Vec<String>> {
    let script = "for url; do curl --globoff --insecure --silent --show-error --max-time 5 \"$url\" 2>&1 | tr '\\n' ' '; echo; done";
    let arguments = [&["exec", from, "--", "/bin/sh", "-c", script, "sh"], urls].concat();
    let answered = cluster.server.kubectl(&arguments)?;
    let mut answers: Vec<String> = answered.lines().map(|line| line.trim().to_owned()).collect();
    answers.resize(urls.len(), String::new());
    Ok(answers)
}

fn everybody_has_ipv6(cluster: &Cluster) -> bool {
    cluster.members.iter().all(|member| member.machine.host.v6().is_some())
}

/// Every one of the first with every one of the second.
fn pairs<'a>(from: &'a [Pod], to: &'a [Pod]) -> impl Iterator<Item = (&'a Pod, &'a Pod)> {
    from.iter().flat_map(move |one| to.iter().map(move |other| (one, other)))
}

/// netexec answers /clientip with address and port.
fn is_from(answer: &str, address: &str) -> bool {
    answer.rsplit_once(':').is_some_and(|(host, _port)| host.trim_matches(['[', ']']) == address)
}

fn known(names: &[String]) -> impl Fn(&str) -> bool + 'static {
    let names = names.to_vec();
    move |answer| names.iter().any(|name| name == answer)
}

pub(super) fn bracketed(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

fn service_addresses(cluster: &Cluster, name: &str) -> Result<Vec<String>> {
    let get = ["get", "service", name, "--output", "jsonpath={.spec.clusterIPs[*]}"];
    Ok(cluster.server.kubectl(&get)?.split_whitespace().map(str::to_owned).collect())
}

fn pods(cluster: &Cluster, app: &str) -> Result<Vec<Pod>> {
    let found = cluster.objects(&["pods", "--selector", &format!("app={app}")])?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pod = |pod: &Value| {
        let addresses = pod["status"]["podIPs"].as_array().context("a pod has addresses")?;
        Ok(Pod {
            name: text(&pod["metadata"]["name"]),
            node: text(&pod["spec"]["nodeName"]),
            addresses: addresses.iter().map(|address| text(&address["ip"])).collect(),
        })
    };
    let pods: Vec<Pod> = found.iter().map(pod).collect::<Result<_>>()?;
    let both = pods.iter().all(|pod| pod.addresses.len() == 2);
    anyhow::ensure!(both && pods.len() == cluster.members.len(), "a pod of {app} with both addresses on every node");
    Ok(pods)
}

fn daemon_set(name: &str, host_network: bool) -> Value {
    let port = if host_network { HOST_NETWORK_PORT } else { POD_PORT };
    let ports = if host_network { json!([]) } else { json!([{ "containerPort": POD_PORT, "hostPort": HOST_PORT }]) };
    let udp_port = port + 1;
    json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": { "name": name, "namespace": "default" },
        "spec": {
            "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name } },
                "spec": {
                    "hostNetwork": host_network,
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "main",
                        "image": AGNHOST,
                        "imagePullPolicy": "Never",
                        "args": ["netexec", format!("--http-port={port}"), format!("--udp-port={udp_port}")],
                        "ports": ports,
                        "readinessProbe": { "httpGet": { "port": port, "path": "/hostname" }, "periodSeconds": 1 },
                    }],
                },
            },
        },
    })
}

fn service(name: &str, selector: Value, more: Value) -> Value {
    let mut port = json!({ "port": 80, "targetPort": POD_PORT });
    if more["type"] == "NodePort" {
        port["nodePort"] = NODE_PORT.into();
    }
    let mut spec = json!({ "selector": selector, "ipFamilyPolicy": "RequireDualStack", "ports": [port] });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "default" }, "spec": spec })
}
