//! The program `keystone-controller`. See the library.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use keystone_controller::args::{Cli, Command, LogFormat, RunArgs};
use keystone_controller::{crds, run};
use tracing_subscriber::EnvFilter;

/// The loop is one task; a second thread keeps the lease renewed and requests moving beside it.
const THREADS: usize = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Some(Command::Crds { directory: Some(directory) }) => write_crds(&directory),
        Some(Command::Crds { directory: None }) => print_crds(),
        Some(Command::Run(args)) => start(args),
        None => start(cli.run),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "keystone-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_crds() -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for definition in crds::all() {
        write!(out, "---\n{}", crds::yaml(&definition)?)?;
    }
    Ok(())
}

fn write_crds(directory: &Path) -> anyhow::Result<()> {
    for definition in crds::all() {
        let path = directory.join(crds::file_name(&definition));
        std::fs::write(&path, crds::yaml(&definition)?).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn start(args: RunArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log).with_context(|| format!("--log: `{}` is no filter", args.log))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    runtime.block_on(run::run(args))
}
