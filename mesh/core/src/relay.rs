//! The relay: frames, fragments, quotas.
