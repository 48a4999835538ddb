//! The DaemonSet's pod beside a daemon that runs on its host: keeps giving it access to Kubernetes.
//!
//! ```text
//!   kubelet ── projected token, rotated ──► agent ── UseKubernetes, over the control socket ──► daemon on the host
//! ```
//!
//! The daemon was there first (it made the Node reachable), has the machine's membership, and keeps its data plane. The
//! pod brings what a machine that joined by token lacks: credentials of its Node. They are handed over again every few
//! seconds, so that a daemon which was restarted has them soon, and a token that was rotated takes the place of the old.

use std::time::{Duration, Instant};

use keystone_mesh_core::node::NodeName;
use tokio::sync::mpsc;

use crate::cni::service::PodService;
use crate::config::{Config, Places};
use crate::control::{self, Answer, Call, ControlError, Request};
use crate::http::{HttpServer, listen, pages};
use crate::kube_api::access::ServiceAccount;
use crate::signals::Stop;
use crate::state::{StateDir, StateError};

/// Between two grants. Nothing comes of one that changes nothing.
const EVERY: Duration = Duration::from_secs(10);
/// While the host's daemon is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Calls of the status listener that wait for the host's daemon.
const CALLS: usize = 16;

/// How an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By a signal.
    Stopped,
    /// There is no daemon on this host, nor anyone else who has its state.
    NoHost,
}

/// The agent of one Node.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Where the daemon's state and control socket are.
    pub places: Places,
    /// What is handed over.
    pub account: ServiceAccount,
    /// The Node.
    pub name: NodeName,
    /// How the daemon is to serve pods.
    pub pods: PodService,
    /// How long the host's daemon is waited for.
    pub patience: Duration,
}

impl Agent {
    /// Gives access to the daemon on this host until a signal, or until there is none. An error is one that a restart of
    /// the pod may cure.
    pub async fn serve(&self, config: &Config) -> anyhow::Result<End> {
        let mut stop = Stop::new()?;
        let _status = self.serve_status(config);
        let (mut told, mut alone_since) = (String::new(), Instant::now());
        loop {
            let (said, pause) = match self.hand_over().await {
                Ok(said) => {
                    alone_since = Instant::now();
                    (said, EVERY)
                }
                Err(Trouble::NoDaemon) if alone_since.elapsed() >= self.patience && self.state_is_free()? => {
                    return Ok(End::NoHost);
                }
                Err(Trouble::NoDaemon) => ("waiting for the daemon of this host".to_owned(), LOOK_EVERY),
                Err(Trouble::Other(why)) => (format!("the daemon of this host has no access: {why}"), EVERY),
            };
            // What it says is told when it changes: every ten seconds it would be noise.
            if said != told {
                tracing::info!(node = %self.name, "{said}");
                told = said;
            }
            tokio::select! {
                // The grant stays: the next pod renews it, and what is deleted is refused by the API server.
                _ = stop.requested() => return Ok(End::Stopped),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Hands the access over once. What came of it, in words.
    async fn hand_over(&self) -> Result<String, Trouble> {
        let grant = self.account.grant(self.name.to_string()).map_err(|error| Trouble::Other(error.to_string()))?;
        self.ask(&Request::UseKubernetes { grant }).await?;
        self.ask(&Request::ServePods { service: self.pods }).await?;
        let Answer::Status(status) = self.ask(&Request::Status).await? else {
            return Err(Trouble::Other("the daemon answered something else than was asked".into()));
        };
        let registry = &status.registry;
        let reason = registry.reason.as_ref().map_or(String::new(), |why| format!(" ({why})"));
        Ok(format!("the daemon of this host has access; its registry is {}, {}{reason}", registry.kind, registry.state))
    }

    async fn ask(&self, request: &Request) -> Result<Answer, Trouble> {
        control::ask(&self.places.socket(), request).await.map_err(|error| match error {
            ControlError::NotRunning { .. } => Trouble::NoDaemon,
            ControlError::Running(_) | ControlError::Io { .. } | ControlError::Refused(_) | ControlError::Answer(_) => {
                Trouble::Other(error.to_string())
            }
        })
    }

    /// Whether nobody has the state: a daemon that starts or stops at this moment is not in the way of another.
    fn state_is_free(&self) -> anyhow::Result<bool> {
        match StateDir::open(&self.places.state_dir) {
            Ok(_) => Ok(true),
            Err(StateError::Locked(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Serves the daemon's status on loopback, for the pod's probes, where the daemon does not do it itself.
    fn serve_status(&self, config: &Config) -> Option<HttpServer> {
        if config.status_listen.is_empty() {
            return None;
        }
        let (calls, mut asked) = mpsc::channel::<Call>(CALLS);
        let socket = self.places.socket();
        tokio::spawn(async move {
            while let Some(Call { request, answer }) = asked.recv().await {
                if let Ok(said) = control::ask(&socket, &request).await {
                    let _ = answer.send(said);
                }
            }
        });
        let server = pages::serve_daemon(calls, config.metrics_peers);
        server.set_addresses(listen::addresses(&config.status_listen, &[]));
        Some(server)
    }
}

enum Trouble {
    /// No daemon answers.
    NoDaemon,
    /// Something that a person may have to mend.
    Other(String),
}
