//! Plain WireGuard peers with a fixed configuration, played by `keystone-mesh` or by another implementation.
//!
//! ```text
//!   Settings --> config.toml  --> keystone-mesh up --config     one daemon, with plain peers alone
//!           \--> wg setconf   --> wireguard-go, boringtun-cli   and `ip` for addresses, routes and MTU
//! ```
//!
//! wireguard-go and boringtun-cli are what `make test-peers` installs; [`Maker::program`] finds them.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use keystone_mesh_core::kernel::RULE_PRIORITY;
use keystone_mesh_core::{PresharedKey, PrivateKey, PublicKey};
use serde_json::Value;

use crate::host::Host;
use crate::{Process, tool, wait};

/// How long a program may take until it is configured.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long a clean stop may take.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);

/// Where programs that speak WireGuard's cross-platform interface have their sockets (wg(8)).
const SOCKETS: &str = "/var/run/wireguard";

/// Who made the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// `keystone-mesh`.
    Keystone,
    /// `wireguard`, the program of wireguard-go.
    WireguardGo,
    /// `boringtun-cli`.
    Boringtun,
}

impl Maker {
    /// The name that people know.
    pub fn label(self) -> &'static str {
        match self {
            Self::Keystone => "keystone-mesh",
            Self::WireguardGo => "wireguard-go",
            Self::Boringtun => "boringtun-cli",
        }
    }

    /// The installed program: in the folder that KEYSTONE_TEST_PEERS names, or else on the PATH, or else where `make
    /// test-peers` of this repository puts it. The error says what to do.
    pub fn program(self) -> Result<PathBuf> {
        let name = match self {
            Self::Keystone => "keystone-mesh",
            Self::WireguardGo => "wireguard",
            Self::Boringtun => "boringtun-cli",
        };
        if let Some(folder) = std::env::var_os("KEYSTONE_TEST_PEERS") {
            let path = Path::new(&folder).join(name);
            return if path.is_file() { Ok(path) } else { bail!("KEYSTONE_TEST_PEERS has no {}", path.display()) };
        }
        if let Some(path) = tool::find(name) {
            return Ok(path);
        }
        let asked = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../peers/install")).arg("--path").output();
        let folder = asked.context("ask tests/peers/install for its folder")?.stdout;
        let path = Path::new(String::from_utf8_lossy(&folder).trim()).join(name);
        if path.is_file() { Ok(path) } else { bail!("{} is not installed: run `make test-peers`", self.label()) }
    }
}

/// What one end of tunnels is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its key.
    pub key: PrivateKey,
    /// Its UDP port.
    pub listen_port: u16,
    /// MTU of the interface, in bytes.
    pub mtu: u16,
    /// Its addresses inside.
    pub addresses: Vec<IpNet>,
    /// Its peers.
    pub peers: Vec<Peer>,
}

/// A peer of one end.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its key.
    pub key: PublicKey,
    /// Mixed into the handshake where set.
    pub preshared_key: Option<PresharedKey>,
    /// Where it is; without one it has to come first.
    pub endpoint: Option<SocketAddr>,
    /// What may be sent to it and come from it.
    pub allowed_ips: Vec<IpNet>,
    /// Seconds between keepalives.
    pub keepalive: Option<u16>,
}

/// A program that plays one end of tunnels on a host; dropping it kills the program.
pub struct End {
    host: Host,
    maker: Maker,
    program: PathBuf,
    settings: Settings,
    process: Option<Process>,
}

impl End {
    /// Nothing is started yet.
    pub fn new(host: &Host, maker: Maker, program: &Path, settings: Settings) -> Self {
        Self { host: host.clone(), maker, program: program.to_owned(), settings, process: None }
    }

    /// Who plays it.
    pub fn maker(&self) -> Maker {
        self.maker
    }

    /// Where it runs.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// What it is told.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Changes what it is told at its next start.
    pub fn settings_mut(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// The name of its interface. Sockets of all namespaces share a folder, so it is the host's.
    pub fn interface(&self) -> &str {
        self.host.name()
    }

    /// Starts the program and waits until it is configured and its interface is up.
    pub fn start(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("{} runs already on {}", self.maker.label(), self.host.name());
        }
        match self.maker {
            Maker::Keystone => self.start_keystone(),
            Maker::WireguardGo => self.start_other(&["--foreground"]),
            Maker::Boringtun => self.start_other(&["--foreground", "--disable-drop-privileges"]),
        }
    }

    /// The running program's process id inside the sandbox.
    pub fn id(&self) -> Result<u32> {
        self.process.as_ref().map(Process::id).with_context(|| format!("{} does not run", self.maker.label()))
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), Process::kill)
    }

    /// SIGKILL, and nothing of it is left on the host: ours leaves its interface and rules behind when it is killed.
    pub fn remove(&mut self) -> Result<()> {
        self.kill()?;
        let rule = format!("rule delete pref {RULE_PRIORITY}");
        for leftover in [format!("link delete dev {}", self.interface()), format!("-4 {rule}"), format!("-6 {rule}")] {
            let _nothing_left = self.host.run(Command::new("ip").args(leftover.split(' ')));
        }
        Ok(())
    }

    /// SIGTERM, and how it ended; None if it did not run.
    pub fn stop(&mut self) -> Result<Option<ExitStatus>> {
        self.process.take().map(|process| process.terminate(STOP_PATIENCE)).transpose()
    }

    /// The status it ended with, if it did by itself.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.process.as_mut().map_or(Ok(None), Process::ended)
    }

    /// The last lines that the program wrote.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.host.folder().map(|folder| folder.join(format!("{}.log", self.maker.label())));
        log.map(|log| crate::process::tail(&log, lines)).unwrap_or_default()
    }

    /// What `keystone-mesh status --json` says.
    pub fn status(&self) -> Result<Value> {
        let mut command = Command::new(&self.program);
        command.args(["status", "--json", "--run-dir"]).arg(self.host.folder()?.join("run"));
        serde_json::from_str(&self.host.run(&mut command)?).context("read the status")
    }

    /// What `wg ARGUMENTS` prints, of another implementation.
    pub fn wg(&self, arguments: &[&str]) -> Result<String> {
        self.host.run(Command::new("wg").args(arguments))
    }

    fn start_keystone(&mut self) -> Result<()> {
        let folder = self.host.folder()?;
        let config = folder.join("config.toml");
        fs::write(&config, self.toml(&folder)?).context("write the configuration")?;
        let mut command = Command::new(&self.program);
        command.arg("up").arg("--config").arg(&config);
        command.arg("--state-dir").arg(folder.join("state")).arg("--run-dir").arg(folder.join("run"));
        self.process = Some(self.host.spawn(self.maker.label(), &mut command)?);
        self.wait_until_ready("answers at its control socket", |end| end.status().map(drop))
    }

    fn start_other(&mut self, arguments: &[&str]) -> Result<()> {
        let interface = self.interface().to_owned();
        let folder = self.host.folder()?;
        let config = folder.join("wg.conf");
        fs::write(&config, self.setconf()).context("write the configuration")?;
        // A killed program leaves its socket, which would look like a program that is ready.
        let _none = fs::remove_file(Path::new(SOCKETS).join(format!("{interface}.sock")));
        let mut command = Command::new(&self.program);
        // wireguard-go asks for this where it takes the kernel to have WireGuard.
        command.args(arguments).arg(&interface).env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1");
        self.process = Some(self.host.spawn(self.maker.label(), &mut command)?);
        let file = config.to_str().context("the scratch folder is UTF-8")?.to_owned();
        self.wait_until_ready("takes its configuration", |end| end.wg(&["setconf", end.interface(), &file]).map(drop))?;
        let mut batch = format!("link set dev {interface} mtu {} up\n", self.settings.mtu);
        for net in &self.settings.addresses {
            batch += &format!("address replace {net} dev {interface}{}\n", no_dad(net));
        }
        for net in self.settings.peers.iter().flat_map(|peer| &peer.allowed_ips) {
            batch += &format!("route replace {net} dev {interface}\n");
        }
        self.host.namespace().ip(&batch)
    }

    fn wait_until_ready(&mut self, what: &str, ready: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let what = format!("{} on {} {what}", self.maker.label(), self.host.name());
        let mut last = String::from("nothing");
        let waited = wait::until(&what, START_PATIENCE, POLL, || {
            if let Some(status) = self.ended()? {
                self.process = None;
                bail!("{} ended ({status}):\n{}", self.maker.label(), self.log_tail(12));
            }
            match ready(self) {
                Ok(()) => Ok(Some(())),
                Err(error) => {
                    last = format!("{error:#}");
                    Ok(None)
                }
            }
        });
        waited.with_context(|| format!("at last {last}"))
    }

    fn toml(&self, folder: &Path) -> Result<String> {
        let key = write_key(&folder.join("key"), self.settings.key.as_bytes())?;
        let mut text = format!(
            "interface = \"{}\"\nlisten_port = {}\nmtu = {}\naddresses = {}\nprivate_key_file = \"{key}\"\n",
            self.interface(),
            self.settings.listen_port,
            self.settings.mtu,
            toml_list(&self.settings.addresses)
        );
        for (number, peer) in self.settings.peers.iter().enumerate() {
            text += &format!("\n[[peer]]\npublic_key = \"{}\"\n", peer.key);
            text += &format!("allowed_ips = {}\n", toml_list(&peer.allowed_ips));
            if let Some(psk) = &peer.preshared_key {
                let file = write_key(&folder.join(format!("psk-{number}")), psk.as_bytes())?;
                text += &format!("preshared_key_file = \"{file}\"\n");
            }
            if let Some(endpoint) = peer.endpoint {
                text += &format!("endpoint = \"{endpoint}\"\n");
            }
            if let Some(seconds) = peer.keepalive {
                text += &format!("persistent_keepalive = {seconds}\n");
            }
        }
        Ok(text)
    }

    /// As wg(8) reads it.
    fn setconf(&self) -> String {
        let Settings { key, listen_port, .. } = &self.settings;
        let mut text = format!("[Interface]\nPrivateKey = {}\nListenPort = {listen_port}\n", base64(key.as_bytes()));
        for peer in &self.settings.peers {
            let nets: Vec<String> = peer.allowed_ips.iter().map(ToString::to_string).collect();
            text += &format!("\n[Peer]\nPublicKey = {}\nAllowedIPs = {}\n", peer.key, nets.join(", "));
            if let Some(psk) = &peer.preshared_key {
                text += &format!("PresharedKey = {}\n", base64(psk.as_bytes()));
            }
            if let Some(endpoint) = peer.endpoint {
                text += &format!("Endpoint = {endpoint}\n");
            }
            if let Some(seconds) = peer.keepalive {
                text += &format!("PersistentKeepalive = {seconds}\n");
            }
        }
        text
    }
}

fn no_dad(net: &IpNet) -> &'static str {
    match net {
        IpNet::V4(_) => "",
        IpNet::V6(_) => " nodad",
    }
}

fn toml_list(nets: &[IpNet]) -> String {
    let quoted: Vec<String> = nets.iter().map(|net| format!("\"{net}\"")).collect();
    format!("[{}]", quoted.join(", "))
}

fn write_key(file: &Path, key: &[u8; 32]) -> Result<String> {
    fs::write(file, base64(key)).with_context(|| format!("write {}", file.display()))?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o600))?;
    Ok(file.to_str().context("the scratch folder is UTF-8")?.to_owned())
}

/// The usual text of a key. A public key prints as this, so one is borrowed for secret ones of throw-away tests.
fn base64(key: &[u8; 32]) -> String {
    PublicKey::from_bytes(*key).to_string()
}
