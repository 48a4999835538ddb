//! What takes longer than a request: a hundred megabytes from node to node, connections out of the cluster, kubectl's own
//! connections into pods, and all of it while the DaemonSet is updated.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use keystone_kubelab::Assets;
use keystone_lab::{Host, Process, wait};
use keystone_mesh_api::NAMESPACE;

use super::claims::{POD_PORT, Pod, Probes, Question, ask, bracketed};
use super::cluster::{Cluster, PATIENCE, POLL};
use crate::story::{Story, millis};

/// What is moved: 100 MiB of noise, served by busybox.
const BYTES: u64 = 100 << 20;
const FILE_PORT: u16 = 9000;

/// Where the website outside of the cluster listens.
const WEBSITE_PORT: u16 = 8080;

/// Where kubectl listens at home.
const FORWARDED_PORT: u16 = 38080;

/// How fast the transfers are that go on during an update, in bytes a second: they take a minute, and an update of three
/// nodes a quarter of that.
const SLOW: u64 = BYTES / 60;

/// A file on every node, and its hash.
pub(super) struct Files {
    hashes: Vec<String>,
}

impl Files {
    /// Makes the files and serves them from the probes on the pod network.
    pub(super) fn serve(cluster: &Cluster, probes: &Probes) -> Result<Self> {
        let script = format!(
            "mkdir -p /tmp/files && head -c {BYTES} /dev/urandom > /tmp/files/noise && \
             httpd -p '[::]:{FILE_PORT}' -h /tmp/files && sha256sum < /tmp/files/noise"
        );
        let serve = |pod: &Pod| cluster.server.kubectl(&["exec", &pod.name, "--", "/bin/sh", "-c", &script]);
        Ok(Self { hashes: probes.pods.iter().map(serve).collect::<Result<_>>()? })
    }

    /// Every pod loads the file of its neighbour, by IPv4 round the one way and by IPv6 round the other.
    pub(super) fn load(&self, cluster: &Cluster, story: &mut Story, probes: &Probes) -> Result<()> {
        for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let (mut whole, mut found) = (true, Vec::new());
            for (at, pod) in probes.pods.iter().enumerate() {
                let from = (at + family + 1) % probes.pods.len();
                let start = Instant::now();
                let command = load(&probes.pods[from].addresses[family], None);
                let hash = cluster.server.kubectl(&["exec", &pod.name, "--", "/bin/sh", "-c", &command]);
                let hash = hash.unwrap_or_else(|err| format!("{err:#}"));
                let right = hash == self.hashes[from];
                whole &= right;
                let speed = BYTES as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64();
                let how = if right { format!("{speed:.0} MiB/s") } else { hash.trim().to_owned() };
                found.push(format!("{} from {}: {how}", pod.node, probes.pods[from].node));
            }
            let claim = format!("100 MiB arrive whole between pods of every two nodes by {name}");
            story.check(whole, &claim, &found.join(", "));
        }
        Ok(())
    }

    /// Updates the DaemonSet, pod by pod, while every pod slowly loads the file of its neighbour.
    pub(super) fn load_during_update(&self, cluster: &mut Cluster, story: &mut Story, probes: &Probes) -> Result<()> {
        let home = cluster.members[0].machine.host.clone();
        let mut loads = Vec::new();
        for (at, pod) in probes.pods.iter().enumerate() {
            let from = (at + 1) % probes.pods.len();
            // Both families at once, each with its own file of the neighbour's.
            for (family, address) in probes.pods[from].addresses.iter().enumerate() {
                let command = load(address, Some(SLOW));
                let mut command = cluster.server.kubectl_command(&["exec", &pod.name, "--", "/bin/sh", "-c", &command]);
                let log = format!("load-{}-{family}", pod.node);
                loads.push((pod.node.clone(), from, home.spawn(&log, &mut command)?));
            }
        }
        let start = Instant::now();
        let before = agents(cluster)?;
        cluster.server.kubectl(&["--namespace", NAMESPACE, "rollout", "restart", "daemonset/keystone-mesh"])?;
        cluster.wait_rollout(NAMESPACE, "daemonset/keystone-mesh")?;
        let took = start.elapsed();
        let replaced = agents(cluster)?.iter().all(|agent| !before.contains(agent));
        let found = format!("{} agents in {}", before.len(), millis(took));
        story.check(replaced, "the DaemonSet is updated node by node under traffic", &found);

        let mut lasted = Vec::new();
        for (_node, _from, process) in &mut loads {
            lasted.push(process.ended()?.is_none());
        }
        let mut found = Vec::new();
        let mut unbroken = true;
        for ((node, from, mut process), lasted) in loads.into_iter().zip(lasted) {
            wait::until(&format!("the transfer to {node} ends"), PATIENCE, POLL, || process.ended())?;
            let hash = process.log_tail(1);
            let right = hash.trim() == self.hashes[from].trim();
            unbroken &= right && lasted;
            found.push(match (right, lasted) {
                (true, true) => format!("{node}: whole"),
                (true, false) => format!("{node}: whole, but before the update's end"),
                (false, _) => format!("{node}: {}", hash.trim()),
            });
        }
        story.check(unbroken, "no established connection between pods breaks", &found.join(", "));
        Ok(())
    }
}

fn load(address: &str, bytes_a_second: Option<u64>) -> String {
    let limit = bytes_a_second.map(|limit| format!("--limit-rate {limit} ")).unwrap_or_default();
    let url = format!("http://{}:{FILE_PORT}/noise", bracketed(address));
    format!("curl --globoff --silent --show-error {limit}'{url}' | sha256sum")
}

fn agents(cluster: &Cluster) -> Result<Vec<String>> {
    let selector = ["--namespace", NAMESPACE, "--selector", "app.kubernetes.io/component=agent"];
    let pods = cluster.objects(&[&["pods"], &selector[..]].concat())?;
    Ok(pods.iter().filter_map(|pod| pod["metadata"]["uid"].as_str()).map(str::to_owned).collect())
}

/// A host outside of the cluster that says who visits it.
pub(super) struct Website {
    host: Host,
    _program: Process,
}

impl Website {
    pub(super) fn open(host: Host) -> Result<Self> {
        let mut command = Command::new(Assets::find_tests()?.program("agnhost"));
        command.args(["netexec", &format!("--http-port={WEBSITE_PORT}")]);
        let program = host.spawn("website", &mut command)?;
        Ok(Self { host, _program: program })
    }

    /// Pods of every node visit it; it sees the address that their node's router has in public.
    pub(super) fn is_visited(&self, cluster: &Cluster, story: &mut Story, probes: &Probes) -> Result<()> {
        let mut questions = Vec::new();
        for pod in &probes.pods {
            let member = cluster.members.iter().find(|member| member.name() == pod.node).context("a node of ours")?;
            let expected: Ipv4Addr = member.machine.host.public_v4();
            let url = format!("http://{}:{WEBSITE_PORT}/clientip", self.host.v4());
            questions.push(Question::new(pod, url, move |answer| answer.starts_with(&format!("{expected}:"))));
        }
        ask(cluster, story, "pods of every node reach the internet, seen with the address of their site", questions)
    }
}

/// `kubectl logs`, `exec` and `port-forward` into a pod of every node.
pub(super) fn kubectl_reaches_pods(cluster: &Cluster, story: &mut Story, probes: &Probes) -> Result<()> {
    let home = cluster.members[0].machine.host.clone();
    let mut found = Vec::new();
    let mut all = true;
    for pod in &probes.pods {
        let start = Instant::now();
        let log = cluster.server.kubectl(&["logs", &pod.name, "--tail=1"]).unwrap_or_default();
        let port = format!("{FORWARDED_PORT}:{POD_PORT}");
        let mut command = cluster.server.kubectl_command(&["port-forward", &format!("pod/{}", pod.name), &port]);
        let _forward = home.spawn("port-forward", &mut command)?;
        let url = format!("http://127.0.0.1:{FORWARDED_PORT}/hostname");
        let answer = wait::until("the forwarded port answers", Duration::from_secs(20), POLL, || {
            Ok(home.run(Command::new("curl").args(["--silent", "--max-time", "5", &url])).ok())
        });
        let right = answer.as_ref().is_ok_and(|answer| answer.trim() == pod.name) && !log.is_empty();
        all &= right;
        let how = if right { millis(start.elapsed()) } else { format!("log {log:?}, port {answer:?}") };
        found.push(format!("{}: {how}", pod.node));
    }
    story.check(all, "kubectl logs and port-forward reach a pod of every node, as exec does", &found.join(", "));
    Ok(())
}
