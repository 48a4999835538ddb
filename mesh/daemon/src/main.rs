//! The `keystone-mesh` program: daemon, relay and CLI.

fn main() -> std::process::ExitCode {
    keystone_mesh::cli::main()
}
