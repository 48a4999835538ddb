//! QUIC on the mesh socket: streams to the control plane, and relays.
//!
//! ```text
//!                     ┌──────────── one quinn endpoint per node, on the mesh's UDP port ───────────┐
//!                     │                                                                            │
//!   keystone-gateway/1│ direct: one stream per dial ──────────────► GatewayStream                  │
//!                     │                                                  ▲                         │
//!   keystone-relay/1  │ splice through a relay ── TLS inside ────────────┘                         │
//!                     │ DATAGRAMs ── frames, fragments ──► packets to and from the data plane      │
//!                     └────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Both ends of every connection show their Ed25519 identity as a TLS raw public key ([`tls`]). Clients pin the one
//! they want; servers take any and decide afterwards what it may do. [`endpoint`] holds the socket and the bounds on
//! strangers, [`reach`] tries all addresses of a host, [`gateway`] makes authenticated byte streams, [`relay_server`] and
//! [`relay_client`] are the two ends of a relay, with [`relay_session`] as one connection between them and [`splice`] as
//! the streams through them; [`relay_pool`] is what the data plane sends through, [`frames`] puts messages on streams.
//!
//! It does not matter who reads the socket: the endpoint takes any `quinn::AsyncUdpSocket`, the data plane's (which
//! hands over what is neither WireGuard nor a probe) or one of its own ([`endpoint::QuicEndpoint::bind`]).

mod datagrams;
pub mod endpoint;
pub mod frames;
pub mod gateway;
pub mod reach;
pub mod relay_client;
pub mod relay_pool;
pub mod relay_server;
pub mod relay_session;
pub mod splice;
pub mod tls;

pub use endpoint::{Authenticated, ConnectError, EndpointLimits, QuicEndpoint};
pub use gateway::{GatewayAcceptor, GatewayStream, dial};
pub use relay_client::{RelayClient, RelayState};
pub use relay_pool::RelayPool;
pub use relay_server::{RelayServer, RelayServerConfig};
pub use splice::{AcceptSpliced, SplicedStream};
pub use tls::Protocol;
