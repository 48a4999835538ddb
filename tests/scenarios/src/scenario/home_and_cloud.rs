//! `home-and-cloud`: the product's main job. A control plane behind a home router, workers behind two kinds of cloud NAT and
//! one with a public address, and a relay become one network; then a path dies and heals, and a daemon is killed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::join::{Join, in_millis};
use super::stage::{ControlPlane, Stage};
use crate::story::{Story, millis};
use keystone_lab::mesh::{Node, Peer, Route};
use keystone_lab::ping::Pinger;
use keystone_lab::{Nat, RouterSpec, iperf, wait};

/// What is between the two ends of every pair, and whether UDP can go straight through it. Symmetric against
/// port-restricted stays on the relay: neither end can guess the port that the other's packets must come from.
const PAIRS: [(&str, &str, Hope); 6] = [
    ("home", "worker-pub", Hope::Direct),
    ("home", "worker-pr", Hope::Direct),
    ("home", "worker-sym", Hope::RelayedForAReason),
    ("worker-pub", "worker-pr", Hope::Direct),
    ("worker-pub", "worker-sym", Hope::Direct),
    ("worker-pr", "worker-sym", Hope::RelayedForAReason),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hope {
    Direct,
    RelayedForAReason,
}

/// Distance of the pings that measure gaps: the error of that measurement.
const PING_EVERY: Duration = Duration::from_millis(10);

/// How long anything is waited for before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long a healed link may take to carry traffic again: a path that failed is tried again at growing distances.
const HEALING_PATIENCE: Duration = Duration::from_secs(90);

/// Goals. A claim fails at [`TOLERANCE`] times a goal only: the machine may be busy with other things.
const FAILOVER_GOAL: Duration = Duration::from_secs(1);
const RESTART_GOAL: Duration = Duration::from_secs(1);
const TOLERANCE: u32 = 5;

/// Replies from which a round trip is taken.
const PINGS_PER_PAIR: usize = 20;

/// Rounds of the throughput measurement, and how many seconds each of its halves takes.
const ROUNDS: usize = 3;
const SECONDS: u32 = 2;

/// What stands between the two is one machine's memory, so even a slow data plane is far above this.
const LEAST_MBIT: f64 = 1.0;

pub(super) fn play(stage: &mut Stage, story: &mut Story) -> Result<Value> {
    story.chapter("The network");
    let start = Instant::now();
    let founders = stage.founders()?;
    let workers = [
        worker_behind(stage, "worker-sym", "cloud-a", Nat::Symmetric)?,
        worker_behind(stage, "worker-pr", "cloud-b", Nat::PortRestricted)?,
        public_worker(stage, "worker-pub")?,
    ];
    story.text(PICTURE);
    story.table(&stage.describe());
    story.step(&format!("all of it is up after {}", millis(start.elapsed())));

    story.chapter("The control plane");
    let plane = founders.found(story)?;

    story.chapter("Workers join, each with a token and nothing else");
    let joins = workers.iter().map(|worker| join(story, &plane, worker)).collect::<Result<Vec<_>>>()?;

    let cast = Cast { plane, workers };
    story.chapter("Everyone reaches everyone");
    let pairs = cast.pairs(story)?;

    story.chapter("TCP through the mesh, against the same cables without it");
    let throughput = cast.throughput(story)?;

    story.chapter("The direct path between home and worker-pr dies, and heals");
    let failover = cast.failover(stage, story)?;

    story.chapter("The daemon of worker-pr is killed (-9) and started again");
    let restart = cast.restart(story)?;

    story.chapter("After all that, everyone still reaches everyone");
    let pairs_at_end = cast.pairs(story)?;

    story.chapter("In the end");
    table(story, &joins, &pairs_at_end, &throughput, &failover);
    Ok(json!({
        "joins": joins,
        "pairs": pairs,
        "throughput": throughput,
        "failover": failover,
        "restart": restart,
        "pairs_at_end": pairs_at_end,
    }))
}

const PICTURE: &str = r"
      home                   worker-sym              worker-pr
        |                        |                       |
  [home-router]              [cloud-a]               [cloud-b]              worker-pub    relay
  port-restricted            symmetric            port-restricted               |           |
        |                        |                       |                      |           |
  ======+========================+====== internet =======+======================+===========+====

";

fn worker_behind(stage: &mut Stage, name: &str, router: &str, nat: Nat) -> Result<Arc<Node>> {
    // Both clouds give out the same private addresses, as clouds do.
    let spec = RouterSpec { nat, lan: "10.0.0.1/24".parse()?, ..RouterSpec::default() };
    let (host, _router) = stage.host_behind(name, router, spec)?;
    stage.install(&host, name)
}

fn public_worker(stage: &mut Stage, name: &str) -> Result<Arc<Node>> {
    let host = stage.public_host(name)?;
    stage.install(&host, name)
}

fn join(story: &mut Story, plane: &ControlPlane, worker: &Node) -> Result<Join> {
    let hope = hope_for("home", worker.name());
    let token = plane.home.create_token(1)?;
    let hoped_route = if hope == Hope::Direct { Route::Direct } else { Route::Relayed };
    let join = Join::measure(worker, &token, plane.home_v4, hoped_route)?;
    story.step(&join.tell());
    Ok(join)
}

fn hope_for(a: &str, b: &str) -> Hope {
    let pair = PAIRS.iter().find(|(left, right, _)| (*left, *right) == (a, b));
    pair.map_or(Hope::RelayedForAReason, |(_, _, hope)| *hope)
}

/// Everybody, once all have joined.
struct Cast {
    plane: ControlPlane,
    workers: [Arc<Node>; 3],
}

/// What was seen between two nodes.
#[derive(Clone, Debug, Serialize)]
struct Pair {
    from: String,
    to: String,
    path: Route,
    via: Option<String>,
    reason: Option<String>,
    rtt_ms: Option<f64>,
}

/// Medians over all rounds, in bits per second.
#[derive(Clone, Debug, Serialize)]
struct Throughput {
    from: String,
    to: String,
    bare_bits_per_second: f64,
    mesh_bits_per_second: f64,
    ratio: f64,
}

/// A path that died and healed.
#[derive(Clone, Debug, Serialize)]
struct Failover {
    gap_ms: f64,
    relayed_after_ms: Option<f64>,
    direct_again_after_ms: Option<f64>,
    gap_at_return_ms: f64,
}

/// How soon a peer heard from a restarted daemon.
#[derive(Clone, Debug, Serialize)]
struct Return {
    peer: String,
    after_start_ms: Option<f64>,
}

impl Cast {
    fn node(&self, name: &str) -> Result<&Arc<Node>> {
        let everybody = self.workers.iter().chain([&self.plane.home]);
        everybody.into_iter().find(|node| node.name() == name).with_context(|| format!("nobody is called {name}"))
    }

    fn pairs(&self, story: &mut Story) -> Result<Vec<Pair>> {
        PAIRS.iter().map(|pair| self.pair(story, pair)).collect()
    }

    fn pair(&self, story: &mut Story, (from, to, hope): &(&str, &str, Hope)) -> Result<Pair> {
        let (from_node, to_node) = (self.node(from)?, self.node(to)?);
        let pinger = Pinger::start(from_node.host(), to_node.mesh_v4()?, PING_EVERY)?;
        let reached = pinger.first_reply(PATIENCE);
        let (peer, as_hoped) = settled(from_node, to, *hope)?;
        let since = Instant::now();
        if reached.is_ok() {
            wait::until(&format!("{PINGS_PER_PAIR} replies from {to} to {from}"), PATIENCE, PING_EVERY, || {
                Ok((pinger.trace().counts(since, Instant::now()).1 >= PINGS_PER_PAIR).then_some(()))
            })?;
        }
        let rtt = pinger.trace().median_rtt(since, Instant::now());
        let claim = match hope {
            Hope::Direct => format!("{from} and {to} are direct"),
            Hope::RelayedForAReason => format!("{from} and {to} are relayed and know why"),
        };
        let round_trip = rtt.map_or_else(|| "no reply".to_owned(), millis);
        let reason = peer.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        story.check(reached.is_ok() && as_hoped, &claim, &format!("{}, {round_trip}{reason}", peer.path));
        Ok(Pair {
            from: (*from).to_owned(),
            to: (*to).to_owned(),
            path: peer.path,
            via: peer.via,
            reason: peer.reason,
            rtt_ms: rtt.map(in_millis),
        })
    }

    fn throughput(&self, story: &mut Story) -> Result<Throughput> {
        let (home, worker) = (&self.plane.home, self.node("worker-pub")?);
        let (bare, mesh) = (worker.host().v4(), worker.mesh_v4()?);
        let server = iperf::Server::start(worker.host())?;
        let mut rates = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            for (address, rates) in [bare, mesh].into_iter().zip(&mut rates) {
                rates.push(iperf::tcp_bits_per_second(home.host(), address.into(), SECONDS)?);
            }
        }
        drop(server);
        let [bare, mesh] = rates.map(median);
        let ratio = mesh / bare;
        let found = format!("{:.0} Mbit/s of {:.0}, {:.1} %", mesh / 1e6, bare / 1e6, ratio * 100.0);
        story.check(mesh / 1e6 >= LEAST_MBIT, "TCP flows from home to worker-pub through the mesh", &found);
        Ok(Throughput {
            from: home.name().to_owned(),
            to: worker.name().to_owned(),
            bare_bits_per_second: bare,
            mesh_bits_per_second: mesh,
            ratio,
        })
    }

    fn failover(&self, stage: &Stage, story: &mut Story) -> Result<Failover> {
        let (home, worker) = (&self.plane.home, self.node("worker-pr")?);
        let pinger = Pinger::start(home.host(), worker.mesh_v4()?, PING_EVERY)?;
        pinger.first_reply(PATIENCE)?;

        stage.world.block_udp(home.host(), worker.host())?;
        let cut = Instant::now();
        story.step("the internet drops all UDP between the two, and nothing else");
        let relayed = home.wait_for_path("worker-pr", Route::Relayed, PATIENCE);
        let relayed_after = relayed.is_ok().then(|| cut.elapsed());
        let goes_on = pinger.reply_to_request_after(Instant::now(), PATIENCE);
        let gap = pinger.trace().longest_gap(cut, Instant::now());
        let bound = FAILOVER_GOAL * TOLERANCE;
        let found = format!("silent for {} (goal {})", millis(gap), millis(FAILOVER_GOAL));
        story.check(relayed.is_ok() && goes_on.is_ok() && gap <= bound, "traffic goes on by the relay", &found);

        stage.world.unblock_udp(home.host(), worker.host())?;
        let healed = Instant::now();
        story.step("the internet is well again");
        let direct = home.wait_for_path("worker-pr", Route::Direct, HEALING_PATIENCE);
        let direct_after = direct.is_ok().then(|| healed.elapsed());
        let found = direct_after.map_or_else(|| "not direct".to_owned(), |time| format!("after {}", millis(time)));
        story.check(direct.is_ok(), "the path becomes direct again", &found);
        let gap_at_return = pinger.trace().longest_gap(healed, Instant::now());
        let claim = "the return to the direct path loses no second";
        story.check(gap_at_return <= bound, claim, &format!("silent for {}", millis(gap_at_return)));
        Ok(Failover {
            gap_ms: in_millis(gap),
            relayed_after_ms: relayed_after.map(in_millis),
            direct_again_after_ms: direct_after.map(in_millis),
            gap_at_return_ms: in_millis(gap_at_return),
        })
    }

    fn restart(&self, story: &mut Story) -> Result<Vec<Return>> {
        let worker = self.node("worker-pr")?;
        let address = worker.mesh_v4()?;
        let peers = [self.node("home")?, self.node("worker-pub")?, self.node("worker-sym")?];
        let pingers = peers.map(|peer| Pinger::start(peer.host(), address, PING_EVERY));
        worker.kill()?;
        story.step("killed");
        let started = Instant::now();
        worker.up(&[])?;
        let mut returns = Vec::new();
        for (peer, pinger) in peers.iter().zip(pingers) {
            let reply = pinger?.reply_to_request_after(started, PATIENCE);
            worker.check_alive()?;
            let after = reply.ok().map(|at| at.duration_since(started));
            let found = after.map_or_else(
                || "no reply".to_owned(),
                |time| format!("{} after its start (goal {})", millis(time), millis(RESTART_GOAL)),
            );
            let in_time = after.is_some_and(|time| time <= RESTART_GOAL * TOLERANCE);
            story.check(in_time, &format!("{} hears from worker-pr again", peer.name()), &found);
            returns.push(Return { peer: peer.name().to_owned(), after_start_ms: after.map(in_millis) });
        }
        Ok(returns)
    }
}

/// Waits for the path that is hoped for; says what there is in the end, and whether it is that.
fn settled(node: &Node, peer: &str, hope: Hope) -> Result<(Peer, bool)> {
    let wanted = |peer: &Peer| match hope {
        Hope::Direct => peer.path == Route::Direct,
        Hope::RelayedForAReason => peer.path == Route::Relayed && peer.reason.is_some(),
    };
    let seen = node.wait_until("a settled path", PATIENCE, |status| status.peer(peer).is_some_and(wanted));
    let as_hoped = seen.is_ok();
    let status = seen.or_else(|_in_vain| node.status())?;
    let peer = status.peer(peer).cloned().with_context(|| format!("{} knows no {peer}", node.name()))?;
    Ok((peer, as_hoped))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn table(story: &Story, joins: &[Join], pairs: &[Pair], throughput: &Throughput, failover: &Failover) {
    let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |ms| millis(Duration::from_secs_f64(ms / 1e3)));
    let mut rows = vec![
        ["from", "to", "joined in", "first path", "direct after", "path", "round trip"].map(str::to_owned).to_vec(),
    ];
    for pair in pairs {
        let join = joins.iter().find(|join| pair.from == "home" && join.worker == pair.to);
        rows.push(vec![
            pair.from.clone(),
            pair.to.clone(),
            ms(join.map(|join| join.first_reply_ms)),
            join.map_or_else(|| "-".to_owned(), |join| join.first_path.to_string()),
            ms(join.and_then(|join| join.direct_ms)),
            pair.path.to_string(),
            ms(pair.rtt_ms),
        ]);
    }
    story.table(&rows);
    story.text(&format!(
        "\n  TCP {} to {}: {:.0} Mbit/s through the mesh, {:.0} Mbit/s without, ratio {:.3}\n  \
         direct path dead: silent for {}, direct again after {}\n",
        throughput.from,
        throughput.to,
        throughput.mesh_bits_per_second / 1e6,
        throughput.bare_bits_per_second / 1e6,
        throughput.ratio,
        ms(Some(failover.gap_ms)),
        ms(failover.direct_again_after_ms),
    ));
}
