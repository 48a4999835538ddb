//! A whole Kubernetes cluster of both address families: API server, controllers, kubelets with containerd and kube-proxy,
//! DNS. Who carries its pods is left to others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use keystone_kubelab::{ApiServer, ClusterNode, Dns, NodeOptions, Options, write_test_images};
use keystone_lab::{Host, wait};
use serde_json::{Value, json};

use crate::story::{Story, millis};

/// How long anything of Kubernetes is waited for before it counts as failed: nodes that start together on a busy machine
/// need their time.
pub(super) const PATIENCE: Duration = Duration::from_secs(180);

/// How often it is asked: each time is a program that starts.
pub(super) const POLL: Duration = Duration::from_millis(250);

/// Where pods and Services have their addresses. IPv4 comes first, so it is what the cluster's own Services have.
pub(super) const PODS: &str = "10.42.0.0/16,fd00:10:42::/48";
const SERVICES: &str = "10.43.0.0/16,fd00:10:43::/112";

/// The addresses of the Service `kube-dns`.
const DNS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 43, 0, 10)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x43, 0, 0, 0, 0, 10))];

/// A machine that is to be a node.
pub(super) struct Machine {
    pub(super) host: Host,
    /// What its kubelet announces: one address of each family.
    pub(super) addresses: [IpAddr; 2],
    /// Folders of the machine that pods see at another place.
    pub(super) binds: Vec<(PathBuf, &'static str)>,
}

/// A node of the cluster.
pub(super) struct Member {
    pub(super) machine: Machine,
    pub(super) node: ClusterNode,
    /// Where its pods have their addresses, IPv4 first.
    pub(super) pods: Vec<String>,
}

impl Member {
    pub(super) fn name(&self) -> &str {
        self.node.name()
    }
}

/// Everything that runs. Nodes end before the API server does.
pub(super) struct Cluster {
    /// The first one is that of the control plane.
    pub(super) members: Vec<Member>,
    pub(super) server: ApiServer,
    /// Where nodes and pods of the host's network find the API server.
    server_address: IpAddr,
    images: Vec<PathBuf>,
}

impl Cluster {
    /// Starts the control plane on `host`, where nodes reach it by `address`.
    pub(super) fn start(story: &Story, host: &Host, address: IpAddr) -> Result<Self> {
        let start = Instant::now();
        let (services, pods) = (SERVICES.to_owned(), PODS.to_owned());
        let options =
            Options { host: Some(host.clone()), advertise: Some(address), services, pods, ..Options::default() };
        let mut server = ApiServer::start(options)?;
        server.start_controller_manager()?;
        server.start_scheduler()?;
        let images = write_test_images(&host.folder()?)?;
        story.step(&format!("the control plane is there {} after its start", millis(start.elapsed())));
        Ok(Self { members: Vec::new(), server, server_address: address, images })
    }

    /// Starts a kubelet and its companions on a machine; it stays NotReady until it has a pod network.
    pub(super) fn add(&mut self, story: &Story, machine: Machine, images: &[&Path]) -> Result<()> {
        let start = Instant::now();
        let [address, second] = machine.addresses;
        let node = ClusterNode::start(
            &self.server,
            NodeOptions {
                second_address: Some(second),
                configuration: self.dns().kubelet_configuration(),
                proxy: Some(vec![format!("--cluster-cidr={PODS}")]),
                conflist: None,
                binds: machine.binds.clone(),
                ..NodeOptions::new(&machine.host, address, self.server_address)
            },
        );
        let mut node = node?;
        // As every installation of Kubernetes has them beside the pod network's own: loopback and portmap.
        node.install_reference_plugins()?;
        for image in self.images.iter().map(PathBuf::as_path).chain(images.iter().copied()) {
            node.import(image)?;
        }
        let name = node.name().to_owned();
        let pods = wait::until(&format!("{name} is given addresses for its pods"), PATIENCE, POLL, || {
            node.check_alive()?;
            let get = ["get", "node", &name, "--output", "jsonpath={.spec.podCIDRs[*]}"];
            let found = self.server.kubectl(&get).unwrap_or_default();
            let found: Vec<String> = found.split_whitespace().map(str::to_owned).collect();
            Ok((found.len() == 2).then_some(found))
        })?;
        story.step(&format!("{name} is a node, for pods in {}, {}", pods.join(" and "), millis(start.elapsed())));
        self.members.push(Member { machine, node, pods });
        Ok(())
    }

    /// Where nodes find the API server.
    pub(super) fn server_address(&self) -> IpAddr {
        self.server_address
    }

    /// Waits until every node is Ready.
    pub(super) fn wait_ready(&mut self, story: &mut Story) -> Result<()> {
        let start = Instant::now();
        let condition = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}";
        let all_true = vec!["True"; self.members.len()].join(" ");
        wait::until("all nodes are Ready", PATIENCE, POLL, || {
            self.check_alive()?;
            Ok((self.server.kubectl(&["get", "nodes", "--output", condition])? == all_true).then_some(()))
        })
        .with_context(|| self.conditions())?;
        story.check(true, "all nodes become Ready", &format!("after {}", millis(start.elapsed())));
        Ok(())
    }

    /// Waits until no node keeps pods away: not for want of a network, nor of a mesh that reaches it.
    pub(super) fn wait_untainted(&mut self, story: &mut Story) -> Result<()> {
        let start = Instant::now();
        let taints = "jsonpath={.items[*].spec.taints[*].key}";
        wait::until("no node is tainted", PATIENCE, POLL, || {
            self.check_alive()?;
            Ok(self.server.kubectl(&["get", "nodes", "--output", taints])?.trim().is_empty().then_some(()))
        })
        .with_context(|| self.conditions())?;
        story.check(true, "every node's startup taint is lifted", &format!("after {}", millis(start.elapsed())));
        Ok(())
    }

    /// Starts DNS and waits until it answers.
    pub(super) fn start_dns(&mut self, story: &Story) -> Result<()> {
        let start = Instant::now();
        self.server.apply(&self.dns().manifests().to_string())?;
        self.wait_rollout("kube-system", "deployment/coredns")?;
        story.step(&format!("the cluster's DNS is there after {}", millis(start.elapsed())));
        Ok(())
    }

    /// Waits until all pods of a Deployment or DaemonSet are ready.
    pub(super) fn wait_rollout(&mut self, namespace: &str, what: &str) -> Result<()> {
        let status = ["--namespace", namespace, "rollout", "status", what, "--timeout=2s"];
        let done = wait::until(&format!("{what} is ready"), PATIENCE, POLL, || {
            self.check_alive()?;
            Ok(self.server.kubectl(&status).ok())
        });
        done.map(drop).with_context(|| {
            let of_all = |arguments: &[&str]| self.server.kubectl(&[&["--namespace", namespace], arguments].concat());
            let describe = of_all(&["describe", "pods"]).unwrap_or_default();
            describe + &of_all(&["logs", what, "--tail=10", "--all-pods", "--prefix"]).unwrap_or_default()
        })
    }

    /// What every node says of itself, for an error.
    fn conditions(&self) -> String {
        let print = "jsonpath={range .items[*]}{.metadata.name}{range .status.conditions[*]}, {.type}: {.status} ({.message}){end}{\"\\n\"}{end}";
        self.server.kubectl(&["get", "nodes", "--output", print]).unwrap_or_default()
    }

    /// The objects of a kind, as `kubectl get --output json` gives them.
    pub(super) fn objects(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let text = self.server.kubectl(&[&["get", "--output", "json"], arguments].concat())?;
        let list: Value = serde_json::from_str(&text).context("kubectl writes JSON")?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Applies several objects at once.
    pub(super) fn apply(&self, objects: &[Value]) -> Result<()> {
        self.server.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": objects }).to_string())
    }

    /// Fails, with the end of its log, if a program of a node has ended.
    pub(super) fn check_alive(&mut self) -> Result<()> {
        self.members.iter_mut().try_for_each(|member| member.node.check_alive())
    }

    fn dns(&self) -> Dns {
        Dns { addresses: DNS.to_vec() }
    }
}
