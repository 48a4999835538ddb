//! `kubernetes-outage`: the API server is gone for long, and everything that the mesh knows from it goes on. Meanwhile
//! daemons are killed and started again, one of them home's own, a machine ends, and etcd forgets what would tell of it. Then
//! the API server returns; what is deleted at once is gone everywhere, who comes is let in, and nobody's approval changed.
//!
//! ```text
//!   home: kube-apiserver   worker-1, worker-2     worker-nat       worker-token        worker-ends
//!     controller, relay      kubernetes           kubernetes     through the gateway    kubernetes
//!           |                     |                    |                  |                  |
//!           |                     |             [port-restricted]    [symmetric]             |
//!           |                     |                    |                  |                  |
//!   ========+=====================+===== internet =====+==================+==================+====
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use keystone_lab::mesh::{Node, Route};
use keystone_lab::{Nat, RouterSpec};
use keystone_mesh_core::annotations;
use keystone_mesh_core::node::Approval;
use serde_json::{Value, json};

use super::plane::{HOME, PATIENCE, Plane};
use super::until_gone;
use crate::scenario::join::{Join, in_millis};
use crate::scenario::pairs::{Pairs, pass};
use crate::scenario::stage::Stage;
use crate::story::{Story, millis};

/// Objects that nobody watches: with them etcd's history goes on, and can be forgotten.
const UNSEEN: u32 = 5;

/// Goal for the time from the API server's return until a deletion has reached everybody: the longest pause before a
/// watch is opened again is 15 s.
const GONE_GOAL: Duration = Duration::from_secs(30);

pub(in crate::scenario) fn play(stage: &mut Stage, story: &mut Story, duration: Duration) -> Result<Value> {
    story.chapter("A control plane, four workers with Kubernetes as their registry, one with the gateway");
    let founders = stage.public_founders()?;
    let mut plane = Plane::start(founders, story, &["--approval", "auto"])?;
    let workers = Workers::start(stage, story, &plane)?;
    let home = Arc::clone(&plane.mesh.home);
    let everybody = workers.and(&home);
    let mut pairs = Pairs::start(&everybody)?;
    story.step(&format!("all {} reach each other", everybody.len()));
    let before = approvals(&plane)?;

    story.chapter(&format!("The API server is gone for {}", millis(duration)));
    for number in 0..UNSEEN {
        plane.server.kubectl(&["create", "configmap", &format!("unseen-{number}")])?;
    }
    plane.server.kill()?;
    let gone = Instant::now();
    plane.server.compact()?;
    story.step("the API server is killed, and etcd forgets its history");
    let mut restarts = Vec::new();
    pass(duration / 5, gone);
    restarts.push(pairs.restart(story, &workers.nat, |node| plane.up(node))?);
    pass(duration * 2 / 5, gone);
    restarts.push(pairs.restart(story, &workers.token, |node| node.up(&[]))?);
    pass(duration * 3 / 5, gone);
    restarts.push(pairs.restart(story, &home, |_home| plane.mesh.start_home())?);
    pass(duration * 4 / 5, gone);
    pairs.forget(workers.ends.name());
    workers.ends.kill()?;
    story.step("the machine of worker-ends is gone");
    pass(duration, gone);
    let results = pairs.judge(story, gone, &restarts);

    story.chapter("The API server comes back");
    let away = gone.elapsed();
    plane.server.restart()?;
    let returned = Instant::now();
    story.step(&format!("it was away for {}", millis(away)));
    let stay = workers.without_ends(&home);
    let forgotten = delete_at_once(story, &plane, &workers.ends, &stay)?;
    let late = come_late(stage, story, &plane, &stay)?;
    let writes = plane.wait_calm()?;
    story.step(&format!("{writes} writes to Nodes since its return, and none since {}", millis(returned.elapsed())));
    compare(story, &before, &approvals(&plane)?, &stay)?;
    let silent = pairs.judge(story, returned, &[]);
    Ok(json!({
        "outage_s": away.as_secs_f64(),
        "pairs": results,
        "pairs_after_return": silent,
        "forgotten_ms": in_millis(forgotten),
        "late_ms": in_millis(late),
        "node_writes_after_return": writes,
    }))
}

/// Everybody but home.
struct Workers {
    public: [Arc<Node>; 2],
    nat: Arc<Node>,
    token: Arc<Node>,
    ends: Arc<Node>,
}

impl Workers {
    fn start(stage: &mut Stage, story: &Story, plane: &Plane) -> Result<Self> {
        let behind = |nat| -> Result<RouterSpec> {
            Ok(RouterSpec { nat, lan: "10.0.0.1/24".parse()?, ..RouterSpec::default() })
        };
        let mut public = |name| stage.public_host(name).and_then(|host| plane.enroll(stage, &host));
        let public_workers = [public("worker-1")?, public("worker-2")?];
        let ends = public("worker-ends")?;
        let (host, _router) = stage.host_behind("worker-nat", "cloud-a", behind(Nat::PortRestricted)?)?;
        let nat = plane.enroll(stage, &host)?;
        for worker in [&public_workers[0], &public_workers[1], &ends, &nat] {
            plane.up(worker)?;
        }
        let (host, _router) = stage.host_behind("worker-token", "cloud-b", behind(Nat::Symmetric)?)?;
        let token = stage.install(&host, "worker-token")?;
        let join = Join::measure(&token, &plane.mesh.home.create_token(1)?, HOME, Route::Relayed)?;
        story.step(&join.tell());
        let workers = Self { public: public_workers, nat, token, ends };
        let all = workers.and(&plane.mesh.home);
        for node in &all {
            node.wait_until("it knows everybody", PATIENCE, |status| {
                status.peers.len() == all.len() - 1 && !status.node.addresses.is_empty()
            })?;
        }
        Ok(workers)
    }

    fn and<'a>(&'a self, home: &'a Node) -> Vec<&'a Node> {
        [self.without_ends(home), vec![&self.ends]].concat()
    }

    fn without_ends<'a>(&'a self, home: &'a Node) -> Vec<&'a Node> {
        vec![home, &self.public[0], &self.public[1], &self.nat, &self.token]
    }
}

/// A Node is deleted before anybody has had the time to open his watch again.
fn delete_at_once(story: &mut Story, plane: &Plane, goes: &Node, others: &[&Node]) -> Result<Duration> {
    let start = Instant::now();
    plane.delete_node(goes.name())?;
    let gone = until_gone(goes.name(), others, start)?;
    let claim = format!("{}, deleted at once, is gone from all {} others", goes.name(), others.len());
    story.check(gone <= GONE_GOAL, &claim, &format!("after {} (goal {})", millis(gone), millis(GONE_GOAL)));
    let quarantined = plane.wait_quarantined(goes.name());
    let found = quarantined.as_ref().map_or_else(|err| format!("{err:#}"), |_claim| millis(start.elapsed()));
    story.check(quarantined.is_ok(), "its address is kept from others for a while", &found);
    Ok(gone)
}

/// A machine that has never been here; returns how long it takes until it reaches everybody.
fn come_late(stage: &mut Stage, story: &mut Story, plane: &Plane, others: &[&Node]) -> Result<Duration> {
    let start = Instant::now();
    let host = stage.public_host("worker-late")?;
    let late = plane.enroll(stage, &host)?;
    plane.up(&late)?;
    late.wait_until("it knows everybody", PATIENCE, |status| {
        status.peers.len() == others.len() && !status.node.addresses.is_empty()
    })?;
    for other in others {
        other.wait_until("it knows worker-late", PATIENCE, |status| status.peer("worker-late").is_some())?;
    }
    Pairs::start(&[&[&*late], others].concat())?;
    let took = start.elapsed();
    story.check(true, "who comes is let in, and everybody reaches everybody", &format!("after {}", millis(took)));
    Ok(took)
}

/// Claims that all that stay have the approval that they had.
fn compare(
    story: &mut Story,
    before: &BTreeMap<String, Approval>,
    after: &BTreeMap<String, Approval>,
    stay: &[&Node],
) -> Result<()> {
    let changed: Vec<&str> =
        stay.iter().map(|node| node.name()).filter(|name| before.get(*name) != after.get(*name)).collect();
    let found = if changed.is_empty() { "word for word".to_owned() } else { format!("not of {changed:?}") };
    story.check(changed.is_empty(), &format!("all {} have the approvals of before", stay.len()), &found);
    let late = after.get("worker-late").context("worker-late is approved")?;
    let held: BTreeSet<_> = before.values().flat_map(|approval| &approval.addresses).collect();
    let free = !late.addresses.iter().any(|address| held.contains(address));
    let found = late.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    story.check(free, "worker-late has addresses that nobody had", &found);
    Ok(())
}

/// What the annotations of Nodes and Members say.
fn approvals(plane: &Plane) -> Result<BTreeMap<String, Approval>> {
    let objects = [plane.objects(&["members"])?, plane.objects(&["nodes"])?].concat();
    let mut approvals = BTreeMap::new();
    for object in objects {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let written = serde_json::from_value(object["metadata"]["annotations"].clone()).unwrap_or_default();
        let approval = annotations::decode(&name.parse()?, &written).approval;
        if let Some(approval) = approval.with_context(|| format!("read the approval of {name}"))? {
            approvals.insert(name.to_owned(), approval.get().clone());
        }
    }
    Ok(approvals)
}
