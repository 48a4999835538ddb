//! QUIC's share of the socket: quinn's view of a port that the data plane reads.
//!
//! The ingress thread puts what is QUIC into a bounded queue, whole runs as the kernel gave them; quinn's endpoint
//! takes them out. Sending goes straight to the socket. Addresses stay in the socket's own family on both sides,
//! because quinn compares them: on a dual-stack socket an IPv4 remote shows as IPv4-mapped
//! (`connection.remote_address()`; see [`canonical`](super::canonical)).

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::io::unix::AsyncFd;

use super::UdpSocket;
use crate::sys::reactor;

/// Bytes waiting for quinn: as much as the socket itself would hold for it.
const MAX_BYTES: usize = 4 << 20;
/// What an entry costs beside its bytes, so that many tiny datagrams are bounded as well.
const ENTRY_BYTES: usize = 128;

/// The queue from the ingress threads to quinn, and the socket for the way back.
#[derive(Debug)]
pub struct QuicSocket {
    socket: Arc<UdpSocket>,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    runs: VecDeque<Run>,
    bytes: usize,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Run {
    meta: RecvMeta,
    data: Box<[u8]>,
    taken: usize,
}

impl QuicSocket {
    /// QUIC's share of `socket`.
    pub fn new(socket: Arc<UdpSocket>) -> Self {
        Self { socket, queue: Mutex::default() }
    }

    /// Queues datagrams of `meta.stride` bytes from one sender, and wakes quinn. False if the queue is full; then
    /// nothing is queued.
    pub fn push(&self, meta: RecvMeta, run: &[u8]) -> bool {
        let mut queue = self.lock();
        if queue.bytes + run.len() + ENTRY_BYTES > MAX_BYTES {
            return false;
        }
        queue.bytes += run.len() + ENTRY_BYTES;
        let meta = RecvMeta { len: run.len(), ..meta };
        queue.runs.push_back(Run { meta, data: run.into(), taken: 0 });
        let waker = queue.waker.take();
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Moves runs into `bufs` and says how many. A run too long for a buffer is given in several parts.
    fn fill(&mut self, bufs: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) -> usize {
        let mut filled = 0;
        for (buf, meta) in bufs.iter_mut().zip(metas) {
            let Some(run) = self.runs.front_mut() else { break };
            let rest = &run.data[run.taken..];
            let len = whole_datagrams(rest.len(), run.meta.stride, buf.len());
            buf[..len].copy_from_slice(&rest[..len]);
            *meta = RecvMeta { len, ..run.meta };
            filled += 1;
            run.taken += len;
            if run.taken == run.data.len() || len == 0 {
                self.bytes -= run.data.len() + ENTRY_BYTES;
                self.runs.pop_front();
            }
        }
        filled
    }
}

/// How much of a run of `len` bytes fits into `room` without cutting a datagram. A datagram longer than the buffer is
/// cut, as recvmsg(2) would.
fn whole_datagrams(len: usize, stride: usize, room: usize) -> usize {
    if len <= room {
        len
    } else if stride == 0 || stride > room {
        room
    } else {
        room - room % stride
    }
}

impl AsyncUdpSocket for QuicSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(WritePoller { socket: Arc::clone(&self.socket), waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.state.send((&self.socket.socket).into(), transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut queue = self.lock();
        match queue.fill(bufs, metas) {
            0 => {
                queue.waker = Some(cx.waker().clone());
                Poll::Pending
            }
            filled => Poll::Ready(Ok(filled)),
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.socket.local)
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.state.may_fragment()
    }
}

/// Waits until the socket takes datagrams again. Registered with the reactor only while somebody waits: a standing
/// registration would wake the reactor for every datagram that the data plane sends.
#[derive(Debug)]
struct WritePoller {
    socket: Arc<UdpSocket>,
    waiting: Option<AsyncFd<OwnedFd>>,
}

impl UdpPoller for WritePoller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waiting.is_none() {
            // A duplicate has a registration of its own, apart from those of other waiting tasks.
            let fd = self.socket.as_fd().try_clone_to_owned()?;
            self.waiting = Some(reactor::writable(fd)?);
        }
        let Some(waiting) = &self.waiting else { return Poll::Ready(Ok(())) };
        let result = ready!(waiting.poll_write_ready(cx)).map(drop);
        self.waiting = None;
        Poll::Ready(result)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::super::UdpConfig;
    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn socket() -> QuicSocket {
        QuicSocket::new(Arc::new(UdpSocket::bind(&UdpConfig::default()).unwrap()))
    }

    fn meta(stride: usize) -> RecvMeta {
        RecvMeta { stride, ..RecvMeta::default() }
    }

    /// Polls once with one buffer of `room` bytes.
    fn recv(socket: &QuicSocket, waker: &Waker, room: usize) -> Option<(Vec<u8>, usize)> {
        let mut buf = vec![0; room];
        let mut metas = [RecvMeta::default()];
        let mut cx = Context::from_waker(waker);
        match socket.poll_recv(&mut cx, &mut [IoSliceMut::new(&mut buf)], &mut metas) {
            Poll::Ready(result) => {
                assert_eq!(result.unwrap(), 1);
                buf.truncate(metas[0].len);
                Some((buf, metas[0].stride))
            }
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_waiting_reader_is_woken_once_and_reads_whole_runs() {
        let socket = socket();
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        assert_eq!(recv(&socket, &waker, 2000), None);
        assert!(socket.push(meta(100), &[0x41; 250]));
        assert!(socket.push(meta(70), &[0x42; 70]));
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert_eq!(recv(&socket, &waker, 2000), Some((vec![0x41; 250], 100)));
        assert_eq!(recv(&socket, &waker, 2000), Some((vec![0x42; 70], 70)));
        assert_eq!(recv(&socket, &waker, 2000), None);
        assert_eq!(socket.lock().bytes, 0);
    }

    #[test]
    fn a_run_longer_than_the_buffer_comes_in_whole_datagrams() {
        let socket = socket();
        let waker = Waker::from(Arc::new(Count::default()));
        assert!(socket.push(meta(100), &[0x41; 250]));
        assert_eq!(recv(&socket, &waker, 130).unwrap().0.len(), 100);
        assert_eq!(recv(&socket, &waker, 130).unwrap().0.len(), 100);
        assert_eq!(recv(&socket, &waker, 130).unwrap().0.len(), 50);
        assert_eq!(recv(&socket, &waker, 130), None);
    }

    #[test]
    fn a_full_queue_refuses_and_recovers() {
        let socket = socket();
        let run = [0x41; 60000];
        let taken = (0..1000).take_while(|_| socket.push(meta(1200), &run)).count();
        assert!((60..80).contains(&taken), "{taken}");
        let waker = Waker::from(Arc::new(Count::default()));
        assert!(recv(&socket, &waker, 65535).is_some());
        assert!(socket.push(meta(1200), &run));
        assert!((0..100_000).take_while(|_| socket.push(meta(1), &[0x41])).count() < 1000);
    }
}
