//! The system calls that have no safe wrapper, and entering a network namespace.
#![allow(unsafe_code, reason = "ioctl and two socket options")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

/// `NSFS_MAGIC` of linux/magic.h: the file system that namespaces' files are of.
const NSFS_MAGIC: libc::__fsword_t = 0x6e73_6673;

/// Runs `task` inside the network namespace `netns`, in a thread that ends with it. So no other thread is ever in a
/// foreign namespace, whatever happens to `task`.
pub(crate) fn inside<T: Send>(netns: &Netns, task: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(netns.file.as_fd(), CloneFlags::CLONE_NEWNET)?;
            task()
        });
        inside.join().unwrap_or_else(|_panic| Err(io::Error::other("the thread in the pod's namespace panicked")))
    })
}

/// An open network namespace.
#[derive(Debug)]
pub(crate) struct Netns {
    file: File,
}

impl Netns {
    /// Opens the namespace at `path`. A file that is no namespace is an error of kind [`io::ErrorKind::InvalidInput`].
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let kind = nix::sys::statfs::fstatfs(&file)?.filesystem_type().0;
        if kind != NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "this file is no network namespace"));
        }
        Ok(Self { file })
    }

    /// True if it is the namespace that this program runs in.
    pub(crate) fn is_own(&self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let (own, it) = (std::fs::metadata("/proc/self/ns/net")?, self.file.metadata()?);
        Ok((own.dev(), own.ino()) == (it.dev(), it.ino()))
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Options of a netlink socket (netlink(7)): a sentence with each error, no copy of the request in it, and filters of
/// dumps that are obeyed or refused. All of Linux 4.20 and later; an older kernel answers without.
pub(crate) fn set_netlink_options(socket: &OwnedFd) {
    for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK, libc::NETLINK_GET_STRICT_CHK] {
        let on: libc::c_int = 1;
        let size = size_of_val(&on).try_into().unwrap_or(4);
        // SAFETY: `on` lives through the call, and `size` is its size.
        let _without =
            unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_NETLINK, option, (&raw const on).cast(), size) };
    }
}

/// The index of an interface in the namespace that `socket` was made in (`SIOCGIFINDEX` of netdevice(7)), without the lock
/// that every netlink request waits for.
pub(crate) fn interface_index(socket: &OwnedFd, name: &str) -> io::Result<Option<u32>> {
    // SAFETY: all zeros is a valid `ifreq`: integers, an array of bytes and a union of such.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Ok(None);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the kernel reads the name, which ends with a zero, and writes the index into `request`, which lives on.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request) };
    match Errno::result(answer) {
        // SAFETY: SIOCGIFINDEX fills this field of the union.
        Ok(_) => Ok(u32::try_from(unsafe { request.ifr_ifru.ifru_ifindex }).ok()),
        Err(Errno::ENODEV) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
