//! TCP throughput with iperf3.

use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::host::Host;
use crate::{Process, wait};

/// iperf3's default port.
const PORT: u16 = 5201;

/// How long a server may take to listen, and a client may take beyond the time of its measurement.
const PATIENCE: Duration = Duration::from_secs(5);

/// An iperf3 server on a host, for as long as the value lives.
pub struct Server {
    _process: Process,
}

impl Server {
    /// Starts a server and waits until it listens.
    pub fn start(host: &Host) -> Result<Self> {
        let port = PORT.to_string();
        let process = host.spawn("iperf3", Command::new("iperf3").args(["--server", "--port", &port]))?;
        let what = format!("iperf3 listens on {}", host.name());
        wait::until(&what, PATIENCE, Duration::from_millis(10), || Ok(listens(host).then_some(())))?;
        Ok(Self { _process: process })
    }
}

/// Bits per second that arrive over one TCP stream from `client` to a server at `address`, over `seconds`.
pub fn tcp_bits_per_second(client: &Host, address: IpAddr, seconds: u32) -> Result<f64> {
    let mut command = Command::new("iperf3");
    command.args(["--client", &address.to_string(), "--port", &PORT.to_string(), "--json"]);
    command.args(["--time", &seconds.to_string(), "--connect-timeout", &PATIENCE.as_millis().to_string()]);
    command.env("PATH", crate::tool::search_path()).stdin(Stdio::null());
    let what = format!("iperf3 on {} finds its server free", client.name());
    let report = wait::until(&what, PATIENCE, Duration::from_millis(50), || {
        let report = client.enter(|| command.output());
        let report = report.with_context(|| format!("start iperf3 on {}", client.name()))?;
        let report: Value = serde_json::from_slice(&report.stdout).context("read iperf3's report")?;
        // The server takes one test at a time, and its client is done a moment before it.
        let busy = report.get("error").and_then(Value::as_str).is_some_and(|error| error.contains("busy"));
        Ok((!busy).then_some(report))
    })?;
    let rate = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
    let error = report.get("error").and_then(Value::as_str).unwrap_or("its report has no rate");
    rate.with_context(|| format!("iperf3 from {} to {address}: {error}", client.name()))
}

/// Whether a TCP socket of the host listens on our port; 0A is TCP_LISTEN in /proc/net/tcp (proc(5)).
fn listens(host: &Host) -> bool {
    let wanted = format!(":{PORT:04X} ");
    let tables = host.enter(|| {
        let read = |file| std::fs::read_to_string(file).unwrap_or_default();
        read("/proc/thread-self/net/tcp") + &read("/proc/thread-self/net/tcp6")
    });
    tables.lines().any(|line| line.contains(&wanted) && line.contains(" 0A "))
}
