//! What the process costs, under the names that every Prometheus client library uses.

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeVal;

use super::{Metric, Page};

const CPU: Metric =
    Metric::counter("process_cpu_seconds_total", &[], "User and system CPU time that the process has used.");
const RESIDENT: Metric = Metric::gauge("process_resident_memory_bytes", &[], "Memory of the process that is in RAM.");
const VIRTUAL: Metric = Metric::gauge("process_virtual_memory_bytes", &[], "Address space of the process.");
const OPEN_FDS: Metric = Metric::gauge("process_open_fds", &[], "Open file descriptors.");
const MAX_FDS: Metric = Metric::gauge("process_max_fds", &[], "File descriptors that may be open.");
const START: Metric =
    Metric::gauge("process_start_time_seconds", &[], "When the process started, in seconds since 1970.");

/// Every metric here, in the order of the page.
pub const METRICS: [Metric; 6] = [CPU, RESIDENT, VIRTUAL, OPEN_FDS, MAX_FDS, START];

/// The unit of times in /proc/PID/stat, per second: USER_HZ, the same on every architecture that we build for (time(7)).
const USER_HZ: f64 = 100.0;

/// Adds what the kernel says of this process. What it does not say is left out.
pub fn add(page: &mut Page) {
    if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
        page.add(&CPU, seconds(usage.user_time()) + seconds(usage.system_time()));
    }
    // proc(5): lines as `VmRSS:      5320 kB`, in units of 1024 bytes.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let amount = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_suffix(" kB"))?;
        Some(line.trim().parse::<u64>().ok()? as f64 * 1024.0)
    };
    for (metric, amount) in [(&RESIDENT, amount("VmRSS:")), (&VIRTUAL, amount("VmSize:"))] {
        amount.into_iter().for_each(|bytes| page.add(metric, bytes));
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        // The directory that is being read is one of them.
        page.add(&OPEN_FDS, open.count().saturating_sub(1) as f64);
    }
    if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
        page.add(&MAX_FDS, soft as f64);
    }
    start_time().into_iter().for_each(|at| page.add(&START, at));
}

/// The boot's time and, counted from there, the process' start (proc(5)).
fn start_time() -> Option<f64> {
    let system = std::fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.parse().ok()?;
    let process = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field, in parentheses, may hold anything; after it comes the third.
    let started: f64 = process.rsplit_once(") ")?.1.split(' ').nth(22 - 3)?.parse().ok()?;
    Some(boot + started / USER_HZ)
}

fn seconds(time: TimeVal) -> f64 {
    time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
}
