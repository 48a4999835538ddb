//! Input that is wrong: the answer is CNI JSON with a code and the place, and nothing is made.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::Result;
use serde_json::{Value, json};

use crate::runtime::{Target, netns};
use crate::{PLUGIN, assert_nothing_left, facts, on_a_node, ours, with, write_facts};

/// What the plugin answers to any environment and any bytes.
fn answer(environment: &[(&str, &str)], stdin: &[u8]) -> Result<(bool, Value)> {
    let mut command = Command::new(PLUGIN);
    command.env_clear().envs(environment.iter().copied());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let _unread = child.stdin.take().map(|mut pipe| pipe.write_all(stdin));
    let output = child.wait_with_output()?;
    Ok((output.status.success(), serde_json::from_slice(&output.stdout)?))
}

#[test]
fn version_is_answered_to_whatever_is_on_stdin() {
    let (good, answer) = answer(&[("CNI_COMMAND", "VERSION")], b"nonsense").unwrap();
    assert!(good);
    assert_eq!(answer["cniVersion"], "1.1.0");
    assert_eq!(answer["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
}

#[test]
fn bytes_that_are_no_configuration_are_code_6() {
    let environment =
        [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/run/netns/none")];
    for stdin in [&b""[..], b"{", b"[]", b"null", b"\xff\xfe", b"{\"cniVersion\": 1}"] {
        let (good, answer) = answer(&environment, stdin).unwrap();
        assert!(!good);
        assert_eq!(answer["code"], 6, "{answer}");
        assert_eq!(answer["cniVersion"], "1.1.0");
    }
    let (_, unknown) = answer(&environment, br#"{"cniVersion":"9.9.9","name":"a"}"#).unwrap();
    assert_eq!(unknown["code"], 1);
}

#[test]
fn a_namespace_that_cannot_be_used_is_told_and_nothing_is_made() {
    on_a_node("bad_input::a_namespace_that_cannot_be_used_is_told_and_nothing_is_made", || {
        std::fs::write("/run/file", "")?;
        for (path, code) in [
            ("/run/netns/none", 3),
            ("/run/file", 4),
            ("/run", 4),
            ("/proc/self/ns/net", 4),
            ("/proc/self/ns/mnt", 103),
        ] {
            let refused = ours().add(Target::of("c1", path)).unwrap_err();
            assert!(refused.code == code || path.ends_with("mnt"), "{path}: {refused:?}");
            assert_nothing_left()?;
        }
        Ok(())
    });
}

#[test]
fn hostile_names_make_nothing() {
    on_a_node("bad_input::hostile_names_make_nothing", || {
        let pod = netns("a")?;
        for container in ["../../../etc/passwd", "a/b", "a b", "c1; reboot", "\"}; flush ruleset", "-x", "é"] {
            assert_eq!(ours().add(Target::of(container, &pod)).unwrap_err().code, 4, "{container}");
            assert_eq!(ours().del(Target::of(container, &pod), &Value::Null).unwrap_err().code, 4, "{container}");
        }
        for ifname in ["abcdefghijklmnop", "../eth0", "..", "a b", "a:b", "a/b", "\u{7}"] {
            let target = Target { container: "c1", netns: &pod, ifname };
            assert_eq!(ours().add(target).unwrap_err().code, 4, "{ifname}");
        }
        assert_nothing_left()
    });
}

#[test]
fn prefixes_that_cannot_serve_are_told() {
    on_a_node("bad_input::prefixes_that_cannot_serve_are_told", || {
        let pod = netns("a")?;
        let target = Target::of("c1", &pod);
        let ranges = |ranges: Value| with(json!({ "ipam": { "type": "keystone-cni", "ranges": ranges } }));
        for (wrong, named) in [
            (json!(["10.98.0.0/24"]), "10.98.0.2"),
            (json!(["10.0.0.0/31"]), "too small"),
            (json!(["10.0.0.1/24"]), "write 10.0.0.0/24"),
            (json!(["10.0.0.0/24", "10.0.0.0/16"]), "overlaps"),
        ] {
            let refused = ranges(wrong).add(target).unwrap_err();
            assert_eq!(refused.code, 7, "{refused:?}");
            assert!(refused.message.contains(named), "{}", refused.message);
        }
        let mut small = facts();
        small.mtu = 1200;
        write_facts(&small)?;
        assert_eq!(ours().add(target).unwrap_err().code, 7);
        let mut none = facts();
        none.pod_cidrs.clear();
        write_facts(&none)?;
        assert_eq!(ours().add(target).unwrap_err().code, 11);
        std::fs::remove_file(crate::FACTS)?;
        assert_eq!(ours().add(target).unwrap_err().code, 11);
        let previous = json!({ "cniVersion": "1.1.0", "interfaces": [], "ips": [] });
        let behind = ours().call("ADD", &ours().plugins[0], target, &json!({ "prevResult": previous })).unwrap_err();
        assert_eq!(behind.code, 7);
        assert_nothing_left()
    });
}
