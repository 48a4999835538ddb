//! `keystone-lab`: plays a scenario on a small internet out of network namespaces, tells it as it happens, and leaves
//! nothing behind.

mod scenario;
mod story;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use std::{env, io};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use keystone_lab::sandbox::{self, Sandbox};
use scenario::conformance::{Plugins, Suite};
use scenario::{Options, Scenario};

/// Plays a scenario with real daemons on a network of hosts, home routers, cloud NATs and a public internet.
///
/// Needs no root where user namespaces are allowed. Exits with 0 if everything that it shows is so, with 1 if something
/// is not or cannot be shown, and with 130 after Ctrl-C.
#[derive(Parser)]
#[command(name = "keystone-lab", version)]
struct Cli {
    /// What to play; --list describes each
    #[arg(value_enum, default_value = "home-and-cloud")]
    scenario: Scenario,
    /// List the scenarios and exit
    #[arg(long)]
    list: bool,
    /// Print one JSON document at the end and nothing else on stdout
    #[arg(long)]
    json: bool,
    /// Stay up when the story is over, with a command for a shell on each host, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// Cables carry frames of at most the MTU, as outside one machine, instead of super packets
    #[arg(long)]
    ethernet: bool,
    /// The keystone-mesh program [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    mesh_bin: Option<PathBuf>,
    /// joins: how many machines join in each half
    #[arg(long, visible_alias = "count", value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    joins: u32,
    /// outage: how long home and relay are gone; kubernetes-outage: the API server; kubernetes-scale: how long nothing happens
    #[arg(long, value_name = "MINUTES", default_value_t = 10.0, value_parser = minutes)]
    minutes: f64,
    /// kubernetes-scale: how many real daemons
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(2..=200))]
    daemons: u32,
    /// kubernetes-scale: how many simulated nodes besides
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    nodes: u32,
    /// kubernetes-scale: how many watches besides those of the daemons
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    watches: u32,
    /// bench-peers: rounds, in each of which every program has its turn
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// bench-peers: how long each direction is measured
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// bench-peers: measure the cost of idling alone
    #[arg(long)]
    idle: bool,
    /// kubernetes-e2e: who carries the pods
    #[arg(long, value_enum, default_value = "keystone")]
    plugins: Plugins,
    /// kubernetes-e2e: which of Kubernetes' own tests are run
    #[arg(long, value_enum, default_value = "conformance")]
    suite: Suite,
    /// kubernetes-e2e: the archive that deploy/image/build wrote [default: it is built]
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(err) => {
            complain(&err);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    if cli.list {
        return list();
    }
    if !sandbox::is_inside() {
        return enter_sandbox(&cli);
    }
    let place = sandbox::settle()?;
    let options = Options {
        json: cli.json,
        keep: cli.keep,
        ethernet: cli.ethernet,
        mesh_bin: cli.mesh_bin,
        joins: cli.joins,
        duration: Duration::from_secs_f64(cli.minutes * 60.0),
        daemons: cli.daemons,
        nodes: cli.nodes,
        watches: cli.watches,
        rounds: cli.rounds,
        seconds: cli.seconds,
        idle: cli.idle,
        plugins: cli.plugins,
        suite: cli.suite,
        image: cli.image,
    };
    let shown = scenario::play(cli.scenario, &options, place)?;
    Ok(if shown { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs this program again, with the same arguments, where nothing can be left behind.
fn enter_sandbox(cli: &Cli) -> Result<ExitCode> {
    cli.scenario.prepare(cli.plugins, cli.image.as_deref())?;
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let status = Sandbox::enter(arguments)?.wait_or_interrupt();
    if matches!(cli.scenario, Scenario::Kubernetes | Scenario::KubernetesE2e) {
        keystone_kubelab::sweep();
    }
    let status = status?;
    Ok(ExitCode::from(u8::try_from(sandbox::exit_code(status)).unwrap_or(1)))
}

fn list() -> Result<ExitCode> {
    let mut text = String::new();
    for value in Scenario::value_variants().iter().filter_map(Scenario::to_possible_value) {
        let help = value.get_help().map(ToString::to_string).unwrap_or_default();
        text += &format!("{:17} {help}\n", value.get_name());
    }
    io::Write::write_all(&mut io::stdout().lock(), text.as_bytes()).context("print the list")?;
    Ok(ExitCode::SUCCESS)
}

fn complain(err: &anyhow::Error) {
    let _nobody_reads = io::Write::write_all(&mut io::stderr().lock(), format!("keystone-lab: {err:#}\n").as_bytes());
}

/// More than none, and less than a week.
fn minutes(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_not_a_number| format!("{text:?} is no number of minutes"))?;
    let week = 7.0 * 24.0 * 60.0;
    if value > 0.0 && value < week { Ok(value) } else { Err(format!("{text} is not between 0 and {week}")) }
}
