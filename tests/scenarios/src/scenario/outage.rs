//! `outage`: the control plane and the relay are gone for long. Workers with a direct path go on; one of them is killed and
//! started again meanwhile, and finds the others from what it kept on disk. Then home and relay come back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use super::join::Join;
use super::pairs::{Pairs, pass};
use super::stage::{ControlPlane, Stage};
use crate::story::{Story, millis};
use keystone_lab::mesh::{Node, Route};
use keystone_lab::ping::Pinger;
use keystone_lab::{Nat, RouterSpec};

/// Pings that find the way home again.
const PING_EVERY: Duration = Duration::from_millis(100);

/// How long paths, and the return of home, are waited for.
const PATIENCE: Duration = Duration::from_secs(15);

pub(super) fn play(stage: &mut Stage, story: &mut Story, duration: Duration) -> Result<Value> {
    story.chapter("A control plane, a relay, and three workers");
    let plane = stage.founders()?.found(story)?;
    let [a, b, public] = workers(stage)?;
    for worker in [&public, &a, &b] {
        let token = plane.home.create_token(1)?;
        story.step(&Join::measure(worker, &token, plane.home_v4, Route::Direct)?.tell());
    }
    let pairs = Pairs::start(&[&a, &b, &public])?;
    for (from, to) in [(&a, "worker-b"), (&a, "worker-pub"), (&b, "worker-pub")] {
        let direct = from.wait_for_path(to, Route::Direct, PATIENCE).is_ok();
        let claim = format!("{} and {to} are direct", from.name());
        story.check(direct, &claim, if direct { "direct" } else { "not direct" });
    }

    story.chapter(&format!("Home and relay are gone for {}", millis(duration)));
    plane.kill()?;
    let gone = Instant::now();
    story.step("home and relay are killed");
    pass(duration / 2, gone);
    // From its snapshot: there is nobody to ask.
    let restart = pairs.restart(story, &a, |node| node.up(&[]))?;
    pass(duration, gone);
    let results = pairs.judge(story, gone, &[restart]);

    story.chapter("Home and relay come back");
    come_back(story, &plane, &[a, b, public])?;
    Ok(json!({ "outage_s": duration.as_secs_f64(), "pairs": results }))
}

fn workers(stage: &mut Stage) -> Result<[Arc<Node>; 3]> {
    let behind = || -> Result<RouterSpec> {
        Ok(RouterSpec { nat: Nat::PortRestricted, lan: "10.0.0.1/24".parse()?, ..RouterSpec::default() })
    };
    let (a, _router) = stage.host_behind("worker-a", "cloud-a", behind()?)?;
    let (b, _router) = stage.host_behind("worker-b", "cloud-b", behind()?)?;
    let public = stage.public_host("worker-pub")?;
    Ok([stage.install(&a, "worker-a")?, stage.install(&b, "worker-b")?, stage.install(&public, "worker-pub")?])
}

fn come_back(story: &mut Story, plane: &ControlPlane, workers: &[Arc<Node>]) -> Result<()> {
    plane.start()?;
    let back = Instant::now();
    for worker in workers {
        let pinger = Pinger::start(worker.host(), plane.home_v4, PING_EVERY)?;
        let reply = pinger.first_reply(2 * PATIENCE);
        let found = reply.as_ref().map_or_else(|err| format!("{err:#}"), |at| format!("after {}", millis(*at - back)));
        story.check(reply.is_ok(), &format!("{} reaches home again", worker.name()), &found);
    }
    Ok(())
}
