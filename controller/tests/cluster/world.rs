//! A network whose Kubernetes is real, with machines that are records alone, and controllers that are the program.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use keystone_controller::crds;
use keystone_kubelab::{Access, ApiServer, Options, with_api_server};
use keystone_lab::{Process, sandbox, wait};
use keystone_mesh_api::{AGENT_MANAGER, LEDGER_LABEL, NAMESPACE, NETWORK_CONFIG_MAP};
use keystone_mesh_core::admission::host_of;
use keystone_mesh_core::key::{Identity, Secret};
use keystone_mesh_core::ledger::{Holder, Ledger};
use keystone_mesh_core::network::{DEFAULT_IPV4, Network, default_ipv6};
use keystone_mesh_core::node::{Approval, NodeName, NodeRecord, SignedRecord};
use keystone_mesh_core::path::Nat;
use keystone_mesh_core::{NodeId, annotations};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

/// Everything here happens in far less on a machine that is not busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How often a condition is looked at.
pub(crate) const POLL: Duration = Duration::from_millis(50);
/// Writes of a test under way at once.
const PARALLEL: usize = 16;

/// The API server with CRDs, namespace and the network's document.
pub(crate) struct World<'a> {
    /// The API server.
    pub(crate) server: &'a mut ApiServer,
    /// The network key.
    pub(crate) key: Identity,
    /// The network's document.
    pub(crate) network: Network,
    folder: PathBuf,
}

/// Runs a test in a world of its own. `name` is the test's path.
pub(crate) fn in_world(name: &str, test: impl FnOnce(World<'_>) -> Result<()>) {
    with_api_server(name, Options::default(), |server| test(World::new(server)?));
}

impl<'a> World<'a> {
    /// The world around an API server that just started.
    pub(crate) fn new(server: &'a mut ApiServer) -> Result<Self> {
        let key = Secret::from_bytes([1; 32]).identity();
        let network = Network {
            id: key.id(),
            ipv4: DEFAULT_IPV4.parse()?,
            ipv6: default_ipv6(key.id()),
            relays: vec![],
            gateways: vec!["192.0.2.1:51840".parse()?],
            serial: 1,
        };
        let folder = Path::new(sandbox::SCRATCH).join("controller");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("network.key"), STANDARD.encode(key.seed().as_slice()))?;
        for definition in crds::all() {
            server.apply(&crds::yaml(&definition)?)?;
        }
        let document = network.clone().sign(&key)?.to_map();
        server.kubectl(&["create", "namespace", NAMESPACE])?;
        server.apply(
            &json!({
                "apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"name": NETWORK_CONFIG_MAP, "namespace": NAMESPACE}, "data": document,
            })
            .to_string(),
        )?;
        let established = ["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"];
        server.kubectl(&established)?;
        Ok(Self { server, key, network, folder })
    }

    /// Does something with a client that may do everything.
    pub(crate) fn with_client<R: Send>(&self, work: impl AsyncFnOnce(Client) -> Result<R> + Send) -> Result<R> {
        self.server.with_client(self.server.admin(), work)
    }

    /// Starts a controller. Its metrics are at this port of the loopback.
    pub(crate) fn controller(&self, name: &str, port: u16, flags: &[&str]) -> Result<Controller> {
        self.controller_as(self.server.admin(), name, port, flags)
    }

    /// Starts a controller that comes with this credential.
    pub(crate) fn controller_as(&self, access: &Access, name: &str, port: u16, flags: &[&str]) -> Result<Controller> {
        self.controller_by(&access.kubeconfig(), name, port, flags)
    }

    /// Starts a controller with this kubeconfig.
    pub(crate) fn controller_by(&self, config: &Value, name: &str, port: u16, flags: &[&str]) -> Result<Controller> {
        let kubeconfig = self.folder.join(format!("{name}.kubeconfig"));
        fs::write(&kubeconfig, config.to_string())?;
        let log = self.folder.join(format!("{name}.log"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_keystone-controller"));
        command.arg("--kubeconfig").arg(&kubeconfig).args(["--namespace", NAMESPACE, "--name", name]);
        command.arg("--network-key-file").arg(self.folder.join("network.key"));
        command.arg(format!("--metrics-listen=127.0.0.1:{port}")).arg("--log=info,keystone_controller=debug");
        let process = Process::start(command.args(flags), &log)?;
        Ok(Controller { name: name.to_owned(), process, log, port })
    }

    /// Waits for a condition that a client can see.
    pub(crate) fn until<R: Send>(
        &self,
        what: &str,
        patience: Duration,
        condition: impl AsyncFn(&Client) -> Result<Option<R>> + Send + Sync,
    ) -> Result<R> {
        self.with_client(async |client| until(what, patience, async || condition(&client).await).await)
    }

    /// What the nodes' annotations allow, each verified against the network key.
    pub(crate) async fn approvals(&self, client: &Client) -> Result<BTreeMap<String, Approval>> {
        let mut approvals = BTreeMap::new();
        for node in Api::<Node>::all(client.clone()).list_metadata(&ListParams::default()).await? {
            let name: NodeName = node.name_any().parse()?;
            if let Some(signed) = annotations::approval(&name, node.annotations())? {
                ensure!(signed.get().network == self.key.id(), "{name} is approved by another network");
                approvals.insert(name.to_string(), signed.get().clone());
            }
        }
        Ok(approvals)
    }

    /// The ledger as it stands.
    pub(crate) async fn ledger(&self, client: &Client) -> Result<Ledger> {
        let mut ledger = Ledger::default();
        let pages = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE);
        for page in pages.list(&ListParams::default().labels(LEDGER_LABEL)).await? {
            let number = page.labels()[LEDGER_LABEL].parse()?;
            let faults = ledger.handle_page(number, &page.data.unwrap_or_default());
            ensure!(faults.is_empty(), "the ledger has faults: {faults:?}");
        }
        Ok(ledger)
    }

    /// Whether exactly these machines are approved, each with the address that the ledger holds for it, and no address
    /// twice. None while something is missing; an error where something can never be right any more.
    pub(crate) async fn approved(
        &self,
        client: &Client,
        machines: &[Machine],
    ) -> Result<Option<BTreeMap<String, Approval>>> {
        // What is approved was claimed before, and is released after: so one of both readings shows it.
        let before = self.ledger(client).await?;
        let approvals = self.approvals(client).await?;
        let ledger = self.ledger(client).await?;
        let mut addresses = BTreeSet::new();
        for (name, approval) in &approvals {
            let host = host_of(&self.network, approval).with_context(|| format!("{name} has no address"))?;
            ensure!(addresses.insert(host), "address {host} is approved twice");
            let holder = Holder::Node(name.parse()?, approval.identity);
            let held = [&before, &ledger].map(|ledger| ledger.held_by(&holder));
            ensure!(held.contains(&Some(host)), "{name} has number {host}, the ledger says {held:?}");
        }
        let wanted: BTreeMap<&str, NodeId> = machines.iter().map(|machine| (machine.name(), machine.id())).collect();
        let found: BTreeMap<&str, NodeId> =
            approvals.iter().map(|(name, approval)| (name.as_str(), approval.identity)).collect();
        let held = ledger.live().count();
        Ok((wanted == found && held == machines.len()).then_some(approvals))
    }

    /// Waits until exactly these machines are approved.
    pub(crate) fn until_approved(
        &self,
        machines: &[Machine],
        patience: Duration,
    ) -> Result<BTreeMap<String, Approval>> {
        let what = format!("{} machines are approved", machines.len());
        self.until(&what, patience, async |client| self.approved(client, machines).await)
    }
}

/// Waits for a condition.
pub(crate) async fn until<R>(
    what: &str,
    patience: Duration,
    condition: impl AsyncFn() -> Result<Option<R>>,
) -> Result<R> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        if let Some(value) = condition().await? {
            return Ok(value);
        }
        if tokio::time::Instant::now() > deadline {
            bail!("waited {patience:?} in vain: {what}");
        }
        tokio::time::sleep(POLL).await;
    }
}

/// A machine: an identity and what it says of itself.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    identity: Identity,
    record: NodeRecord,
}

impl Machine {
    /// The machine `PREFIX-NUMBER`.
    pub(crate) fn new(prefix: &str, number: u16) -> Self {
        let mut secret = [9; 32];
        secret[..2].copy_from_slice(&number.to_be_bytes());
        prefix.bytes().zip(&mut secret[2..]).for_each(|(byte, place)| *place = byte);
        let secret = Secret::from_bytes(secret);
        let record = NodeRecord {
            name: format!("{prefix}-{number}").parse().unwrap(),
            identity: secret.identity().id(),
            public_key: secret.wireguard(0).public_key(),
            endpoints: vec!["host 192.0.2.7:51840".parse().unwrap()],
            nat: Nat::Unknown,
            relays: vec![],
            routes: vec![],
            seq: 1,
        };
        Self { identity: secret.identity(), record }
    }

    /// So many of them.
    pub(crate) fn many(prefix: &str, count: u16) -> Vec<Self> {
        (0..count).map(|number| Self::new(prefix, number)).collect()
    }

    /// Its node name.
    pub(crate) fn name(&self) -> &str {
        self.record.name.as_str()
    }

    /// Its identity.
    pub(crate) fn id(&self) -> NodeId {
        self.identity.id()
    }

    /// What it signs with.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its signed record.
    pub(crate) fn record(&self) -> SignedRecord {
        self.record.clone().sign(&self.identity)
    }

    /// The Node as a kubelet and a daemon would have made it.
    pub(crate) fn node(&self) -> Node {
        let node = json!({
            "metadata": {"name": self.name(), "annotations": annotations::of_record(&self.record())},
            "spec": {"taints": [{"key": "someone.else/starting", "effect": "NoSchedule"}]},
        });
        serde_json::from_value(node).unwrap()
    }

    /// Says something else from here on, and publishes it as the daemon does.
    pub(crate) async fn publish(&mut self, client: &Client) -> Result<()> {
        self.record.seq += 1;
        let patch = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.name(), "annotations": annotations::of_record(&self.record())},
        });
        let params = PatchParams::apply(AGENT_MANAGER).force();
        Api::<Node>::all(client.clone()).patch(self.name(), &params, &Patch::Apply(patch)).await?;
        Ok(())
    }
}

/// Creates the Nodes of many machines at once.
pub(crate) async fn create(client: &Client, machines: &[Machine]) -> Result<()> {
    create_all(client, machines, Machine::node).await
}

/// As [`create`], with Nodes of this form.
pub(crate) async fn create_all(client: &Client, machines: &[Machine], node: impl Fn(&Machine) -> Node) -> Result<()> {
    let nodes = Api::<Node>::all(client.clone());
    stream::iter(machines.iter().map(node))
        .map(|node| {
            let nodes = nodes.clone();
            async move { nodes.create(&PostParams::default(), &node).await }
        })
        .buffer_unordered(PARALLEL)
        .try_for_each(|_| async { Ok(()) })
        .await
        .context("create the nodes")
}

/// Deletes the Nodes of many machines at once.
pub(crate) async fn delete(client: &Client, machines: &[Machine]) -> Result<()> {
    let nodes = Api::<Node>::all(client.clone());
    stream::iter(machines)
        .map(|machine| {
            let nodes = nodes.clone();
            async move { nodes.delete(machine.name(), &DeleteParams::default()).await }
        })
        .buffer_unordered(PARALLEL)
        .try_for_each(|_| async { Ok(()) })
        .await
        .context("delete the nodes")
}

/// A controller's process.
pub(crate) struct Controller {
    /// Its name.
    pub(crate) name: String,
    /// Itself.
    pub(crate) process: Process,
    log: PathBuf,
    port: u16,
}

impl Controller {
    /// Resident memory in KiB.
    pub(crate) fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
    }

    /// CPU time used, in clock ticks of a hundredth of a second.
    pub(crate) fn cpu(&self) -> Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
        Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
    }

    /// Everything that it logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its name in the lease.
    pub(crate) fn identity(&self) -> Result<String> {
        self.until_logged("starting", PATIENCE)?;
        let log = self.log();
        let (_, rest) = log.rsplit_once("me=\"").context("its name")?;
        Ok(rest.split_once('"').context("its name")?.0.to_owned())
    }

    /// Waits until it leads.
    pub(crate) fn until_leading(&self, patience: Duration) -> Result<()> {
        self.until_logged("this replica leads", patience)
    }

    /// Waits until a line was logged.
    pub(crate) fn until_logged(&self, text: &str, patience: Duration) -> Result<()> {
        let what = format!("{} logs `{text}`", self.name);
        wait::until(&what, patience, POLL, || Ok(self.log().contains(text).then_some(())))
            .with_context(|| self.process.log_tail(40))
    }

    /// The value of a metric, summed over its labels; none where nothing answers.
    pub(crate) fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        let mut text = String::new();
        use std::io::{Read, Write};
        write!(stream, "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").ok()?;
        stream.read_to_string(&mut text).ok()?;
        Some(keystone_kubelab::Metrics::parse(&text).sum(name, labels))
    }
}
