//! What deploy/ holds, against the real thing: the manifests on a real API server, the chart with real Helm, the rules in
//! a real Prometheus, the image under a real containerd.

#![expect(clippy::unwrap_used, reason = "a test may fail wherever it likes")]

mod accounts;
mod admission;
mod chart;
mod image;
mod monitoring;
mod pod_security;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use std::{env, io::Write as _};

use anyhow::{Context, Result, ensure};
use keystone_kubelab::ApiServer;
use serde::Deserialize as _;
use serde_json::Value;

/// Everything here happens in far less on a machine that is not busy.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);

/// The manifests as they are shipped.
const MANIFESTS: &str = include_str!("../../../../deploy/manifests/keystone-mesh.yaml");

/// Every document of a YAML stream.
fn documents(yaml: &str) -> Vec<Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(yaml);
    documents.map(|document| Value::deserialize(document).unwrap()).filter(|document| !document.is_null()).collect()
}

/// The shipped object of that kind and name.
fn shipped(kind: &str, name: &str) -> Value {
    let mut objects = documents(MANIFESTS).into_iter();
    objects.find(|object| object["kind"] == kind && object["metadata"]["name"] == name).unwrap()
}

/// Applies the shipped manifests.
fn install(server: &ApiServer) -> Result<()> {
    server.apply(MANIFESTS)?;
    server.kubectl(&["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"]).map(drop)
}

/// A path in the repository.
fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Runs a program to its end, and returns what it printed.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} fails ({}): {said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Whether a test can go on. If not, it says SKIPPED and why; in CI it fails.
fn can_go_on(missing: Option<&str>) -> bool {
    let Some(missing) = missing else { return true };
    assert!(env::var_os("CI").is_none(), "in CI nothing is skipped: {missing}");
    let _nobody_reads = std::io::stderr().write_all(format!("SKIPPED: {missing}\n").as_bytes());
    false
}
