//! Keeps a node's CNI directories as [`layout`](super::layout) decides: reads them, applies, waits for a change.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow};
use keystone_cni::facts::{PodFacts, Ready};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::layout::{Decision, Found, Layout, Mode, Op, PLUGIN, PORTMAP, Wanted, is_configuration};
use super::tell;
use crate::sys::reactor;

/// Without any sign of a change the directories are looked at so often: one may not have been there to be watched.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Changes come in bursts (a temporary file, its rename); one look answers them all.
const SETTLE: Duration = Duration::from_millis(50);
/// Far more than any configuration has.
const MAX_BYTES: u64 = 1 << 20;

/// A plugin tells its versions in milliseconds; one that hangs must not keep the directories from being kept.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Where things are, and what is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The mode; none: the directories are not touched.
    pub mode: Option<Mode>,
    /// Where the runtime looks for configurations.
    pub conf_dir: PathBuf,
    /// Where it looks for plugins.
    pub bin_dir: PathBuf,
    /// The plugin's program; none: beside this one.
    pub plugin: Option<PathBuf>,
    /// Where the plugin finds the facts, as paths are on the host; none: at its default.
    pub facts: Option<PathBuf>,
}

/// The installer's handle; it ends when it is dropped, and leaves everything in place.
#[derive(Debug)]
pub struct Installer {
    problems: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Drop for Installer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Installer {
    /// Starts, where there is anything to do. `facts`: the file that the daemon writes.
    pub fn start(settings: &Settings, facts: PathBuf) -> Option<Self> {
        let mode = settings.mode?;
        let problems = Arc::<Mutex<Vec<String>>>::default();
        let work =
            Work { settings: settings.clone(), mode, facts, layout: Layout::default(), programs: Programs::default() };
        let task = tokio::spawn(run(work, problems.clone()));
        Some(Self { problems, task })
    }

    /// What is not as it should be, a sentence each.
    pub fn problems(&self) -> Vec<String> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Takes away what is ours: the node has left.
pub fn withdraw(settings: &Settings) -> anyhow::Result<()> {
    if settings.mode.is_none() {
        return Ok(());
    }
    withdraw_from(&settings.conf_dir)
}

/// Takes away what is ours in a directory of configurations. One that does not exist has nothing.
pub fn withdraw_from(conf_dir: &Path) -> anyhow::Result<()> {
    let settings = Settings { conf_dir: conf_dir.to_owned(), ..Settings::default() };
    let mut work = Work {
        settings,
        mode: Mode::None,
        facts: PathBuf::new(),
        layout: Layout::default(),
        programs: Programs::default(),
    };
    work.round().map(drop)
}

async fn run(mut work: Work, problems: Arc<Mutex<Vec<String>>>) {
    let changes = Changes::new();
    loop {
        let run_dir = work.facts.parent().unwrap_or(Path::new("/"));
        changes.watch(&[&work.settings.conf_dir, &work.settings.bin_dir, run_dir]);
        let round = tokio::task::spawn_blocking(move || {
            let done = work.round();
            (work, done)
        });
        // It runs to its end, or the process ends.
        let Ok((back, done)) = round.await else { return };
        work = back;
        let (said, again_at) = match done {
            Ok(decision) => (decision.problems, decision.again_at),
            Err(error) => (vec![format!("the CNI directories are not as they should be: {error:#}")], None),
        };
        tell(&problems, said);
        let longest = Instant::now() + LOOK_EVERY;
        let until = again_at.map_or(longest, |at| at.min(longest));
        tokio::select! {
            () = changes.changed() => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep_until(until.into()) => {}
        }
    }
}

/// One node's directories.
struct Work {
    settings: Settings,
    mode: Mode,
    facts: PathBuf,
    layout: Layout,
    programs: Programs,
}

impl Work {
    fn round(&mut self) -> anyhow::Result<Decision> {
        let ready = PodFacts::read(&self.facts).map_or(Ready::default(), |facts| facts.ready);
        let facts = self.settings.facts.as_ref().map(|path| path.display().to_string());
        let installs = matches!(self.mode, Mode::PodNetwork | Mode::Helper);
        let source = if installs { Some(self.source()?) } else { None };
        let found = Found {
            files: configurations(&self.settings.conf_dir)?,
            program: match &source {
                Some(source) => self.programs.same(source, &self.settings.bin_dir.join(PLUGIN))?,
                None => true,
            },
            portmap: installs.then(|| self.programs.versions(&self.settings.bin_dir.join(PORTMAP))).flatten(),
        };
        let mut decision = self.layout.decide(&Wanted { mode: self.mode, facts, ready }, &found, Instant::now());
        for op in &decision.ops {
            if let Applied::Changed = self.apply(op, &found, source.as_deref())? {
                // What is there by now is for the next round to judge.
                decision.again_at = Some(Instant::now());
                break;
            }
        }
        Ok(decision)
    }

    fn apply(&self, op: &Op, found: &Found, source: Option<&Path>) -> anyhow::Result<Applied> {
        match op {
            Op::CopyProgram => {
                let source = source.context("no program is to be copied in this mode")?;
                let program = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
                replace(&self.settings.bin_dir, PLUGIN, &program, 0o755, || true)?;
                tracing::info!(directory = %self.settings.bin_dir.display(), "installed the CNI plugin");
            }
            Op::Write { name, text } => {
                let file = self.settings.conf_dir.join(name);
                let (directory, target) = behind_link(&self.settings.conf_dir, name)?;
                let mode = fs::metadata(&file).map_or(0o644, |there| there.permissions().mode() & 0o777);
                // Another program's rewrite since this one was read would be lost.
                let unchanged = || fs::read_to_string(&file).ok().as_ref() == found.files.get(name);
                if let Applied::Changed = replace(&directory, &target, text.as_bytes(), mode, unchanged)? {
                    return Ok(Applied::Changed);
                }
                tracing::info!(file = %file.display(), "wrote the CNI configuration");
            }
            Op::Remove(name) => {
                let file = self.settings.conf_dir.join(name);
                fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
                tracing::info!(file = %file.display(), "removed the CNI configuration");
            }
        }
        Ok(Applied::Done)
    }

    /// The plugin's program as it came with this one.
    fn source(&self) -> anyhow::Result<PathBuf> {
        let path = match &self.settings.plugin {
            Some(path) => path.clone(),
            None => std::env::current_exe().context("where is this program?")?.with_file_name(PLUGIN),
        };
        if path.is_file() {
            return Ok(path);
        }
        Err(anyhow!(
            "{} does not exist; the program {PLUGIN} comes with this one, or name it with --cni-plugin",
            path.display()
        ))
    }
}

/// What came of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Applied {
    Done,
    /// Nothing: what it was decided upon is not there as it was.
    Changed,
}

/// What programs are, by what the file system says of them: reading megabytes in every round would be waste.
#[derive(Debug, Default)]
struct Programs {
    same: Option<([Stamp; 2], bool)>,
    versions: Option<(Stamp, Option<Vec<String>>)>,
}

/// Length and time of the last change.
type Stamp = (u64, SystemTime);

impl Programs {
    /// Whether two programs are one.
    fn same(&mut self, source: &Path, installed: &Path) -> anyhow::Result<bool> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let Some(there) = stamp(installed) else { return Ok(false) };
        let executable = fs::metadata(installed).is_ok_and(|there| there.permissions().mode() & 0o111 != 0);
        let stamps = [stamp(source).context("the program went away")?, there];
        if let Some((of, same)) = self.same
            && of == stamps
        {
            return Ok(same && executable);
        }
        let same = stamps[0].0 == stamps[1].0 && read(source)? == read(installed)?;
        self.same = Some((stamps, same));
        Ok(same && executable)
    }

    /// The versions that a plugin says it speaks; none where it is not there.
    fn versions(&mut self, plugin: &Path) -> Option<Vec<String>> {
        let stamp = stamp(plugin)?;
        if let Some((of, versions)) = &self.versions
            && *of == stamp
        {
            return versions.clone();
        }
        let versions = Some(ask_versions(plugin, ANSWERS_WITHIN).unwrap_or_else(|error| {
            // Where it cannot be run from here (another C library, in the agent's pod) it speaks what all speak.
            tracing::debug!(plugin = %plugin.display(), %error, "a plugin does not tell its versions");
            Vec::new()
        }));
        self.versions = Some((stamp, versions.clone()));
        versions
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let there = fs::metadata(path).ok()?;
    Some((there.len(), there.modified().ok()?))
}

/// The VERSION command of the CNI specification.
fn ask_versions(plugin: &Path, patience: Duration) -> anyhow::Result<Vec<String>> {
    let mut child = Command::new(plugin)
        .env_clear()
        .env("CNI_COMMAND", "VERSION")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let answer = answer(&mut child, patience);
    // It has said what it has to say, or hangs.
    let _gone_already = child.kill();
    child.wait()?;
    let said: serde_json::Value = serde_json::from_slice(&answer?)?;
    let versions = said["supportedVersions"].as_array().context("no supportedVersions")?;
    Ok(versions.iter().filter_map(|version| version.as_str().map(str::to_owned)).collect())
}

/// Gives a plugin its configuration, and reads to the end what it says.
fn answer(child: &mut Child, patience: Duration) -> anyhow::Result<Vec<u8>> {
    if let Some(mut input) = child.stdin.take() {
        input.write_all(br#"{"cniVersion":"1.0.0"}"#)?;
    }
    let output = child.stdout.take().context("no output")?;
    let (tell, told) = mpsc::channel();
    // It ends with the plugin, which is killed where it takes too long.
    std::thread::spawn(move || {
        let mut said = Vec::new();
        let read = output.take(MAX_BYTES).read_to_end(&mut said).map(|_| said);
        let _nobody_waits = tell.send(read);
    });
    Ok(told.recv_timeout(patience).with_context(|| format!("no answer within {patience:?}"))??)
}

/// The configurations of a directory, by name. One that does not exist has none.
fn configurations(directory: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let reading = || format!("cannot read {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        entries => entries.with_context(reading)?,
    };
    let mut files = BTreeMap::new();
    for entry in entries {
        let entry = entry.with_context(reading)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // A link counts as the file that it leads to, as for the runtime.
        let is_small_file = fs::metadata(entry.path()).is_ok_and(|there| there.is_file() && there.len() <= MAX_BYTES);
        if is_configuration(&name) && is_small_file {
            // It may go at any time; what is no text is no configuration.
            if let Ok(text) = fs::read_to_string(entry.path()) {
                files.insert(name, text);
            }
        }
    }
    Ok(files)
}

/// Where a configuration is in truth. A link, as NixOS and configuration managers make them, stays one: its file is written.
fn behind_link(directory: &Path, name: &str) -> anyhow::Result<(PathBuf, String)> {
    let file = directory.join(name);
    let Ok(target) = fs::read_link(&file) else { return Ok((directory.to_owned(), name.to_owned())) };
    let refused = || format!("{} is a link to {}, which cannot be written here", file.display(), target.display());
    let behind = fs::canonicalize(&file).with_context(refused)?;
    match (behind.parent(), behind.file_name().and_then(OsStr::to_str)) {
        (Some(directory), Some(name)) => Ok((directory.to_owned(), name.to_owned())),
        _ => Err(anyhow!(refused())),
    }
}

/// Puts a file into place in one step, unless what is there is another by then. What is half written has a name that no
/// runtime looks at.
fn replace(
    directory: &Path,
    name: &str,
    bytes: &[u8],
    mode: u32,
    unchanged: impl Fn() -> bool,
) -> anyhow::Result<Applied> {
    let beside = directory.join(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        let mut file = fs::File::create(&beside)?;
        file.write_all(bytes)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        // A crash of the host must not leave an empty program under the plugin's name.
        file.sync_all()?;
        if !unchanged() {
            return Ok(Applied::Changed);
        }
        fs::rename(&beside, directory.join(name)).map(|()| Applied::Done)
    })();
    if !matches!(written, Ok(Applied::Done)) {
        let _nothing_to_remove = fs::remove_file(&beside);
    }
    written.map_err(|error| {
        let remedy = if error.kind() == io::ErrorKind::ReadOnlyFilesystem {
            "; k3s and NixOS have directories of their own (--cni-conf-dir, --cni-bin-dir)"
        } else {
            ""
        };
        anyhow!("cannot write {name} into {}: {error}{remedy}", directory.display())
    })
}

/// Changes of directories (inotify(7)). Where they cannot be watched, looking regularly has to do.
struct Changes(Option<(Inotify, AsyncFd<OwnedFd>)>);

impl Changes {
    fn new() -> Self {
        let made = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(io::Error::from);
        let ready = made.and_then(|inotify| {
            let ready = reactor::readable(inotify.as_fd().try_clone_to_owned()?)?;
            Ok((inotify, ready))
        });
        let told =
            |error| tracing::warn!(%error, "directories cannot be watched; they are looked at every ten seconds");
        Self(ready.map_err(told).ok())
    }

    /// Watches these, also those that came into being since. One that is watched already stays so.
    fn watch(&self, directories: &[&Path]) {
        let Some((inotify, _)) = &self.0 else { return };
        let written = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVE | AddWatchFlags::IN_DELETE;
        for directory in directories {
            let _not_there_yet = inotify.add_watch(*directory, written | AddWatchFlags::IN_ONLYDIR);
        }
    }

    /// Waits for a change. Cancel-safe.
    async fn changed(&self) {
        let Some((inotify, ready)) = &self.0 else { return std::future::pending().await };
        loop {
            let Ok(mut guard) = ready.readable().await else { return std::future::pending().await };
            match inotify.read_events() {
                Ok(_) => return,
                Err(Errno::EAGAIN) => guard.clear_ready(),
                Err(_) => return std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests;
