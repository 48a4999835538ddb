//! Byte streams that a relay joins in the middle.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use keystone_mesh_core::NodeId;
use keystone_mesh_core::relay::{Meter, Quota};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// Bytes under way in each direction inside the relay, besides the streams' own windows.
pub(crate) const BUFFER: usize = 16 * 1024;

/// A byte stream in both directions.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static> ByteStream for T {}

/// A stream from a client of a relay, as it reaches the control plane: TLS comes next.
pub struct SplicedStream {
    /// The relay in the middle.
    pub relay: NodeId,
    /// The client, as the relay says. TLS proves it.
    pub from: NodeId,
    /// The client's address, as the relay sees it.
    pub addr: SocketAddr,
    /// The bytes.
    pub io: Box<dyn ByteStream>,
}

impl std::fmt::Debug for SplicedStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { relay, from, addr, io: _ } = self;
        f.debug_struct("SplicedStream").field("relay", relay).field("from", from).field("addr", addr).finish()
    }
}

/// Takes streams that arrive through a relay. Must not wait; what it cannot take it drops.
pub trait AcceptSpliced: Send + Sync + 'static {
    /// Takes one.
    fn accept_spliced(self: Arc<Self>, stream: SplicedStream);
}

impl AcceptSpliced for mpsc::Sender<SplicedStream> {
    fn accept_spliced(self: Arc<Self>, stream: SplicedStream) {
        let _ = self.try_send(stream);
    }
}

/// Carries bytes both ways until both directions have ended or one fails. Each direction has the quota for itself.
/// Returns the bytes from `a` to `b` and back.
pub(crate) async fn pipe(
    a: (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    b: (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    quota: Quota,
) -> io::Result<(u64, u64)> {
    tokio::try_join!(pump(a.0, b.1, quota), pump(b.0, a.1, quota))
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, quota: Quota) -> io::Result<u64> {
    let (mut buffer, mut total) = (vec![0; BUFFER], 0);
    let mut meter = Meter::new(quota, Instant::now());
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            to.shutdown().await?;
            return Ok(total);
        }
        let pause = meter.charge(length, Instant::now());
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        to.write_all(&buffer[..length]).await?;
        to.flush().await?;
        total += length as u64;
    }
}
