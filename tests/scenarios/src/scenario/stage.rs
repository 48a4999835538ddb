//! What the stories have in common: hosts with daemons, and the control plane with its relay.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::story::{Story, millis};
use keystone_lab::mesh::{Node, Program, Status};
use keystone_lab::{Host, Router, RouterSpec, Wire, World};

/// How long a daemon may take until it is ready.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// The world and everybody in it.
pub(super) struct Stage {
    pub(super) world: World,
    program: Option<Program>,
    hosts: Vec<Host>,
    nodes: Vec<Arc<Node>>,
}

/// A network's home and its relay.
pub(super) struct ControlPlane {
    pub(super) home: Arc<Node>,
    pub(super) relay: Arc<Node>,
    pub(super) home_v4: Ipv4Addr,
    pub(super) network: String,
    pub(super) relay_address: String,
    /// With which the home's daemon is started, besides the relay's address.
    arguments: Vec<String>,
}

impl Stage {
    pub(super) fn new(wire: Wire, program: Option<Program>) -> Result<Self> {
        Ok(Self { world: World::new(wire)?, program, hosts: Vec::new(), nodes: Vec::new() })
    }

    /// A public host.
    pub(super) fn public_host(&mut self, name: &str) -> Result<Host> {
        let host = self.world.public_host(name)?;
        self.hosts.push(host.clone());
        Ok(host)
    }

    /// A host alone behind a router of its own.
    pub(super) fn host_behind(&mut self, name: &str, router: &str, spec: RouterSpec) -> Result<(Host, Router)> {
        let router = self.world.router(router, spec)?;
        let host = router.host(name)?;
        self.hosts.push(host.clone());
        Ok((host, router))
    }

    /// Hosts behind one router.
    pub(super) fn hosts_behind<const N: usize>(
        &mut self,
        names: [&str; N],
        router: &str,
        spec: RouterSpec,
    ) -> Result<[Host; N]> {
        let router = self.world.router(router, spec)?;
        let hosts = names.into_iter().map(|name| router.host(name)).collect::<Result<Vec<_>>>()?;
        self.hosts.extend(hosts.iter().cloned());
        hosts.try_into().map_err(|_other_length| anyhow!("a host for each name"))
    }

    /// Two hosts with nothing but a cable between them.
    pub(super) fn two_hosts(&mut self, names: [&str; 2]) -> Result<[Host; 2]> {
        let hosts = self.world.two_hosts(names)?;
        self.hosts.extend(hosts.iter().cloned());
        Ok(hosts)
    }

    /// The program under test.
    pub(super) fn program(&self) -> Result<&Program> {
        self.program.as_ref().context("this story runs without keystone-mesh")
    }

    /// A fresh installation of the program on `host`.
    pub(super) fn install(&mut self, host: &Host, name: &str) -> Result<Arc<Node>> {
        let node = Arc::new(Node::new(self.program()?, host, name)?);
        self.nodes.push(Arc::clone(&node));
        Ok(node)
    }

    /// Forgets an installation whose daemon has ended.
    pub(super) fn uninstall(&mut self, node: &Arc<Node>) {
        self.nodes.retain(|known| !Arc::ptr_eq(known, node));
    }

    /// Every installation.
    pub(super) fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.iter()
    }

    /// The name of every host.
    pub(super) fn host_names(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().map(Host::name)
    }

    /// A machine at home behind a port-restricted router, and a public one for the relay; nothing runs there yet.
    pub(super) fn founders(&mut self) -> Result<Founders> {
        let (home, _router) = self.host_behind("home", "home-router", RouterSpec::default())?;
        let relay = self.public_host("relay")?;
        Ok(Founders { home: self.install(&home, "home")?, relay: self.install(&relay, "relay")? })
    }

    /// As [`Self::founders`], with home in public too.
    pub(super) fn public_founders(&mut self) -> Result<Founders> {
        let (home, relay) = (self.public_host("home")?, self.public_host("relay")?);
        Ok(Founders { home: self.install(&home, "home")?, relay: self.install(&relay, "relay")? })
    }

    /// A table of all hosts and what stands before them.
    pub(super) fn describe(&self) -> Vec<Vec<String>> {
        let head = ["host", "address", "behind", "which is", "seen as"].map(str::to_owned).to_vec();
        let row = |host: &Host| {
            let router = host.router();
            let behind = router.map_or("-", Router::name).to_owned();
            let nat = router.map_or_else(|| "-".to_owned(), |router| router.nat().to_string());
            vec![host.name().to_owned(), host.v4().to_string(), behind, nat, host.public_v4().to_string()]
        };
        [head].into_iter().chain(self.hosts.iter().map(row)).collect()
    }
}

/// The machines on which a network begins.
pub(super) struct Founders {
    home: Arc<Node>,
    relay: Arc<Node>,
}

impl Founders {
    /// Makes a network and starts its control plane and its relay.
    pub(super) fn found(self, story: &Story) -> Result<ControlPlane> {
        let mut plane = self.init(story)?;
        plane.begin(story, &[])?;
        Ok(plane)
    }

    /// Makes a network; nothing runs yet.
    pub(super) fn init(self, story: &Story) -> Result<ControlPlane> {
        let Self { home, relay } = self;
        let network = home.init()?;
        let relay_address = relay.relay_address(&network)?;
        story.step(&format!("home makes the network {}", shortened(&network)));
        let home_v4 = Ipv4Addr::UNSPECIFIED;
        Ok(ControlPlane { home, relay, home_v4, network, relay_address, arguments: Vec::new() })
    }
}

impl ControlPlane {
    /// Starts relay and home for the first time, home with these arguments besides.
    pub(super) fn begin(&mut self, story: &Story, arguments: &[&str]) -> Result<()> {
        self.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let start = Instant::now();
        self.start()?;
        self.home_v4 = self.home.mesh_v4()?;
        story.step(&format!(
            "home is {} in the mesh and connected to the relay {} after its start",
            self.home_v4,
            millis(start.elapsed())
        ));
        Ok(())
    }

    /// Starts relay and home, and waits until home is connected to its relay and has its address.
    pub(super) fn start(&self) -> Result<()> {
        self.relay.start_relay(&self.network)?;
        self.start_home()
    }

    /// Starts home alone, and waits until it is connected to its relay and has its address.
    pub(super) fn start_home(&self) -> Result<()> {
        let mut arguments = vec!["--relay", &self.relay_address];
        arguments.extend(self.arguments.iter().map(String::as_str));
        self.home.up(&arguments)?;
        let ready = |status: &Status| status.has_relay() && !status.node.addresses.is_empty();
        self.home.wait_until("connected to its relay", START_PATIENCE, ready)?;
        Ok(())
    }

    /// SIGKILL to both.
    pub(super) fn kill(&self) -> Result<()> {
        self.home.kill()?;
        self.relay.kill()
    }
}

/// Enough of a key for a person to tell it from another.
fn shortened(key: &str) -> String {
    key.chars().take(8).chain(['…']).collect()
}
