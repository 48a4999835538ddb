//! Errors as the specification has them: a number for the runtime, sentences for people.

use std::fmt;

use serde_json::{Value, json};

use super::Version;

/// As long as a message may be, in bytes.
const MAX_TEXT: usize = 2000;

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// The number that tells a runtime what to do. Below 100 the specification gives the meaning, from 100 on we do
/// (docs/cni.md has the table).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Code {
    /// The configuration asks for a version of CNI that is not spoken here.
    IncompatibleVersion = 1,
    /// The configuration has a key that is not known here.
    UnsupportedField = 2,
    /// The container's network namespace does not exist; nothing is left of it here.
    UnknownContainer = 3,
    /// A `CNI_*` variable is missing or has a value that cannot be right.
    InvalidEnvironment = 4,
    /// Reading or writing failed.
    Io = 5,
    /// What came in is not what it should be: no JSON, or JSON of another form.
    Decode = 6,
    /// The configuration is understood and contradicts itself or this node.
    InvalidConfig = 7,
    /// Something passing is missing, the node's facts for example; the same call succeeds later.
    TryAgainLater = 11,
    /// STATUS: pods cannot be given a network here yet.
    NotAvailable = 50,
    /// Every address of the ranges is taken, or the one asked for is.
    NoAddress = 100,
    /// The container has this interface already.
    AlreadyAttached = 101,
    /// The store of addresses on disk is damaged.
    Store = 102,
    /// The kernel refused a step.
    Kernel = 103,
    /// CHECK: what is there differs from what ADD made.
    Differs = 104,
    /// A delegated IPAM plugin is not there or did not answer as a plugin does.
    Delegate = 105,
    /// A fault in this program.
    Bug = 199,
}

impl Code {
    /// All of them, in order.
    pub const ALL: [Self; 16] = [
        Self::IncompatibleVersion,
        Self::UnsupportedField,
        Self::UnknownContainer,
        Self::InvalidEnvironment,
        Self::Io,
        Self::Decode,
        Self::InvalidConfig,
        Self::TryAgainLater,
        Self::NotAvailable,
        Self::NoAddress,
        Self::AlreadyAttached,
        Self::Store,
        Self::Kernel,
        Self::Differs,
        Self::Delegate,
        Self::Bug,
    ];

    /// What it means and what helps, as docs/cni.md has it.
    pub fn meaning(self) -> (&'static str, &'static str) {
        match self {
            Self::IncompatibleVersion => (
                "the configuration's `cniVersion` is not spoken here",
                "set a version that `CNI_COMMAND=VERSION keystone-cni` lists",
            ),
            Self::UnsupportedField => {
                ("the configuration has a key that is not known here", "remove or correct the key that is named")
            }
            Self::UnknownContainer => {
                ("the container's network namespace does not exist", "nothing: nothing was made, nothing is left")
            }
            Self::InvalidEnvironment => (
                "a `CNI_*` variable is missing or wrong",
                "call the plugin through a container runtime; the message names the variable",
            ),
            Self::Io => {
                ("reading or writing failed", "look at the file that is named: rights, space, a read-only disk")
            }
            Self::Decode => {
                ("the input is not JSON, or not of the form that is expected", "correct the place that is named")
            }
            Self::InvalidConfig => {
                ("the configuration contradicts itself or this node", "correct the conflist as the message says")
            }
            Self::TryAgainLater => (
                "what the daemon has to tell first is missing",
                "wait; where it stays, `keystone-mesh doctor` says why the node is not ready",
            ),
            Self::NotAvailable => (
                "STATUS: pods cannot be given a network here yet",
                "`keystone-mesh status` and `doctor` say what the node waits for",
            ),
            Self::NoAddress => (
                "every address is taken, or the one asked for is",
                "`keystone-cni ipam list` shows who holds them; give the node another pod CIDR",
            ),
            Self::AlreadyAttached => {
                ("the container has this interface already", "DEL it first; what is there was left alone")
            }
            Self::Store => (
                "the store of addresses is damaged",
                "the message names the entry; only its own container is concerned: DEL or GC takes it away",
            ),
            Self::Kernel => (
                "the kernel refused a step; everything before it was undone",
                "the message has the step and the kernel's reason",
            ),
            Self::Differs => {
                ("CHECK: something that ADD made is missing or different", "restart the pod; look for who changed it")
            }
            Self::Delegate => (
                "the IPAM plugin named in the configuration is missing or answered nonsense",
                "install it in a directory of `CNI_PATH`",
            ),
            Self::Bug => ("a fault in keystone-cni", "report it with the message"),
        }
    }
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// For the runtime.
    pub code: u32,
    /// What was wrong and what to do, in one sentence.
    pub message: String,
    /// What else is known; may be empty.
    pub details: String,
}

impl Error {
    /// An error without details.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code: code as u32, message: bounded(message.into()), details: String::new() }
    }

    /// The same with `details`, behind what is there already.
    #[must_use]
    pub fn with_details(mut self, details: impl fmt::Display) -> Self {
        if !self.details.is_empty() {
            self.details.push_str("; ");
        }
        self.details = bounded(self.details + &details.to_string());
        self
    }

    /// A failed system call on `what`, for [`Code::Io`].
    pub fn io(what: impl fmt::Display, error: &std::io::Error) -> Self {
        Self::new(Code::Io, format!("{what}: {error}"))
    }

    /// True for an error of this kind.
    pub fn is(&self, code: Code) -> bool {
        self.code == code as u32
    }

    /// What goes to stdout.
    pub fn to_json(&self, version: Version) -> Value {
        let mut json = json!({ "cniVersion": version.as_str(), "code": self.code, "msg": self.message });
        if !self.details.is_empty() {
            json["details"] = self.details.clone().into();
        }
        json
    }
}

/// Runtimes put errors into events, so what was wrong is quoted, but not by the megabyte.
fn bounded(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push_str("...");
    }
    text
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.message, self.code)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl std::error::Error for Error {}
