//! What a process uses, as the kernel counts it (proc(5)).

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// Linux counts CPU time for /proc in hundredths of a second on every architecture.
const TICK: Duration = Duration::from_millis(10);

/// One reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Memory that is resident, in bytes.
    pub rss: u64,
    /// The part of it that is the process' own: no pages of programs and libraries, which are larger in a debug build.
    pub anonymous: u64,
    /// CPU time of all its threads since its start, in user mode and in the kernel.
    pub cpu: Duration,
}

impl Usage {
    /// Of the process with this id.
    pub fn of(process: u32) -> Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/{process}/{file}");
            fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        let status = read("status")?;
        let bytes = |field: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("0 kB");
            let kilobytes: u64 =
                value.trim().trim_end_matches(" kB").parse().with_context(|| format!("parse {field}"))?;
            anyhow::Ok(kilobytes * 1024)
        };
        let stat = read("stat")?;
        // The second field is the program's name in parentheses, and may hold anything; utime is the 14th, stime the 15th.
        let fields = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
        let ticks: u32 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum();
        Ok(Self { rss: bytes("VmRSS:")?, anonymous: bytes("RssAnon:")?, cpu: TICK * ticks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_something() {
        let usage = Usage::of(std::process::id()).unwrap();
        assert!(usage.rss > usage.anonymous && usage.anonymous > 1 << 14, "{usage:?}");
        Usage::of(u32::MAX).unwrap_err();
    }
}
