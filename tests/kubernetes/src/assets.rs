//! The programs of Kubernetes: where they are, and what to do where they are not.

use std::env;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use keystone_lab::preflight::{self, Tool};
use nix::unistd::geteuid;

/// Builds the programs, and says where they are.
const INSTALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/install");

/// The same for what Kubernetes' own tests need.
const INSTALL_TESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/install-e2e");

/// What an API server needs: the programs that envtest's own folder has.
const CONTROL_PLANE: &[&str] = &["etcd", "kube-apiserver", "kubectl"];

/// What nodes and the control plane's controllers need besides.
const CLUSTER: &[&str] =
    &["etcd", "kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"];

/// What Kubernetes' own tests need besides the cluster.
const TESTS: &[&str] = &["agnhost", "coredns", "e2e.test", "ginkgo", "localhost.crt", "localhost.key"];

/// What the programs of a node call.
pub const NODE_TOOLS: &[Tool] = &[
    Tool::new("busybox", "busybox"),
    Tool::new("containerd", "containerd"),
    Tool::new("ctr", "containerd"),
    Tool::new("ip", "iproute2"),
    Tool::new("iptables", "iptables"),
    Tool::new("nft", "nftables"),
    Tool::new("runc", "runc"),
];

/// What goes into the image that Kubernetes' own tests run, besides; and the reference network plugins.
pub const TEST_TOOLS: &[Tool] = &[
    Tool::new("curl", "curl"),
    Tool::new("dash", "dash"),
    Tool::new("dig", "bind9-dnsutils"),
    Tool::new("getent", "libc-bin"),
    Tool::new("iperf", "iperf"),
    Tool::new("nc.openbsd", "netcat-openbsd"),
];

/// A folder with programs of Kubernetes.
#[derive(Clone, Debug)]
pub struct Assets(PathBuf);

impl Assets {
    /// The programs of an API server: from the folder that `KUBEBUILDER_ASSETS` names if all are there, or else from what
    /// tests/assets/install built.
    pub fn find() -> Result<Self> {
        Self::find_with(CONTROL_PLANE)
    }

    /// As [`Self::find`], with all that a cluster with nodes needs.
    pub fn find_for_cluster() -> Result<Self> {
        Self::find_with(CLUSTER)
    }

    /// Kubernetes' own tests, and what they need.
    pub fn find_tests() -> Result<Self> {
        Self::built(INSTALL_TESTS, TESTS)
    }

    fn find_with(programs: &[&str]) -> Result<Self> {
        let given = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
        match given.filter(|folder| has(folder, programs)) {
            Some(folder) => Ok(Self(folder)),
            None => Self::built(INSTALL, programs),
        }
    }

    fn built(install: &str, programs: &[&str]) -> Result<Self> {
        let asked = Command::new(install).arg("--path").stdin(Stdio::null()).output();
        let asked = asked.with_context(|| format!("start {install}"))?;
        let folder = PathBuf::from(String::from_utf8_lossy(&asked.stdout).trim());
        ensure!(
            has(&folder, programs),
            "the programs of Kubernetes are not built; `make test-assets` does it, in some minutes"
        );
        Ok(Self(folder))
    }

    /// The path of one of them.
    pub fn program(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

fn has(folder: &Path, programs: &[&str]) -> bool {
    programs.iter().all(|program| folder.join(program).is_file())
}

/// Whether a test can run an API server here. If not it says SKIPPED and why; in CI (`CI` is set) nothing is skipped, and
/// the test fails.
pub fn can_test() -> bool {
    report(Assets::find().map(drop))
}

/// As [`can_test`], for a test with nodes, which needs root, containerd and runc besides.
pub fn can_test_cluster() -> bool {
    let root = geteuid().is_root().then_some(()).context("containers need root");
    preflight::can_test_with(NODE_TOOLS) && report(root.and_then(|()| Assets::find_for_cluster().map(drop)))
}

/// As [`can_test_cluster`], for a test that runs Kubernetes' own.
pub fn can_test_conformance() -> bool {
    can_test_cluster() && preflight::can_test_with(TEST_TOOLS) && report(Assets::find_tests().map(drop))
}

fn report(found: Result<()>) -> bool {
    let Err(err) = found else { return true };
    assert!(env::var_os("CI").is_none(), "there is no Kubernetes, and in CI nothing is skipped: {err:#}");
    // A test has no better place to say so than its output.
    let _nobody_reads = io::stderr().write_all(format!("SKIPPED: {err:#}\n").as_bytes());
    false
}
