use axum::routing::get;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

async fn bound(server: &HttpServer, condition: impl Fn(&BTreeSet<SocketAddr>) -> bool) -> BTreeSet<SocketAddr> {
    let mut bound = server.bound();
    let bound = tokio::time::timeout(DEADLINE, bound.wait_for(|bound| condition(bound))).await;
    bound.expect("listens in time").unwrap().clone()
}

fn hello() -> Router {
    Router::new().route("/", get(async || "hello"))
}

fn set(addresses: &[&str]) -> BTreeSet<SocketAddr> {
    addresses.iter().map(|address| address.parse().unwrap()).collect()
}

/// The whole answer to a request; empty where the connection was closed without one.
async fn ask(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The server may have closed already, and reading tells as much.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.expect("an end in time");
    String::from_utf8_lossy(&answer).into_owned()
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

#[tokio::test]
async fn addresses_come_and_go() {
    let server = HttpServer::start(hello(), Arc::default());
    server.set_addresses(set(&["127.0.0.1:0"]));
    let first = *bound(&server, |bound| bound.len() == 1).await.first().unwrap();
    assert!(ask(first, GET).await.ends_with("hello"));

    // An address of a documentation prefix (RFC 5737) is on no interface and can be bound all the same.
    server.set_addresses(set(&["127.0.0.1:0", "192.0.2.77:0"]));
    let both = bound(&server, |bound| bound.len() == 2).await;
    assert!(both.contains(&first), "what stays is not bound anew");

    server.set_addresses(BTreeSet::new());
    bound(&server, BTreeSet::is_empty).await;
    let closed = async {
        while TcpStream::connect(first).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, closed).await.expect("nobody listens any more");
}

#[tokio::test]
async fn an_address_that_is_taken_is_tried_again_and_disturbs_no_other() {
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = other.local_addr().unwrap();
    let server = HttpServer::start(hello(), Arc::default());
    server.set_addresses(BTreeSet::from([taken, "127.0.0.1:0".parse().unwrap()]));
    let free = *bound(&server, |bound| bound.len() == 1).await.first().unwrap();
    assert!(ask(free, GET).await.ends_with("hello"));
    drop(other);
    bound(&server, |bound| bound.contains(&taken)).await;
    assert!(ask(taken, GET).await.ends_with("hello"));
}

#[tokio::test]
async fn a_flood_of_connections_is_counted_and_shuts_out_no_other_address() {
    let refused = Arc::<AtomicU64>::default();
    let server = HttpServer::start(hello(), refused.clone());
    server.set_addresses(set(&["127.0.0.1:0", "127.0.0.2:0"]));
    let both: Vec<SocketAddr> = bound(&server, |bound| bound.len() == 2).await.into_iter().collect();
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS + 8 {
        held.push(TcpStream::connect(both[0]).await.unwrap());
    }
    let counted = async {
        while refused.load(Ordering::Relaxed) < 8 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, counted).await.expect("those beyond the limit are counted");
    assert!(ask(both[1], GET).await.ends_with("hello"));
    drop(held);
}

#[tokio::test]
async fn a_head_without_end_is_refused() {
    let server = HttpServer::start(hello(), Arc::default());
    server.set_addresses(set(&["127.0.0.1:0"]));
    let address = *bound(&server, |bound| bound.len() == 1).await.first().unwrap();
    let many = "X: y\r\n".repeat(HEADERS + 1);
    let answer = ask(address, format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let long = "y".repeat(2 * READ_BUFFER);
    let answer = ask(address, format!("GET / HTTP/1.1\r\nX: {long}\r\n\r\n").as_bytes()).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert!(ask(address, b"\x16\x03\x01\x02\x00rubbish\r\n\r\n").await.starts_with("HTTP/1.1 400 "));
    assert!(ask(address, GET).await.ends_with("hello"));
}

#[tokio::test]
async fn a_client_that_says_nothing_is_let_go() {
    let server = HttpServer::start(hello(), Arc::default());
    server.set_addresses(set(&["127.0.0.1:0"]));
    let address = *bound(&server, |bound| bound.len() == 1).await.first().unwrap();
    let started = std::time::Instant::now();
    let answer = ask(address, b"GET / HT").await;
    assert!(!answer.contains("hello"), "{answer}");
    assert!(started.elapsed() >= HEAD_PATIENCE);
}
