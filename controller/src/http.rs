//! The HTTP listener: `/metrics`, `/healthz`, `/readyz`.
//!
//! Two replicas on one host network want the same port for a moment while one follows the other. So a port that is
//! taken is said and tried again, and nothing else waits for it.

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

use crate::metrics;

/// Between two tries to take the port.
const RETRY: Duration = Duration::from_secs(5);
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

/// Serves until it is dropped.
pub async fn serve(listen: SocketAddr, registry: Registry, health: Arc<Health>) {
    let shared = Shared { registry: Arc::new(Mutex::new(registry)), health };
    let router = Router::new()
        .route("/metrics", routing::get(scrape))
        .route("/healthz", routing::get(healthz))
        .route("/readyz", routing::get(readyz))
        .with_state(shared);
    loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => {
                tracing::info!(%listen, "serving metrics");
                if let Err(error) = axum::serve(listener, router.clone()).await {
                    tracing::warn!(%error, %listen, "the metrics listener failed; opening it again");
                }
            }
            Err(error) => tracing::warn!(
                %error, %listen,
                "metrics cannot be served yet; another replica may have the port, else choose one with --metrics-listen"
            ),
        }
        tokio::time::sleep(RETRY).await;
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
