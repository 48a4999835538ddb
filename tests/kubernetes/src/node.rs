//! A node of the cluster: containerd, kubelet and kube-proxy on a machine of the lab.
//!
//! Everything that a node expects at a fixed place (/etc/cni/net.d, /opt/cni/bin, /var/lib/kubelet, /run/containerd, ...)
//! is its own: the programs share a mount namespace in which /etc, /opt and /var are overlays and the rest is bound, so
//! nothing of the real machine is changed and many nodes live side by side. What the kubelet would change for the whole
//! machine (vm.overcommit_memory and the like) it finds already as it wants it. It all ends with the sandbox.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use keystone_lab::{Host, Process, tool, wait};
use serde_json::{Value, json};

use crate::image::{BUSYBOX, Image};
use crate::{Access, ApiServer, Assets, PORT, cgroup};

/// How long each program may take to start.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// How often it is asked whether it has.
const POLL: Duration = Duration::from_millis(50);

/// What a kubelet wants the kernel to be set to; it is shown files that say so.
const KERNEL_SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Pods of the host's network alone need no more; without any a node does not become Ready.
const NO_POD_NETWORK: &str = r#"{"cniVersion": "0.4.0", "name": "none", "plugins": [{"type": "loopback"}]}"#;

/// Where network plugins are looked for, and where Debian has the reference ones.
const PLUGINS: &str = "/opt/cni/bin";
const REFERENCE_PLUGINS: &str = "/usr/lib/cni";

/// How a node is run.
#[derive(Clone)]
pub struct NodeOptions {
    /// The machine.
    pub host: Host,
    /// Name of the Node.
    pub name: String,
    /// The address that the kubelet announces and where it listens; it must be there before.
    pub address: IpAddr,
    /// One of the other family that it announces too, in a cluster of both.
    pub second_address: Option<IpAddr>,
    /// The address by which it finds the API server.
    pub server: IpAddr,
    /// Further settings of the kubelet's configuration (KubeletConfiguration v1beta1).
    pub configuration: Value,
    /// Further arguments of the kubelet.
    pub arguments: Vec<String>,
    /// Run kube-proxy too, with these arguments besides; `--proxy-mode` among them or it is iptables.
    pub proxy: Option<Vec<String>>,
    /// Folders of the machine that the node's programs and pods see at another place.
    pub binds: Vec<(PathBuf, &'static str)>,
    /// A file for /etc/cni/net.d; None for a node that waits for its pod network.
    pub conflist: Option<String>,
}

impl NodeOptions {
    /// A node for pods of the host's network, named as its machine.
    pub fn new(host: &Host, address: IpAddr, server: IpAddr) -> Self {
        Self {
            host: host.clone(),
            name: host.name().to_owned(),
            address,
            second_address: None,
            server,
            configuration: json!({}),
            arguments: Vec::new(),
            proxy: None,
            binds: Vec::new(),
            conflist: Some(NO_POD_NETWORK.to_owned()),
        }
    }
}

/// A running node. Dropping it kills its programs and its containers.
pub struct ClusterNode {
    options: NodeOptions,
    assets: Assets,
    folder: PathBuf,
    access: Access,
    /// From the last to be started to the first: that is how they must end.
    proxy: Option<Process>,
    kubelet: Option<Process>,
    containerd: Option<Process>,
    /// Holds the mount namespace.
    holder: Process,
}

impl ClusterNode {
    /// Starts the programs, in this order; the kubelet registers when it reaches the API server. Needs root, and what
    /// [`can_test_cluster`](crate::can_test_cluster) asks for.
    pub fn start(server: &ApiServer, options: NodeOptions) -> Result<Self> {
        let assets = Assets::find_for_cluster()?;
        let folder = options.host.folder()?.join("node");
        for part in ["conf", "kubelet", "kubelet-pki", "settings"] {
            fs::create_dir_all(folder.join(part)).with_context(|| format!("make {}", folder.display()))?;
        }
        let name = format!("system:node:{}", options.name);
        let access = server.user(&name, Some("system:nodes"))?.at(&url(options.server));
        access.write_kubeconfig(&folder.join("conf/kubelet.kubeconfig"))?;
        let proxy = server.user("system:kube-proxy", None)?.at(&url(options.server));
        proxy.write_kubeconfig(&folder.join("conf/proxy.kubeconfig"))?;
        server.write_server_certificate(&folder.join("conf"), "kubelet", &options.name, options.address)?;
        let group = cgroup::create(&options.name)?;
        fs::write(folder.join("conf/containerd.toml"), containerd_configuration(&folder))
            .context("configure containerd")?;
        let kubelet = kubelet_configuration(&folder, &options, &group)?;
        fs::write(folder.join("conf/kubelet.json"), kubelet.to_string()).context("configure the kubelet")?;
        let holder = hold_mounts(&options, &folder)?;
        let (proxy, kubelet, containerd) = (None, None, None);
        let mut node = Self { options, assets, folder, access, proxy, kubelet, containerd, holder };
        node.start_containerd()?;
        node.import_busybox()?;
        if let Some(conflist) = node.options.conflist.clone() {
            node.write_file(Path::new("/etc/cni/net.d/10-kubelab.conflist"), &conflist)?;
        }
        node.start_kubelet()?;
        if let Some(arguments) = node.options.proxy.clone() {
            node.start_proxy(&arguments)?;
        }
        Ok(node)
    }

    /// Name of the Node.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// What the kubelet shows to the API server.
    pub fn access(&self) -> &Access {
        &self.access
    }

    /// Runs a program to its end where the node's programs run: in the same network and the same mounts.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(Path::new(program));
        self.options.host.run(command.args(arguments))
    }

    /// Writes a file as the node's programs see it.
    pub fn write_file(&self, path: &Path, text: &str) -> Result<()> {
        let mut command = self.command(Path::new("sh"));
        command.args(["-c", "mkdir -p \"$(dirname \"$0\")\" && cat > \"$0\""]).arg(path);
        self.options.host.enter(|| tool::feed(&mut command, text)).map(drop)
    }

    /// Gives an image to containerd, under the name that it was written with.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.ctr(&["images", "import", &archive.to_string_lossy()]).map(drop)
    }

    /// Puts the reference network plugins, as Debian has them, where the conflist's programs are looked for.
    pub fn install_reference_plugins(&self) -> Result<()> {
        ensure!(
            Path::new(REFERENCE_PLUGINS).is_dir(),
            "the reference network plugins are not installed (package containernetworking-plugins)"
        );
        self.run("sh", &["-c", &format!("mkdir -p {PLUGINS} && cp {REFERENCE_PLUGINS}/* {PLUGINS}/")]).map(drop)
    }

    /// SIGKILL to the kubelet; its pods go on.
    pub fn kill_kubelet(&mut self) -> Result<()> {
        self.kubelet.take().map_or(Ok(()), Process::kill)
    }

    /// Starts the kubelet again after [`Self::kill_kubelet`].
    pub fn start_kubelet(&mut self) -> Result<()> {
        ensure!(self.kubelet.is_none(), "the kubelet of {} runs already", self.name());
        let mut command = self.command(&self.assets.program("kubelet"));
        command.arg("--config").arg(self.folder.join("conf/kubelet.json"));
        command.arg("--kubeconfig").arg(self.folder.join("conf/kubelet.kubeconfig"));
        command.arg("--cert-dir").arg(self.folder.join("kubelet-pki"));
        command.arg(format!("--hostname-override={}", self.name()));
        let second = self.options.second_address.map(|address| format!(",{address}")).unwrap_or_default();
        command.arg(format!("--node-ip={}{second}", self.options.address));
        command.args(&self.options.arguments);
        self.kubelet = Some(self.options.host.spawn("kubelet", &mut command)?);
        Ok(())
    }

    /// Fails, with the end of its log, if one of the programs has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        for process in [&mut self.proxy, &mut self.kubelet, &mut self.containerd].into_iter().flatten() {
            if let Some(status) = process.ended()? {
                bail!("a program of node {} ended ({status}):\n{}", self.options.name, process.log_tail(20));
            }
        }
        Ok(())
    }

    /// How the kubelet's log ends.
    pub fn log_tail(&self, lines: usize) -> String {
        self.kubelet.as_ref().map(|process| process.log_tail(lines)).unwrap_or_default()
    }

    fn start_containerd(&mut self) -> Result<()> {
        let mut command = self.command(Path::new("containerd"));
        command.arg("--config").arg(self.folder.join("conf/containerd.toml"));
        self.containerd = Some(self.options.host.spawn("containerd", &mut command)?);
        wait::until(&format!("containerd of {} answers", self.name()), START_PATIENCE, POLL, || {
            self.check_alive()?;
            Ok(self.ctr(&["version"]).ok())
        })
        .map(drop)
    }

    fn start_proxy(&mut self, arguments: &[String]) -> Result<()> {
        let mut command = self.command(&self.assets.program("kube-proxy"));
        command.arg("--kubeconfig").arg(self.folder.join("conf/proxy.kubeconfig"));
        command.arg(format!("--hostname-override={}", self.name()));
        // The limits of connection tracking are the whole machine's.
        command.args(["--proxy-mode=iptables", "--conntrack-max-per-core=0"]).args(arguments);
        self.proxy = Some(self.options.host.spawn("kube-proxy", &mut command)?);
        Ok(())
    }

    fn import_busybox(&self) -> Result<()> {
        let archive = self.folder.join("busybox.tar");
        Image::busybox()?.write(&archive, BUSYBOX, &["/bin/sleep", "2147483647"])?;
        self.import(&archive)?;
        fs::remove_file(&archive).context("remove the imported archive")
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(Path::new("ctr"));
        command.arg("--address").arg(socket(&self.folder)).args(["--namespace", "k8s.io"]).args(arguments);
        self.options.host.run(&mut command)
    }

    /// `program` in the node's mount namespace; where it is started decides its network.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.holder.id())).arg("--").arg(program);
        command
    }
}

impl Drop for ClusterNode {
    fn drop(&mut self) {
        self.proxy = None;
        self.kubelet = None;
        // Shims live on without containerd; they have its socket among their arguments, and containers die with them.
        self.containerd = None;
        let socket = socket(&self.folder);
        for (process, arguments) in processes() {
            if arguments.contains(&socket.to_string_lossy().into_owned()) {
                end_tree(process);
            }
        }
    }
}

fn url(server: IpAddr) -> String {
    match server {
        IpAddr::V4(address) => format!("https://{address}:{PORT}"),
        IpAddr::V6(address) => format!("https://[{address}]:{PORT}"),
    }
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("containerd.sock")
}

/// Makes the node's view of the file system, in a process that then sleeps.
fn hold_mounts(options: &NodeOptions, folder: &Path) -> Result<Process> {
    let mut script = String::from("set -e\nmount --make-rshared /\n");
    for part in ["etc", "opt", "var"] {
        let (upper, work) = (folder.join(part), folder.join(format!("{part}.work")));
        script += &format!("mkdir -p {0} {1} /{part}\n", upper.display(), work.display());
        script += &format!(
            "mount -t overlay -o lowerdir=/{part},upperdir={},workdir={} overlay /{part}\n",
            upper.display(),
            work.display()
        );
    }
    // A layer of a container cannot itself be on an overlay, and /run is everybody's.
    let own = [
        ("kubelet", "/var/lib/kubelet"),
        ("run/containerd", "/run/containerd"),
        ("run/keystone-mesh", "/run/keystone-mesh"),
    ];
    let own = own.map(|(part, place)| (folder.join(part), place));
    for (part, place) in own.iter().chain(&options.binds) {
        script += &format!("mkdir -p {0} {place}\nmount --bind {0} {place}\n", part.display());
    }
    for (setting, value) in KERNEL_SETTINGS {
        let file = folder.join("settings").join(setting.replace('/', "."));
        script += &format!("echo {value} > {0}\nmount --bind {0} /proc/sys/{setting}\n", file.display());
    }
    let ready = folder.join("ready");
    script += &format!("touch {}\nexec sleep 2147483647\n", ready.display());
    let mut holder = options.host.spawn("mounts", Command::new("sh").args(["-c", &script]))?;
    wait::until("the node's file systems are mounted", START_PATIENCE, POLL, || {
        if let Some(status) = holder.ended()? {
            bail!("they cannot be mounted ({status}):\n{}", holder.log_tail(5));
        }
        Ok(ready.exists().then_some(()))
    })?;
    Ok(holder)
}

fn containerd_configuration(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        r#"version = 2
root = "{folder}/containerd"
state = "{folder}/containerd.state"
disabled_plugins = [
  "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/{BUSYBOX}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{PLUGINS}"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "{folder}/runc"
"#
    )
}

fn kubelet_configuration(folder: &Path, options: &NodeOptions, group: &str) -> Result<Value> {
    let mut configuration = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": options.address.to_string(),
        "authentication": { "x509": { "clientCAFile": folder.join("conf/ca.crt") } },
        "tlsCertFile": folder.join("conf/kubelet.crt"),
        "tlsPrivateKeyFile": folder.join("conf/kubelet.key"),
        "containerRuntimeEndpoint": format!("unix://{}", socket(folder).display()),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": group,
        "enforceNodeAllocatable": [],
        "failCgroupV1": false,
        "failSwapOn": false,
        // A full disk of the machine is none of the cluster's business.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": { "memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%" },
        // Every node has the whole machine for its own, as far as it knows: what it says about itself is said rarely.
        "nodeStatusUpdateFrequency": "4s",
        "nodeStatusReportFrequency": "5m",
    });
    let Value::Object(further) = &options.configuration else { bail!("a kubelet's configuration is an object") };
    for (setting, value) in further {
        configuration[setting] = value.clone();
    }
    Ok(configuration)
}

/// Every process of the sandbox with its arguments.
fn processes() -> Vec<(u32, Vec<String>)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let arguments = |process: u32| fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    let split =
        |bytes: &[u8]| bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    numbered.map(|process| (process, split(&arguments(process)))).collect()
}

/// SIGKILL to a process and all that it started, from the outside in, so that nothing is started meanwhile.
fn end_tree(process: u32) {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    if let Ok(number) = i32::try_from(process) {
        let _gone_already = kill(Pid::from_raw(number), Signal::SIGKILL);
    }
    children.split_whitespace().filter_map(|child| child.parse().ok()).for_each(end_tree);
}
