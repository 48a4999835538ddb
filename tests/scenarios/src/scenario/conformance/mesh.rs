//! The product: a home and two workers, each behind a NAT of its own, one mesh under all of it, and our image and chart as
//! the pod network.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use keystone_lab::mesh::{Node, Route};
use keystone_lab::{Nat, tool, wait};
use keystone_mesh_api::NAMESPACE;

use super::cluster::{Cluster, Machine};
use crate::scenario::join::Join;
use crate::scenario::kubernetes::plane::HOME;
use crate::scenario::kubernetes::worker_behind;
use crate::scenario::stage::{ControlPlane, Stage};
use crate::story::{Story, millis};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// How long a mesh address is waited for.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

const PICTURE: &str = r"
      home: kube-apiserver, kubelet      worker-sym: kubelet       worker-pr: kubelet
        |                                    |                         |
  [home-router]                          [cloud-a]                 [cloud-b]                 relay   website
  port-restricted                        symmetric              port-restricted                |       |
        |                                    |                         |                       |       |
  ======+====================================+======= internet ========+=======================+=======+==

";

/// Builds the image with the programs of this program's own profile. Outside of the sandbox, where compilers are.
pub(super) fn build_image() -> Result<()> {
    let folder = image_folder()?;
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    let mut command = Command::new(Path::new(REPOSITORY).join("deploy/image/build"));
    let archive = tool::feed(command.env("PROFILE", profile).env("OUT", &folder), "").context("build the image")?;
    fs::write(folder.join("archive"), archive.trim()).context("note where the image is")
}

/// Where [`build_image`] wrote it.
fn built_image() -> Result<PathBuf> {
    fs::read_to_string(image_folder()?.join("archive")).map(PathBuf::from).context("find the image that was built")
}

/// Where cargo lets tests write (`CARGO_TARGET_TMPDIR`).
fn image_folder() -> Result<PathBuf> {
    let program = env::current_exe().context("find the path of this program")?;
    let target = program.parent().and_then(Path::parent).context("this program is in a folder of cargo's")?;
    let folder = target.join("tmp/e2e-image");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

pub(super) fn start(stage: &mut Stage, story: &mut Story, image: Option<&Path>) -> Result<(Cluster, ControlPlane)> {
    story.chapter("The network");
    let founders = stage.founders()?;
    let workers = [
        worker_behind(stage, "worker-sym", "cloud-a", Nat::Symmetric)?,
        worker_behind(stage, "worker-pr", "cloud-b", Nat::PortRestricted)?,
    ];
    story.text(PICTURE);
    story.table(&stage.describe());

    story.chapter("The control plane");
    let mut mesh = founders.init(story)?;
    let home = Arc::clone(&mesh.home);
    let mut cluster = Cluster::start(story, home.host(), HOME.into())?;
    install_chart(&cluster, &mesh)?;
    let kubeconfig = home.host().folder()?.join("admin.kubeconfig");
    cluster.server.admin().write_kubeconfig(&kubeconfig)?;
    let kubeconfig = kubeconfig.to_str().context("the scratch folder is UTF-8")?;
    mesh.begin(story, &["--registry", "kubernetes", "--kubeconfig", kubeconfig, "--status-listen", "51842"])?;
    ensure!(mesh.home_v4 == HOME, "home has {} and not the first address of the mesh", mesh.home_v4);
    let image = image.map_or_else(built_image, |image| Ok(image.to_owned()))?;
    cluster.add(story, machine(&home)?, &[&image])?;
    cluster.server.kubectl(&["label", "node", "home", "node-role.kubernetes.io/control-plane="])?;

    story.chapter("Workers join, each with a token and nothing else, and start their kubelets");
    for worker in &workers {
        let token = home.create_token(1)?;
        story.step(&Join::measure(worker, &token, HOME, Route::Relayed)?.tell());
        cluster.add(story, machine(worker)?, &[&image])?;
    }
    let start = Instant::now();
    cluster.wait_rollout(NAMESPACE, "deployment/keystone-controller")?;
    cluster.wait_rollout(NAMESPACE, "daemonset/keystone-mesh")?;
    story.step(&format!("the chart's pods are ready {} later", millis(start.elapsed())));
    Ok((cluster, mesh))
}

fn install_chart(cluster: &Cluster, mesh: &ControlPlane) -> Result<()> {
    let asked = tool::feed(Command::new(Path::new(REPOSITORY).join("tests/assets/install-helm")).arg("--path"), "")?;
    let mut helm = Command::new(Path::new(asked.trim()).join("helm"));
    helm.args(["template", "keystone-mesh"]).arg(Path::new(REPOSITORY).join("deploy/chart/keystone-mesh"));
    helm.args(["--namespace", NAMESPACE]);
    for value in [
        "namespace.create=true",
        "image.pullPolicy=Never",
        "cni.mode=pod-network",
        &format!("networkKey={}", mesh.network),
        &format!("apiServer.host={HOME}"),
        "controller.replicas=1",
        // Every node at its turn, as in a cluster of many.
        "agent.maxUnavailable=1",
    ] {
        helm.args(["--set", value]);
    }
    let manifests = tool::feed(&mut helm, "").context("render the chart (`make chart` builds Helm)")?;
    cluster.server.apply(&manifests)?;
    cluster.server.apply(&mesh.home.kubernetes_secret()?)
}

fn machine(node: &Node) -> Result<Machine> {
    let addresses = wait::until("the mesh gives an address of each family", ADDRESS_PATIENCE, POLL, || {
        let status = node.status()?;
        let addresses = || status.node.addresses.iter().map(|net| net.addr());
        Ok(addresses().find(IpAddr::is_ipv4).zip(addresses().find(IpAddr::is_ipv6)))
    })?;
    // Pods find the machine's daemon where that of a host without a lab would be.
    let binds = vec![(node.run_folder(), "/run/keystone-mesh"), (node.state_folder(), "/var/lib/keystone-mesh")];
    Ok(Machine { host: node.host().clone(), addresses: addresses.into(), binds })
}
