//! Asks daemons, over the mesh, whom they reach.
//!
//! `GET /v1/peers` on a daemon's status listener answers `{"node": NAME, "peers": [{"name", "path", "last_handshake_s",
//! ..}]}`. The answer is read liberally: a peer that does not read is left out, and so says nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use keystone_mesh_core::node::NodeName;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use crate::metrics::{self, Metrics, PollLabels};
use crate::view::{Reach, Report, Reporter};

/// Reporters that are asked at once: one is enough, and the others are for when it is away.
const AT_MOST: usize = 5;
/// A whole question and answer; across the mesh and a relay that is some hundred milliseconds.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of an answer: some 500 for each of 5,000 peers, three times over.
const LARGEST: usize = 8 << 20;
/// A session lives 180 s at most without another handshake (WireGuard's REJECT_AFTER_TIME): an idle peer whose last
/// one is younger is reached, an older one is not known to be.
const SESSION_LIFE: f64 = 180.0;

/// Asks whom `reporters` names, every `interval`, at the port of their status listeners, until nobody listens.
pub async fn run(
    mut reporters: watch::Receiver<Vec<Reporter>>,
    reports: mpsc::Sender<Report>,
    port: u16,
    interval: Duration,
    metrics: Metrics,
) {
    loop {
        // Whoever is named is asked at once, and then again each time.
        if reporters.wait_for(|reporters| !reporters.is_empty()).await.is_err() {
            return;
        }
        let named: Vec<Reporter> = reporters.borrow_and_update().iter().take(AT_MOST).cloned().collect();
        let asked = named.iter().map(|reporter| ask_within_time(reporter, port));
        for (reporter, answer) in named.iter().zip(join_all(asked).await) {
            metrics.polls.get_or_create(&PollLabels { result: label(&answer) }).inc();
            match answer {
                Ok(peers) => {
                    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    let gauge = metrics.last_report.get_or_create_owned(&metrics::Reporter::of(&reporter.name));
                    gauge.set(at.as_secs_f64());
                    let report = Report { reporter: reporter.name.clone(), at: at.as_millis() as u64, peers };
                    if reports.send(report).await.is_err() {
                        return;
                    }
                }
                Err(error) => tracing::debug!(reporter = %reporter.name, %error, "a reporter does not answer"),
            }
        }
        tokio::time::sleep(interval).await;
    }
}

/// Why a reporter gave no report.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("no answer within {TIMEOUT:?}")]
    Timeout,
    #[error("it has no address")]
    NoAddress,
    #[error("it could not be connected to: {0}")]
    Connect(#[source] std::io::Error),
    #[error("the connection failed: {0}")]
    Http(#[from] hyper::Error),
    #[error("it answered {0}")]
    Status(StatusCode),
    #[error("the answer was cut off or is larger than {LARGEST} bytes: {0}")]
    Body(String),
    #[error("the answer does not read: {0}")]
    Json(#[from] serde_json::Error),
    #[error("this is `{0}`, not the node that was asked")]
    OtherNode(String),
}

fn label<T>(answer: &Result<T, AskError>) -> &'static str {
    match answer {
        Ok(_) => "ok",
        Err(AskError::Timeout) => "timeout",
        Err(AskError::NoAddress | AskError::Connect(_) | AskError::Http(_) | AskError::Status(_)) => "refused",
        Err(AskError::Body(_) | AskError::Json(_) | AskError::OtherNode(_)) => "malformed",
    }
}

async fn ask_within_time(reporter: &Reporter, port: u16) -> Result<BTreeMap<NodeName, Reach>, AskError> {
    tokio::time::timeout(TIMEOUT, ask(reporter, port)).await.map_err(|_| AskError::Timeout)?
}

async fn ask(reporter: &Reporter, port: u16) -> Result<BTreeMap<NodeName, Reach>, AskError> {
    let (stream, at) = connect(&reporter.addresses, port).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get("/v1/peers")
        .header(header::HOST, at.to_string())
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .expect("the parts are constant or addresses");
    let exchange = async {
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(AskError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), LARGEST).collect().await;
        Ok(body.map_err(|error| AskError::Body(error.to_string()))?.to_bytes())
    };
    // What ends the connection ends the exchange, which knows better what it means.
    let connection = async {
        let _ = connection.await;
        std::future::pending::<()>().await;
    };
    let body = tokio::select! {
        body = exchange => body?,
        () = connection => unreachable!("it never ends"),
    };
    read(reporter.name.as_str(), &body)
}

async fn connect(addresses: &[IpAddr], port: u16) -> Result<(TcpStream, SocketAddr), AskError> {
    let mut last = AskError::NoAddress;
    for address in addresses {
        let at = SocketAddr::new(*address, port);
        match TcpStream::connect(at).await {
            Ok(stream) => return Ok((stream, at)),
            Err(error) => last = AskError::Connect(error),
        }
    }
    Err(last)
}

#[derive(Deserialize)]
struct Answer {
    node: Option<String>,
    peers: Vec<Value>,
}

#[derive(Deserialize)]
struct Peer {
    name: NodeName,
    path: String,
    last_handshake_s: Option<f64>,
}

fn read(asked: &str, body: &[u8]) -> Result<BTreeMap<NodeName, Reach>, AskError> {
    let Answer { node, peers } = serde_json::from_slice(body)?;
    if let Some(node) = node
        && node != asked
    {
        return Err(AskError::OtherNode(node.chars().take(253).collect()));
    }
    let peers = peers.into_iter().filter_map(|peer| serde_json::from_value::<Peer>(peer).ok());
    Ok(peers.filter_map(|peer| Some((peer.name.clone(), reach(&peer)?))).collect())
}

/// A peer without traffic is not probed: there a session that lives is all that is known.
fn reach(peer: &Peer) -> Option<Reach> {
    match peer.path.as_str() {
        "direct" | "relayed" => Some(Reach::Reached),
        "none" | "connecting" => Some(Reach::Unreached),
        _ => peer.last_handshake_s.filter(|ago| *ago < SESSION_LIFE).map(|_| Reach::Reached),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const ANSWER: &str = r#"{"node": "home", "more": 1, "peers": [
        {"name": "w1", "path": "direct", "last_handshake_s": 12.3, "reason": null, "extra": true},
        {"name": "w2", "path": "relayed"},
        {"name": "w3", "path": "none", "last_handshake_s": 400, "reason": "no answer"},
        {"name": "w4", "path": "idle", "last_handshake_s": 100},
        {"name": "w5", "path": "idle"},
        {"name": "NOT A NAME", "path": "direct"},
        {"path": "direct"},
        7]}"#;

    fn reporter(name: &str) -> Reporter {
        Reporter { name: name.parse().unwrap(), addresses: vec![IpAddr::from([127, 0, 0, 1])] }
    }

    /// Answers every connection with these bytes, and keeps it open where it is asked to.
    async fn server(answer: Vec<u8>, hang: bool) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let answer = answer.clone();
                tokio::spawn(async move {
                    let mut request = [0; 1024];
                    let _ = stream.read(&mut request).await;
                    let _ = stream.write_all(&answer).await;
                    if hang {
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        port
    }

    fn http(status: &str, body: &str) -> Vec<u8> {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }

    #[tokio::test]
    async fn an_answer_is_read_liberally() {
        let port = server(http("200 OK", ANSWER), false).await;
        let peers = ask_within_time(&reporter("home"), port).await.unwrap();
        let peers: Vec<(&str, Reach)> = peers.iter().map(|(name, reach)| (name.as_str(), *reach)).collect();
        let expected =
            [("w1", Reach::Reached), ("w2", Reach::Reached), ("w3", Reach::Unreached), ("w4", Reach::Reached)];
        assert_eq!(peers, expected);
    }

    #[tokio::test]
    async fn every_bad_answer_is_an_error_with_a_label() {
        let cases = [
            (http("200 OK", "{"), "malformed"),
            (http("200 OK", r#"{"node": "other", "peers": []}"#), "malformed"),
            (http("404 Not Found", ""), "refused"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_vec(), "malformed"),
            (b"SSH-2.0-x\r\n".to_vec(), "refused"),
            (vec![], "refused"),
        ];
        for (answer, wanted) in cases {
            let port = server(answer.clone(), false).await;
            let answered = ask_within_time(&reporter("home"), port).await;
            assert_eq!(label(&answered), wanted, "{:?}: {answered:?}", String::from_utf8_lossy(&answer));
        }
    }

    #[tokio::test]
    async fn a_reporter_that_hangs_is_given_up() {
        let port = server(vec![], true).await;
        assert_eq!(label(&ask_within_time(&reporter("home"), port).await), "timeout");
    }

    #[tokio::test]
    async fn an_answer_without_end_is_cut_off() {
        let mut endless = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
        endless.resize(LARGEST + (1 << 20), b' ');
        let port = server(endless, true).await;
        assert_eq!(label(&ask_within_time(&reporter("home"), port).await), "malformed");
    }

    #[tokio::test]
    async fn whoever_is_named_is_asked_at_once() {
        let port = server(http("200 OK", ANSWER), false).await;
        let (reporters, receiver) = watch::channel(vec![]);
        let (sender, mut reports) = mpsc::channel(8);
        let task = tokio::spawn(run(receiver, sender, port, Duration::from_secs(3600), Metrics::default()));
        reporters.send_replace(vec![reporter("home")]);
        let report = tokio::time::timeout(Duration::from_secs(10), reports.recv()).await.unwrap().unwrap();
        assert_eq!((report.reporter.as_str(), report.peers.len()), ("home", 4));
        task.abort();
    }
}
