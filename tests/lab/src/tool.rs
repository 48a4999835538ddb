//! Calls of programs that end soon (`ip`, `nft`, `kubectl`): whole batches on stdin, and errors that quote the line that
//! failed.

use std::ffi::OsString;
use std::io::Write;
use std::process::{Command, Stdio};
use std::{env, path::PathBuf};

use anyhow::{Context, Result, anyhow, bail};

/// Where `ip` and `nft` live on distributions that keep them off the PATH of ordinary users.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// The PATH that the lab searches and gives to what it starts.
pub fn search_path() -> OsString {
    let mut folders: Vec<PathBuf> = env::var_os("PATH").map(|p| env::split_paths(&p).collect()).unwrap_or_default();
    folders.extend(SYSTEM_FOLDERS.iter().map(PathBuf::from));
    env::join_paths(folders).unwrap_or_else(|_colon_in_a_folder| SYSTEM_FOLDERS.join(":").into())
}

/// Where `program` is found, if it is.
pub fn find(program: &str) -> Option<PathBuf> {
    env::split_paths(&search_path()).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Runs `command` with `input` on stdin and returns its stdout; a failure quotes the input line it speaks of.
pub fn feed(command: &mut Command, input: &str) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .env("PATH", search_path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let mut stdin = child.stdin.take().ok_or_else(|| anyhow!("{name} has no stdin"))?;
    // A program that stops early closes the pipe; its own message says why.
    let _closed_early = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().with_context(|| format!("wait for {name}"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("{name} fails ({}): {}{}", output.status, message.trim(), quoted_line(&message, input));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Both tools name the place as `-:LINE` (ip) or `/dev/stdin:LINE:` (nft).
fn quoted_line(message: &str, input: &str) -> String {
    let place = message.split_once("-:").or_else(|| message.split_once("/dev/stdin:"));
    let digits = place.map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
    let number = digits.and_then(|digits| digits.parse::<usize>().ok()).unwrap_or(0);
    let line = number.checked_sub(1).and_then(|index| input.lines().nth(index));
    line.map(|line| format!("\n  in line {number}: {}", line.trim())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_quotes_the_line_it_speaks_of() {
        let input = "link add x\nlink set y\n";
        assert_eq!(quoted_line("Command failed -:2", input), "\n  in line 2: link set y");
        assert_eq!(quoted_line("/dev/stdin:1:5-9: Error: syntax", input), "\n  in line 1: link add x");
        assert_eq!(quoted_line("Cannot find device", input), "");
    }
}
