//! The program: environment and stdin in, JSON and an exit code out.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::{env, panic, process};

use serde_json::Value;

use crate::list;
use crate::spec::{Call, Code, Config, Error, Result, Verb, Version};
use crate::verbs;

/// GC names every pod of a node, with 150 bytes each; and no runtime sends a hundred thousand.
const MAX_STDIN: u64 = 16 << 20;

const USAGE: &str = "\
keystone-cni, the CNI plugin of Keystone Mesh. Container runtimes call it with CNI_COMMAND and a configuration on stdin.

usage: keystone-cni ipam list [--data-dir DIR] [--output table|json]   who holds which address
       keystone-cni --version
       keystone-cni --help
";

/// Does what environment, arguments and stdin say.
pub fn main() -> ExitCode {
    panic::set_hook(Box::new(|panic| {
        let error = Error::new(Code::Bug, format!("a fault in keystone-cni, please report it: {panic}"));
        fail(&error, Version::LATEST);
        process::exit(1);
    }));
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    if arguments.is_empty() { plugin() } else { command_line(&arguments) }
}

fn plugin() -> ExitCode {
    let mut version = Version::LATEST;
    match answer(&mut version) {
        Ok(Value::Null) => ExitCode::SUCCESS,
        Ok(answer) => print(&answer),
        Err(error) => {
            fail(&error, version);
            ExitCode::FAILURE
        }
    }
}

fn answer(version: &mut Version) -> Result<Value> {
    let call = Call::parse(&|name| env::var_os(name))?;
    if call.verb == Verb::Version {
        return Ok(Version::supported());
    }
    let mut raw = Vec::new();
    let read = io::stdin().lock().take(MAX_STDIN + 1).read_to_end(&mut raw);
    read.map_err(|error| Error::io("cannot read the configuration from stdin", &error))?;
    if raw.len() as u64 > MAX_STDIN {
        return Err(Error::new(Code::Decode, format!("the configuration on stdin has more than {MAX_STDIN} bytes")));
    }
    *version = Config::version_of(&raw);
    verbs::run(&call, &Config::parse(raw)?)
}

fn command_line(arguments: &[OsString]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(|word| word.to_str().unwrap_or("\u{fffd}")).collect();
    match words.as_slice() {
        ["--version" | "-V"] => write(&format!("keystone-cni {}\n", env!("CARGO_PKG_VERSION"))),
        ["--help" | "-h" | "help"] => write(USAGE),
        ["ipam", "list", options @ ..] => match list::list(options) {
            Ok(text) => write(&text),
            Err(error) => complain(&error.to_string()),
        },
        other => complain(&format!("{other:?} is no command\n\n{USAGE}")),
    }
}

fn complain(message: &str) -> ExitCode {
    let _nobody_listens = writeln!(io::stderr(), "keystone-cni: {message}");
    ExitCode::FAILURE
}

fn fail(error: &Error, version: Version) {
    let _nobody_listens = writeln!(io::stdout(), "{}", error.to_json(version));
}

fn print(answer: &Value) -> ExitCode {
    write(&format!("{answer}\n"))
}

fn write(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
