//! A netlink socket to nfnetlink.
//!
//! The kernel works a request off while it is sent: when `send` returns, what it has to say lies in the socket's queue.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sockopt};
use nix::sys::time::TimeVal;

use super::NftError;
use super::wire::{Message, flag, kind, messages};

/// A dump's datagrams have 32 KiB at most (`NLMSG_GOODSIZE`); errors quote the message, whose attributes have 64 KiB.
const BUFFER: usize = 256 * 1024;
/// Room for what the kernel says of a transaction, where it refuses all of it.
const RECEIVE_BUFFER: usize = 8 * 1024 * 1024;
/// What a batch may have beside its bytes (`netlink_sendmsg` compares with the buffer less 32).
const SLACK: usize = 4096;
/// The kernel answers at once, or something is broken that waiting does not mend.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    send_buffer: usize,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Socket {
    pub(super) fn open() -> Result<Self, NftError> {
        let error = |errno| failed("open a netlink socket", errno);
        let fd = socket::socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )
        .map_err(error)?;
        socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(error)?;
        let patience = TimeVal::new(PATIENCE.as_secs().try_into().unwrap_or(i64::MAX), 0);
        socket::setsockopt(&fd, sockopt::ReceiveTimeout, &patience).map_err(error)?;
        // Without the privilege the system's maximum has to do; a transaction that fails is told all the same.
        if socket::setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            let _ = socket::setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER);
        }
        Ok(Self { fd, send_buffer: 0, buffer: vec![0; BUFFER], sequence: 0 })
    }

    /// A number for a request.
    pub(super) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    /// Sends a batch and collects what the kernel refuses: the message's number and the error's. Nothing: it took all.
    pub(super) fn transact(&mut self, batch: &[u8]) -> Result<Vec<(u32, i32)>, NftError> {
        self.make_room(batch.len())?;
        self.send(batch)?;
        let (mut refused, mut acknowledged) = (Vec::new(), false);
        loop {
            let length = match socket::recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(failed("hear of a transaction", errno)),
            };
            for message in messages(&self.buffer[..length]).filter(|message| message.kind == kind::ERROR) {
                match message.error().ok_or(NftError::Answer("a transaction"))? {
                    0 => acknowledged = true,
                    error => refused.push((message.sequence, error)),
                }
            }
        }
        if !acknowledged && refused.is_empty() {
            return Err(failed("hear of a transaction", Errno::ENOMSG));
        }
        Ok(refused)
    }

    /// Sends a request and gives every message of the answer to `each`. An error of the kernel is the result.
    pub(super) fn request(
        &mut self,
        doing: &'static str,
        request: &[u8],
        mut each: impl FnMut(Message<'_>) -> Result<(), NftError>,
    ) -> Result<(), NftError> {
        self.send(request)?;
        let sequence = self.sequence;
        let mut interrupted = false;
        loop {
            let length = match socket::recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => length,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(failed(doing, errno)),
            };
            for message in messages(&self.buffer[..length]).filter(|message| message.sequence == sequence) {
                interrupted |= message.flags & flag::DUMP_INTERRUPTED != 0;
                match message.kind {
                    kind::DONE if interrupted => return Err(failed(doing, Errno::EINTR)),
                    kind::DONE => return Ok(()),
                    kind::ERROR => match message.error().ok_or(NftError::Answer("a request"))? {
                        0 => return Ok(()),
                        error => return Err(failed(doing, Errno::from_raw(error))),
                    },
                    _ => each(message)?,
                }
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), NftError> {
        loop {
            match socket::send(self.fd.as_raw_fd(), bytes, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed("ask the kernel", errno)),
            }
        }
    }

    /// A transaction is one datagram, however large.
    fn make_room(&mut self, length: usize) -> Result<(), NftError> {
        let wanted = length + SLACK;
        if self.send_buffer >= wanted {
            return Ok(());
        }
        if socket::setsockopt(&self.fd, sockopt::SndBufForce, &wanted).is_err() {
            socket::setsockopt(&self.fd, sockopt::SndBuf, &wanted)
                .map_err(|errno| failed("make room for a transaction", errno))?;
        }
        self.send_buffer = wanted;
        Ok(())
    }
}

fn failed(doing: &'static str, errno: Errno) -> NftError {
    let error = if errno == Errno::EMSGSIZE {
        io::Error::new(ErrorKind::QuotaExceeded, "it is larger than net.core.wmem_max allows")
    } else {
        io::Error::from(errno)
    };
    NftError::Socket { doing, error }
}
