//! Standard output for results, standard error for logs and complaints.

use std::io::{self, IsTerminal as _, Write as _};

use serde::Serialize;
use tracing_subscriber::EnvFilter;

/// Prints text as it is.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Tells the person something beside the result.
pub(super) fn complain_of(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Prints a value as JSON.
pub(super) fn print_json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Tells an error with its causes, on one line each.
pub(super) fn complain(error: &anyhow::Error) {
    let mut text = format!("error: {error}\n");
    for cause in error.chain().skip(1) {
        // A transparent error repeats its cause.
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text.push_str(&format!("  because: {cause}\n"));
        }
    }
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Whether the reader of our output is gone, which is no error of ours (`keystone-mesh peers | head`).
pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// What does not belong in a log: the engine calls a peer that does not answer an error, and kube each connection that
/// fails, without a cause; whoever asked says it with one.
const NOT_LOGGED: &str = "boringtun=off,kube_client::client::builder=off";

/// Logs to standard error: without times under systemd, which has its own, and with colours on a terminal alone.
pub(super) fn start_log(filter: &str) {
    let under_systemd = std::env::var_os("JOURNAL_STREAM").is_some();
    let (filter, wrong) = match EnvFilter::try_new(format!("{NOT_LOGGED},{filter}")) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(format!("{NOT_LOGGED},info")), Some(error)),
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false);
    if under_systemd {
        log.without_time().init();
    } else {
        log.init();
    }
    if let Some(error) = wrong {
        tracing::warn!(%error, "the log filter is not understood; using info");
    }
}

/// A table with columns as wide as their widest cell; the last column is not padded.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([head[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        format!("{}\n", text.trim_end())
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// Bytes as a person reads them: `1.4 GiB`.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Seconds as a person reads them: `3 s`, `5 min`, `2 h`.
pub(super) fn ago(seconds: f64) -> String {
    match seconds as u64 {
        s @ 0..=119 => format!("{s} s"),
        s @ 120..=7199 => format!("{} min", s / 60),
        s @ 7200..=172_799 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let text = table(&["A", "LONG"], &[vec!["value".into(), "x".into()], vec!["v".into(), String::new()]]);
        assert_eq!(text, "A      LONG\nvalue  x\nv\n");
    }

    #[test]
    fn amounts_are_readable() {
        assert_eq!([bytes(0), bytes(1023), bytes(1536), bytes(3 << 30)], ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]);
        assert_eq!([ago(3.2), ago(300.0), ago(10_000.0)], ["3 s", "5 min", "2 h"]);
    }
}
