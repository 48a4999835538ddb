//! The driver: carries out steps on the node's kernel, and reads what is there.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use nix::errno::Errno;

use crate::apply::Apply;
use crate::attachment::{HOST_MAC, Mac, is_host_name};
use crate::netlink::{Refusal, Socket};
use crate::plan::{Family, Pair, Step};
use crate::spec::{Code, Error, Result};
use crate::sys::{self, Netns};
use crate::sysctl;

mod message;
mod read;

pub use read::{FoundRoute, Link};

/// The kernel's flag for "make it, and fail where it exists".
const MAKE: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// The kernel settles within microseconds, or within a second where many links change at once (linkwatch of net/core).
const SETTLE_PATIENCE: Duration = Duration::from_secs(2);

/// How long to wait before it is asked again: about what a worker of the kernel takes to be run.
const SETTLE_INTERVAL: Duration = Duration::from_micros(250);

/// The host's network, and a pod's where there is one.
#[derive(Debug)]
pub struct Kernel {
    host: Socket,
    pod: Option<Pod>,
    /// The two ends, known once they are made or looked up.
    host_index: u32,
    pod_index: u32,
}

#[derive(Debug)]
struct Pod {
    netns: Netns,
    socket: Socket,
}

impl Kernel {
    /// The host's network alone.
    pub fn host() -> Result<Self> {
        let host = Socket::open().map_err(|error| Error::io("cannot open a netlink socket", &error))?;
        Ok(Self { host, pod: None, host_index: 0, pod_index: 0 })
    }

    /// The host's network and that of the pod at `netns`.
    pub fn with_pod(netns: &Path) -> Result<Self> {
        let mut kernel = Self::host()?;
        let gone = |error: &io::Error| {
            let code =
                if error.kind() == io::ErrorKind::NotFound { Code::UnknownContainer } else { Code::InvalidEnvironment };
            Error::new(code, format!("CNI_NETNS is {}, which cannot be used: {error}", netns.display()))
        };
        let opened = Netns::open(netns).map_err(|error| gone(&error))?;
        if opened.is_own().map_err(|error| Error::io("/proc/self/ns/net", &error))? {
            return Err(Error::new(
                Code::InvalidEnvironment,
                format!(
                    "CNI_NETNS is {}, the host's own network namespace: a pod needs one of its own",
                    netns.display()
                ),
            ));
        }
        let socket = sys::inside(&opened, Socket::open)
            .map_err(|error| Error::io("cannot enter the pod's network namespace", &error))?;
        kernel.pod = Some(Pod { netns: opened, socket });
        Ok(kernel)
    }

    fn pod(&mut self) -> std::result::Result<&mut Pod, Refusal> {
        self.pod.as_mut().ok_or_else(|| io::Error::other("no pod's namespace was opened").into())
    }

    fn create_pair(&mut self, pair: &Pair) -> std::result::Result<(), Refusal> {
        let pod = self.pod.as_ref().ok_or_else(|| io::Error::other("no pod's namespace was opened"))?;
        let request = message::create_pair(pair, HOST_MAC, &pod.netns);
        self.host.change(request, MAKE)?;
        self.host_index = self.host.interface_index(&pair.host)?.ok_or(Errno::ENODEV)?;
        self.pod_index = pod.socket.interface_index(&pair.pod)?.ok_or(Errno::ENODEV)?;
        Ok(())
    }

    /// A link's state: Linux 6.9 and later answer the question only when it is settled; older ones are asked again. An IPv6
    /// address's: its entry in the local table is made by a worker (addrconf_dad_work), without detection of duplicates too.
    ///
    /// What does not settle in time is not refused: what is wrong with it shows in CHECK and readiness probes.
    fn settle(&mut self, addresses: &[IpAddr]) -> std::result::Result<(), Refusal> {
        let (host, pod) = (self.host_index, self.pod_index);
        let deadline = Instant::now() + SETTLE_PATIENCE;
        while !(read::carries(&mut self.host, host)? && self.pod_answers(pod, addresses)?) && Instant::now() < deadline
        {
            thread::sleep(SETTLE_INTERVAL);
        }
        Ok(())
    }

    fn pod_answers(&mut self, index: u32, addresses: &[IpAddr]) -> std::result::Result<bool, Refusal> {
        let socket = &mut self.pod()?.socket;
        if !read::carries(socket, index)? {
            return Ok(false);
        }
        for address in addresses.iter().filter(|address| address.is_ipv6()) {
            if !read::is_local(socket, *address)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn carry_out(&mut self, step: &Step) -> std::result::Result<(), Refusal> {
        let (host, pod) = (self.host_index, self.pod_index);
        match step {
            Step::Forward(family) => Ok(sysctl::forward(*family)?),
            Step::CreatePair(pair) => self.create_pair(pair),
            Step::HostUp(alias) => match self.host.change(message::set_host_up(host, alias, true), 0) {
                // A kernel without IPv6 makes no such addresses anyway.
                Err(refusal) if refusal.is(Errno::EAFNOSUPPORT) => {
                    self.host.change(message::set_host_up(host, alias, false), 0)
                }
                done => done,
            },
            Step::AllowIpv6(interface) => {
                let pod = self.pod()?;
                Ok(sys::inside(&pod.netns, || sysctl::allow_ipv6(interface))?)
            }
            Step::PodUp => self.pod()?.socket.change(message::set_up(pod), 0),
            Step::PodAddress(address) => self.pod()?.socket.change(message::address(pod, *address), MAKE),
            Step::PodGateway(gateway) => self.pod()?.socket.change(message::neighbour(pod, *gateway, HOST_MAC), MAKE),
            Step::PodRoute(to) => {
                let gateway = Family::of(to.addr()).gateway();
                self.pod()?.socket.change(message::route_by(pod, *to, gateway, None), MAKE)
            }
            Step::HostNeighbour(address, mac) => self.host.change(message::neighbour(host, *address, *mac), MAKE),
            Step::HostRoute(address) => self.host.change(message::route_to(host, *address), MAKE),
            Step::Settle(addresses) => self.settle(addresses),
        }
    }

    /// True if the pod has an interface of this name.
    pub fn pod_has(&mut self, interface: &str) -> Result<bool> {
        let index = self.pod().and_then(|pod| Ok(pod.socket.interface_index(interface)?));
        Ok(index.map_err(|error| Error::new(Code::Kernel, format!("cannot look for {interface}: {error}")))?.is_some())
    }

    /// True if the host has an interface of this name.
    pub fn host_has(&self, interface: &str) -> Result<bool> {
        let index = self.host.interface_index(interface);
        Ok(index.map_err(|error| Error::io(format_args!("cannot look for {interface}"), &error))?.is_some())
    }

    /// Names of all host ends of a network's pairs.
    pub fn host_pairs(&mut self, group: u32) -> Result<Vec<String>> {
        let pairs = read::pairs(&mut self.host).map_err(|error| failed("list the interfaces", &error))?;
        let of_network = |link: &Link| link.group == group && is_host_name(&link.name);
        Ok(pairs.into_iter().filter(of_network).map(|link| link.name).collect())
    }

    /// An interface of the host by its name.
    pub fn host_link(&mut self, name: &str) -> Result<Option<Link>> {
        read::link(&mut self.host, name).map_err(|error| failed(&format!("read the interface {name}"), &error))
    }

    /// An interface of the host by its index.
    pub fn host_link_at(&mut self, index: u32) -> Result<Option<Link>> {
        read::link_at(&mut self.host, index).map_err(|error| failed(&format!("read the interface {index}"), &error))
    }

    /// An interface of the pod by its name.
    pub fn pod_link(&mut self, name: &str) -> Result<Option<Link>> {
        let link = self.pod().and_then(|pod| read::link(&mut pod.socket, name));
        link.map_err(|error| failed(&format!("read the pod's interface {name}"), &error))
    }

    /// Addresses of an interface of the pod.
    pub fn pod_addresses(&mut self, index: u32) -> Result<Vec<IpAddr>> {
        let addresses = self.pod().and_then(|pod| read::addresses(&mut pod.socket, index));
        addresses.map_err(|error| failed("list the pod's addresses", &error))
    }

    /// Routes of the pod through an interface.
    pub fn pod_routes(&mut self, index: u32) -> Result<Vec<FoundRoute>> {
        let routes = self.pod().and_then(|pod| read::routes(&mut pod.socket, index));
        routes.map_err(|error| failed("list the pod's routes", &error))
    }

    /// Permanent neighbours of the pod on an interface, with their hardware addresses.
    pub fn pod_neighbours(&mut self, index: u32) -> Result<Vec<(IpAddr, Option<Mac>)>> {
        let neighbours = self.pod().and_then(|pod| read::neighbours(&mut pod.socket, index));
        neighbours.map_err(|error| failed("list the pod's neighbours", &error))
    }

    /// Index of the interface that the host's route to exactly this address goes through, if there is such a route.
    pub fn host_route(&mut self, address: IpAddr) -> Result<Option<u32>> {
        read::route_to(&mut self.host, address).map_err(|error| failed(&format!("read the route to {address}"), &error))
    }

    /// Sets the MTU of an interface of the host.
    pub fn set_host_mtu(&mut self, index: u32, mtu: u32) -> Result<()> {
        let done = self.host.change(message::set_mtu(index, mtu), 0);
        done.map_err(|error| failed(&format!("set the MTU of the host's interface {index} to {mtu}"), &error))
    }

    /// Sets the MTU of an interface of the pod.
    pub fn set_pod_mtu(&mut self, index: u32, mtu: u32) -> Result<()> {
        let done = self.pod().and_then(|pod| pod.socket.change(message::set_mtu(index, mtu), 0));
        done.map_err(|error| failed(&format!("set the MTU of the pod's interface to {mtu}"), &error))
    }

    /// Makes a route in the pod; false if it exists.
    pub fn add_pod_route(&mut self, index: u32, to: IpNet, by: IpAddr, mtu: u32) -> Result<bool> {
        let made = self.pod().and_then(|pod| pod.socket.change(message::route_by(index, to, by, Some(mtu)), MAKE));
        match made {
            Err(error) if error.is(Errno::EEXIST) => Ok(false),
            made => made.map(|()| true).map_err(|error| failed(&format!("give the pod a route to {to}"), &error)),
        }
    }

    /// Takes a route of [`Kernel::add_pod_route`] away.
    pub fn delete_pod_route(&mut self, index: u32, to: IpNet, by: IpAddr) -> Result<()> {
        let gone = self.pod().and_then(|pod| pod.socket.change(message::delete_route_by(index, to, by), 0));
        gone.map_err(|error| failed(&format!("take the pod's route to {to} away"), &error))
    }
}

impl Apply for Kernel {
    fn apply(&mut self, step: &Step) -> Result<()> {
        self.carry_out(step).map_err(|refusal| {
            let exists = refusal.is(Errno::EEXIST);
            let error = failed(&step.describe(), &refusal);
            if let (Step::CreatePair(_), true) = (step, exists) {
                Error { code: Code::AlreadyAttached as u32, ..error }
            } else if let (Step::HostRoute(address), true) = (step, exists) {
                error.with_details(format_args!("somebody has {address} already: `ip route show {address}` says who"))
            } else {
                error
            }
        })
    }

    fn delete_pair(&mut self, host: &str) -> Result<bool> {
        match self.host.change(message::delete_link(host), 0) {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.is(Errno::ENODEV) => Ok(false),
            Err(refusal) => Err(failed(&format!("remove the interface {host}"), &refusal)),
        }
    }
}

fn failed(what: &str, refusal: &Refusal) -> Error {
    let hint = if refusal.is(Errno::EPERM) { " (CNI plugins run as root with CAP_NET_ADMIN)" } else { "" };
    Error::new(Code::Kernel, format!("cannot {what}: {refusal}{hint}"))
}
