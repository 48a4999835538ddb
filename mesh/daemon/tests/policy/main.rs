//! Network policies with real packets: pods are network namespaces, nodes forward between them, and the kernel decides.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "a test prints its table")]

mod cost;
mod daemon;
mod gap;
mod stage;
mod table;
