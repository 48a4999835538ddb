//! A machine: one namespace with one device, `eth0`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::{fs, io};

use anyhow::{Context, Result};

use crate::link::Uplink;
use crate::nat::Nat;
use crate::netns::Namespace;
use crate::process::Process;
use crate::router::Router;
use crate::sandbox::SCRATCH;
use crate::tool;
use crate::world::Fabric;

/// A host in a world; clones are the same host.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

struct Inner {
    /// Held so that the internet outlives what hangs on it.
    _fabric: Arc<Fabric>,
    namespace: Arc<Namespace>,
    uplink: Uplink,
    router: Option<Router>,
}

impl Host {
    pub(crate) fn new(fabric: &Arc<Fabric>, namespace: Arc<Namespace>, uplink: Uplink, router: Option<Router>) -> Self {
        Self { inner: Arc::new(Inner { _fabric: Arc::clone(fabric), namespace, uplink, router }) }
    }

    /// The host's name, which is also that of its network namespace.
    pub fn name(&self) -> &str {
        self.inner.namespace.name()
    }

    /// The address of `eth0`.
    pub fn v4(&self) -> Ipv4Addr {
        self.inner.uplink.lease().v4
    }

    /// The public IPv6 address of `eth0`, where the site has IPv6.
    pub fn v6(&self) -> Option<Ipv6Addr> {
        self.inner.uplink.lease().v6
    }

    /// The cable of `eth0`.
    pub fn uplink(&self) -> &Uplink {
        &self.inner.uplink
    }

    /// The router in whose LAN it is; None for a public host.
    pub fn router(&self) -> Option<&Router> {
        self.inner.router.as_ref()
    }

    /// The IPv4 address under which the internet sees it: its own, or that of the router at the internet's edge. Behind a
    /// firewall that does not translate it is its own.
    pub fn public_v4(&self) -> Ipv4Addr {
        let edge = self.router().map(Router::outermost).filter(|router| router.nat() != Nat::Firewall);
        edge.map_or_else(|| self.v4(), Router::wan_v4)
    }

    /// The name of its site: of the router at the internet's edge, or its own if it is public.
    pub(crate) fn site(&self) -> &str {
        self.router().map_or_else(|| self.name(), |router| router.outermost().name())
    }

    pub(crate) fn namespace(&self) -> &Namespace {
        &self.inner.namespace
    }

    /// A folder of this host's own, on a private tmpfs.
    pub fn folder(&self) -> Result<PathBuf> {
        let folder = Path::new(SCRATCH).join(self.name());
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        Ok(folder)
    }

    /// Runs `work` inside this host's network. Sockets that it opens stay there for their whole life.
    pub fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.inner.namespace.enter(work)
    }

    /// A UDP socket of this host on `addr`.
    pub fn udp(&self, addr: SocketAddr) -> Result<UdpSocket> {
        let socket: io::Result<UdpSocket> = self.enter(|| UdpSocket::bind(addr));
        socket.with_context(|| format!("on {}: bind UDP {addr}", self.name()))
    }

    /// Starts a program here; its output goes to `NAME.log` in [`Self::folder`].
    pub fn spawn(&self, name: &str, command: &mut Command) -> Result<Process> {
        let log = self.folder()?.join(format!("{name}.log"));
        Process::spawn(&self.inner.namespace, command, &log)
    }

    /// Runs a program here to its end and returns its stdout.
    pub fn run(&self, command: &mut Command) -> Result<String> {
        self.enter(|| tool::feed(command, "")).with_context(|| format!("on {}", self.name()))
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Host({}, {})", self.name(), self.v4())
    }
}
