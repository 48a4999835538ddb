//! eventfd(2): a counter that one thread raises and another waits for with poll(2).
#![allow(unsafe_code, reason = "no crate of the workspace wraps eventfd")]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _};

/// Wakes a thread that blocks in poll(2). Raising is idempotent until the counter is cleared.
#[derive(Debug)]
pub(crate) struct EventFd(File);

impl EventFd {
    /// A lowered event, nonblocking and closed on exec.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes two integers and touches no memory of ours.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made by the kernel for us and nothing else owns it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Makes the descriptor readable.
    pub(crate) fn raise(&self) {
        // The one possible failure is a counter at its maximum: then it is readable, which is all that is asked for.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Makes it unreadable until it is raised again.
    pub(crate) fn clear(&self) {
        // The one possible failure is a counter at zero: cleared already.
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
