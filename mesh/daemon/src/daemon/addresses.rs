//! Host names in the configuration and in approvals, resolved and kept resolved: a home connection's address changes.

use std::net::SocketAddr;
use std::time::Duration;

use keystone_mesh_core::PublicKey;
use keystone_mesh_core::relay::HostPort;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Between two looks. Dynamic DNS entries live about a minute.
const PERIOD: Duration = Duration::from_secs(60);
/// Where a name did not resolve.
const RETRY: Duration = Duration::from_secs(5);

/// Addresses that names stand for at present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Resolved {
    /// This node's configured endpoints.
    pub(super) own: Vec<SocketAddr>,
    /// Configured plain peers' endpoints.
    pub(super) plain: Vec<(PublicKey, SocketAddr)>,
    /// Names that the machine wants resolved.
    pub(super) names: Vec<(HostPort, SocketAddr)>,
}

/// Resolves for ever; the task ends when the receiver does. `names` are what the machine wants at present.
pub(super) fn start(
    own: Vec<HostPort>,
    plain: Vec<(PublicKey, HostPort)>,
    mut names: watch::Receiver<Vec<HostPort>>,
) -> (mpsc::Receiver<Resolved>, JoinHandle<()>) {
    let (tell, resolved) = mpsc::channel(1);
    let configured = own.iter().chain(plain.iter().map(|(_, host)| host)).any(|host| host.literal().is_none());
    let task = tokio::spawn(async move {
        let mut told = None;
        loop {
            let wanted = names.borrow_and_update().clone();
            let (found, complete) = resolve(&own, &plain, &wanted).await;
            if told.as_ref() != Some(&found) {
                told = Some(found.clone());
                if tell.send(found).await.is_err() {
                    return;
                }
            }
            let pause = match (configured || !wanted.is_empty(), complete) {
                (false, _) => None,
                (true, true) => Some(PERIOD),
                (true, false) => Some(RETRY),
            };
            let changed = match pause {
                Some(pause) => tokio::time::timeout(pause, names.changed()).await,
                None => Ok(names.changed().await),
            };
            if let Ok(Err(_)) = changed {
                return;
            }
        }
    });
    (resolved, task)
}

async fn resolve(own: &[HostPort], plain: &[(PublicKey, HostPort)], names: &[HostPort]) -> (Resolved, bool) {
    let mut resolved = Resolved::default();
    let mut complete = true;
    for host in own {
        match lookup(host).await {
            Some(addr) => resolved.own.push(addr),
            None => complete = false,
        }
    }
    for (key, host) in plain {
        match lookup(host).await {
            Some(addr) => resolved.plain.push((*key, addr)),
            None => complete = false,
        }
    }
    for host in names {
        match lookup(host).await {
            Some(addr) => resolved.names.push((host.clone(), addr)),
            None => complete = false,
        }
    }
    (resolved, complete)
}

async fn lookup(host: &HostPort) -> Option<SocketAddr> {
    if let Some(addr) = host.literal() {
        return Some(addr);
    }
    match tokio::net::lookup_host((host.host(), host.port())).await {
        Ok(mut found) => found.next(),
        Err(error) => {
            tracing::warn!(%host, %error, "an endpoint's name does not resolve");
            None
        }
    }
}
