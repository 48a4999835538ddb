//! The HTTP listener: `/metrics`, `/healthz`, `/readyz`.
//!
//! Replicas in pods with networks of their own serve all of them, those that wait too. Where two share a host's network
//! only one can have the port, and that is the leader: whoever waits beside it leaves it alone. A port that is taken is
//! said and tried again, and nothing else waits for it.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Router, routing};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::lease::Sight;
use crate::metrics;

/// Between two tries to take the port.
const RETRY: Duration = Duration::from_secs(1);
/// The first look at the Lease is waited for so long, so that a replica which will wait does not take the port first.
/// An API server that is away must not keep the health checks from being answered.
const FIRST_LOOK: Duration = Duration::from_secs(2);
/// Answers under way when the port is left are given so long.
const FINISH: Duration = Duration::from_secs(1);
/// The loop turns several times in so long, whatever happens.
const STUCK: Duration = Duration::from_secs(120);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What `/healthz` and `/readyz` say.
#[derive(Debug)]
pub struct Health {
    started: Instant,
    /// Milliseconds from the start to the loop's last turn.
    turned: AtomicU64,
    ready: AtomicBool,
}

impl Default for Health {
    fn default() -> Self {
        Self { started: Instant::now(), turned: AtomicU64::new(0), ready: AtomicBool::new(false) }
    }
}

impl Health {
    /// The loop turned; `ready` where everything that must be known was listed.
    pub fn handle_turn(&self, ready: bool) {
        self.turned.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.ready.store(ready, Ordering::Relaxed);
    }

    fn is_alive(&self) -> bool {
        let turned = Duration::from_millis(self.turned.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(turned) < STUCK
    }
}

#[derive(Clone)]
struct Shared {
    registry: Arc<Mutex<Registry>>,
    health: Arc<Health>,
}

/// Where a port is: whoever has the same place cannot have it, too.
pub fn place(listen: SocketAddr) -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let network = fs::read_link("/proc/self/ns/net")?;
    Ok(format!("{} {} {}", boot.trim(), network.display(), listen.port()))
}

/// Serves until it is dropped, while `sights` do not tell that the leader wants the port.
pub async fn serve(
    listen: SocketAddr,
    registry: Registry,
    health: Arc<Health>,
    mut sights: watch::Receiver<Option<Sight>>,
) {
    let shared = Shared { registry: Arc::new(Mutex::new(registry)), health };
    let router = Router::new()
        .route("/metrics", routing::get(scrape))
        .route("/healthz", routing::get(healthz))
        .route("/readyz", routing::get(readyz))
        .with_state(shared);
    let _ = tokio::time::timeout(FIRST_LOOK, sights.wait_for(Option::is_some)).await;
    let mut told = false;
    loop {
        if is_wanted(*sights.borrow_and_update()) {
            tracing::info!(
                %listen,
                "the leader runs on this very network and serves the metrics; this replica leaves it the port until it \
                 leads itself"
            );
            if sights.wait_for(|sight| !is_wanted(*sight)).await.is_err() {
                return;
            }
        }
        match TcpListener::bind(listen).await {
            Ok(listener) => {
                tracing::info!(%listen, "serving metrics");
                told = false;
                serve_until_wanted(listener, router.clone(), sights.clone()).await;
            }
            Err(error) if !told => {
                tracing::warn!(
                    %error, %listen,
                    "metrics cannot be served yet, trying again; a replica that leads gets the port from one that waits, \
                     so if this stays another program has it: choose another with --metrics-listen"
                );
                told = true;
            }
            Err(error) => tracing::debug!(%error, %listen, "metrics cannot be served yet"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn is_wanted(sight: Option<Sight>) -> bool {
    sight.is_some_and(|sight| sight.beside)
}

/// Serves until the leader wants the port. Connections that are kept open end, too: a scraper has to come to the leader.
async fn serve_until_wanted(listener: TcpListener, router: Router, sights: watch::Receiver<Option<Sight>>) {
    let wanted = |mut sights: watch::Receiver<Option<Sight>>| async move {
        let seen = sights.wait_for(|sight| is_wanted(*sight)).await.is_ok();
        if !seen {
            // Nobody looks any longer.
            std::future::pending::<()>().await;
        }
    };
    let too_long = async {
        wanted(sights.clone()).await;
        tokio::time::sleep(FINISH).await;
    };
    tokio::select! {
        ended = axum::serve(listener, router).with_graceful_shutdown(wanted(sights.clone())) => {
            if let Err(error) = ended {
                tracing::warn!(%error, "the metrics listener failed; opening it again");
            }
        }
        () = too_long => {}
    }
}

async fn scrape(State(shared): State<Shared>) -> Response {
    let text = metrics::encode(&shared.registry.lock().unwrap_or_else(PoisonError::into_inner));
    ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response()
}

async fn healthz(State(shared): State<Shared>) -> (StatusCode, &'static str) {
    if shared.health.is_alive() { (StatusCode::OK, "ok\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "stuck\n") }
}

async fn readyz(State(shared): State<Shared>) -> (StatusCode, &'static str) {
    if shared.health.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not everything was listed yet; does the API server answer?\n")
    }
}
