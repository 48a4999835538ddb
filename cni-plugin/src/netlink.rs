//! A small blocking rtnetlink socket: one request, its answer, the next.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use crate::sys;

/// As the kernel's own buffers for dumps (NLMSG_GOODSIZE grows up to this).
const BUFFER: usize = 32 << 10;

/// Message types of netlink(7).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// `NLM_F_ACK_TLVS`: attributes follow the error. The library has it with another meaning of the same bit.
const ACK_TLVS: u16 = 0x200;

/// `NLMSGERR_ATTR_MSG`: the kernel's sentence.
const ATTR_MSG: u16 = 1;

/// An error number and the header of the failed request, which are in front of the attributes.
const ERROR_HEADER: usize = 4 + 16;

/// A dump that changed while it was read is read again, this often at most.
const DUMP_ATTEMPTS: usize = 10;

/// What the kernel answers when it refuses.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// With its number and, often, a sentence.
    #[error("{}{}{said}", number.desc(), if said.is_empty() { "" } else { ": " })]
    Kernel {
        /// errno(3).
        number: Errno,
        /// The kernel's sentence; may be empty.
        said: String,
    },
    /// The socket failed, or the answer is none.
    #[error(transparent)]
    Socket(#[from] io::Error),
}

impl Refusal {
    /// True if the kernel answered with this number.
    pub(crate) fn is(&self, number: Errno) -> bool {
        matches!(self, Self::Kernel { number: found, .. } if *found == number)
    }
}

impl From<Errno> for Refusal {
    fn from(number: Errno) -> Self {
        Self::Socket(number.into())
    }
}

/// A socket that stays in the network namespace it was made in, whoever uses it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the namespace of the calling thread.
    pub(crate) fn open() -> io::Result<Self> {
        let protocol = SockProtocol::NetlinkRoute;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        sys::set_netlink_options(&fd);
        Ok(Self { fd, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// The index of an interface of this namespace.
    pub(crate) fn interface_index(&self, name: &str) -> io::Result<Option<u32>> {
        sys::interface_index(&self.fd, name)
    }

    /// Asks for a change; `flags` are those beside request and acknowledgement.
    pub(crate) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Refusal> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.answers(|_| {}).map(|_interrupted| ())
    }

    /// Asks for one thing.
    pub(crate) fn get(&mut self, message: RouteNetlinkMessage) -> Result<Option<RouteNetlinkMessage>, Refusal> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK)?;
        let mut found = None;
        self.answers(|message| found = Some(message))?;
        Ok(found)
    }

    /// Asks for all things of a kind, as far as `message` filters.
    pub(crate) fn dump(&mut self, message: &RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Refusal> {
        for _attempt in 0..DUMP_ATTEMPTS {
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            let mut found = Vec::new();
            let interrupted = self.answers(|message| found.push(message))?;
            if !interrupted {
                return Ok(found);
            }
        }
        Err(io::Error::new(io::ErrorKind::WouldBlock, "the kernel's list changed at every reading").into())
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = flags;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// Hands every answer on until the last; true if the list changed meanwhile.
    fn answers(&mut self, mut each: impl FnMut(RouteNetlinkMessage)) -> Result<bool, Refusal> {
        let mut interrupted = false;
        loop {
            // A dump's messages are no larger than the buffer that it was read with, so nothing is cut off.
            let size = match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                size => size?,
            };
            let mut rest = self.buffer.get(..size).unwrap_or_default();
            while !rest.is_empty() {
                let (packet, behind) = first(rest)?;
                rest = behind;
                if packet.sequence_number() != self.sequence {
                    continue;
                }
                interrupted |= packet.flags() & NLM_F_DUMP_INTR != 0;
                match packet.message_type() {
                    NLMSG_ERROR | NLMSG_DONE => return outcome(&packet).map(|()| interrupted),
                    _ => each(parse(packet.into_inner())?),
                }
            }
        }
    }
}

/// The first message of a datagram, and what is behind it. Messages begin at multiples of four bytes.
fn first(bytes: &[u8]) -> io::Result<(NetlinkBuffer<&[u8]>, &[u8])> {
    let packet = NetlinkBuffer::new_checked(bytes).map_err(nonsense)?;
    let length = packet.length() as usize;
    let (message, _) =
        bytes.split_at_checked(length).ok_or_else(|| nonsense("a message is longer than its datagram"))?;
    let behind = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Ok((NetlinkBuffer::new_checked(message).map_err(nonsense)?, behind))
}

fn parse(bytes: &[u8]) -> io::Result<RouteNetlinkMessage> {
    let packet = NetlinkMessage::deserialize(bytes).map_err(nonsense)?;
    let NetlinkPayload::InnerMessage(message) = packet.payload else {
        return Err(nonsense(format!("it sent {:?}", packet.payload)));
    };
    Ok(message)
}

/// The number in an acknowledgement or at a dump's end; 0 is success.
fn outcome(packet: &NetlinkBuffer<&[u8]>) -> Result<(), Refusal> {
    let payload = packet.payload();
    let number = payload.first_chunk().copied().map(i32::from_ne_bytes).unwrap_or_default();
    if number == 0 {
        return Ok(());
    }
    let header = if packet.message_type() == NLMSG_DONE { 4 } else { ERROR_HEADER };
    let has_attributes = packet.flags() & ACK_TLVS != 0;
    let attributes = payload.get(header..).filter(|_| has_attributes).unwrap_or_default();
    Err(Refusal::Kernel { number: Errno::from_raw(-number), said: sentence(attributes).unwrap_or_default() })
}

/// The kernel's sentence among the attributes of an error (each: length, kind, value, padding to four bytes).
fn sentence(mut attributes: &[u8]) -> Option<String> {
    loop {
        let (length, rest) = attributes.split_first_chunk()?;
        let (kind, _) = rest.split_first_chunk()?;
        let length = usize::from(u16::from_ne_bytes(*length));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes(*kind) == ATTR_MSG {
            return Some(String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned());
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn nonsense(reason: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the kernel's answer cannot be read: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sentence_is_found_among_other_attributes() {
        let mut attributes = vec![8, 0, 2, 0, 1, 2, 3, 4];
        attributes.extend([7, 0, 1, 0, b'n', b'o', 0, 0]);
        assert_eq!(sentence(&attributes).as_deref(), Some("no"));
        assert_eq!(sentence(&[]), None);
        assert_eq!(sentence(&[0, 0, 2, 0]), None);
        assert_eq!(sentence(&[200, 0, 1, 0, b'n']), None);
    }

    #[test]
    fn an_answer_that_is_cut_off_is_an_error_and_no_panic() {
        for length in 0..16 {
            assert!(first(&vec![1; length]).is_err(), "{length}");
        }
    }
}
