//! The scenarios, played by the real daemon: what they show must be so.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The daemon that `cargo test --workspace` builds beside this test.
fn mesh_bin() -> Option<PathBuf> {
    let lab = PathBuf::from(env!("CARGO_BIN_EXE_keystone-lab"));
    Some(lab.with_file_name("keystone-mesh")).filter(|bin| bin.exists())
}

fn play(arguments: &[&str]) {
    let Some(mesh_bin) = mesh_bin() else {
        eprintln!(
            "SKIPPED scenario {arguments:?}: keystone-mesh is not built; run `cargo build -p keystone-mesh` first"
        );
        return;
    };
    let played = Command::new(env!("CARGO_BIN_EXE_keystone-lab"))
        .args(arguments)
        .arg("--json")
        .arg("--mesh-bin")
        .arg(mesh_bin)
        .stdin(Stdio::null())
        .output()
        .expect("keystone-lab starts");
    let story = format!("{}{}", String::from_utf8_lossy(&played.stdout), String::from_utf8_lossy(&played.stderr));
    assert!(played.status.success(), "{arguments:?}: {}\n{story}", played.status);
    let told: serde_json::Value = serde_json::from_slice(&played.stdout).expect("one JSON document");
    assert!(told.is_object(), "{story}");
}

#[test]
fn home_and_cloud_become_one_network() {
    play(&["home-and-cloud"]);
}

#[test]
fn machines_join_one_after_another() {
    play(&["joins", "--count", "3"]);
}

#[test]
fn an_outage_of_home_and_relay_leaves_what_is_established() {
    play(&["outage", "--minutes", "0.5"]);
}

#[test]
fn a_cluster_spans_a_home_and_clouds() {
    if keystone_kubelab::can_test_cluster() {
        play(&["kubernetes"]);
    }
}
