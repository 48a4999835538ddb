//! The data plane: TUN to UDP and back, in batches, on threads of its own.
