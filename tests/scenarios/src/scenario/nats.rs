//! `nats`: one home behind each kind of router, and what a probe from there finds.

use anyhow::Result;
use serde_json::{Value, json};

use super::stage::Stage;
use crate::story::Story;
use keystone_lab::{Nat, RouterSpec, Upstream, probe};

pub(super) fn play(stage: &mut Stage, story: &mut Story) -> Result<Value> {
    story.chapter("Kinds of NAT, as named and as measured (RFC 4787: mapping, filtering)");
    let (a, b) = (stage.public_host("probe-a")?, stage.public_host("probe-b")?);
    let mut found = Vec::new();
    for (number, nat) in Nat::ALL.into_iter().enumerate() {
        let spec = RouterSpec { nat, ..RouterSpec::default() };
        let (home, _router) = stage.host_behind(&format!("home-{number}"), &format!("router-{number}"), spec)?;
        let seen = probe::nat_behaviour(&home, &a, &b)?;
        story.check(seen == nat.promise(), &format!("{nat:18} is {}", nat.promise()), &seen.to_string());
        found.push(json!({ "nat": nat.to_string(), "behaviour": seen.to_string() }));
    }
    let carrier = stage.world.router(
        "carrier",
        RouterSpec { lan: "100.64.0.1/24".parse()?, nat: Nat::Symmetric, ..RouterSpec::default() },
    )?;
    let spec = RouterSpec { upstream: Upstream::Behind(carrier), ..RouterSpec::default() };
    let (home, _router) = stage.host_behind("home-cgnat", "router-cgnat", spec)?;
    let seen = probe::nat_behaviour(&home, &a, &b)?;
    let promise = Nat::Symmetric.promise();
    story.check(seen == promise, &format!("behind a carrier   is {promise}"), &seen.to_string());
    found.push(json!({ "nat": "port-restricted behind a symmetric carrier", "behaviour": seen.to_string() }));
    Ok(Value::Array(found))
}
