//! `kubernetes`: a control plane behind a home router and workers behind two kinds of cloud NAT become one Kubernetes
//! cluster. Kubelets reach the API server, and the API server reaches kubelets, through the mesh alone.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use keystone_kubelab::{ApiServer, BUSYBOX, ClusterNode, NodeOptions, Options, PORT};
use keystone_lab::mesh::{Node, Route};
use keystone_lab::{Nat, RouterSpec, wait};
use serde_json::{Value, json};

use super::join::{Join, in_millis};
use super::stage::{ControlPlane, Stage};
use crate::story::{Story, millis};

/// How long anything of Kubernetes is waited for before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often it is asked: each time is a program that starts.
const POLL: Duration = Duration::from_millis(100);

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
    let plane = founders.found(story)?;
    let start = Instant::now();
    let server = control_plane(&plane)?;
    story.step(&format!("the API server is ready {} after its start", millis(start.elapsed())));
    for worker in &workers {
        let closed = !reaches(worker, plane.home.host().public_v4());
        let claim = format!("{} does not reach the API server at home's public address", worker.name());
        story.check(closed, &claim, if closed { "no connection" } else { "it does" });
    }

    story.chapter("Workers join, each with a token and nothing else, and start their kubelets");
    let mut cluster = Cluster { plane, server, nodes: Vec::new() };
    let registered = workers.iter().map(|worker| cluster.add(story, worker)).collect::<Result<Vec<_>>>()?;

    story.chapter("What Kubernetes sees");
    cluster.ready(story)?;
    story.text(&indented(&cluster.server.kubectl(&["get", "nodes", "--output", "wide"])?));
    for worker in &workers {
        cluster.announces_mesh_address(story, worker)?;
    }

    story.chapter("The API server reaches into nodes behind NAT");
    for worker in &workers {
        cluster.logs_and_exec(story, worker)?;
    }
    Ok(json!({ "registered": registered }))
}

fn worker_behind(stage: &mut Stage, name: &str, router: &str, nat: Nat) -> Result<Arc<Node>> {
    let spec = RouterSpec { nat, lan: "10.0.0.1/24".parse()?, ..RouterSpec::default() };
    let (host, _router) = stage.host_behind(name, router, spec)?;
    stage.install(&host, name)
}

fn control_plane(plane: &ControlPlane) -> Result<ApiServer> {
    let mesh = IpAddr::V4(plane.home_v4);
    let host = Some(plane.home.host().clone());
    let mut server = ApiServer::start(Options { host, advertise: Some(mesh), ..Options::default() })?;
    server.start_controller_manager()?;
    server.start_scheduler()?;
    Ok(server)
}

fn reaches(worker: &Node, server: Ipv4Addr) -> bool {
    let server = SocketAddr::from((server, PORT));
    worker.host().enter(|| TcpStream::connect_timeout(&server, CONNECT_PATIENCE).is_ok())
}

/// Everything that runs.
struct Cluster {
    plane: ControlPlane,
    server: ApiServer,
    nodes: Vec<ClusterNode>,
}

impl Cluster {
    /// A machine that has only a token becomes a node; returns what that took.
    fn add(&mut self, story: &Story, worker: &Node) -> Result<Value> {
        let token = self.plane.home.create_token(1)?;
        let join = Join::measure(worker, &token, self.plane.home_v4, Route::Relayed)?;
        story.step(&join.tell());
        let start = Instant::now();
        let (own, home) = (worker.mesh_v4()?.into(), self.plane.home_v4.into());
        let mut node = ClusterNode::start(&self.server, NodeOptions::new(worker.host(), own, home))?;
        let name = format!("node/{}", worker.name());
        wait::until(&format!("{name} is registered"), PATIENCE, POLL, || {
            node.check_alive()?;
            Ok(self.server.kubectl(&["get", &name, "--output", "name"]).ok())
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
            let found = self.server.kubectl(&["get", "nodes", "--output", condition])?;
            Ok((found == all_true).then_some(()))
        });
        let found = ready.as_ref().map_or_else(ToString::to_string, |()| format!("after {}", millis(start.elapsed())));
        story.check(ready.is_ok(), "all nodes become Ready", &found);
        Ok(())
    }

    fn announces_mesh_address(&self, story: &mut Story, worker: &Node) -> Result<()> {
        let addresses = "jsonpath={.status.addresses[?(@.type=='InternalIP')].address}";
        let found = self.server.kubectl(&["get", "node", worker.name(), "--output", addresses])?;
        let claim = format!("the internal address of {} is the one that the mesh gave it", worker.name());
        story.check(found == worker.mesh_v4()?.to_string(), &claim, &found);
        Ok(())
    }

    fn logs_and_exec(&mut self, story: &mut Story, worker: &Node) -> Result<()> {
        let pod = format!("on-{}", worker.name());
        self.run_pod(&pod, worker.name(), "echo \"a word from $(hostname)\"; exec sleep 2147483647")?;
        let log = self.server.kubectl(&["logs", &pod]).unwrap_or_else(|err| format!("{err:#}"));
        let claim = format!("kubectl logs reads what a pod on {} wrote", worker.name());
        story.check(log.starts_with("a word from"), &claim, log.trim());
        let start = Instant::now();
        let said = self.server.kubectl(&["exec", &pod, "--", "ip", "-o", "-4", "address", "show", "dev", "ksmesh0"]);
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
        wait::until("the default ServiceAccount is made", PATIENCE, POLL, || Ok(self.server.apply(&manifest).ok()))?;
        wait::until(&format!("pod {name} runs"), PATIENCE, POLL, || {
            self.nodes.iter_mut().try_for_each(ClusterNode::check_alive)?;
            let phase = self.server.kubectl(&["get", "pod", name, "--output", "jsonpath={.status.phase}"])?;
            Ok((phase == "Running").then_some(()))
        })
    }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
