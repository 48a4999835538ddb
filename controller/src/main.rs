//! The controller of a Keystone Mesh. See the library.
#![allow(clippy::print_stdout, reason = "sketch")]
fn main() -> anyhow::Result<()> {
    for definition in keystone_controller::crds::all() {
        print!("---\n{}", keystone_controller::crds::yaml(&definition)?);
    }
    Ok(())
}
