//! Wall-clock time, for what outlives the process: token lives, sequence numbers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The time since 1970; nothing where the clock stands before that.
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Seconds since 1970; 0 where the clock stands before that.
pub fn unix_now() -> u64 {
    unix_time().as_secs()
}

/// Milliseconds since 1970.
pub fn unix_now_ms() -> u64 {
    u64::try_from(unix_time().as_millis()).unwrap_or(u64::MAX)
}
