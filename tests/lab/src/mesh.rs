//! Runs the real `keystone-mesh` program on hosts and reads what it says about itself.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::host::Host;
use crate::sandbox::SCRATCH;
use crate::{Process, process, tool, wait};

/// The mesh's UDP port.
const PORT: u16 = 51840;

/// How often the daemon is asked while waiting for something to be so.
const POLL: Duration = Duration::from_millis(50);

/// How long a clean stop may take.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Lines of a log that an error quotes.
const QUOTED_LINES: usize = 12;

/// The program under test.
#[derive(Clone, Debug)]
pub struct Program(PathBuf);

impl Program {
    /// The program at `path`, or else the one beside this program.
    pub fn find(path: Option<PathBuf>) -> Result<Self> {
        let path = match path {
            Some(path) => path,
            None => std::env::current_exe().context("find the path of this program")?.with_file_name("keystone-mesh"),
        };
        let path = std::path::absolute(&path).with_context(|| format!("find {}", path.display()))?;
        ensure!(
            path.is_file(),
            "there is no program {}: build it (cargo build --release -p keystone-mesh) or name it with --mesh-bin",
            path.display()
        );
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// One machine's installation of the program: its state, its control socket, its log and, while it runs, its daemon.
pub struct Node {
    name: String,
    host: Host,
    program: Program,
    folder: PathBuf,
    daemon: Mutex<Option<Process>>,
}

impl Node {
    /// A fresh installation called `name` on `host`; several with different names may follow each other on one host.
    pub fn new(program: &Program, host: &Host, name: &str) -> Result<Self> {
        let folder = Path::new(SCRATCH).join("nodes").join(name);
        fs::create_dir_all(folder.join("run")).with_context(|| format!("make {}", folder.display()))?;
        Ok(Self {
            name: name.to_owned(),
            host: host.clone(),
            program: program.clone(),
            folder,
            daemon: Mutex::new(None),
        })
    }

    /// Its name in the mesh.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine it runs on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Makes this the control plane of a network of its own, and returns the network key.
    pub fn init(&self) -> Result<String> {
        let made: Initialised = self.ask_json(&["init", "--name", &self.name], &[Dir::State])?;
        Ok(made.network)
    }

    /// Makes the identity of a relay and returns where it will be, as `KEY@HOST:PORT`.
    pub fn relay_address(&self, network: &str) -> Result<String> {
        let key = self.ask(&["relay", "--network", network, "--print-key"], &[Dir::State])?;
        Ok(format!("{}@{}:{PORT}", key.trim(), self.host.v4()))
    }

    /// Starts a relay alone.
    pub fn start_relay(&self, network: &str) -> Result<()> {
        let listen = format!("[::]:{PORT}");
        self.start(&["relay", "--network", network, "--listen", &listen], &[Dir::State])
    }

    /// Starts the daemon with further arguments.
    pub fn up(&self, arguments: &[&str]) -> Result<()> {
        self.start(&[&["up"], arguments].concat(), &[Dir::State, Dir::Run])
    }

    /// Starts the daemon of a machine that has never been here; the token brings it in.
    pub fn up_with_token(&self, token: &str) -> Result<()> {
        let file = self.folder.join("token");
        write_secret(&file, token)?;
        let file = file.to_str().context("the scratch folder is UTF-8")?;
        self.up(&["--token-file", file, "--name", &self.name])
    }

    /// Asks this control plane for a token that is good for `uses` machines.
    pub fn create_token(&self, uses: u32) -> Result<String> {
        let uses = uses.to_string();
        let made: Token =
            self.ask_json(&["token", "create", "--uses", &uses, "--ttl", "1h"], &[Dir::State, Dir::Run])?;
        Ok(made.token)
    }

    /// The manifest of the Secret that lets Kubernetes' controller sign for this control plane's network.
    pub fn kubernetes_secret(&self) -> Result<String> {
        self.ask(&["kubernetes", "secret"], &[Dir::State])
    }

    /// Whether the daemon knows a peer of this name. Asked at its control socket, without starting a program: for many
    /// nodes, often. A peer that it knows it begins to connect to.
    pub fn knows(&self, peer: &str) -> Result<bool> {
        let request = serde_json::json!({ "ask": "connect", "name": peer });
        let answered = || -> io::Result<String> {
            let mut socket = UnixStream::connect(self.folder.join("run/control.sock"))?;
            socket.set_read_timeout(Some(STOP_PATIENCE))?;
            socket.write_all(format!("{request}\n").as_bytes())?;
            let mut answer = String::new();
            BufReader::new(socket).read_line(&mut answer)?;
            Ok(answer)
        };
        let answer = answered().with_context(|| format!("ask the daemon of {}", self.name))?;
        let answer: Value =
            serde_json::from_str(&answer).with_context(|| format!("{} answers {answer:?}", self.name))?;
        match answer["answer"].as_str() {
            Some("done") => Ok(true),
            Some("failed") => Ok(false),
            _ => bail!("the daemon of {} answers {answer}", self.name),
        }
    }

    /// Process id of the daemon, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.daemon().as_ref().map(Process::id)
    }

    /// What the daemon says about itself.
    pub fn status(&self) -> Result<Status> {
        self.ask_json(&["status"], &[Dir::Run])
    }

    /// Waits until the daemon answers at its control socket and `so` holds of what it says.
    pub fn wait_until(&self, what: &str, patience: Duration, so: impl Fn(&Status) -> bool) -> Result<Status> {
        let mut last = String::from("it never answered");
        let seen = wait::until(&format!("{}: {what}", self.name), patience, POLL, || {
            self.check_alive()?;
            match self.status() {
                Ok(status) if so(&status) => Ok(Some(status)),
                Ok(status) => {
                    last = format!("it said {status:?}");
                    Ok(None)
                }
                Err(err) => {
                    last = format!("{err:#}");
                    Ok(None)
                }
            }
        });
        seen.with_context(|| format!("at last {last}"))
    }

    /// Waits until traffic to the peer called `peer` takes such a path.
    pub fn wait_for_path(&self, peer: &str, route: Route, patience: Duration) -> Result<Peer> {
        let what = format!("{route} path to {peer}");
        let status = self.wait_until(&what, patience, |status| status.peer(peer).is_some_and(|p| p.path == route))?;
        status.peer(peer).cloned().with_context(|| format!("{} knows no {peer}", self.name))
    }

    /// Its IPv4 address in the mesh.
    pub fn mesh_v4(&self) -> Result<Ipv4Addr> {
        self.status()?.node.v4().with_context(|| format!("{} has no IPv4 address in the mesh", self.name))
    }

    /// Fails, with the end of the log, if the daemon is not running.
    pub fn check_alive(&self) -> Result<()> {
        let mut daemon = self.daemon();
        let Some(process) = daemon.as_mut() else { bail!("the daemon of {} is not started", self.name) };
        if let Some(status) = process.ended()? {
            bail!("the daemon of {} ended ({status}):\n{}", self.name, process.log_tail(QUOTED_LINES));
        }
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&self) -> Result<()> {
        self.daemon().take().map_or(Ok(()), Process::kill)
    }

    /// SIGTERM, and the status it ends with; None if it does not run.
    pub fn stop(&self) -> Result<Option<ExitStatus>> {
        self.daemon().take().map(|process| process.terminate(STOP_PATIENCE)).transpose()
    }

    /// Leaves the network and waits for the daemon's end.
    pub fn leave(&self) -> Result<()> {
        self.ask(&["leave"], &[Dir::State, Dir::Run])?;
        let Some(mut process) = self.daemon().take() else { return Ok(()) };
        let what = format!("the daemon of {} ends after leave", self.name);
        wait::until(&what, STOP_PATIENCE, POLL, || process.ended()).map(drop)
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self, lines: usize) -> String {
        process::tail(&self.log(), lines)
    }

    /// Where its daemon keeps what outlives it.
    pub fn state_folder(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Where its daemon's control socket is.
    pub fn run_folder(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// What a shell on its host needs so that `keystone-mesh status` and the like speak with this daemon.
    pub fn environment(&self) -> [(&'static str, OsString); 3] {
        let mut path = OsString::from("$PATH:");
        path.push(self.program.0.parent().unwrap_or(Path::new("/")));
        [
            ("KEYSTONE_MESH_STATE_DIR", self.folder.join("state").into()),
            ("KEYSTONE_MESH_RUN_DIR", self.folder.join("run").into()),
            ("PATH", path),
        ]
    }

    fn start(&self, arguments: &[&str], dirs: &[Dir]) -> Result<()> {
        let mut daemon = self.daemon();
        ensure!(daemon.is_none(), "the daemon of {} runs already", self.name);
        *daemon = Some(Process::spawn(self.host.namespace(), &mut self.command(arguments, dirs), &self.log())?);
        Ok(())
    }

    fn ask_json<T: DeserializeOwned>(&self, arguments: &[&str], dirs: &[Dir]) -> Result<T> {
        let answer = self.ask(&[arguments, &["--json"]].concat(), dirs)?;
        serde_json::from_str(&answer)
            .with_context(|| format!("{}: keystone-mesh {} answers {:?}", self.name, arguments[0], answer.trim()))
    }

    fn ask(&self, arguments: &[&str], dirs: &[Dir]) -> Result<String> {
        let mut command = self.command(arguments, dirs);
        self.host.enter(|| tool::feed(&mut command, "")).with_context(|| format!("on {}", self.name))
    }

    fn command(&self, arguments: &[&str], dirs: &[Dir]) -> Command {
        let mut command = Command::new(&self.program.0);
        command.args(arguments);
        for dir in dirs {
            let (flag, folder) = match dir {
                Dir::State => ("--state-dir", "state"),
                Dir::Run => ("--run-dir", "run"),
            };
            command.arg(flag).arg(self.folder.join(folder));
        }
        command
    }

    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    fn daemon(&self) -> MutexGuard<'_, Option<Process>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which folders a command of the program is told.
#[derive(Clone, Copy)]
enum Dir {
    State,
    Run,
}

#[derive(Deserialize)]
struct Initialised {
    network: String,
}

#[derive(Deserialize)]
struct Token {
    token: String,
}

/// The answer of `status --json`, as far as the lab reads it.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// The node itself.
    pub node: OwnState,
    /// The relays it uses.
    #[serde(default)]
    pub relays: Vec<Relay>,
    /// The peers it knows.
    #[serde(default)]
    pub peers: Vec<Peer>,
}

impl Status {
    /// The peer of this name.
    pub fn peer(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name == name)
    }

    /// Whether a relay is connected.
    pub fn has_relay(&self) -> bool {
        self.relays.iter().any(|relay| relay.state == "up")
    }
}

/// What the node says about itself.
#[derive(Clone, Debug, Deserialize)]
pub struct OwnState {
    /// Its addresses in the mesh.
    #[serde(default)]
    pub addresses: Vec<IpNet>,
    /// Its TUN device.
    #[serde(default)]
    pub interface: String,
}

impl OwnState {
    fn v4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|net| match net.addr() {
            IpAddr::V4(addr) => Some(addr),
            IpAddr::V6(_) => None,
        })
    }
}

/// A relay as the node sees it.
#[derive(Clone, Debug, Deserialize)]
pub struct Relay {
    /// `up` where it is usable.
    pub state: String,
}

/// A peer as the node sees it.
#[derive(Clone, Debug, Deserialize)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// How traffic to it travels.
    pub path: Route,
    /// By which address or relay.
    pub via: Option<String>,
    /// Why it is not direct.
    pub reason: Option<String>,
}

/// How traffic to a peer travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// Straight over UDP.
    Direct,
    /// Through a relay.
    Relayed,
    /// Not at all.
    None,
    /// Nothing has been sent for a while.
    Idle,
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::Relayed => "relayed",
            Self::None => "none",
            Self::Idle => "idle",
        })
    }
}

fn write_secret(file: &Path, secret: &str) -> Result<()> {
    let mut out: File = File::options().write(true).create(true).truncate(true).mode(0o600).open(file)?;
    out.write_all(secret.as_bytes()).with_context(|| format!("write {}", file.display()))
}
