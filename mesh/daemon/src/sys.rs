//! All `unsafe` of the daemon: system calls that no crate wraps, each with a safety line.
