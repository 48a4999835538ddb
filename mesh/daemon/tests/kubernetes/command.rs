//! `approve` and `kubernetes secret`, as a person runs them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use keystone_kubelab::{Options, with_api_server};
use keystone_mesh_core::annotations;

use crate::world::*;

fn keystone_mesh(state: &Path, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keystone-mesh"));
    command.env_remove("KUBECONFIG").env("KEYSTONE_MESH_STATE_DIR", state).env("KEYSTONE_MESH_RUN_DIR", state);
    Ok(command.args(arguments).output()?)
}

fn good(output: &Output) -> Result<String> {
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{said}{complained}");
    Ok(said.into_owned())
}

#[test]
fn a_person_approves_a_node_and_gives_the_controller_its_key() {
    let name = "command::a_person_approves_a_node_and_gives_the_controller_its_key";
    with_api_server(name, Options::default(), |server| {
        install_resources(server)?;
        let state = tempfile::tempdir()?;
        let kubeconfig = state.path().join("kubeconfig");
        server.admin().write_kubeconfig(&kubeconfig)?;
        let kubeconfig = kubeconfig.to_str().unwrap();
        let approve = |more: &[&str]| {
            let arguments = [&["approve", "w", "--kubeconfig", kubeconfig], more].concat();
            keystone_mesh(state.path(), &arguments)
        };
        let complaint = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
        let identity = |byte| secret(byte).identity().id().to_string();
        let member = || server.kubectl(&["get", "member", "w", "--output", "jsonpath={.spec.identity} {.spec.routes}"]);

        assert!(complaint(&approve(&[])?).contains("neither a Node nor a Member"));
        server.apply(&node("w", &BTreeMap::new()))?;
        assert!(complaint(&approve(&[])?).contains("no daemon has published"));
        server.apply(&node("w", &annotations::of_record(&record(2, "w", 1))))?;
        assert!(complaint(&approve(&["--identity", &identity(3)])?).contains("nothing was changed"));
        assert!(member().is_err());
        good(&approve(&["--identity", &identity(2)[..12], "--route", "10.42.0.0/24"])?)?;
        assert_eq!(member()?, format!("{} [\"10.42.0.0/24\"]", identity(2)));
        good(&approve(&[])?)?;

        // The machine was reinstalled: who approves it has to say so.
        server.apply(&node("w", &annotations::of_record(&record(4, "w", 2))))?;
        assert!(complaint(&approve(&[])?).contains("another identity"));
        good(&approve(&["--identity", &identity(4)])?)?;
        assert_eq!(member()?.trim(), identity(4));

        assert!(complaint(&keystone_mesh(state.path(), &["kubernetes", "secret"])?).contains("not the control plane"));
        good(&keystone_mesh(state.path(), &["init", "--name", "home"])?)?;
        let printed = keystone_mesh(state.path(), &["kubernetes", "secret", "--namespace", "elsewhere"])?;
        assert!(complaint(&printed).contains("signing key"));
        server.apply(&good(&printed)?)?;
        let path = "jsonpath={.data.network\\.key}";
        let arguments = ["get", "secret", "--namespace", "elsewhere", "keystone-mesh-network-key", "--output", path];
        assert_eq!(server.kubectl(&arguments)?.len(), 60, "Base64 of Base64 of 32 bytes");
        Ok(())
    });
}
