//! mallopt(3): when the C library gives freed memory back to the kernel.
#![allow(unsafe_code, reason = "no crate of the workspace wraps mallopt")]

/// From this size on a block is mapped by itself, and unmapped when it is freed. Below lie a packet and a batch, above a
/// page of a list of a thousand Nodes. It is glibc's own initial value, doubled; but glibc raises its own to the size of
/// the largest block that was ever freed, and then keeps lists long after they are read: 6 MiB at a thousand nodes.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 256 << 10;

/// Memory of large blocks goes back to the kernel when it is freed, also later in a long life.
pub(crate) fn give_back_large_blocks() {
    #[cfg(target_env = "gnu")]
    for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: mallopt takes two integers, locks the allocator, and touches no memory of ours.
        let _taken = unsafe { libc::mallopt(parameter, LARGE) };
    }
}
