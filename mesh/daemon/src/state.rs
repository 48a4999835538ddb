//! The node's state on disk.
//!
//! Each file is a head line (`keystone-mesh KIND 1 crc32=...`) and JSON. Files are 0600, written to a temporary name in
//! the same directory, synced, and renamed, so that a crash or a full disk leaves the old file. A file that does not
//! read back whole is refused and never overwritten: it may be the only copy of a key.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::{Entry, NodeName, SignedApproval};
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use keystone_mesh_core::relay::address::Rendezvous;
use keystone_mesh_core::{NodeId, PublicKey, Secret};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// Why state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file does not read back whole.
    #[error(
        "{path} is damaged ({why}); it was left as it is. Restore it from a backup; or, to start afresh, move it away \
         and join again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// Others may read a secret.
    #[error("{path} can be read by others (mode {mode:o}); it holds a secret: run `chmod 600 {path}`", path = path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The directory is in use.
    #[error(
        "{0} is in use by another keystone-mesh process; stop that one first, or give this one its own --state-dir"
    )]
    Locked(PathBuf),
    /// The system refused.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// The membership of this node in its network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Membership {
    /// The network key, pinned.
    pub network: NodeId,
    /// The node's name.
    pub name: NodeName,
    /// Whether this node is the control-plane host: its identity is the network key.
    pub control_plane: bool,
    /// Ways to the control plane as the token gave them, until the network's document is known.
    #[serde(default)]
    pub rendezvous: Vec<Rendezvous>,
    /// What the node is allowed.
    #[serde(default)]
    pub approval: Option<SignedApproval>,
}

/// The last good state of the mesh, from which a node rebuilds it when nobody answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The network's document.
    pub network: Option<SignedNetwork>,
    /// Every node that was known; signatures are verified again when the file is read.
    pub entries: Vec<Entry>,
    /// Every plain peer of the network.
    #[serde(default)]
    pub peers: Vec<SignedPlainPeer>,
    /// Peers with a session, and where each was last reached directly.
    pub live: Vec<LivePeer>,
}

/// A peer that had a session when the snapshot was taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LivePeer {
    /// Its WireGuard key.
    pub key: PublicKey,
    /// Where it was reached directly, if it was.
    pub direct: Option<std::net::SocketAddr>,
}

/// The state directory. Holding one holds its lock.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: Option<nix::fcntl::Flock<File>>,
}

impl StateDir {
    /// Opens the directory, making it (0700) where it is missing, and locks it against a second daemon.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let error = |action, source| StateError::Io { action, path: path.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| error("create", source))?;
        let lock_path = path.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
        let file = file.map_err(|source| StateError::Io { action: "open", path: lock_path, source })?;
        match nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path: path.to_owned(), _lock: Some(lock) }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(StateError::Locked(path.to_owned())),
            Err((_, errno)) => Err(error("lock", errno.into())),
        }
    }

    /// Opens the directory to read while a daemon may hold it.
    pub fn read_only(path: &Path) -> Self {
        Self { path: path.to_owned(), _lock: None }
    }

    /// A file in the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The node's secret, where there is one.
    pub fn secret(&self) -> Result<Option<Secret>, StateError> {
        let path = self.file("secret");
        match fs::metadata(&path) {
            Ok(meta) if meta.permissions().mode() & 0o077 != 0 => {
                return Err(StateError::Exposed { path, mode: meta.permissions().mode() & 0o777 });
            }
            _ => {}
        }
        let Some(text) = read::<String>(&path, "secret")?.map(Zeroizing::new) else { return Ok(None) };
        let damaged = || StateError::Damaged { path: path.clone(), why: "not 32 bytes of Base64".into() };
        let bytes = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, text.as_bytes());
        let bytes = Zeroizing::new(bytes.map_err(|_| damaged())?);
        let bytes: [u8; 32] = bytes.as_slice().try_into().map_err(|_| damaged())?;
        Ok(Some(Secret::from_bytes(bytes)))
    }

    /// The node's secret, made from the system's randomness where there is none.
    pub fn secret_or_create(&self) -> Result<Secret, StateError> {
        if let Some(secret) = self.secret()? {
            return Ok(secret);
        }
        let mut bytes = Zeroizing::new([0; 32]);
        getrandom::fill(bytes.as_mut_slice()).map_err(|error| StateError::Io {
            action: "draw randomness for",
            path: self.file("secret"),
            source: io::Error::other(error.to_string()),
        })?;
        let text = Zeroizing::new(base64::Engine::encode(&base64::engine::general_purpose::STANDARD, bytes.as_slice()));
        write(&self.file("secret"), "secret", text.as_str())?;
        Ok(Secret::from_bytes(*bytes))
    }

    /// The node's membership, where it has one.
    pub fn membership(&self) -> Result<Option<Membership>, StateError> {
        read(&self.file("membership"), "membership")
    }

    /// Stores the membership.
    pub fn set_membership(&self, membership: &Membership) -> Result<(), StateError> {
        write(&self.file("membership"), "membership", membership)
    }

    /// The last good state of the mesh.
    pub fn snapshot(&self) -> Result<Option<Snapshot>, StateError> {
        read(&self.file("snapshot"), "snapshot")
    }

    /// Stores the state of the mesh.
    pub fn set_snapshot(&self, snapshot: &Snapshot) -> Result<(), StateError> {
        write(&self.file("snapshot"), "snapshot", snapshot)
    }

    /// Forgets membership, snapshot and secret: what `leave` does.
    pub fn forget(&self) -> Result<(), StateError> {
        for name in ["snapshot", "membership", "registry.redb", "secret"] {
            let path = self.file(name);
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(StateError::Io { action: "remove", path, source }),
            }
        }
        Ok(())
    }
}

/// Reads a state file; none where there is no such file.
fn read<T: DeserializeOwned>(path: &Path, kind: &str) -> Result<Option<T>, StateError> {
    let damaged = |why: String| StateError::Damaged { path: path.to_owned(), why };
    let bytes = match fs::read(path) {
        Ok(bytes) => Zeroizing::new(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StateError::Io { action: "read", path: path.to_owned(), source }),
    };
    let end = bytes.iter().position(|&b| b == b'\n').ok_or_else(|| damaged("no head line".into()))?;
    let (head, body) = (&bytes[..end], &bytes[end + 1..]);
    let wanted = head_line(kind, body);
    if head != wanted.as_bytes() {
        let same_kind = head.starts_with(format!("keystone-mesh {kind} 1 ").as_bytes());
        let why = if same_kind {
            "its checksum does not fit: cut off or changed"
        } else {
            "not a file of this kind and version"
        };
        return Err(damaged(why.into()));
    }
    serde_json::from_slice(body).map(Some).map_err(|error| damaged(error.to_string()))
}

/// Writes a state file so that at every moment the old or the whole new one is there.
fn write<T: Serialize + ?Sized>(path: &Path, kind: &str, value: &T) -> Result<(), StateError> {
    let error = |action, source| StateError::Io { action, path: path.to_owned(), source };
    let body = serde_json::to_vec_pretty(value).map_err(|e| error("encode", e.into()))?;
    let body = Zeroizing::new(body);
    let temporary = path.with_extension("tmp");
    let result = (|| {
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(|e| error("write", e))?;
        file.write_all(head_line(kind, &body).as_bytes()).map_err(|e| error("write", e))?;
        file.write_all(b"\n").map_err(|e| error("write", e))?;
        file.write_all(&body).map_err(|e| error("write", e))?;
        file.sync_all().map_err(|e| error("sync", e))?;
        fs::rename(&temporary, path).map_err(|e| error("replace", e))
    })();
    if result.is_err() {
        // What was half written is of no use, and on a full disk it is in the way.
        let _ = fs::remove_file(&temporary);
        return result;
    }
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory).and_then(|dir| dir.sync_all()).map_err(|e| error("sync the directory of", e))
}

fn head_line(kind: &str, body: &[u8]) -> String {
    format!("keystone-mesh {kind} 1 crc32={:08x}", crc32fast::hash(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, StateDir) {
        let temp = tempfile::tempdir().unwrap();
        let state = StateDir::open(&temp.path().join("state")).unwrap();
        (temp, state)
    }

    #[test]
    fn a_secret_is_made_once_and_kept_private() {
        let (_temp, state) = dir();
        let first = state.secret_or_create().unwrap();
        assert_eq!(state.secret_or_create().unwrap().as_bytes(), first.as_bytes());
        assert_eq!(fs::metadata(state.file("secret")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        let (_temp, state) = dir();
        state.secret_or_create().unwrap();
        fs::set_permissions(state.file("secret"), fs::Permissions::from_mode(0o644)).unwrap();
        assert!(state.secret().unwrap_err().to_string().contains("chmod 600"));
    }

    #[test]
    fn damage_is_refused_and_the_file_is_left_alone() {
        let (_temp, state) = dir();
        state.secret_or_create().unwrap();
        let whole = fs::read(state.file("secret")).unwrap();
        let mut damages: Vec<Vec<u8>> = (0..whole.len()).map(|cut| whole[..cut].to_vec()).collect();
        for i in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[i] ^= 1;
            damages.push(flipped);
        }
        for damage in damages {
            fs::write(state.file("secret"), &damage).unwrap();
            let error = state.secret_or_create().unwrap_err();
            assert!(matches!(error, StateError::Damaged { .. }), "{error}");
            assert_eq!(fs::read(state.file("secret")).unwrap(), damage);
        }
    }

    #[test]
    fn a_second_daemon_is_kept_out() {
        let (temp, _state) = dir();
        let error = StateDir::open(&temp.path().join("state")).unwrap_err();
        assert!(matches!(error, StateError::Locked(_)), "{error}");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let (_temp, state) = dir();
        let old = Snapshot::default();
        state.set_snapshot(&old).unwrap();
        // A directory in the place of the temporary file makes every write fail, as a full disk does.
        fs::create_dir(state.file("snapshot.tmp")).unwrap();
        let live = vec![LivePeer { key: PublicKey::from_bytes([1; 32]), direct: None }];
        assert!(state.set_snapshot(&Snapshot { live, ..old.clone() }).is_err());
        assert_eq!(state.snapshot().unwrap(), Some(old));
    }
}
