//! Wall-clock time, for what outlives the process: token lives, sequence numbers.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970; 0 where the clock stands before that.
pub fn unix_now() -> u64 {
    since_1970().as_secs()
}

/// Milliseconds since 1970.
pub fn unix_now_ms() -> u64 {
    u64::try_from(since_1970().as_millis()).unwrap_or(u64::MAX)
}

fn since_1970() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
