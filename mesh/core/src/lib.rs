//! Every decision of Keystone Mesh.
//!
//! **The contract.** A machine in this crate takes `now` and input values through `handle_*(.., now)` and gives output
//! values through `poll_output(now)`, which the driver drains until it answers [`Output::Timeout`](mesh::Output) (or
//! the machine's own equivalent). After every input the driver drains the outputs. Machines read no clock, draw no
//! randomness (a seed or the bytes are arguments), know no socket, and never wait. `now` never goes backwards.
//!
//! **The map.**
//!
//! | module | what it decides |
//! | --- | --- |
//! | [`key`] | identities, WireGuard keys, the derivation of both from one secret |
//! | [`node`] | names, what a node says of itself, what it is allowed: records and approvals, signed |
//! | [`network`] | the network's own document: CIDRs, relays, gateways |
//! | [`token`] | join tokens: encoding, life, uses, name patterns |
//! | [`admission`] | whether a join is accepted, and what it is granted: addresses, routes |
//! | [`annotations`] | how records and approvals stand on Kubernetes objects |
//! | [`directory`] | what is known of every node when objects come, change, break and go |
//! | [`ledger`] | who holds which address, and for how long nobody else gets it |
//! | [`plain_peer`] | machines with stock WireGuard that a node serves |
//! | [`throttle`] | how long a source that keeps failing has to wait |
//! | [`plan`] | records and approvals to peers, allowed IPs, addresses and routes: one desired value, and its diff |
//! | [`kernel`] | links, addresses, routes and rules: the diff from the present state to the desired one |
//! | [`nftables`] | tables of the packet filter as values, and the steps from one to the next |
//! | [`policy`] | NetworkPolicies: from what the cluster says to one node's table |
//! | [`pods`] | what leaves the cluster is masqueraded |
//! | [`allowed_ips`] | longest-prefix lookup |
//! | [`path`] | which way a peer's packets go: relay first, then direct |
//! | [`probe`] | the probe datagram, authenticated with a key that both ends derive |
//! | [`relay`] | relay frames, fragments, quotas |
//! | [`gateway`], [`wire`] | what node and gateway say to each other, and its framing |
//! | [`mesh`] | the machine that composes the above for one node |

#![cfg_attr(test, expect(clippy::disallowed_methods, reason = "tests need an origin of time"))]

pub mod admission;
pub mod allowed_ips;
pub mod annotations;
pub mod backoff;
pub mod directory;
pub mod facts;
pub mod gateway;
pub mod io;
pub mod kernel;
pub mod key;
pub mod ledger;
pub mod mesh;
pub mod network;
pub mod nftables;
pub mod node;
pub mod path;
pub mod plain_peer;
pub mod plan;
pub mod pods;
pub mod policy;
pub mod probe;
pub mod relay;
pub mod throttle;
pub mod token;
pub mod wire;

pub use allowed_ips::AllowedIps;
pub use io::{DropReason, PeerConfig, PeerOp, Via};
pub use key::{Identity, NodeId, PresharedKey, PrivateKey, PublicKey, Secret, Signature};
