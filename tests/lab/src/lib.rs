//! A small internet out of network namespaces, for tests and demonstrations that need real packets.
//!
//! ```text
//!   host      host                          every name is a network namespace,
//!     └─ lan ──┘                            every line a veth pair
//!         │
//!      router        host                   router: nftables decides which NAT it is
//!         │           │                     (another router may stand where the internet stands: CGNAT)
//!   ──────┴─ internet ┴──────               internet: routes public prefixes, can lose and block packets
//! ```
//!
//! The lab runs inside a [`sandbox`]: private network, mount and process namespaces (and a user namespace where it is
//! not root), so nothing it makes is visible outside, two labs never meet, and the kernel removes everything when the
//! lab ends, however it ends. Inside, a [`World`] makes hosts and routers; a [`Host`] runs programs and closures in its
//! own network; links are cut, slowed and made lossy, pairs of networks are kept from exchanging UDP, and routers reboot.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use keystone_lab::{Nat, RouterSpec, Wire, World, probe};
//!
//! let world = World::new(Wire::Offloaded)?;
//! let (a, b) = (world.public_host("a")?, world.public_host("b")?);
//! let router = world.router("home-router", RouterSpec { nat: Nat::PortRestricted, ..RouterSpec::default() })?;
//! let home = router.host("home")?;
//! let seen = probe::nat_behaviour(&home, &a, &b)?;
//! assert_eq!(seen, Nat::PortRestricted.promise());
//! # Ok(())
//! # }
//! ```
//!
//! What drives the product on such a world is in [`mesh`], and how time is measured in [`ping`]. Plain WireGuard peers,
//! ours and others', are in [`wireguard`]. The stories that the program `keystone-lab` tells are in tests/scenarios.

mod conntrack;
mod host;
mod internet;
pub mod iperf;
mod link;
pub mod mesh;
pub mod nat;
mod netns;
pub mod ping;
pub mod preflight;
pub mod probe;
mod process;
mod router;
pub mod sandbox;
pub mod tool;
pub mod wait;
pub mod wireguard;
mod world;

pub use host::Host;
pub use link::Uplink;
pub use nat::{Inbound, Nat};
pub use process::Process;
pub use router::{Router, RouterSpec, Upstream};
pub use world::{Wire, World};
