//! The real daemon on hosts that are short of something, and among people who mean it ill.
//!
//! Every test has a sandbox of its own. What joining refuses is tested in `join.rs`, over QUIC alone.

mod datagrams;
mod disk;
mod kernel;
mod life;
mod refusals;
#[path = "../stage/mod.rs"]
mod stage;

use std::path::{Path, PathBuf};

use anyhow::Result;
use keystone_lab::mesh::{Node, Program};
use keystone_lab::sandbox::{SCRATCH, in_own_world};
use keystone_lab::wireguard::Maker;
use keystone_lab::{Wire, World};
use stage::{KEYSTONE_MESH, Pair, Shape};

/// Both ends are ours, and we call.
const OURS: Shape = Shape { other: Maker::Keystone, we_call: true, psk: false, over_v6: false };

/// Runs a test in a world of its own.
fn in_world(name: &str, test: impl FnOnce(&World) -> Result<()>) {
    in_own_world(name, || test(&World::new(Wire::Offloaded)?));
}

/// Two daemons of ours that know each other, and traffic between them has flowed.
fn talking_pair(world: &World) -> Result<(Pair, [keystone_lab::ping::Pinger; 2])> {
    let mut pair = Pair::new(world, "0", OURS)?;
    pair.start()?;
    let pings = pair.ping_other()?;
    stage::both_reply(&pings, std::time::Instant::now(), stage::PATIENCE)?;
    Ok((pair, pings))
}

/// A control plane that can be reached, running.
fn control_plane(world: &World) -> Result<Node> {
    let host = world.public_host("home")?;
    let home = node(&host)?;
    home.init()?;
    home.up(&["--gateway", &format!("{}:51840", host.v4())])?;
    home.wait_until("is ready", stage::PATIENCE, |_| true)?;
    Ok(home)
}

/// A host with a fresh installation that joins and has its addresses.
fn worker(world: &World, home: &Node, name: &str) -> Result<Node> {
    let node = node(&world.public_host(name)?)?;
    join(&node, home)?;
    Ok(node)
}

fn join(node: &Node, home: &Node) -> Result<()> {
    node.up_with_token(&home.create_token(1)?)?;
    node.wait_until("is in", stage::PATIENCE, |status| !status.node.addresses.is_empty())?;
    Ok(())
}

fn node(host: &keystone_lab::Host) -> Result<Node> {
    Node::new(&Program::find(Some(KEYSTONE_MESH.into()))?, host, host.name())
}

/// The state directory of a node.
fn state_of(node: &Node) -> PathBuf {
    Path::new(SCRATCH).join("nodes").join(node.name()).join("state")
}
