//! `keystone-cni`: called by the container runtime, once for each verb.

use std::process::ExitCode;

fn main() -> ExitCode {
    keystone_cni::program::main()
}
