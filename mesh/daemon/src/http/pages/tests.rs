use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;
use crate::status::Approval;
use crate::status::tests::sample;

/// A server of these pages on a port of loopback.
async fn serve(pages: Router) -> (HttpServer, SocketAddr) {
    let server = HttpServer::start(pages, Arc::default());
    server.set_addresses(BTreeSet::from(["127.0.0.1:0".parse().unwrap()]));
    let mut bound = server.bound();
    let bound = tokio::time::timeout(Duration::from_secs(10), bound.wait_for(|bound| !bound.is_empty())).await;
    let address = *bound.unwrap().unwrap().first().unwrap();
    (server, address)
}

async fn request(address: SocketAddr, head: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{head}\r\nHost: node\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

async fn fetch(address: SocketAddr, page: &str) -> (u16, String) {
    let answer = request(address, &format!("GET {page} HTTP/1.1")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// The driver: answers with this status, and counts how often it is asked.
fn driver(status: Status) -> (mpsc::Sender<Call>, Arc<AtomicUsize>) {
    let (calls, mut received) = mpsc::channel::<Call>(1);
    let asked = Arc::<AtomicUsize>::default();
    let count = asked.clone();
    tokio::spawn(async move {
        while let Some(call) = received.recv().await {
            assert!(matches!(call.request, Request::Status));
            count.fetch_add(1, Ordering::Relaxed);
            let _ = call.answer.send(Answer::Status(Box::new(status.clone())));
        }
    });
    (calls, asked)
}

fn pages(calls: mpsc::Sender<Call>) -> Router {
    daemon(ask_driver(calls), 100, Arc::default())
}

#[tokio::test]
async fn the_pages_of_a_daemon_say_what_the_commands_say() {
    let (calls, _) = driver(sample());
    let (_server, address) = serve(pages(calls)).await;
    assert_eq!(fetch(address, "/healthz").await, (200, "ok\n".into()));
    assert_eq!(fetch(address, "/readyz").await, (200, "ready\n".into()));
    let (code, status) = fetch(address, "/v1/status").await;
    assert_eq!((code, status), (200, serde_json::to_string(&sample()).unwrap()));
    let (code, peers) = fetch(address, "/v1/peers").await;
    assert_eq!((code, peers), (200, serde_json::to_string(&sample().peers_page()).unwrap()));
    let (code, metrics) = fetch(address, "/metrics").await;
    assert_eq!(code, 200);
    assert!(metrics.contains("keystone_mesh_peers{path=\"direct\"} 1.0\n"), "{metrics}");
}

#[tokio::test]
async fn a_node_that_is_not_ready_says_why() {
    let mut status = sample();
    status.node.approval = Approval::Pending;
    let (calls, _) = driver(status);
    let (_server, address) = serve(pages(calls)).await;
    let (code, why) = fetch(address, "/readyz").await;
    assert_eq!((code, why.as_str()), (503, "this node is pending: the network has not approved it\n"));
    assert_eq!(fetch(address, "/healthz").await.0, 200);
}

#[tokio::test]
async fn many_requests_cost_the_driver_one_answer_a_second() {
    let (calls, asked) = driver(sample());
    let source = Source::new(ask_driver(calls));
    let started = Instant::now();
    let mut answers = 0;
    while started.elapsed() < Duration::from_millis(1500) {
        answers += usize::from(source.get().await.is_some());
        tokio::task::yield_now().await;
    }
    let allowed = started.elapsed().as_secs() as usize + 1;
    let asked = asked.load(Ordering::Relaxed);
    assert!(answers > 10 && asked <= allowed, "{asked} questions for {answers} answers");
}

#[tokio::test]
async fn a_driver_that_does_not_answer_makes_the_daemon_unhealthy() {
    let (calls, _stuck) = mpsc::channel(1);
    let (_server, address) = serve(pages(calls)).await;
    let (code, why) = fetch(address, "/healthz").await;
    assert_eq!(code, 503);
    assert!(why.contains("does not answer within 5 s"), "{why}");
}

#[tokio::test]
async fn only_get_is_answered_and_unknown_pages_are_named() {
    let (calls, _) = driver(sample());
    let (_server, address) = serve(pages(calls)).await;
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
        let answer = request(address, &format!("{method} /v1/status HTTP/1.1")).await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{method}: {answer}");
    }
    let (code, body) = fetch(address, "/v1/secret").await;
    assert_eq!(code, 404);
    assert!(body.contains("/v1/status"), "{body}");
}

#[tokio::test]
async fn the_pages_of_a_relay_say_what_it_counts() {
    let counted = RelaySnapshot { clients: 3, ..RelaySnapshot::default() };
    let (_server, address) = serve(relay(move || counted.clone())).await;
    let (code, metrics) = fetch(address, "/metrics").await;
    assert_eq!(code, 200);
    assert!(metrics.contains("keystone_relay_clients 3.0\n"), "{metrics}");
    assert_eq!(fetch(address, "/readyz").await.0, 200);
    let (_, status) = fetch(address, "/v1/status").await;
    assert_eq!(serde_json::from_str::<RelaySnapshot>(&status).unwrap().clients, 3);
}

#[tokio::test]
async fn prometheus_is_given_openmetrics() {
    let (_server, address) = serve(relay(RelaySnapshot::default)).await;
    let answer = request(address, "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0").await;
    assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0"), "{answer}");
    assert!(answer.ends_with("# EOF\n"), "{answer}");
}
