//! Notice of changes, without reading what they were: the driver reads the state anyway.

use std::io;
use std::time::Duration;

use rtnetlink::MulticastGroup;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::time::{Instant, timeout_at};

/// Changes come in bursts (an interface goes and takes addresses and routes along); one reading answers them all. Short
/// enough that a deleted route is back before a TCP sender notices, and at most 20 readings a second under a flood.
const BURST: Duration = Duration::from_millis(50);

/// One notification; a longer one is cut, as its content is not read.
const NOTIFICATION: usize = 4096;

const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Ipv6Ifinfo,
];

/// The host's changes of links, addresses, routes and rules. Dropping it ends the subscription.
pub struct Changes {
    socket: TokioSocket,
    buffer: Vec<u8>,
    /// Until when the running burst is collected.
    burst_end: Option<Instant>,
}

impl Changes {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        let groups = GROUPS.iter().fold(0, |mask, group| mask | 1 << (*group as u32 - 1));
        socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
        Ok(Self { socket, buffer: Vec::with_capacity(NOTIFICATION), burst_end: None })
    }

    /// Waits until something changed and 50 ms have passed to let its consequences arrive.
    ///
    /// Nothing is lost when the future is dropped; the next call goes on where it stopped.
    pub async fn changed(&mut self) -> io::Result<()> {
        let end = match self.burst_end {
            Some(end) => end,
            None => {
                self.notified().await?;
                *self.burst_end.insert(Instant::now() + BURST)
            }
        };
        while Instant::now() < end {
            match timeout_at(end, self.notified()).await {
                Ok(result) => result?,
                Err(_elapsed) => break,
            }
        }
        self.burst_end = None;
        Ok(())
    }

    async fn notified(&mut self) -> io::Result<()> {
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer).await {
            // The kernel dropped notifications for want of room: something changed, and that is all we ask.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            result => result,
        }
    }
}
