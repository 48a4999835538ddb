//! The mesh's control plane in Kubernetes: an API server at home, our controller, and home's daemon that coordinates
//! through both, each with the rights that the chart gives it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node as KubernetesNode;
use keystone_kubelab::{Access, ApiServer, Options};
use keystone_lab::mesh::Node;
use keystone_lab::{Host, Process, wait};
use keystone_mesh_api::{
    AGENT_ACCOUNT, CONTROLLER_ACCOUNT, GATEWAY_ACCOUNT, LEDGER_LABEL, NAMESPACE, NETWORK_CONFIG_MAP, NETWORK_KEY_FIELD,
    NETWORK_KEY_SECRET,
};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, PostParams};
use serde_json::Value;

use crate::scenario::stage::{ControlPlane, Founders, Stage};
use crate::story::{Story, millis};

/// What is shipped for clusters without Helm.
const MANIFESTS: &str = include_str!("../../../../../deploy/manifests/keystone-mesh.yaml");

/// The first address of a network is its control plane's.
pub(in crate::scenario) const HOME: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 1);

/// How long anything of Kubernetes is waited for before it counts as failed.
pub(in crate::scenario) const PATIENCE: Duration = Duration::from_secs(120);

/// As [`PATIENCE`], for what thousands of nodes take part in.
pub(in crate::scenario) const FLEET_PATIENCE: Duration = Duration::from_secs(1800);

/// Nothing has been written for so long: what happened before is over.
const CALM: Duration = Duration::from_secs(10);

/// How often it is asked: each time is a program that starts.
pub(in crate::scenario) const POLL: Duration = Duration::from_millis(100);

/// Where this stands a Node is approved.
const APPROVAL_SIGNATURE: &str = "mesh.keystone.cluster/approval-signature";

/// Everything at home.
pub(in crate::scenario) struct Plane {
    pub(in crate::scenario) mesh: ControlPlane,
    pub(in crate::scenario) server: ApiServer,
    pub(in crate::scenario) controller: Process,
}

impl Plane {
    /// Starts all of it; the controller with these arguments besides.
    pub(in crate::scenario) fn start(founders: Founders, story: &Story, arguments: &[&str]) -> Result<Self> {
        let mut mesh = founders.init(story)?;
        let host = mesh.home.host().clone();
        let start = Instant::now();
        let advertise = Some(IpAddr::V4(HOME));
        let server = ApiServer::start(Options { host: Some(host.clone()), advertise, ..Options::default() })?;
        story.step(&format!("the API server is ready {} after its start", millis(start.elapsed())));

        install(&server)?;
        server.apply(&mesh.home.kubernetes_secret()?)?;
        let folder = host.folder()?;
        let key_file = folder.join("network.key");
        std::fs::write(&key_file, network_key(&server)?).context("write the network key")?;

        let kubeconfig = folder.join("controller.kubeconfig");
        server.service_account(NAMESPACE, CONTROLLER_ACCOUNT)?.write_kubeconfig(&kubeconfig)?;
        let mut command = Command::new(controller_program()?);
        command.arg("--kubeconfig").arg(&kubeconfig).arg("--network-key-file").arg(&key_file);
        command.args(["--namespace", NAMESPACE, "--name", "home"]).args(arguments);
        let controller = host.spawn("keystone-controller", &mut command)?;

        // The first start brings what home knows over to Kubernetes, which is an administrator's work.
        let kubeconfig = folder.join("home.kubeconfig");
        server.admin().write_kubeconfig(&kubeconfig)?;
        let path = kubeconfig.to_str().context("the scratch folder is UTF-8")?;
        mesh.begin(story, &["--registry", "kubernetes", "--kubeconfig", path, "--status-listen", "51842"])?;
        ensure!(mesh.home_v4 == HOME, "home has {} and not the first address of the mesh", mesh.home_v4);
        wait::until("the network's document is in Kubernetes", PATIENCE, POLL, || {
            Ok(server.kubectl(&["get", "configmap", "--namespace", NAMESPACE, NETWORK_CONFIG_MAP]).ok())
        })?;
        mesh.home.stop()?;
        server.service_account(NAMESPACE, GATEWAY_ACCOUNT)?.write_kubeconfig(&kubeconfig)?;
        mesh.start_home()?;
        story.step("the chart's accounts, roles and policies are installed; from here on nobody is an administrator");
        Ok(Self { mesh, server, controller })
    }

    /// Access of an agent on this Node, as its pod has it.
    pub(in crate::scenario) fn agent_on(&self, node: &str) -> Result<Access> {
        self.server.service_account_on(node, NAMESPACE, AGENT_ACCOUNT)
    }

    /// Makes the Node of a machine, and installs a daemon there.
    pub(in crate::scenario) fn enroll(&self, stage: &mut Stage, host: &Host) -> Result<Arc<Node>> {
        self.create_node(host.name())?;
        let server = format!("https://{}:{}", self.mesh.home.host().v4(), keystone_kubelab::PORT);
        let access = self.agent_on(host.name())?.at(&server);
        access.write_kubeconfig(&host.folder()?.join("kubeconfig"))?;
        stage.install(host, host.name())
    }

    /// Starts a daemon that was enrolled, with Kubernetes as its registry.
    pub(in crate::scenario) fn up(&self, node: &Node) -> Result<()> {
        let kubeconfig = node.host().folder()?.join("kubeconfig");
        let kubeconfig = kubeconfig.to_str().context("the scratch folder is UTF-8")?;
        let coordination = ["--registry", "kubernetes", "--kubeconfig", kubeconfig];
        node.up(&[&["--name", node.name(), "--network", &self.mesh.network], &coordination[..]].concat())
    }

    /// Makes a Node, as a kubelet does that has just registered.
    pub(in crate::scenario) fn create_node(&self, name: &str) -> Result<()> {
        let node = KubernetesNode {
            metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
            ..KubernetesNode::default()
        };
        self.server.with_client(self.server.admin(), async |client| {
            Api::all(client).create(&PostParams::default(), &node).await.context("create a Node").map(drop)
        })
    }

    /// Deletes a Node; it is gone when this returns.
    pub(in crate::scenario) fn delete_node(&self, name: &str) -> Result<()> {
        self.server.with_client(self.server.admin(), async |client| {
            let nodes = Api::<KubernetesNode>::all(client);
            nodes.delete(name, &DeleteParams::default()).await.context("delete a Node").map(drop)
        })
    }

    /// Waits until nothing has been written to any Node for a while; returns how often it was since the API server's start.
    pub(in crate::scenario) fn wait_calm(&self) -> Result<u64> {
        let mut last = (self.server.metrics()?.writes("nodes"), Instant::now());
        wait::until("nothing is written to Nodes", FLEET_PATIENCE, POLL * 5, || {
            let writes = self.server.metrics()?.writes("nodes");
            if writes != last.0 {
                last = (writes, Instant::now());
            }
            Ok((last.1.elapsed() > CALM).then_some(writes))
        })
    }

    /// The objects of a kind, as `kubectl get --output json` gives them.
    pub(in crate::scenario) fn objects(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let text = self.server.kubectl(&[&["get", "--output", "json"], arguments].concat())?;
        let list: Value = serde_json::from_str(&text).context("kubectl writes JSON")?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// What the ledger says of the node of this name: a claim each, as text.
    pub(in crate::scenario) fn claims(&self, node: &str) -> Result<Vec<String>> {
        self.claims_where(|name| name == node)
    }

    /// As [`Self::claims`], of all nodes whose names begin with `prefix`.
    pub(in crate::scenario) fn claims_of(&self, prefix: &str) -> Result<Vec<String>> {
        self.claims_where(|name| name.starts_with(prefix))
    }

    fn claims_where(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
        let pages = self.objects(&["configmaps", "--namespace", NAMESPACE, "--selector", LEDGER_LABEL])?;
        let lines = pages.iter().filter_map(|page| page["data"].as_object()).flatten();
        let claims = lines.filter_map(|(_number, claim)| claim.as_str());
        Ok(claims.filter(|claim| claim.split(' ').nth(1).is_some_and(&wanted)).map(str::to_owned).collect())
    }

    /// Waits until so many Nodes whose names begin with `prefix` are approved.
    pub(in crate::scenario) fn wait_approved(&self, prefix: &str, count: usize) -> Result<()> {
        wait::until(&format!("all {count} are approved"), FLEET_PATIENCE, POLL * 5, || {
            let approved = self.server.with_client(self.server.admin(), async |client| {
                let nodes = Api::<KubernetesNode>::all(client);
                let listed = nodes.list_metadata(&ListParams::default()).await?.items.into_iter();
                let ours = listed.filter(|node| node.name_any().starts_with(prefix));
                Ok(ours.filter(|node| node.annotations().contains_key(APPROVAL_SIGNATURE)).count())
            })?;
            Ok((approved == count).then_some(()))
        })
    }

    /// Waits until the ledger says that the node's address was given back, and is kept from others for a while.
    pub(in crate::scenario) fn wait_quarantined(&self, node: &str) -> Result<String> {
        wait::until(&format!("the address of {node} is quarantined"), PATIENCE, POLL, || {
            Ok(self.claims(node)?.into_iter().find(|claim| claim.contains(" released ")))
        })
    }
}

/// Everything of the chart but the programs, which run on hosts here.
fn install(server: &ApiServer) -> Result<()> {
    let objects = MANIFESTS.split("\n---\n");
    let runs = |object: &&str| object.lines().any(|line| line == "kind: DaemonSet" || line == "kind: Deployment");
    let manifests = objects.filter(|object| !runs(object)).collect::<Vec<_>>().join("\n---\n");
    server.apply(&manifests)?;
    server.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"]).map(drop)
}

/// What the Secret holds, as a pod of the controller finds it in a file.
fn network_key(server: &ApiServer) -> Result<String> {
    let key = format!("go-template={{{{index .data \"{NETWORK_KEY_FIELD}\" | base64decode}}}}");
    server.kubectl(&["--namespace", NAMESPACE, "get", "secret", NETWORK_KEY_SECRET, "--output", &key])
}

fn controller_program() -> Result<PathBuf> {
    let path = std::env::current_exe().context("find the path of this program")?.with_file_name("keystone-controller");
    ensure!(path.is_file(), "there is no program {}: build it (-p keystone-controller)", path.display());
    Ok(path)
}
