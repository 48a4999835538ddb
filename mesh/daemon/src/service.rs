//! The far end of `ping` and `bench`: echo over UDP and bulk transfer over TCP, on the node's mesh addresses only.
//!
//! Who reaches it came through the mesh. What one node can make another do is bounded: sessions at once, seconds each.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Port of the service, UDP and TCP.
pub const PORT: u16 = 51841;
/// Transfers at once.
const MAX_TRANSFERS: usize = 4;
/// Longest transfer.
const MAX_SECONDS: u64 = 60;
/// Bytes written or read at a time.
const CHUNK: usize = 256 << 10;
/// How long the request of a transfer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a transfer's client asks, a line of JSON.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", tag = "transfer")]
pub enum Transfer {
    /// The client sends until it closes its side; the answer is a [`Received`] line.
    Upload,
    /// The server sends for so many seconds, then closes.
    Download {
        /// 1 to 60.
        seconds: u64,
    },
    /// CPU seconds that the server's data plane has used: a [`Cpu`] line.
    Cpu,
}

/// What arrived.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Received {
    /// Bytes.
    pub bytes: u64,
    /// From the first to the last byte.
    pub seconds: f64,
}

/// What it cost.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Cpu {
    /// CPU seconds of the data plane's workers since the daemon started.
    pub seconds: f64,
}

/// The running service; ends when dropped.
#[derive(Debug)]
pub struct Service {
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Service {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Service {
    /// Listens on every given address. Addresses that cannot be bound are logged and left out.
    pub fn start(addresses: &[IpAddr]) -> Self {
        let transfers = Arc::new(Semaphore::new(MAX_TRANSFERS));
        let mut tasks = Vec::new();
        for &address in addresses {
            match listen(SocketAddr::new(address, PORT)) {
                Ok((udp, tcp)) => {
                    tasks.push(tokio::spawn(echo(udp)));
                    tasks.push(tokio::spawn(accept(tcp, transfers.clone())));
                }
                Err(error) => tracing::warn!(%address, %error, "ping and bench cannot be answered on this address"),
            }
        }
        Self { tasks }
    }
}

fn listen(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = std::net::UdpSocket::bind(address)?;
    udp.set_nonblocking(true)?;
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok((UdpSocket::from_std(udp)?, socket.listen(16)?))
}

async fn echo(socket: UdpSocket) {
    let mut buffer = vec![0; 2048];
    loop {
        match socket.recv_from(&mut buffer).await {
            // A full send buffer loses an echo, as the network may.
            Ok((length, from)) => drop(socket.try_send_to(&buffer[..length], from)),
            Err(error) => {
                tracing::debug!(%error, "echo");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept(listener: TcpListener, transfers: Arc<Semaphore>) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let Ok(place) = transfers.clone().try_acquire_owned() else { continue };
                tokio::spawn(async move {
                    let limit = Duration::from_secs(MAX_SECONDS + 5);
                    match tokio::time::timeout(limit, serve(stream)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::debug!(%from, %error, "bench session"),
                        Err(_) => tracing::debug!(%from, "bench session cut off"),
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "bench cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(stream: TcpStream) -> io::Result<()> {
    let mut stream = BufReader::with_capacity(CHUNK, stream);
    let mut line = String::new();
    tokio::time::timeout(PATIENCE, (&mut stream).take(1024).read_line(&mut line)).await??;
    match serde_json::from_str(&line)? {
        Transfer::Upload => {
            let received = drain(&mut stream).await?;
            answer(&mut stream, &received).await
        }
        Transfer::Download { seconds } => {
            send_for(&mut stream, Duration::from_secs(seconds.clamp(1, MAX_SECONDS))).await
        }
        Transfer::Cpu => answer(&mut stream, &Cpu { seconds: data_plane_cpu() }).await,
    }
}

async fn answer<T: Serialize>(stream: &mut (impl AsyncWrite + Unpin), value: &T) -> io::Result<()> {
    let mut text = serde_json::to_vec(value)?;
    text.push(b'\n');
    stream.write_all(&text).await?;
    stream.shutdown().await
}

/// Reads to the end and tells how much came in what time.
pub async fn drain(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Received> {
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    let mut first = None;
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            read => {
                first.get_or_insert_with(Instant::now);
                bytes += read as u64;
            }
        }
    }
    Ok(Received { bytes, seconds: first.map_or(0.0, |first| first.elapsed().as_secs_f64()) })
}

/// Writes zeros for so long, then closes this side.
pub async fn send_for(stream: &mut (impl AsyncWrite + Unpin), time: Duration) -> io::Result<()> {
    let chunk = vec![0; CHUNK];
    let end = Instant::now() + time;
    while Instant::now() < end {
        stream.write_all(&chunk).await?;
    }
    stream.shutdown().await
}

/// CPU seconds of this process' data-plane workers, by the kernel's account of each thread (proc(5), schedstat).
pub fn data_plane_cpu() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let nanoseconds: u64 = tasks
        .flatten()
        .filter(|task| {
            std::fs::read_to_string(task.path().join("comm"))
                .is_ok_and(|name| name.starts_with(crate::dataplane::THREAD_PREFIX))
        })
        .filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    nanoseconds as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn transfers_count_what_they_move_and_rubbish_ends_only_itself() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = tokio::spawn(accept(listener, Arc::new(Semaphore::new(2))));

        let mut rubbish = TcpStream::connect(address).await.unwrap();
        rubbish.write_all(b"rubbish\n").await.unwrap();
        assert_eq!(rubbish.read(&mut [0; 8]).await.unwrap_or(0), 0);

        let mut up = TcpStream::connect(address).await.unwrap();
        up.write_all(b"{\"transfer\":\"upload\"}\n").await.unwrap();
        up.write_all(&vec![0; 1 << 20]).await.unwrap();
        up.shutdown().await.unwrap();
        let mut line = String::new();
        up.read_to_string(&mut line).await.unwrap();
        assert_eq!(serde_json::from_str::<Received>(&line).unwrap().bytes, 1 << 20);

        let mut down = TcpStream::connect(address).await.unwrap();
        down.write_all(b"{\"transfer\":\"download\",\"seconds\":1}\n").await.unwrap();
        assert!(drain(&mut down).await.unwrap().bytes > 0);
        accepting.abort();
    }
}
