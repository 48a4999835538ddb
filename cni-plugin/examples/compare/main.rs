//! Our plugin beside the reference ones, `ptp` and `bridge` with `host-local`: what each verb does case by case, and how long
//! ADD, CHECK and DEL take. Writes Markdown to stdout; `make bench-cni` runs it.
//!
//! ```text
//!   compare --plugin FILE [--reference DIR] [--newer DIR] [--rounds N] [--pods N]
//! ```
//!
//! All runs in one sandbox of keystone-lab, with the same network namespaces for everybody, and in turns: whatever else the
//! machine does meanwhile disturbs all alike.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the result goes to stdout, progress to stderr")]

mod cases;
mod contest;
#[path = "../../tests/plugin/runtime.rs"]
#[expect(dead_code, reason = "the tests use more of it")]
mod runtime;
mod timing;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

use anyhow::{Context, Result, bail};
use keystone_lab::sandbox::{self, Sandbox};

use crate::contest::Contestant;

struct Options {
    plugin: PathBuf,
    /// Reference plugins that speak CNI 1.0.0, and such that speak 1.1.0.
    reference: PathBuf,
    newer: Option<PathBuf>,
    rounds: usize,
    pods: usize,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Self> {
        let mut options =
            Self { plugin: PathBuf::new(), reference: runtime::REFERENCE.into(), newer: None, rounds: 5, pods: 2000 };
        while let Some(word) = words.next() {
            let word = word.to_string_lossy().into_owned();
            let value = words.next().with_context(|| format!("{word} needs a value"))?;
            let text = value.to_string_lossy().into_owned();
            match word.as_str() {
                "--plugin" => options.plugin = fs::canonicalize(&value).with_context(|| format!("find {text}"))?,
                "--reference" => {
                    options.reference = fs::canonicalize(&value).with_context(|| format!("find {text}"))?;
                }
                "--newer" => options.newer = Some(fs::canonicalize(&value).with_context(|| format!("find {text}"))?),
                "--rounds" => options.rounds = text.parse().context("--rounds is a number")?,
                "--pods" => options.pods = text.parse().context("--pods is a number")?,
                _ => bail!("{word} is not known: --plugin, --reference, --newer, --rounds, --pods"),
            }
        }
        if !options.plugin.is_file() {
            bail!("--plugin has to name the program keystone-cni");
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let options = Options::parse(env::args_os().skip(1))?;
    if !sandbox::is_inside() {
        let status = Sandbox::enter(env::args_os().skip(1))?.wait()?;
        return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    sandbox::settle()?;
    let contestants = Contestant::all(&options.plugin, &options.reference, options.newer.as_deref())?;
    println!("{}", cases::table(&contestants)?);
    println!("{}", timing::latencies(&contestants, options.rounds)?);
    println!("{}", timing::mass(&contestants, options.pods)?);
    Ok(ExitCode::SUCCESS)
}
