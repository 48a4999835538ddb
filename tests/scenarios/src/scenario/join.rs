//! One machine joins: from the start of its daemon to the first reply from home, and to a direct path.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::story::millis;
use keystone_lab::mesh::{Node, Route};
use keystone_lab::ping::Pinger;
use keystone_lab::wait;

/// How long a first reply is waited for before the join counts as failed.
const REPLY_PATIENCE: Duration = Duration::from_secs(15);

/// How long a direct path is waited for.
const DIRECT_PATIENCE: Duration = Duration::from_secs(10);

/// Distance of the pings that find the first reply: the error of that measurement.
const PING_EVERY: Duration = Duration::from_millis(10);

/// What a join took.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Join {
    /// Who joined.
    pub(super) worker: String,
    /// From the start of the daemon to the first ping reply from home through the mesh.
    pub(super) first_reply_ms: f64,
    /// The path of that time.
    pub(super) first_path: Route,
    /// From the start of the daemon to a direct path, if it became one.
    pub(super) direct_ms: Option<f64>,
    /// The path in the end.
    pub(super) path: Route,
    /// Why that is not direct.
    pub(super) reason: Option<String>,
}

impl Join {
    /// Starts the daemon of `worker`, which has no state yet, and waits for the reply; for a direct path too if
    /// `hoped_for` says so.
    pub(super) fn measure(worker: &Node, token: &str, home: Ipv4Addr, hoped_for: Route) -> Result<Self> {
        let pinger = Pinger::start(worker.host(), home, PING_EVERY)?;
        let start = Instant::now();
        worker.up_with_token(token)?;
        let replied = wait::until("the first reply from home", REPLY_PATIENCE, Duration::ZERO, || {
            worker.check_alive()?;
            Ok(pinger.first_reply(Duration::from_millis(100)).ok())
        });
        let replied = replied.with_context(|| format!("{} joins", worker.name()))?;
        let status = worker.wait_until("knows home", REPLY_PATIENCE, |status| status.peer("home").is_some())?;
        let peer = status.peer("home").cloned().context("the joined node knows no home")?;
        let first_path = peer.path;
        let (peer, direct_ms) = if hoped_for == Route::Direct {
            match worker.wait_for_path("home", Route::Direct, DIRECT_PATIENCE) {
                Ok(peer) => (peer, Some(in_millis(start.elapsed()))),
                Err(_in_vain) => (worker.status()?.peer("home").cloned().unwrap_or(peer), None),
            }
        } else {
            (peer, None)
        };
        Ok(Self {
            worker: worker.name().to_owned(),
            first_reply_ms: in_millis(replied.duration_since(start)),
            first_path,
            direct_ms,
            path: peer.path,
            reason: peer.reason,
        })
    }

    /// One sentence.
    pub(super) fn tell(&self) -> String {
        let ms = |value: f64| millis(Duration::from_secs_f64(value / 1e3));
        let later = match self.direct_ms {
            Some(direct) if self.first_path != Route::Direct => format!(", direct after {}", ms(direct)),
            None if self.first_path != self.path => format!(", then {}", self.path),
            Some(_) | None => String::new(),
        };
        let reason = self.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        format!(
            "{} has a reply from home after {}, {}{later}{reason}",
            self.worker,
            ms(self.first_reply_ms),
            self.first_path
        )
    }
}

pub(super) fn in_millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
