//! Link, addresses, routes and rules over rtnetlink(7): the driver of `keystone_mesh_core::kernel`.
//!
//! ```text
//!                +---------- read ----------+
//!                v                          |
//!   Desired -> diff -> operations -> execute each    until nothing differs
//!                ^
//!   Changes -----+   somebody changed links, addresses, routes or rules: apply again
//! ```
//!
//! An operation's error does not decide anything: the state is read again, and an error that left no difference was
//! none (someone else added the route meanwhile, the interface took its routes along). What differs as much after a
//! round as before it is reported with the kernel's word about it.
//!
//! Requests and notifications have a socket each. On a shared one a flood of notifications would overrun the receive
//! buffer and take replies with it, whose requests would wait for ever.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use keystone_mesh_core::kernel::{self, Actual, Desired, Diff, KernelOp, Warning};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

mod execute;
mod read;
mod watch;

pub use watch::Changes;

/// How often an apply reads and corrects, at most. Two rounds are for what the kernel does by itself (a primary address
/// takes its secondaries along, the last address its interface's routes); the rest is for those who change things in
/// the middle of it. Who goes on doing so is left to the next apply, which the watch asks for.
const ROUNDS: usize = 8;

/// The kernel's state of one interface.
pub struct KernelState {
    interface: String,
    session: Mutex<Session>,
    /// Carries the requests; ends with this value.
    _connection: JoinSet<()>,
}

/// Held through a whole operation: a netlink socket serves one dump at a time.
struct Session {
    handle: rtnetlink::Handle,
    /// Warnings that hold and were reported.
    reported: BTreeSet<Warning>,
}

/// What an apply or a removal did.
#[derive(Debug, Default)]
pub struct Applied {
    /// Operations that the kernel took. Zero where everything was as desired.
    pub changes: usize,
    /// What is left out and why. Each is reported once, and again after it has ceased in between.
    pub warnings: Vec<Warning>,
    /// What could not be done; everything else was.
    pub failures: Vec<Failure>,
}

/// An operation that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {op}: {error}{}", remedy(error))]
pub struct Failure {
    /// The operation.
    pub op: KernelOp,
    /// The kernel's reason.
    pub error: io::Error,
}

/// Why the kernel's state is unknown.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No netlink socket. It needs a kernel of 4.20 or later with rtnetlink, and a seccomp profile that lets it through.
    #[error("cannot open a netlink socket: {0}; is AF_NETLINK allowed (seccomp, RestrictAddressFamilies)?")]
    Socket(io::Error),
    /// A part of the state could not be read.
    #[error("cannot read the kernel's {what}: {error}")]
    Read {
        /// Which part.
        what: &'static str,
        /// The kernel's reason.
        error: io::Error,
    },
}

impl KernelState {
    /// Opens the netlink socket. Changes nothing; the interface need not exist.
    ///
    /// Called from within a tokio runtime. The socket belongs to the network namespace of the calling thread.
    pub fn new(interface: &str) -> Result<Self, KernelError> {
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check().map_err(KernelError::Socket)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        Ok(Self {
            interface: interface.to_owned(),
            session: Mutex::new(Session { handle, reported: BTreeSet::new() }),
            _connection: tasks,
        })
    }

    /// Makes the kernel hold what is desired, and nothing else of ours.
    ///
    /// To be awaited to its end: a half-done apply leaves a valid state, but one that only the next apply completes.
    pub async fn apply(&self, desired: &Desired) -> Result<Applied, KernelError> {
        self.converge(|actual| kernel::diff(desired, actual)).await
    }

    /// Takes everything of ours away: rules and routes of both families, and the interface (also a persistent one) with
    /// its addresses. Nothing happens where nothing is left.
    pub async fn remove(&self) -> Result<Applied, KernelError> {
        self.converge(kernel::removal).await
    }

    /// What the kernel holds.
    pub async fn actual(&self) -> Result<Actual, KernelError> {
        let session = self.session.lock().await;
        read::actual(&session.handle, &self.interface).await
    }

    /// The host's own addresses that peers may try, sorted; none inside the `mesh` prefixes.
    pub async fn host_addresses(&self, mesh: &[IpNet]) -> Result<Vec<IpAddr>, KernelError> {
        let session = self.session.lock().await;
        let interfaces = read::interfaces(&session.handle, &self.interface).await?;
        Ok(kernel::host_addresses(&interfaces.others, mesh))
    }

    /// Tells of every change of links, addresses, routes and rules from here on, our own included.
    ///
    /// Called from within a tokio runtime, in the network namespace of [`Self::new`].
    pub fn watch(&self) -> Result<Changes, KernelError> {
        Changes::open().map_err(KernelError::Socket)
    }

    async fn converge(&self, plan: impl Fn(&Actual) -> Diff) -> Result<Applied, KernelError> {
        let mut session = self.session.lock().await;
        let mut applied = Applied::default();
        let mut attempted = Vec::new();
        for _ in 0..ROUNDS {
            let actual = read::actual(&session.handle, &self.interface).await?;
            let Diff { ops, warnings } = plan(&actual);
            applied.warnings.extend(session.unreported(warnings));
            if ops == attempted {
                applied.failures.extend(without_effect(&ops, &applied.failures));
                break;
            }
            applied.failures.clear();
            if ops.is_empty() {
                break;
            }
            for &op in &ops {
                match execute::execute(&session.handle, &actual, op).await {
                    Ok(()) => applied.changes += 1,
                    Err(error) => applied.failures.push(Failure { op, error }),
                }
            }
            attempted = ops;
        }
        Ok(applied)
    }
}

impl Session {
    fn unreported(&mut self, holding: BTreeSet<Warning>) -> Vec<Warning> {
        let fresh = holding.difference(&self.reported).cloned().collect();
        self.reported = holding;
        fresh
    }
}

/// The operations that the kernel took, and that are still to be done.
fn without_effect(ops: &[KernelOp], failures: &[Failure]) -> Vec<Failure> {
    let refused = |op: &&KernelOp| failures.iter().any(|failure| failure.op == **op);
    let taken = ops.iter().filter(|op| !refused(op));
    taken.map(|&op| Failure { op, error: io::Error::other("the kernel took it, but it had no effect") }).collect()
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() == io::ErrorKind::PermissionDenied {
        true => "; the daemon needs CAP_NET_ADMIN in this network namespace",
        false => "",
    }
}

fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        rtnetlink::Error::RequestFailed => io::ErrorKind::BrokenPipe.into(),
        other @ (rtnetlink::Error::UnexpectedMessage(_)
        | rtnetlink::Error::NamespaceError(_)
        | rtnetlink::Error::InvalidHardwareAddress(_)
        | rtnetlink::Error::InvalidIp(_)
        | rtnetlink::Error::InvalidAddress(..)
        | rtnetlink::Error::InvalidNla(_)) => io::Error::other(other),
    }
}
