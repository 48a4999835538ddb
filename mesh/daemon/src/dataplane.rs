//! The data plane: TUN to UDP and back, in batches, on threads of its own.

/// Every worker thread's name begins so.
pub const THREAD_PREFIX: &str = "ksm-";
