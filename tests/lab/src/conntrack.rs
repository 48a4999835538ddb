//! Forgets all connections of the network namespace of the calling thread: what `conntrack -F` does, without its package.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE` (linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h).
const DELETE_CONNECTIONS: u16 = (1 << 8) | 2;

/// `NLM_F_REQUEST | NLM_F_ACK` (linux/netlink.h).
const REQUEST_WITH_ANSWER: u16 = 0x1 | 0x4;

/// `struct nlmsghdr` (16 bytes), then `struct nfgenmsg` (4 bytes): family unspecified, version 0, resource 0.
const LENGTH: u32 = 20;

pub(crate) fn flush() -> Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)
        .context("open a netfilter netlink socket")?;
    let mut request = Vec::with_capacity(LENGTH as usize);
    request.extend_from_slice(&LENGTH.to_ne_bytes());
    request.extend_from_slice(&DELETE_CONNECTIONS.to_ne_bytes());
    request.extend_from_slice(&REQUEST_WITH_ANSWER.to_ne_bytes());
    request.resize(LENGTH as usize, 0);
    send(netlink.as_raw_fd(), &request, MsgFlags::empty()).context("ask to flush conntrack")?;
    let mut answer = [0; 256];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty()).context("read the answer")?;
    // `struct nlmsgerr` follows the header and begins with a negative errno, or 0.
    let Some(code) = answer[..length].get(16..20) else { bail!("the answer to a conntrack flush has {length} bytes") };
    match i32::from_ne_bytes([code[0], code[1], code[2], code[3]]) {
        0 => Ok(()),
        code => Err(Errno::from_raw(-code)).context("flush conntrack"),
    }
}
