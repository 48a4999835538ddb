//! `kubernetes`: a control plane behind a home router and workers behind two kinds of cloud NAT become one Kubernetes
//! cluster. Kubelets reach the API server, and the API server reaches kubelets, through the mesh alone.

mod bursts;
pub(super) mod outage;
pub(super) mod plane;
pub(super) mod scale;

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use keystone_kubelab::{BUSYBOX, ClusterNode, NodeOptions, PORT};
use keystone_lab::mesh::{Node, Route};
use keystone_lab::{Nat, RouterSpec, wait};
use keystone_mesh_api::{READY_CONDITION, STARTUP_TAINT};
use keystone_mesh_core::annotations;
use serde_json::{Value, json};

use self::plane::{HOME, PATIENCE, POLL, Plane};
use super::join::{Join, in_millis};
use super::stage::Stage;
use crate::story::{Story, millis};

/// Goal for the time from a Node's end to that of its peer. A claim fails at [`TOLERANCE`] times as much only: the machine
/// may be busy with other things.
pub(super) const GONE_GOAL: Duration = Duration::from_secs(2);
pub(super) const TOLERANCE: u32 = 10;

/// How often a daemon is asked whether it still knows a peer.
const ASK_EVERY: Duration = Duration::from_millis(10);

/// How long a connection that must fail may try.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

const PICTURE: &str = r"
      home: kube-apiserver            worker-sym: kubelet       worker-pr: kubelet
        |                                 |                         |
  [home-router]                       [cloud-a]                 [cloud-b]                    relay
  port-restricted                     symmetric              port-restricted                   |
        |                                 |                         |                          |
  ======+=================================+======= internet ========+==========================+====

";

pub(super) fn play(stage: &mut Stage, story: &mut Story) -> Result<Value> {
    story.chapter("The network");
    let founders = stage.founders()?;
    let workers = [
        worker_behind(stage, "worker-sym", "cloud-a", Nat::Symmetric)?,
        worker_behind(stage, "worker-pr", "cloud-b", Nat::PortRestricted)?,
    ];
    story.text(PICTURE);
    story.table(&stage.describe());

    story.chapter("The control plane");
    let mut plane = Plane::start(founders, story, &[])?;
    plane.server.start_controller_manager()?;
    plane.server.start_scheduler()?;
    for worker in &workers {
        let closed = !reaches(worker, plane.mesh.home.host().public_v4());
        let claim = format!("{} does not reach the API server at home's public address", worker.name());
        story.check(closed, &claim, if closed { "no connection" } else { "it does" });
    }

    story.chapter("Workers join, each with a token and nothing else, and start their kubelets");
    let mut cluster = Cluster { plane, nodes: Vec::new() };
    let registered = workers.iter().map(|worker| cluster.add(story, worker)).collect::<Result<Vec<_>>>()?;

    story.chapter("What Kubernetes sees");
    cluster.ready(story)?;
    story.text(&indented(&cluster.plane.server.kubectl(&["get", "nodes", "--output", "wide"])?));
    for worker in &workers {
        cluster.announces_mesh_address(story, worker)?;
        cluster.is_recorded_and_approved(story, worker)?;
        cluster.is_reached(story, worker)?;
    }

    story.chapter("The API server reaches into nodes behind NAT");
    for worker in &workers {
        cluster.logs_and_exec(story, worker)?;
    }

    story.chapter("A machine is gone, and so is its Node");
    let [stays, goes] = &workers;
    let gone = cluster.delete(story, goes, &[&Arc::clone(&cluster.plane.mesh.home), stays])?;
    Ok(json!({ "registered": registered, "gone_ms": in_millis(gone) }))
}

/// A machine alone behind a cloud's NAT.
pub(super) fn worker_behind(stage: &mut Stage, name: &str, router: &str, nat: Nat) -> Result<Arc<Node>> {
    let spec = RouterSpec { nat, lan: "10.0.0.1/24".parse()?, ..RouterSpec::default() };
    let (host, _router) = stage.host_behind(name, router, spec)?;
    stage.install(&host, name)
}

fn reaches(worker: &Node, server: Ipv4Addr) -> bool {
    let server = SocketAddr::from((server, PORT));
    worker.host().enter(|| TcpStream::connect_timeout(&server, CONNECT_PATIENCE).is_ok())
}

/// Everything that runs.
struct Cluster {
    plane: Plane,
    nodes: Vec<ClusterNode>,
}

impl Cluster {
    /// A machine that has only a token becomes a node; returns what that took.
    fn add(&mut self, story: &Story, worker: &Node) -> Result<Value> {
        let token = self.plane.mesh.home.create_token(1)?;
        let join = Join::measure(worker, &token, HOME, Route::Relayed)?;
        story.step(&join.tell());
        let start = Instant::now();
        let (own, home) = (worker.mesh_v4()?.into(), HOME.into());
        let mut node = ClusterNode::start(&self.plane.server, NodeOptions::new(worker.host(), own, home))?;
        let name = format!("node/{}", worker.name());
        wait::until(&format!("{name} is registered"), PATIENCE, POLL, || {
            node.check_alive()?;
            Ok(self.plane.server.kubectl(&["get", &name, "--output", "name"]).ok())
        })?;
        let took = start.elapsed();
        story.step(&format!("its kubelet has registered {} after the start of containerd", millis(took)));
        self.nodes.push(node);
        Ok(json!({ "join": join, "registered_ms": in_millis(took) }))
    }

    fn ready(&mut self, story: &mut Story) -> Result<()> {
        let start = Instant::now();
        let condition = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}";
        let all_true = vec!["True"; self.nodes.len()].join(" ");
        let ready = wait::until("all nodes are Ready", PATIENCE, POLL, || {
            self.nodes.iter_mut().try_for_each(ClusterNode::check_alive)?;
            let found = self.plane.server.kubectl(&["get", "nodes", "--output", condition])?;
            Ok((found == all_true).then_some(()))
        });
        let found = ready.as_ref().map_or_else(ToString::to_string, |()| format!("after {}", millis(start.elapsed())));
        story.check(ready.is_ok(), "all nodes become Ready", &found);
        Ok(())
    }

    fn announces_mesh_address(&self, story: &mut Story, worker: &Node) -> Result<()> {
        let addresses = "jsonpath={.status.addresses[?(@.type=='InternalIP')].address}";
        let found = self.plane.server.kubectl(&["get", "node", worker.name(), "--output", addresses])?;
        let claim = format!("the internal address of {} is the one that the mesh gave it", worker.name());
        story.check(found == worker.mesh_v4()?.to_string(), &claim, &found);
        Ok(())
    }

    fn is_recorded_and_approved(&self, story: &mut Story, worker: &Node) -> Result<()> {
        let node = self.node(worker.name())?;
        let written = serde_json::from_value(node["metadata"]["annotations"].clone()).unwrap_or_default();
        let decoded = annotations::decode(&worker.name().parse()?, &written);
        let record = decoded.record.ok().flatten().map(|record| record.get().identity);
        let approval = decoded.approval.ok().flatten().map(|approval| approval.get().identity);
        let found = match (record, approval) {
            (Some(record), Some(approval)) if record == approval => format!("both of {}", record.short()),
            (record, approval) => format!("record of {record:?}, approval of {approval:?}"),
        };
        let claim = format!("record and approval of {} stand in its annotations", worker.name());
        story.check(record.is_some() && record == approval, &claim, &found);
        Ok(())
    }

    fn is_reached(&self, story: &mut Story, worker: &Node) -> Result<()> {
        let mut found = String::from("no condition");
        let reached = wait::until("the mesh reaches it", PATIENCE, POLL, || {
            let node = self.node(worker.name())?;
            let items = |value: &Value| value.as_array().cloned().unwrap_or_default();
            let conditions = items(&node["status"]["conditions"]);
            let condition = conditions.iter().find(|condition| condition["type"] == READY_CONDITION);
            let tainted = items(&node["spec"]["taints"]).iter().any(|taint| taint["key"] == STARTUP_TAINT);
            if let Some(condition) = condition {
                found = format!("{}, {}", condition["status"], condition["message"]);
            }
            found += if tainted { ", tainted" } else { ", no taint" };
            Ok((condition.is_some_and(|condition| condition["status"] == "True") && !tainted).then_some(()))
        });
        let claim = format!("{} is {READY_CONDITION} and its startup taint is lifted", worker.name());
        story.check(reached.is_ok(), &claim, &found);
        Ok(())
    }

    /// Ends the machine of `worker` and deletes its Node; returns how long the slowest of `others` still knew the peer.
    fn delete(&mut self, story: &mut Story, worker: &Node, others: &[&Node]) -> Result<Duration> {
        self.nodes.retain(|node| node.name() != worker.name());
        worker.kill()?;
        let start = Instant::now();
        self.plane.delete_node(worker.name())?;
        let gone = until_gone(worker.name(), others, start)?;
        let claim = format!("{} is gone from every node", worker.name());
        let found = format!("{} after its Node (goal {})", millis(gone), millis(GONE_GOAL));
        story.check(gone <= GONE_GOAL * TOLERANCE, &claim, &found);
        let quarantined = self.plane.wait_quarantined(worker.name());
        let claim = "its address is kept from others for a while";
        let found = quarantined.as_ref().map_or_else(ToString::to_string, |_claim| millis(start.elapsed()));
        story.check(quarantined.is_ok(), claim, &found);
        Ok(gone)
    }

    fn node(&self, name: &str) -> Result<Value> {
        let text = self.plane.server.kubectl(&["get", "node", name, "--output", "json"])?;
        serde_json::from_str(&text).context("kubectl writes JSON")
    }

    fn logs_and_exec(&mut self, story: &mut Story, worker: &Node) -> Result<()> {
        let pod = format!("on-{}", worker.name());
        self.run_pod(&pod, worker.name(), "echo \"a word from $(hostname)\"; exec sleep 2147483647")?;
        let log = self.plane.server.kubectl(&["logs", &pod]).unwrap_or_else(|err| format!("{err:#}"));
        let claim = format!("kubectl logs reads what a pod on {} wrote", worker.name());
        story.check(log.starts_with("a word from"), &claim, log.trim());
        let start = Instant::now();
        let said =
            self.plane.server.kubectl(&["exec", &pod, "--", "ip", "-o", "-4", "address", "show", "dev", "ksmesh0"]);
        let said = said.unwrap_or_else(|err| format!("{err:#}"));
        let took = start.elapsed();
        let claim = format!("kubectl exec runs a program in a pod on {}", worker.name());
        let found = format!("{} after {}", said.split_whitespace().nth(3).unwrap_or(&said), millis(took));
        story.check(said.contains(&worker.mesh_v4()?.to_string()), &claim, &found);
        Ok(())
    }

    fn run_pod(&mut self, name: &str, node: &str, script: &str) -> Result<()> {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name, "namespace": "default" },
            "spec": {
                "hostNetwork": true,
                "nodeSelector": { "kubernetes.io/hostname": node },
                "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": false,
                "containers": [{
                    "name": "main",
                    "image": BUSYBOX,
                    "imagePullPolicy": "Never",
                    "command": ["/bin/sh", "-c", script],
                }],
            },
        });
        let manifest = pod.to_string();
        wait::until("the default ServiceAccount is made", PATIENCE, POLL, || {
            Ok(self.plane.server.apply(&manifest).ok())
        })?;
        wait::until(&format!("pod {name} runs"), PATIENCE, POLL, || {
            self.nodes.iter_mut().try_for_each(ClusterNode::check_alive)?;
            let phase = self.plane.server.kubectl(&["get", "pod", name, "--output", "jsonpath={.status.phase}"])?;
            Ok((phase == "Running").then_some(()))
        })
    }
}

/// Waits until none of `nodes` knows `peer`; returns how long after `start` that was.
pub(super) fn until_gone(peer: &str, nodes: &[&Node], start: Instant) -> Result<Duration> {
    for node in nodes {
        wait::until(&format!("{} forgets {peer}", node.name()), PATIENCE, ASK_EVERY, || {
            Ok((!node.knows(peer)?).then_some(()))
        })?;
    }
    Ok(start.elapsed())
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
