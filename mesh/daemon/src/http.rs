//! A small HTTP server for what this program says about itself.
//!
//! ```text
//!   addresses wanted ──> keeper: binds, lets go, tries again ──> one acceptor for each address
//!                                                                   │ at most CONNECTIONS at once
//!                                                                   └──> one request, LIFETIME long at most
//! ```
//!
//! GET only. Whoever talks to it costs little: connections are counted for each address by itself, so that a flood through
//! the mesh does not shut out the probes that come by loopback; a connection carries one request, has a limit on its
//! headers and on its life, and what is answered is computed once a second at most ([`pages`]).

pub mod listen;
pub mod pages;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

/// Connections at once on one address: a scraper, a probe, some people and the controller's reporters.
const CONNECTIONS: usize = 32;
/// How long a client may take for its request's head.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may live: a full page over the slowest link that is worth a mesh.
const LIFETIME: Duration = Duration::from_secs(20);
/// What is read ahead; a head that is longer is refused. hyper's least is 8 KiB.
const READ_BUFFER: usize = 16 << 10;
/// Header lines in a request; browsers send about 20.
const HEADERS: usize = 64;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// How long after an address could not be bound it is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// A running server; ends when dropped.
#[derive(Debug)]
pub struct HttpServer {
    wanted: watch::Sender<BTreeSet<SocketAddr>>,
    bound: watch::Receiver<BTreeSet<SocketAddr>>,
    keeper: JoinHandle<()>,
}

impl HttpServer {
    /// Serves `pages` on the addresses that [`HttpServer::set_addresses`] names. Refused connections are added to
    /// `refused`. Call it within a tokio runtime.
    pub fn start(pages: Router, refused: Arc<AtomicU64>) -> Self {
        let (wanted, addresses) = watch::channel(BTreeSet::new());
        let (tell_bound, bound) = watch::channel(BTreeSet::new());
        let keeper = Keeper { pages, refused, wanted: addresses, tell_bound, open: BTreeMap::new() };
        Self { wanted, bound, keeper: tokio::spawn(keeper.run()) }
    }

    /// Listens on these addresses and no others. They need not be on an interface yet. One that cannot be bound is told
    /// in the log and tried again every few seconds.
    pub fn set_addresses(&self, addresses: BTreeSet<SocketAddr>) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != addresses;
            *wanted = addresses;
            changed
        });
    }

    /// Where it listens, with the port that the system chose where 0 was asked for.
    pub fn bound(&self) -> watch::Receiver<BTreeSet<SocketAddr>> {
        self.bound.clone()
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

struct Keeper {
    pages: Router,
    refused: Arc<AtomicU64>,
    wanted: watch::Receiver<BTreeSet<SocketAddr>>,
    tell_bound: watch::Sender<BTreeSet<SocketAddr>>,
    /// By the address that was asked for.
    open: BTreeMap<SocketAddr, Acceptor>,
}

impl Keeper {
    async fn run(mut self) {
        let mut complained = BTreeSet::new();
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            self.open.retain(|address, _| wanted.contains(address));
            complained.retain(|address| wanted.contains(address));
            let mut missing = false;
            for address in wanted {
                if self.open.contains_key(&address) {
                    continue;
                }
                match self.listen(address) {
                    Ok(acceptor) => {
                        complained.remove(&address);
                        self.open.insert(address, acceptor);
                    }
                    Err(error) => {
                        missing = true;
                        if complained.insert(address) {
                            tracing::warn!(%address, %error, "status cannot be served here; trying again");
                        }
                    }
                }
            }
            self.tell_bound.send_replace(self.open.values().map(|acceptor| acceptor.address).collect());
            let retry = async { if missing { tokio::time::sleep(RETRY).await } else { std::future::pending().await } };
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() { return },
                () = retry => {}
            }
        }
    }

    fn listen(&self, address: SocketAddr) -> io::Result<Acceptor> {
        let listener = bind(address)?;
        let address = listener.local_addr()?;
        tracing::info!(%address, "status is served");
        let task = tokio::spawn(accept(listener, self.pages.clone(), self.refused.clone()));
        Ok(Acceptor { address, task })
    }
}

/// One bound address; let go of when dropped.
struct Acceptor {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Binds an address that may not be on any interface yet: mesh addresses come and go with the plan.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv4() {
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_freebind_v6(true)?;
        // `::` shall not take IPv4's place as well: that may be another address in the list.
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn accept(listener: TcpListener, pages: Router, refused: Arc<AtomicU64>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let Ok(place) = places.clone().try_acquire_owned() else {
                    refused.fetch_add(1, Ordering::Relaxed);
                    continue;
                };
                let pages = pages.clone();
                tokio::spawn(async move {
                    match tokio::time::timeout(LIFETIME, serve(stream, pages)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::debug!(%from, %error, "status request"),
                        Err(_) => tracing::debug!(%from, "status request cut off"),
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "status cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, pages: Router) -> hyper::Result<()> {
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(READ_BUFFER)
        .max_headers(HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(pages))
        .await
}

#[cfg(test)]
mod tests;
