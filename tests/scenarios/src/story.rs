//! How a scenario speaks: steps with the time at which they happened, tables, and a list of what must be so.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::Serialize;

/// What is told to the person who watches, or kept silent under `--json`.
pub(crate) struct Story {
    start: Instant,
    audible: bool,
    colours: bool,
    checks: Vec<Check>,
}

/// One thing that a scenario claims.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Check {
    /// What must be so.
    pub(crate) claim: String,
    /// Whether it is.
    pub(crate) holds: bool,
    /// What was found.
    pub(crate) found: String,
}

#[derive(Clone, Copy)]
enum Colour {
    Green = 32,
    Red = 31,
    Bold = 1,
    Dim = 2,
}

impl Story {
    /// Begins now. Not `audible`: nothing is printed, only checks are kept.
    pub(crate) fn begin(audible: bool) -> Self {
        let colours = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { start: Instant::now(), audible, colours, checks: Vec::new() }
    }

    /// A chapter.
    pub(crate) fn chapter(&self, title: &str) {
        self.print(&format!("\n{}\n", self.paint(Colour::Bold, title)));
    }

    /// Something that happened, with the time since the beginning.
    pub(crate) fn step(&self, text: &str) {
        let at = self.paint(Colour::Dim, &format!("{:6.2} s", self.start.elapsed().as_secs_f64()));
        self.print(&format!("  {at}  {text}\n"));
    }

    /// Text as it stands.
    pub(crate) fn text(&self, text: &str) {
        self.print(text);
    }

    /// Notes whether `claim` holds, and says so.
    pub(crate) fn check(&mut self, holds: bool, claim: &str, found: &str) {
        let mark = if holds { self.paint(Colour::Green, "yes") } else { self.paint(Colour::Red, "NO ") };
        self.print(&format!("            {mark} {claim}: {found}\n"));
        self.checks.push(Check { claim: claim.to_owned(), holds, found: found.to_owned() });
    }

    /// A table; the first row is its head.
    pub(crate) fn table(&self, rows: &[Vec<String>]) {
        self.print(&table(rows, |head| self.paint(Colour::Bold, head)));
    }

    /// Everything that was checked.
    pub(crate) fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// Fails with the list of claims that do not hold.
    pub(crate) fn verdict(&self) -> Result<()> {
        let broken: Vec<String> = self.checks.iter().filter(|check| !check.holds).map(Check::to_string).collect();
        if !broken.is_empty() {
            bail!("{} of {} claims do not hold:\n  {}", broken.len(), self.checks.len(), broken.join("\n  "));
        }
        self.print(&format!(
            "\n{} in {:.1} s.\n",
            self.paint(Colour::Green, &format!("All {} claims hold", self.checks.len())),
            self.start.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    fn print(&self, text: &str) {
        if self.audible {
            // A reader that went away (a closed pipe) is no reason to stop measuring.
            let _closed = io::stdout().lock().write_all(text.as_bytes());
        }
    }

    fn paint(&self, colour: Colour, text: &str) -> String {
        if self.colours { format!("\x1b[{}m{text}\x1b[0m", colour as u8) } else { text.to_owned() }
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.claim, self.found)
    }
}

/// Milliseconds as a person reads them.
pub(crate) fn millis(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1e3;
    match millis {
        ..10.0 => format!("{millis:.2} ms"),
        10.0..10_000.0 => format!("{millis:.0} ms"),
        _ => format!("{:.1} s", time.as_secs_f64()),
    }
}

fn table(rows: &[Vec<String>], paint_head: impl Fn(&str) -> String) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let line = cells.join("  ");
        let line = line.trim_end();
        text += &format!("  {}\n", if number == 0 { paint_head(line) } else { line.to_owned() });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let text = table(&[row(["a", "b"]), row(["long", "x"])], str::to_owned);
        assert_eq!(text, "  a     b\n  long  x\n");
    }

    #[test]
    fn a_verdict_lists_exactly_what_does_not_hold() {
        let mut story = Story::begin(false);
        story.check(true, "water is wet", "wet");
        story.verdict().unwrap();
        story.check(false, "the moon is cheese", "rock");
        let verdict = story.verdict().unwrap_err().to_string();
        assert!(verdict.contains("the moon is cheese: rock") && !verdict.contains("water"), "{verdict}");
    }

    #[test]
    fn times_are_printed_at_a_readable_scale() {
        assert_eq!(millis(Duration::from_micros(1234)), "1.23 ms");
        assert_eq!(millis(Duration::from_millis(456)), "456 ms");
        assert_eq!(millis(Duration::from_secs(12)), "12.0 s");
    }
}
