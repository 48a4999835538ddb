//! The custom resources: the files, and what the API server makes of them.

use std::path::Path;

use anyhow::Result;
use keystone_controller::crds;
use serde_json::{Value, json};

use crate::world::{World, in_world};

const IDENTITY: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

#[test]
fn the_files_are_what_the_program_prints() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
    let mut names: Vec<String> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let definitions = crds::all();
    assert_eq!(names, definitions.iter().map(crds::file_name).collect::<Vec<_>>());
    for definition in definitions {
        let file = std::fs::read_to_string(folder.join(crds::file_name(&definition))).unwrap();
        let remedy = "run `cargo run -p keystone-controller -- crds --directory deploy/crds`";
        assert!(file == crds::yaml(&definition).unwrap(), "{}: {remedy}", crds::file_name(&definition));
    }
}

#[test]
fn what_is_wrong_is_refused_by_the_api_server_in_words() {
    in_world("crds::what_is_wrong_is_refused_by_the_api_server_in_words", |world| {
        let good = [
            ("Peer", "p1", json!({"publicKey": KEY})),
            ("Peer", "p2", json!({"publicKey": KEY, "endpoint": "[2001:db8::1]:51820", "routes": ["10.0.0.0/8"]})),
            ("Peer", "p3", json!({"publicKey": KEY, "endpoint": "home.example.org:1", "node": "home.lan"})),
            ("Member", "m1", json!({"identity": IDENTITY, "token": "aaaaaaaaaaaaa", "routes": ["fd00::/8"]})),
            ("JoinToken", "aaaaaaaaaaaaa", json!({"hash": "h", "uses": 3, "namePattern": "w-*"})),
        ];
        for (kind, name, spec) in good {
            apply(&world, kind, name, &spec)?;
        }
        let bad = [
            ("Peer", "x", json!({}), "publicKey"),
            ("Peer", "x", json!({"publicKey": "AAAA"}), "publicKey"),
            ("Peer", "x", json!({"publicKey": KEY, "routes": ["10.0.0.0/33"]}), "every entry has to be a network"),
            ("Peer", "x", json!({"publicKey": KEY, "routes": ["10.0.0.1"]}), "every entry has to be a network"),
            ("Peer", "x", json!({"publicKey": KEY, "endpoint": "host"}), "endpoint"),
            ("Peer", "x", json!({"publicKey": KEY, "endpoint": "host:0"}), "endpoint"),
            ("Peer", "x", json!({"publicKey": KEY, "node": "Home"}), "node"),
            ("Peer", "x", json!({"publicKey": KEY, "persistentKeepalive": 0}), "persistentKeepalive"),
            ("Member", "x", json!({"identity": "short"}), "identity"),
            ("Member", "x", json!({"identity": IDENTITY, "routes": vec!["10.0.0.0/8"; 65]}), "routes"),
            ("Member", "m1", json!({"identity": IDENTITY.replace('a', "b")}), "another identity is another machine"),
            ("JoinToken", "short", json!({"hash": "h"}), "named after its token's id"),
            ("JoinToken", "baaaaaaaaaaaa", json!({"hash": "h", "uses": 0}), "uses"),
            ("JoinToken", "baaaaaaaaaaaa", json!({"hash": "h", "namePattern": "W*"}), "namePattern"),
            ("JoinToken", "aaaaaaaaaaaaa", json!({"hash": "other"}), "hash of a JoinToken cannot be changed"),
        ];
        for (kind, name, spec, said) in bad {
            let error = format!("{:#}", apply(&world, kind, name, &spec).expect_err(&spec.to_string()));
            assert!(error.contains(said), "{kind} {spec}: {error}");
        }
        let table = world.server.kubectl(&["get", "members", "--output", "wide"])?;
        assert!(table.contains("APPROVED") && table.contains(IDENTITY), "{table}");
        let explained = world.server.kubectl(&["explain", "members"])?;
        assert!(explained.contains("let into the network") && !explained.contains("Auto-generated"), "{explained}");
        Ok(())
    });
}

fn apply(world: &World<'_>, kind: &str, name: &str, spec: &Value) -> Result<()> {
    let object = json!({
        "apiVersion": "mesh.keystone.cluster/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec,
    });
    world.server.apply(&object.to_string())
}
