//! All `unsafe` of the daemon: system calls that no crate wraps, each with a safety line.

pub(crate) mod eventfd;
pub(crate) mod memory;
pub(crate) mod reactor;
pub(crate) mod tun;
