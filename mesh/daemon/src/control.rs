//! The control socket: how the CLI talks to the daemon on the same host.
//!
//! A Unix socket, mode 0600. A client writes one request as a line of JSON and reads one answer as a line of JSON.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use keystone_mesh_core::node::NodeName;
use keystone_mesh_core::token::{NamePattern, TokenId, TokenRecord};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::cni::service::PodService;
use crate::kube_api::access::Grant;
use crate::status::{Condition, Status};

/// Longest request, in bytes.
const MAX_REQUEST: u64 = 64 << 10;
/// How long the daemon may take to answer: a leave waits for the control plane.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the CLI asks.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Request {
    /// Everything about the daemon.
    Status,
    /// What the controller says of this node, which the API server is asked for.
    Conditions,
    /// Begin to connect to a peer although no packet waits for it.
    Connect {
        /// The peer's name.
        name: String,
    },
    /// Make a join token.
    TokenCreate {
        /// Seconds of life; none for ever.
        ttl: Option<u64>,
        /// How many nodes may join with it; none any number.
        uses: Option<u32>,
        /// Which names it is good for.
        names: Option<NamePattern>,
        /// Networks that its nodes may be the way to.
        routes: Vec<IpNet>,
    },
    /// List tokens.
    TokenList,
    /// Take a token back.
    TokenRevoke {
        /// Which.
        id: TokenId,
    },
    /// Take a node out of the network.
    Remove {
        /// Which.
        name: NodeName,
    },
    /// Take this access to Kubernetes, in place of the gateway, until it ends. Asked again at each renewal.
    UseKubernetes {
        /// The access; secret.
        grant: Grant,
    },
    /// Back to the gateway.
    WithdrawKubernetes,
    /// Serve pods so, where the daemon's own configuration does not say how.
    ServePods {
        /// How.
        service: PodService,
    },
    /// Leave the network, clean up and stop.
    Leave {
        /// Also where the control plane cannot be told.
        force: bool,
    },
}

/// What the daemon answers.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Everything about the daemon.
    Status(Box<Status>),
    /// What the controller says; nothing where the registry is not Kubernetes.
    Conditions {
        /// By type.
        conditions: Vec<Condition>,
    },
    /// A token; its text is secret.
    Token {
        /// What the person copies.
        token: String,
        /// Its id.
        id: TokenId,
        /// When it ends, seconds since 1970.
        expires: Option<u64>,
    },
    /// Tokens.
    Tokens {
        /// By age.
        tokens: Vec<TokenRecord>,
    },
    /// Done.
    Done,
    /// Not done.
    Failed {
        /// Why, with the remedy.
        message: String,
    },
}

/// A request on its way to the driver.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Answer>,
}

/// Why the socket cannot be served or asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A daemon is there already.
    #[error("a daemon is already running: it answers on {0}")]
    Running(PathBuf),
    /// No daemon.
    #[error("no daemon answers on {path} ({why}); start one with `keystone-mesh up`, or name its --run-dir")]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        why: io::Error,
    },
    /// The system refused.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The daemon will not, or cannot.
    #[error("{0}")]
    Refused(String),
    /// The daemon broke off or said something else.
    #[error("the daemon's answer was not understood ({0}); are CLI and daemon of one version?")]
    Answer(String),
}

/// Binds the socket, taking the place of one whose daemon is gone.
pub fn bind(path: &Path) -> Result<UnixListener, ControlError> {
    let error = |action, source| ControlError::Io { action, path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|source| error("create the directory of", source))?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ControlError::Running(path.to_owned()));
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error("replace", source)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(|source| error("bind", source))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(|source| error("protect", source))?;
    Ok(listener)
}

/// Serves the socket: each request goes to the driver as a [`Call`].
pub async fn serve(listener: UnixListener, calls: mpsc::Sender<Call>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(serve_one(stream, calls.clone()))),
            Err(error) => {
                tracing::warn!(%error, "the control socket cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_one(mut stream: UnixStream, calls: mpsc::Sender<Call>) {
    let (input, mut output) = stream.split();
    let mut line = String::new();
    if BufReader::new(input.take(MAX_REQUEST)).read_line(&mut line).await.is_err() {
        return;
    }
    let answer = match serde_json::from_str(&line) {
        Ok(request) => {
            let (tell, answer) = oneshot::channel();
            let stopping = || Answer::Failed { message: "the daemon is stopping".into() };
            match calls.send(Call { request, answer: tell }).await {
                Ok(()) => answer.await.unwrap_or_else(|_| stopping()),
                Err(_) => stopping(),
            }
        }
        Err(error) => Answer::Failed { message: format!("not a request of this version: {error}") },
    };
    if let Ok(mut text) = serde_json::to_vec(&answer) {
        text.push(b'\n');
        let _ = output.write_all(&text).await;
    }
}

/// Asks the daemon.
pub async fn ask(path: &Path, request: &Request) -> Result<Answer, ControlError> {
    let not_running = |why| ControlError::NotRunning { path: path.to_owned(), why };
    let mut stream = UnixStream::connect(path).await.map_err(not_running)?;
    let text = serde_json::to_string(request).map_err(|error| ControlError::Answer(error.to_string()))?;
    let exchange = async {
        stream.write_all(format!("{text}\n").as_bytes()).await?;
        let mut line = String::new();
        BufReader::new(&mut stream).read_line(&mut line).await?;
        Ok::<_, io::Error>(line)
    };
    let late = || ControlError::Answer(format!("nothing within {} s", PATIENCE.as_secs()));
    let line = tokio::time::timeout(PATIENCE, exchange).await.map_err(|_| late())?;
    let line = line.map_err(|error| ControlError::Answer(error.to_string()))?;
    match serde_json::from_str(&line) {
        Ok(answer) => refusals_are_errors(answer),
        Err(error) => Err(ControlError::Answer(error.to_string())),
    }
}

/// An answer that is not [`Answer::Failed`].
pub fn refusals_are_errors(answer: Answer) -> Result<Answer, ControlError> {
    if let Answer::Failed { message } = answer { Err(ControlError::Refused(message)) } else { Ok(answer) }
}

/// The error of an answer to another question.
pub fn not_the_question() -> ControlError {
    ControlError::Answer("it answers another question".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_reaches_the_driver_and_rubbish_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/control.sock");
        let (calls, mut received) = mpsc::channel(1);
        let serving = tokio::spawn(serve(bind(&path).unwrap(), calls));
        let asking = {
            let path = path.clone();
            tokio::spawn(async move { ask(&path, &Request::TokenList).await })
        };
        let call = received.recv().await.unwrap();
        assert!(matches!(call.request, Request::TokenList));
        call.answer.send(Answer::Done).unwrap();
        assert!(matches!(asking.await.unwrap().unwrap(), Answer::Done));

        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"{\"ask\":\"explode\"}\n").await.unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).await.unwrap();
        assert!(line.contains("not a request of this version"), "{line}");
        assert!(matches!(bind(&path), Err(ControlError::Running(_))));
        serving.abort();
    }

    #[tokio::test]
    async fn a_dead_daemons_socket_is_replaced_and_a_missing_one_explained() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let error = ask(&path, &Request::Status).await.unwrap_err();
        assert!(error.to_string().contains("keystone-mesh up"), "{error}");
        drop(bind(&path).unwrap());
        assert!(path.exists());
        assert!(bind(&path).is_ok());
    }
}
