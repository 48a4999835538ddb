//! `outage`: the control plane and the relay are gone for long. Workers with a direct path go on; one of them is killed and
//! started again meanwhile, and finds the others from what it kept on disk. Then home and relay come back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use super::join::{Join, in_millis};
use super::stage::{ControlPlane, Stage};
use crate::story::{Story, millis};
use keystone_lab::mesh::{Node, Route};
use keystone_lab::ping::Pinger;
use keystone_lab::wait;
use keystone_lab::{Nat, RouterSpec};

/// Pings over the whole outage, and how long a silence between live direct peers counts as a break.
const PING_EVERY: Duration = Duration::from_millis(100);
const BREAK: Duration = Duration::from_secs(2);

/// How long paths, and the return to them after a restart, are waited for.
const PATIENCE: Duration = Duration::from_secs(15);

/// The pairs that are watched, from the one that restarts and between those that do not.
struct Watch {
    from: &'static str,
    to: &'static str,
    pinger: Pinger,
}

pub(super) fn play(stage: &mut Stage, story: &mut Story, duration: Duration) -> Result<Value> {
    story.chapter("A control plane, a relay, and three workers");
    let plane = stage.founders()?.found(story)?;
    let [a, b, public] = workers(stage)?;
    for worker in [&public, &a, &b] {
        let token = plane.home.create_token(1)?;
        story.step(&Join::measure(worker, &token, plane.home_v4, Route::Direct)?.tell());
    }
    let watches = watch(story, &a, &b, &public)?;

    story.chapter(&format!("Home and relay are gone for {}", millis(duration)));
    plane.kill()?;
    let gone = Instant::now();
    story.step("home and relay are killed");
    pass(duration / 2, gone);
    let restart = restart_meanwhile(story, &a, &watches)?;
    pass(duration, gone);
    let results = judge(story, &watches, gone, restart);

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

fn watch(story: &mut Story, a: &Node, b: &Node, public: &Node) -> Result<Vec<Watch>> {
    let pairs =
        [(a, b, "worker-a", "worker-b"), (a, public, "worker-a", "worker-pub"), (b, public, "worker-b", "worker-pub")];
    let mut watches = Vec::new();
    for (from, to, from_name, to_name) in pairs {
        let pinger = Pinger::start(from.host(), to.mesh_v4()?, PING_EVERY)?;
        pinger.first_reply(PATIENCE)?;
        let direct = from.wait_for_path(to_name, Route::Direct, PATIENCE).is_ok();
        story.check(
            direct,
            &format!("{from_name} and {to_name} are direct"),
            if direct { "direct" } else { "not direct" },
        );
        watches.push(Watch { from: from_name, to: to_name, pinger });
    }
    Ok(watches)
}

/// Lets time pass until `since` lies so far back: the outage is what is measured.
fn pass(time: Duration, since: Instant) {
    std::thread::sleep(time.saturating_sub(since.elapsed()));
}

/// Kills worker-a and starts it again; returns when it was started.
fn restart_meanwhile(story: &mut Story, a: &Node, watches: &[Watch]) -> Result<Instant> {
    story.step("worker-a is killed and started again, with home and relay still gone");
    a.kill()?;
    let started = Instant::now();
    a.up(&[])?;
    for watch in watches.iter().filter(|watch| watch.from == "worker-a") {
        let claim = format!("worker-a finds {} again from its snapshot", watch.to);
        let back = wait::until(&claim, PATIENCE, Duration::ZERO, || {
            a.check_alive()?;
            Ok(watch.pinger.reply_to_request_after(started, Duration::from_millis(200)).ok())
        });
        let found = match &back {
            Ok(at) => format!("after {}", millis(at.duration_since(started))),
            Err(err) => format!("{err:#}"),
        };
        story.check(back.is_ok(), &claim, &found);
    }
    Ok(started)
}

fn judge(story: &mut Story, watches: &[Watch], gone: Instant, restart: Instant) -> Vec<Value> {
    let now = Instant::now();
    let mut results = Vec::new();
    for Watch { from, to, pinger } in watches {
        let trace = pinger.trace();
        // The restart is a break of its own; what is claimed of worker-a is the time before it and after it.
        let settled = (restart + PATIENCE).min(now);
        let gap = if *from == "worker-a" {
            trace.longest_gap(gone, restart - BREAK / 2).max(trace.longest_gap(settled, now))
        } else {
            trace.longest_gap(gone, now)
        };
        let (sent, answered) = trace.counts(gone, now);
        let claim = format!("{from} and {to} go on all the time");
        story.check(gap < BREAK, &claim, &format!("longest silence {}, {answered} of {sent} answered", millis(gap)));
        results.push(
            json!({ "from": from, "to": to, "longest_gap_ms": in_millis(gap), "sent": sent, "answered": answered }),
        );
    }
    results
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
