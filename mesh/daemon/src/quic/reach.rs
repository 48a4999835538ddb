//! From host names to a connection: resolve at each attempt, try all addresses at once, take the first that answers.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use keystone_mesh_core::NodeId;
use keystone_mesh_core::relay::HostPort;
use tokio::task::JoinSet;

use super::endpoint::{Authenticated, ConnectError, QuicEndpoint};
use super::tls::Protocol;

/// Addresses that are tried for one host or relay. A name with more is asked for trouble.
const MAX_ADDRESSES: usize = 8;

/// Why none of a place's addresses gave a connection. Displays all reasons on one line.
#[derive(Debug)]
pub struct ReachError(pub Vec<Unreached>);

/// Why one address, or one name, gave no connection.
#[derive(Debug, thiserror::Error)]
pub enum Unreached {
    /// The name does not resolve.
    #[error("cannot resolve {host}: {source}")]
    Unresolved {
        /// The name and port.
        host: HostPort,
        /// What the resolver says.
        source: io::Error,
    },
    /// The name resolves to nothing.
    #[error("{0} has no address")]
    NoAddress(HostPort),
    /// The address does not answer as it should.
    #[error(transparent)]
    Connect(ConnectError),
}

impl fmt::Display for ReachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, reason) in self.0.iter().enumerate() {
            write!(f, "{}{reason}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for ReachError {}

/// Connects to the holder of the key `server` at any of `hosts`.
pub async fn connect_any(
    endpoint: &QuicEndpoint,
    hosts: &[HostPort],
    server: NodeId,
    protocol: Protocol,
) -> Result<Authenticated, ReachError> {
    let (addrs, mut reasons) = resolve(hosts).await;
    let mut attempts = JoinSet::new();
    for addr in addrs {
        let endpoint = endpoint.clone();
        attempts.spawn(async move { endpoint.connect(addr, server, protocol).await });
    }
    // The rest of the attempts end with the set.
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => reasons.push(Unreached::Connect(error)),
            Err(error) => tracing::error!(%error, "a connection attempt did not end by itself"),
        }
    }
    Err(ReachError(reasons))
}

async fn resolve(hosts: &[HostPort]) -> (Vec<SocketAddr>, Vec<Unreached>) {
    let mut lookups = JoinSet::new();
    let (mut addrs, mut reasons) = (Vec::new(), Vec::new());
    for host in hosts.iter().take(MAX_ADDRESSES).cloned() {
        match host.literal() {
            Some(addr) => addrs.push(addr),
            None => {
                lookups.spawn(async move {
                    let found = tokio::net::lookup_host((host.host(), host.port())).await;
                    let found = found.map(|found| found.take(MAX_ADDRESSES).collect::<Vec<_>>());
                    (host, found)
                });
            }
        }
    }
    while let Some(lookup) = lookups.join_next().await {
        match lookup {
            Ok((host, Ok(found))) if found.is_empty() => reasons.push(Unreached::NoAddress(host)),
            Ok((_, Ok(found))) => addrs.extend(found),
            Ok((host, Err(source))) => reasons.push(Unreached::Unresolved { host, source }),
            Err(error) => tracing::error!(%error, "a name lookup did not end by itself"),
        }
    }
    addrs.sort_unstable();
    addrs.dedup();
    addrs.truncate(MAX_ADDRESSES);
    (addrs, reasons)
}
