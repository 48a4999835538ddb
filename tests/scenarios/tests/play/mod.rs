//! Plays a scenario as a test.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The daemon that `cargo test --workspace` builds beside this test.
fn mesh_bin() -> Option<PathBuf> {
    let lab = PathBuf::from(env!("CARGO_BIN_EXE_keystone-lab"));
    Some(lab.with_file_name("keystone-mesh")).filter(|bin| bin.exists())
}

/// Fails if anything that the scenario shows is not so.
#[expect(clippy::print_stdout, reason = "it is the output of the test")]
pub(crate) fn play(arguments: &[&str]) {
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
    let checks = told["checks"].as_array().expect("a list of checks");
    // The figures are worth reading after a success too.
    checks.iter().for_each(|check| println!("{}: {}", check["claim"], check["found"]));
}
