//! `joins`: many machines join a home behind NAT, one after the other, each as if it had never been here: a fresh state, a
//! fresh name, and a router that has forgotten it. Once from behind a router that lets a direct path come up, once from
//! behind one that does not.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::join::Join;
use super::spread::Spread;
use super::stage::{ControlPlane, Stage};
use crate::story::{Story, millis};
use keystone_lab::mesh::Route;
use keystone_lab::wait;
use keystone_lab::{Host, Nat, Router, RouterSpec};

/// Goals, from the start of the daemon, and for a direct path from the first reply.
const REPLY_P50: Duration = Duration::from_millis(1000);
const REPLY_P99: Duration = Duration::from_millis(3000);
const DIRECT_P99: Duration = Duration::from_millis(2000);

/// How long a machine that left may take to lose its TUN device.
const GONE_PATIENCE: Duration = Duration::from_secs(5);

pub(super) fn play(stage: &mut Stage, story: &mut Story, count: u32) -> Result<Value> {
    story.chapter("A home behind a port-restricted router, a relay, and nobody else");
    let plane = stage.founders()?.found(story)?;
    let mut halves = Vec::new();
    for (nat, hoped_for) in [(Nat::PortRestricted, Route::Direct), (Nat::Symmetric, Route::Relayed)] {
        story.chapter(&format!("{count} machines join from behind a {nat} router"));
        let short = if nat == Nat::Symmetric { "sym" } else { "pr" };
        let spec = RouterSpec { nat, lan: "10.0.0.1/24".parse()?, ..RouterSpec::default() };
        let (host, router) = stage.host_behind(&format!("worker-{short}"), &format!("cloud-{short}"), spec)?;
        let mut joins = Vec::new();
        for number in 1..=count {
            let name = format!("{short}-{number}");
            let join = join_and_leave(stage, &plane, (&host, &router), &name, hoped_for)?;
            story.step(&join.tell());
            joins.push(join);
        }
        halves.push((nat, hoped_for, joins));
    }
    story.chapter("From the start of the daemon");
    let mut rows = vec![["router", "measure", "n", "p50", "p99", "max"].map(str::to_owned).to_vec()];
    let mut results = serde_json::Map::new();
    for (nat, hoped_for, joins) in &halves {
        let replies = Spread::of(joins.iter().map(|join| join.first_reply_ms));
        let directs = Spread::of(joins.iter().filter_map(|join| Some(join.direct_ms? - join.first_reply_ms)));
        rows.push(row(replies, *nat, "first reply from home"));
        if *hoped_for == Route::Direct {
            rows.push(row(directs, *nat, "then direct after"));
        }
        results
            .insert(nat.to_string(), json!({ "first_reply_ms": replies, "then_direct_ms": directs, "joins": joins }));
    }
    story.table(&rows);
    for (nat, hoped_for, joins) in &halves {
        claim(story, *nat, *hoped_for, joins);
    }
    Ok(Value::Object(results))
}

fn join_and_leave(
    stage: &mut Stage,
    plane: &ControlPlane,
    (host, router): (&Host, &Router),
    name: &str,
    hoped_for: Route,
) -> Result<Join> {
    let token = plane.home.create_token(1)?;
    let node = stage.install(host, name)?;
    let join = Join::measure(&node, &token, plane.home_v4, hoped_for)?;
    let interface = node.status()?.node.interface;
    node.leave()?;
    let what = format!("{interface} is gone after {name} left");
    wait::until(&what, GONE_PATIENCE, Duration::from_millis(10), || Ok((!has_device(host, &interface)).then_some(())))?;
    stage.uninstall(&Arc::clone(&node));
    router.forget_mappings()?;
    Ok(join)
}

fn has_device(host: &Host, name: &str) -> bool {
    let wanted = format!("{name}:");
    let devices = host.enter(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default());
    devices.lines().any(|line| line.trim_start().starts_with(&wanted))
}

fn claim(story: &mut Story, nat: Nat, hoped_for: Route, joins: &[Join]) {
    let replies = Spread::of(joins.iter().map(|join| join.first_reply_ms));
    let directs = Spread::of(joins.iter().filter_map(|join| Some(join.direct_ms? - join.first_reply_ms)));
    let claims = [(replies.p50, REPLY_P50, "p50"), (replies.p99, REPLY_P99, "p99")];
    for (value, goal, name) in claims {
        let claim = format!("{nat}: {name} of the first reply is at most {}", millis(goal));
        story.check(value <= goal.as_secs_f64() * 1e3, &claim, &format!("{value:.0} ms"));
    }
    match hoped_for {
        Route::Direct => {
            let claim = format!("{nat}: all become direct");
            let direct = joins.iter().filter(|join| join.direct_ms.is_some()).count();
            story.check(direct == joins.len(), &claim, &format!("{direct} of {}", joins.len()));
            let claim = format!("{nat}: p99 of then becoming direct is at most {}", millis(DIRECT_P99));
            story.check(directs.p99 <= DIRECT_P99.as_secs_f64() * 1e3, &claim, &format!("{:.0} ms", directs.p99));
        }
        Route::Relayed | Route::None | Route::Idle => {
            let relayed = joins.iter().filter(|join| join.path == Route::Relayed).count();
            story.check(
                relayed == joins.len(),
                &format!("{nat}: all go by the relay"),
                &format!("{relayed} of {}", joins.len()),
            );
        }
    }
}

fn row(spread: Spread, nat: Nat, measure: &str) -> Vec<String> {
    let numbers = [spread.p50, spread.p99, spread.max].map(|value| format!("{value:.0} ms"));
    [nat.to_string(), measure.to_owned(), spread.n.to_string()].into_iter().chain(numbers).collect()
}
