//! The TUN device: where packets of the mesh enter and leave the kernel.
//!
//! The device is opened with a virtio header before every packet, so that the kernel may hand over 64 KiB of one flow
//! as a single super packet and take as much back. One system call then carries some 45 wire packets, and the kernel's
//! own per-packet work, which is what costs, is done once. [`split`] takes super packets apart on their way out,
//! [`coalesce`] puts wire packets together on their way in.

pub mod checksum;
pub mod coalesce;
pub mod ip;
pub mod split;
#[cfg(test)]
mod testing;
pub mod virtio;

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::sys::tun as ioctl;
use virtio::HEADER_LEN;

/// The longest name of a Linux network interface, in bytes (`IFNAMSIZ` without its zero).
pub const MAX_NAME_LEN: usize = 15;

/// Room for the virtio header and the largest IP packet.
pub const MAX_READ: usize = HEADER_LEN + 65535;

const DEVICE: &str = "/dev/net/tun";

/// Why a TUN device could not be opened. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The kernel has no tun driver, or the container hides it.
    #[error("{DEVICE} does not exist: load the tun module (`modprobe tun`), or pass the device into the container")]
    NoDevice,
    /// The device file's mode forbids opening it.
    #[error("{DEVICE} may not be opened: run as root, or allow the device in the container's device rules")]
    DeviceForbidden,
    /// Creating interfaces needs a capability.
    #[error("creating the interface {0} needs CAP_NET_ADMIN: run as root, or grant the capability")]
    NoCapability(String),
    /// Something else has an interface of that name.
    #[error("the interface name {0} is in use: stop the other program, or choose another name")]
    NameInUse(String),
    /// Not a name for an interface.
    #[error("`{0}` is no interface name: 1 to {MAX_NAME_LEN} characters, without `/`, `:`, `%` and blanks")]
    BadName(String),
    /// Anything else that the kernel said.
    #[error("cannot open the interface {name}: {action}: {source}")]
    Io {
        /// The interface.
        name: String,
        /// What was being done.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// How to open a TUN device.
#[derive(Clone, Debug)]
pub struct TunConfig {
    /// The interface's name.
    pub name: String,
    /// Queues, one per shard; at least 1.
    pub queues: usize,
    /// Whether the interface outlives the process, so that a restart finds its addresses and routes in place.
    pub persistent: bool,
}

/// Which packets the kernel hands over as super packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// TCP and UDP.
    TcpAndUdp,
    /// TCP (kernels before 6.2 have no USO).
    Tcp,
    /// None: each packet alone, its checksum complete.
    None,
}

/// An open TUN device. Closing it removes the interface unless it is persistent.
#[derive(Debug)]
pub struct Tun {
    queues: Vec<TunQueue>,
    /// Held while the interface is ours; two daemons on one persistent multi-queue device would each get half the
    /// packets.
    claim: UnixDatagram,
}

/// One queue of a device: reads and writes one packet, or super packet, at a time and never blocks.
#[derive(Debug)]
pub struct TunQueue {
    file: File,
    offload: Offload,
}

impl Tun {
    /// Opens the device, making it or attaching to the persistent one that an earlier process left.
    pub fn open(config: &TunConfig) -> Result<Self, TunError> {
        let name = config.name.as_str();
        if !is_interface_name(name) {
            return Err(TunError::BadName(name.chars().take(40).collect()));
        }
        let claim = claim(name)?;
        let mut queues = Vec::new();
        for _ in 0..config.queues.max(1) {
            let file = open_queue(name)?;
            ioctl::set_header_len(&file, HEADER_LEN as i32).map_err(io_error(name, "setting the header's length"))?;
            let offload = set_best_offload(&file);
            queues.push(TunQueue { file, offload });
        }
        ioctl::set_persist(&queues[0].file, config.persistent).map_err(io_error(name, "making it persistent"))?;
        Ok(Self { queues, claim })
    }

    /// The queues, and the claim on the name, which is to be kept as long as they are.
    pub fn into_queues(self) -> (Vec<TunQueue>, TunClaim) {
        (self.queues, TunClaim(self.claim))
    }
}

/// Keeps other daemons of this network namespace off an interface.
#[derive(Debug)]
pub struct TunClaim(#[expect(dead_code, reason = "held for its effect while it lives")] UnixDatagram);

impl TunQueue {
    /// A queue over any descriptor that keeps packet boundaries and carries virtio headers, such as one end of a
    /// `SOCK_SEQPACKET` pair in a test. It must be nonblocking.
    pub fn from_fd(fd: OwnedFd, offload: Offload) -> Self {
        Self { file: File::from(fd), offload }
    }

    /// Which super packets the queue takes and gives.
    pub fn offload(&self) -> Offload {
        self.offload
    }

    /// Reads one packet with its virtio header into `buf`, which should have [`MAX_READ`] bytes.
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match (&self.file).read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Writes one packet, given as its virtio header and parts.
    pub fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        loop {
            match (&self.file).write_vectored(parts) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn is_interface_name(name: &str) -> bool {
    (1..=MAX_NAME_LEN).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%'))
}

/// Claims the name among the daemons of this network namespace. Abstract socket names belong to a network namespace,
/// as interfaces do, and the kernel frees them when their process dies, however it dies.
fn claim(name: &str) -> Result<UnixDatagram, TunError> {
    let address = SocketAddr::from_abstract_name(format!("keystone-mesh/tun/{name}"));
    address.and_then(|address| UnixDatagram::bind_addr(&address)).map_err(|error| match error.raw_os_error() {
        Some(libc::EADDRINUSE) => TunError::NameInUse(name.to_owned()),
        _ => io_error(name, "claiming the name")(error),
    })
}

fn open_queue(name: &str) -> Result<File, TunError> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
    let file = file.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunError::NoDevice,
        Some(libc::EACCES | libc::EPERM) => TunError::DeviceForbidden,
        _ => io_error(name, "opening the tun driver")(error),
    })?;
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    ioctl::attach(&file, name, flags).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => TunError::NoCapability(name.to_owned()),
        // EINVAL: an interface of another kind, or a TUN device of another program with other flags.
        Some(libc::EBUSY | libc::EEXIST | libc::EINVAL) => TunError::NameInUse(name.to_owned()),
        _ => io_error(name, "TUNSETIFF")(error),
    })?;
    Ok(file)
}

fn set_best_offload(file: &File) -> Offload {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    for (flags, offload) in [(tcp | udp, Offload::TcpAndUdp), (tcp, Offload::Tcp), (0, Offload::None)] {
        if ioctl::set_offload(file, flags).is_ok() {
            return offload;
        }
    }
    Offload::None
}

fn io_error(name: &str, action: &'static str) -> impl FnOnce(io::Error) -> TunError {
    let name = name.to_owned();
    move |source| TunError::Io { name, action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_would_refuse_are_refused_first() {
        for name in ["", "a/b", "sixteen-letters-", "a b", "tun%d", "a:b", ".", ".."] {
            let config = TunConfig { name: name.to_owned(), queues: 1, persistent: false };
            assert!(matches!(Tun::open(&config), Err(TunError::BadName(_))), "{name:?}");
        }
        assert!(is_interface_name("ksmesh0"));
        assert!(is_interface_name("fifteen-letters"));
    }
}
