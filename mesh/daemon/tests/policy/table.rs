//! The truth table: for each policy who may speak to whom, by hand and by the kernel.

#![expect(clippy::needless_pass_by_value, reason = "a table reads better without references")]

use anyhow::{Context as _, Result, ensure};
use keystone_lab::sandbox::in_own_world;
use keystone_mesh_core::kernel::Family;
use keystone_mesh_core::policy::Stage as Life;
use serde_json::{Value, json};

use crate::stage::{Outcome, Stage, labelled};

/// Policies, and what they come to: `FROM > TO BY`, with `yes` or `no`; each is tried by IPv4 and by IPv6, or by the one
/// that is named (`>4`, `>6`).
struct Case {
    what: &'static str,
    policies: Vec<(&'static str, &'static str, Value)>,
    expected: &'static [&'static str],
}

fn web(rest: Value) -> Value {
    let mut spec = json!({ "podSelector": labelled("app", "web") });
    if let (Some(spec), Value::Object(rest)) = (spec.as_object_mut(), rest) {
        spec.extend(rest);
    }
    spec
}

fn ingress(rules: Value) -> Value {
    web(json!({ "policyTypes": ["Ingress"], "ingress": rules }))
}

fn egress(rules: Value) -> Value {
    web(json!({ "policyTypes": ["Egress"], "egress": rules }))
}

fn one(what: &'static str, spec: Value, expected: &'static [&'static str]) -> Case {
    Case { what, policies: vec![("default", "policy", spec)], expected }
}

fn cases() -> Vec<Case> {
    [whom(), ports(), both_ways()].into_iter().flatten().collect()
}

fn whom() -> Vec<Case> {
    vec![
        Case {
            what: "no policy",
            policies: vec![],
            expected: &["client > web tcp/80 yes", "outside > web tcp/80 yes", "web > outside udp/53 yes"],
        },
        one(
            "nothing may come",
            ingress(json!([])),
            &[
                "client > web tcp/80 no",
                "far > web tcp/80 no",
                "outside > web udp/53 no",
                "client > web icmp no",
                "node-1 > web tcp/80 yes",
                "node-2 > web tcp/80 no",
                "web > client tcp/80 yes",
                "web > web tcp/80 yes",
                "web > service tcp/80 yes",
                "client > service tcp/80 no",
                "client > db tcp/80 yes",
                "cart > api tcp/80 yes",
            ],
        ),
        one("everything may come", ingress(json!([{}])), &["far > web udp/53 yes", "outside > web icmp yes"]),
        one(
            "pods of the namespace",
            ingress(json!([{ "from": [{ "podSelector": {} }] }])),
            &["client > web tcp/80 yes", "far > web tcp/80 yes", "cart > web tcp/80 no", "outside > web tcp/80 no"],
        ),
        one(
            "pods of the namespace with a label, not those of the host's network",
            ingress(json!([{ "from": [{ "podSelector": labelled("app", "client") }] }])),
            &[
                "client > web tcp/80 yes",
                "client > service tcp/80 yes",
                "far > service tcp/80 yes",
                "db > service tcp/80 no",
                "db > web tcp/80 no",
                "cart > web tcp/80 no",
                "node-2 > web tcp/80 no",
            ],
        ),
        one(
            "all pods of a namespace",
            ingress(json!([{ "from": [{ "namespaceSelector": labelled("team", "shop") }] }])),
            &["cart > web tcp/80 yes", "api > web tcp/80 yes", "client > web tcp/80 no"],
        ),
        one(
            "pods with a label of a namespace",
            ingress(json!([{ "from": [
                { "namespaceSelector": labelled("team", "shop"), "podSelector": labelled("app", "client") }] }])),
            &["cart > web tcp/80 yes", "api > web tcp/80 no", "client > web tcp/80 no"],
        ),
        one(
            "one or the other",
            ingress(json!([{ "from": [
                { "namespaceSelector": labelled("team", "shop") }, { "podSelector": labelled("app", "db") }] }])),
            &["api > web tcp/80 yes", "db > web tcp/80 yes", "client > web tcp/80 no"],
        ),
        one(
            "expressions",
            ingress(json!([{ "from": [{ "podSelector": { "matchExpressions": [
                { "key": "app", "operator": "In", "values": ["client", "db"] },
                { "key": "zone", "operator": "DoesNotExist" }, { "key": "tier", "operator": "NotIn", "values": ["back"] },
            ] } }] }])),
            &["client > web tcp/80 yes", "far > web tcp/80 no", "db > web tcp/80 no", "cart > web tcp/80 no"],
        ),
        one(
            "a block without a part",
            ingress(json!([{ "from": [{ "ipBlock": { "cidr": "192.0.2.0/24", "except": ["192.0.2.16/28"] } },
                { "ipBlock": { "cidr": "2001:db8::/32" } }] }])),
            &["outside > web tcp/80 yes", "client > web tcp/80 no", "node-2 > web tcp/80 no"],
        ),
        one(
            "a block of nodes",
            ingress(json!([{ "from": [{ "ipBlock": { "cidr": "10.98.0.2/32" } }] }])),
            &["node-2 >4 web tcp/80 yes", "node-2 >6 web tcp/80 no", "outside > web tcp/80 no"],
        ),
    ]
}

fn ports() -> Vec<Case> {
    vec![
        one(
            "a port",
            ingress(json!([{ "ports": [{ "port": 80 }] }])),
            &["client > web tcp/80 yes", "client > web tcp/81 no", "client > web udp/53 no", "client > web icmp no"],
        ),
        one(
            "ports of two protocols",
            ingress(json!([{ "ports": [{ "port": 81 }, { "protocol": "UDP", "port": 53 }] }])),
            &["far > web tcp/81 yes", "far > web udp/53 yes", "far > web tcp/80 no", "far > web udp/5353 no"],
        ),
        one(
            "ports enough for a set",
            ingress(
                json!([{ "ports": [{ "port": 81 }, { "protocol": "UDP", "port": 53 }, { "port": 8080, "endPort": 8081 }] }]),
            ),
            &[
                "far > web tcp/81 yes",
                "far > web udp/53 yes",
                "far > web tcp/8080 yes",
                "far > web tcp/80 no",
                "far > web udp/5353 no",
            ],
        ),
        one(
            "a range",
            ingress(json!([{ "ports": [{ "port": 81, "endPort": 8080 }] }])),
            &[
                "client > web tcp/81 yes",
                "client > web tcp/8080 yes",
                "client > web tcp/80 no",
                "client > web tcp/8443 no",
            ],
        ),
        one(
            "a protocol",
            ingress(json!([{ "ports": [{ "protocol": "UDP" }] }])),
            &["client > web udp/5353 yes", "client > web tcp/80 no"],
        ),
        one(
            "a name, which is each pod's own",
            json!({ "podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{ "ports": [{ "port": "http" }] }] }),
            &[
                "far > web tcp/80 yes",
                "far > web tcp/8080 no",
                "far > db tcp/8080 yes",
                "far > db tcp/80 no",
                "web > client tcp/80 no",
            ],
        ),
        one(
            "a name of the destination's",
            egress(json!([{ "to": [{ "namespaceSelector": {} }], "ports": [{ "port": "http" }] }])),
            &[
                "web > db tcp/8080 yes",
                "web > db tcp/80 no",
                "web > api tcp/81 yes",
                "web > api tcp/80 no",
                "web > outside tcp/80 no",
            ],
        ),
        one(
            "whom and by which port",
            ingress(json!([{ "from": [{ "podSelector": labelled("app", "client") }], "ports": [{ "port": 80 }] },
                { "from": [{ "podSelector": labelled("app", "db") }], "ports": [{ "port": 81 }] }])),
            &["client > web tcp/80 yes", "client > web tcp/81 no", "db > web tcp/81 yes", "db > web tcp/80 no"],
        ),
    ]
}

fn both_ways() -> Vec<Case> {
    vec![
        one(
            "nothing may leave",
            egress(json!([])),
            &[
                "web > client tcp/80 no",
                "web > far tcp/80 no",
                "web > outside udp/53 no",
                "web > node-1 tcp/80 yes",
                "web > node-2 tcp/80 no",
                "client > web tcp/80 yes",
                "web > web tcp/80 yes",
            ],
        ),
        one(
            "only to some",
            egress(json!([{ "to": [{ "podSelector": labelled("app", "db") }] },
                { "to": [{ "ipBlock": { "cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "192.0.2.16/28"] } }] }])),
            &[
                "web > db tcp/80 yes",
                "web > client tcp/80 no",
                "web >4 outside tcp/80 yes",
                "web >4 outside-2 tcp/80 no",
                "web >6 outside tcp/80 no",
            ],
        ),
        one(
            "both types by default, where it says something of egress",
            web(json!({ "egress": [{ "to": [{ "podSelector": labelled("app", "db") }] }] })),
            &["client > web tcp/80 no", "web > db tcp/80 yes", "web > client tcp/80 no"],
        ),
        Case {
            what: "policies add up",
            policies: vec![
                ("default", "a", ingress(json!([{ "from": [{ "podSelector": labelled("app", "db") }] }]))),
                ("default", "b", ingress(json!([{ "from": [{ "podSelector": labelled("zone", "far") }] }]))),
                ("default", "c", json!({ "podSelector": {}, "policyTypes": ["Ingress"] })),
            ],
            expected: &["db > web tcp/80 yes", "far > web tcp/80 yes", "client > web tcp/80 no", "web > db tcp/80 no"],
        },
        Case {
            what: "source and destination both have to allow, across nodes",
            policies: vec![
                (
                    "default",
                    "far",
                    json!({ "podSelector": labelled("zone", "far"), "policyTypes": ["Egress"],
                    "egress": [{ "to": [{ "podSelector": labelled("tier", "front") }] }] }),
                ),
                ("default", "web", ingress(json!([{ "ports": [{ "port": 80 }] }]))),
            ],
            expected: &["far > web tcp/80 yes", "far > web tcp/81 no", "far > db tcp/80 no", "client > web tcp/81 no"],
        },
        Case {
            what: "of another namespace",
            policies: vec![(
                "shop",
                "policy",
                json!({ "podSelector": {}, "policyTypes": ["Ingress"],
                "ingress": [{ "from": [{ "podSelector": {} }] }] }),
            )],
            expected: &[
                "cart > api tcp/80 yes",
                "client > api tcp/80 no",
                "client > cart tcp/80 no",
                "far > web tcp/80 yes",
            ],
        },
    ]
}

/// `FROM >[4|6] TO BY yes|no`
fn parsed(line: &str) -> Result<(Vec<Family>, [&str; 3], Outcome)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [from, arrow, to, by, expected] = words[..] else { anyhow::bail!("{line}: five words") };
    let families = match arrow {
        ">4" => vec![Family::V4],
        ">6" => vec![Family::V6],
        _ => Family::ALL.to_vec(),
    };
    let expected = if expected == "yes" { Outcome::Passed } else { Outcome::Dropped };
    Ok((families, [from, to, by], expected))
}

fn try_all(stage: &Stage, lines: &[&str]) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for line in lines {
        let (families, [from, to, by], expected) = parsed(line)?;
        for family in families {
            let found = stage.attempt(family, from, to, by).with_context(|| format!("{line}, {family}"))?;
            let mark = if found == expected { "" } else { "   <-- WRONG" };
            println!("  {family:5} {from:>9} -> {to:<9} {by:<9} {:<8}{mark}", format!("{found:?}").to_lowercase());
            if found != expected {
                wrong.push(format!("{line}: {found:?} by {family}"));
            }
        }
    }
    Ok(wrong)
}

#[test]
fn the_kernel_decides_as_the_table_says() {
    in_own_world("table::the_kernel_decides_as_the_table_says", || {
        let mut stage = Stage::new()?;
        let (mut wrong, mut count) = (Vec::new(), 0);
        for Case { what, policies, expected } in cases() {
            println!("{what}");
            stage.set_policies(&policies).context(what)?;
            count += expected.len();
            wrong.extend(try_all(&stage, expected).context(what)?.into_iter().map(|line| format!("{what}: {line}")));
        }
        println!("{count} cases");
        ensure!(wrong.is_empty(), "{wrong:#?}");
        Ok(())
    });
}

#[test]
fn pods_that_begin_and_end_are_isolated_at_every_moment() {
    in_own_world("table::pods_that_begin_and_end_are_isolated_at_every_moment", || {
        let mut stage = Stage::new()?;
        let isolating = json!({ "podSelector": labelled("app", "new"), "policyTypes": ["Ingress", "Egress"],
            "ingress": [{ "from": [{ "podSelector": labelled("app", "client") }] }] });
        type Change = fn(&mut Stage);
        let moments: [(&str, Change, &[&str]); 4] = [
            (
                "scheduled, its address not known yet",
                |stage| stage.pod("default", "new").addresses.clear(),
                &[
                    "client > new tcp/80 no",
                    "new > client tcp/80 no",
                    "client > web tcp/80 yes",
                    "node-1 > new tcp/80 yes",
                ],
            ),
            (
                "it runs",
                |stage| {
                    let place = stage.places["new"];
                    stage.pod("default", "new").addresses = vec![place.v4.into(), place.v6.into()];
                },
                &["client > new tcp/80 yes", "far > new tcp/80 yes", "db > new tcp/80 no", "new > client tcp/80 no"],
            ),
            (
                "who may speak to it has ended",
                |stage| stage.pod("default", "client").stage = Life::Finished,
                &["client > new tcp/80 no", "far > new tcp/80 yes"],
            ),
            (
                "it has ended, and its address is free",
                |stage| stage.pod("default", "new").stage = Life::Finished,
                &["db > new tcp/80 yes", "new > db tcp/80 yes"],
            ),
        ];
        stage.set_policies(&[("default", "policy", isolating)])?;
        for (what, change, expected) in moments {
            println!("{what}");
            change(&mut stage);
            stage.enforce()?;
            let wrong = try_all(&stage, expected).context(what)?;
            ensure!(wrong.is_empty(), "{what}: {wrong:#?}");
        }
        Ok(())
    });
}
