//! The pages: what is served under which path.
//!
//! | path | says |
//! | --- | --- |
//! | `/metrics` | metrics, for Prometheus |
//! | `/healthz` | 200 while the program answers |
//! | `/readyz` | 200 once it does its work; otherwise 503 and why not |
//! | `/v1/status` | the whole status as JSON, as `keystone-mesh status --json` prints it |
//! | `/v1/peers` | the node's name and its peers as JSON (the daemon alone) |

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use tokio::sync::{Mutex, mpsc, oneshot};

use super::HttpServer;
use crate::clock::unix_time;
use crate::control::{Answer, Call, Request};
use crate::metrics::daemon::Around;
use crate::metrics::{self, Format};
use crate::quic::relay_server::{RelayServer, RelaySnapshot};
use crate::status::Status;

/// How long an answer of the driver is served again: requests cost it once a second at most.
const FRESH: Duration = Duration::from_secs(1);
/// How long the driver may take for its answer. It waits for the control plane while it leaves a network, for nothing
/// else.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves a daemon's pages; `peers` is the number up to which each peer has metrics of its own.
pub fn serve_daemon(calls: mpsc::Sender<Call>, peers: usize) -> HttpServer {
    let refused = Arc::<AtomicU64>::default();
    HttpServer::start(daemon(ask_driver(calls), peers, refused.clone()), refused)
}

/// Serves the pages of a relay alone.
pub fn serve_relay(relay: Arc<RelayServer>) -> HttpServer {
    HttpServer::start(self::relay(move || relay.snapshot()), Arc::default())
}

type Asked<T> = Pin<Box<dyn Future<Output = Option<T>> + Send>>;
type Ask<T> = Box<dyn Fn() -> Asked<T> + Send + Sync>;

/// A value that is asked for once a second at most; whoever comes meanwhile waits for the same answer.
struct Source<T> {
    ask: Ask<T>,
    last: Mutex<Option<(Instant, Arc<T>)>>,
}

impl<T> Source<T> {
    fn new(ask: Ask<T>) -> Self {
        Self { ask, last: Mutex::default() }
    }

    async fn get(&self) -> Option<Arc<T>> {
        let mut last = self.last.lock().await;
        if let Some((at, value)) = &*last
            && at.elapsed() < FRESH
        {
            return Some(value.clone());
        }
        let value = Arc::new(tokio::time::timeout(PATIENCE, (self.ask)()).await.ok()??);
        *last = Some((Instant::now(), value.clone()));
        Some(value)
    }
}

fn ask_driver(calls: mpsc::Sender<Call>) -> Ask<Status> {
    Box::new(move || {
        let calls = calls.clone();
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            calls.send(Call { request: Request::Status, answer }).await.ok()?;
            let answer = answered.await.ok()?;
            if let Answer::Status(status) = answer { Some(*status) } else { None }
        })
    })
}

struct Daemon {
    status: Source<Status>,
    peers: usize,
    refused: Arc<AtomicU64>,
}

type Shared = State<Arc<Daemon>>;

fn daemon(ask: Ask<Status>, peers: usize, refused: Arc<AtomicU64>) -> Router {
    let state = Arc::new(Daemon { status: Source::new(ask), peers, refused });
    Router::new()
        .route("/metrics", get(daemon_metrics))
        .route("/healthz", get(async |State(daemon): Shared| daemon.answer(|_| "ok\n".into_response()).await))
        .route("/readyz", get(async |State(daemon): Shared| daemon.answer(|status| ready(status.not_ready())).await))
        .route("/v1/status", get(async |State(daemon): Shared| daemon.answer(json).await))
        .route("/v1/peers", get(async |State(daemon): Shared| daemon.answer(|s| json(&s.peers_page())).await))
        .fallback(not_found)
        .with_state(state)
}

async fn daemon_metrics(State(daemon): Shared, headers: HeaderMap) -> Response {
    let refused = daemon.refused.load(Ordering::Relaxed);
    let around = Around { peers: daemon.peers, refused, now: unix_time() };
    daemon.answer(|status| metrics_page(metrics::daemon::page(status, around), &headers)).await
}

impl Daemon {
    /// An answer from the status; 503 where the driver gives none.
    async fn answer(&self, from: impl FnOnce(&Status) -> Response) -> Response {
        match self.status.get().await {
            Some(status) => from(&status),
            None => {
                let why =
                    format!("the daemon does not answer within {} s: it is stopping, or stuck\n", PATIENCE.as_secs());
                (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
            }
        }
    }
}

fn relay(snapshot: impl Fn() -> RelaySnapshot + Send + Sync + 'static) -> Router {
    let snapshot = Arc::new(snapshot);
    let seen = snapshot.clone();
    Router::new()
        .route("/metrics", get(async move |headers: HeaderMap| metrics_page(metrics::relay::page(&seen()), &headers)))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(async || ready(None)))
        .route("/v1/status", get(async move || json(&snapshot())))
        .fallback(not_found)
}

fn metrics_page(page: metrics::Page, headers: &HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = Format::negotiate(accept);
    ([(header::CONTENT_TYPE, format.media_type())], page.render(format)).into_response()
}

fn ready(not_ready: Option<String>) -> Response {
    match not_ready {
        None => "ready\n".into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

fn json<T: Serialize>(value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn not_found() -> Response {
    (StatusCode::NOT_FOUND, "pages: /metrics /healthz /readyz /v1/status /v1/peers\n").into_response()
}

#[cfg(test)]
mod tests;
