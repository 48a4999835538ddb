//! The relay, decided: what it forwards, for whom, and how much.
//!
//! A relay joins nodes that cannot (yet) reach each other. It knows its clients by identity, forwards datagrams
//! between them and splices byte streams to the control plane. It reads neither: datagrams are WireGuard's, and the
//! streams are TLS from end to end.
//!
//! ```text
//!   node A ──QUIC──┐                       ┌──QUIC── node B
//!                  ├── relay: table by ────┤
//!   joiner ──QUIC──┘   identity, quotas    └──QUIC── control plane (identity = network key)
//!
//!   DATAGRAM from A  { peer: B, packet }   becomes   { peer: A, packet }  to B      frame, reassembly
//!   stream from A    Connect { to: K }     becomes   Incoming { from: A } to K      message
//! ```
//!
//! [`admission`] says who may use it, [`quota`] how much, [`frame`] and [`reassembly`] how packets travel in QUIC
//! datagrams that may be smaller than they are, [`message`] what is said on streams, [`address`] how relays and
//! gateways are written in configuration.

pub mod address;
pub mod admission;
pub mod frame;
pub mod message;
pub mod quota;
pub mod reassembly;
pub mod table;

pub use address::{HostPort, RelayAddr, Rendezvous};
pub use admission::{Admission, AdmissionLimits, Grant, Role};
pub use frame::{Frame, FrameError};
pub use message::{Code, Refusal};
pub use quota::{Meter, Quota};
pub use reassembly::Reassembly;
pub use table::{RelayDrop, Table};
