//! etcd as an administrator uses it: over the JSON gateway of its API, which speaks plain HTTP.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Where clients find it, on loopback.
pub(crate) const PORT: u16 = 2379;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The revision that the store is at.
pub(crate) fn revision() -> Result<i64> {
    // Any key will do: the answer's header has the revision. Bytes are Base64 in this API.
    let answer = post("/v3/kv/range", &json!({ "key": "AA==" }))?;
    let revision = answer["header"]["revision"].as_str().and_then(|text| text.parse().ok());
    revision.with_context(|| format!("etcd answers without a revision: {answer}"))
}

/// Forgets all history before `revision`; watches from before it can no longer be continued.
pub(crate) fn compact(revision: i64) -> Result<()> {
    post("/v3/kv/compaction", &json!({ "revision": revision, "physical": true })).map(drop)
}

fn post(path: &str, body: &Value) -> Result<Value> {
    let body = body.to_string();
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).context("connect to etcd")?;
    stream.set_read_timeout(Some(PATIENCE)).context("set a timeout")?;
    // HTTP/1.0: the answer ends with the connection and comes in one piece.
    let head =
        format!("POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all([head, body].concat().as_bytes()).context("ask etcd")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("read etcd's answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("etcd does not speak HTTP")?;
    if !head.lines().next().is_some_and(|status| status.contains(" 200 ")) {
        bail!("etcd refuses {path}: {body}");
    }
    serde_json::from_str(body).with_context(|| format!("etcd answers {body:?}"))
}
