//! Every two of some nodes ping each other over the whole of a story: what breaks off, and for how long, shows afterwards.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::join::in_millis;
use crate::story::{Story, millis};
use keystone_lab::mesh::Node;
use keystone_lab::ping::Pinger;
use keystone_lab::wait;

/// Distance of the pings, and how long a silence between live peers counts as a break.
const PING_EVERY: Duration = Duration::from_millis(100);
const BREAK: Duration = Duration::from_secs(2);

/// How long first replies, and those after a restart, are waited for.
const PATIENCE: Duration = Duration::from_secs(15);

/// The pings between every two.
pub(super) struct Pairs(Vec<Pair>);

struct Pair {
    from: String,
    to: String,
    pinger: Pinger,
}

/// A node that was killed, and how long it took until all its pairs were back.
pub(super) struct Restart {
    node: String,
    killed: Instant,
    back: Instant,
}

impl Pairs {
    /// Starts a ping from each node to all that follow it, and waits for the first replies.
    pub(super) fn start(nodes: &[&Node]) -> Result<Self> {
        let mut pairs = Vec::new();
        for (number, from) in nodes.iter().enumerate() {
            for to in &nodes[number + 1..] {
                let pinger = Pinger::start(from.host(), to.mesh_v4()?, PING_EVERY)?;
                let (from, to) = (from.name().to_owned(), to.name().to_owned());
                pinger.first_reply(PATIENCE).with_context(|| format!("{from} pings {to}"))?;
                pairs.push(Pair { from, to, pinger });
            }
        }
        Ok(Self(pairs))
    }

    /// Stops the pings of a node that goes for good.
    pub(super) fn forget(&mut self, node: &str) {
        self.0.retain(|pair| !pair.has(node));
    }

    /// Kills `node` and starts it again; claims that it is back with everybody.
    pub(super) fn restart(
        &self,
        story: &mut Story,
        node: &Node,
        up: impl FnOnce(&Node) -> Result<()>,
    ) -> Result<Restart> {
        let name = node.name().to_owned();
        story.step(&format!("{name} is killed and started again"));
        let killed = Instant::now();
        node.kill()?;
        let started = Instant::now();
        up(node)?;
        let mut back = started;
        for pair in self.0.iter().filter(|pair| pair.has(&name)) {
            let claim = format!("{name} and {} find each other again", pair.other(&name));
            let replied = wait::until(&claim, PATIENCE, Duration::ZERO, || {
                node.check_alive()?;
                Ok(pair.pinger.reply_to_request_after(started, Duration::from_millis(200)).ok())
            });
            let found = match &replied {
                Ok(at) => format!("after {}", millis(at.duration_since(started))),
                Err(err) => format!("{err:#}"),
            };
            story.check(replied.is_ok(), &claim, &found);
            back = back.max(replied.unwrap_or_else(|_in_vain| Instant::now()));
        }
        Ok(Restart { node: name, killed, back })
    }

    /// Claims that no pair fell silent since `begin`, but for a node's own restart.
    pub(super) fn judge(&self, story: &mut Story, begin: Instant, restarts: &[Restart]) -> Vec<Value> {
        let end = Instant::now();
        let mut results = Vec::new();
        for pair in &self.0 {
            let gap = pair.longest_gap(begin, end, restarts);
            let (sent, answered) = pair.pinger.trace().counts(begin, end);
            let claim = format!("{} and {} go on all the time", pair.from, pair.to);
            let found = format!("longest silence {}, {answered} of {sent} answered", millis(gap));
            story.check(gap < BREAK, &claim, &found);
            results.push(json!({
                "from": pair.from,
                "to": pair.to,
                "longest_gap_ms": in_millis(gap),
                "sent": sent,
                "answered": answered,
            }));
        }
        results
    }
}

impl Pair {
    fn has(&self, node: &str) -> bool {
        self.from == node || self.to == node
    }

    fn other(&self, node: &str) -> &str {
        if self.from == node { &self.to } else { &self.from }
    }

    /// The longest silence between `begin` and `end`, restarts of its own nodes left out, which are claimed for
    /// themselves.
    fn longest_gap(&self, begin: Instant, end: Instant, restarts: &[Restart]) -> Duration {
        let trace = self.pinger.trace();
        let (mut longest, mut from) = (Duration::ZERO, begin);
        for restart in restarts.iter().filter(|restart| self.has(&restart.node)) {
            longest = longest.max(trace.longest_gap(from, restart.killed));
            from = restart.back;
        }
        longest.max(trace.longest_gap(from, end))
    }
}

/// Lets time pass until `since` lies so far back: an outage is what is measured.
pub(super) fn pass(time: Duration, since: Instant) {
    std::thread::sleep(time.saturating_sub(since.elapsed()));
}
