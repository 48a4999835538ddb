//! A start that cannot be: one clear sentence, and nothing is left or changed.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use keystone_lab::wireguard::{End, Maker};
use keystone_lab::{Host, World};

use crate::kernel::index;
use crate::stage::{KEYSTONE_MESH, Pair, status};
use crate::{OURS, in_world, node, state_of};

/// What a start says that has to fail.
fn refusal(end: &mut End) -> Result<String> {
    let failed = end.start().err().context("it started")?;
    Ok(format!("{failed:#}"))
}

fn lone_daemon(world: &World) -> Result<End> {
    Ok(Pair::new(world, "0", OURS)?.ours)
}

fn has_interface(host: &Host, name: &str) -> bool {
    host.run(Command::new("ip").args(["link", "show", "dev", name])).is_ok()
}

#[test]
fn a_port_in_use_is_named_and_nothing_is_left() {
    in_world("refusals::a_port_in_use_is_named_and_nothing_is_left", |world| {
        let mut daemon = lone_daemon(world)?;
        let port = daemon.settings().listen_port;
        let taken = daemon.host().udp(SocketAddr::from(([0, 0, 0, 0], port)))?;
        let said = refusal(&mut daemon)?;
        ensure!(said.contains(&format!("UDP port {port} is in use: stop the other program")), "{said}");
        ensure!(!has_interface(daemon.host(), daemon.interface()), "the interface is gone");
        drop(taken);
        daemon.start()
    });
}

#[test]
fn without_the_capability_it_says_which_and_how_to_grant_it() {
    in_world("refusals::without_the_capability_it_says_which_and_how_to_grant_it", |world| {
        let mut daemon = lone_daemon(world)?;
        let wrapped = wrapper(daemon.host(), "exec setpriv --bounding-set=-net_admin --inh-caps=-net_admin")?;
        let mut poor = End::new(daemon.host(), Maker::Keystone, &wrapped, daemon.settings().clone());
        let said = refusal(&mut poor)?;
        ensure!(said.contains("CAP_NET_ADMIN is missing") && said.contains("AmbientCapabilities"), "{said}");
        ensure!(!has_interface(daemon.host(), daemon.interface()), "nothing was made");
        daemon.start()
    });
}

#[test]
fn without_the_tun_device_it_says_how_to_get_it() {
    in_world("refusals::without_the_tun_device_it_says_how_to_get_it", |world| {
        let mut daemon = lone_daemon(world)?;
        let wrapped =
            wrapper(daemon.host(), "exec unshare --mount sh -c 'mount -t tmpfs none /dev/net && exec \"$0\" \"$@\"'")?;
        let mut poor = End::new(daemon.host(), Maker::Keystone, &wrapped, daemon.settings().clone());
        let said = refusal(&mut poor)?;
        ensure!(said.contains("/dev/net/tun is missing: run `modprobe tun`"), "{said}");
        daemon.start()
    });
}

#[test]
fn a_second_daemon_on_the_same_state_is_kept_out() {
    in_world("refusals::a_second_daemon_on_the_same_state_is_kept_out", |world| {
        let mut first = lone_daemon(world)?;
        first.start()?;
        let interface = index(first.host(), first.interface())?;
        let mut second = End::new(first.host(), Maker::Keystone, KEYSTONE_MESH.as_ref(), first.settings().clone());
        second.settings_mut().listen_port += 1;
        let said = run_to_its_end(&second)?;
        ensure!(said.contains("is in use by another keystone-mesh process") && said.contains("--state-dir"), "{said}");
        ensure!(status(&first)?.node.listen_port == first.settings().listen_port, "the first one goes on");
        ensure!(index(first.host(), first.interface())? == interface, "its interface is the same one");
        Ok(())
    });
}

#[test]
fn damaged_state_is_refused_and_kept_as_it_is() {
    in_world("refusals::damaged_state_is_refused_and_kept_as_it_is", |world| {
        let home = node(&world.public_host("home")?)?;
        home.init()?;
        for file in ["secret", "membership", "registry.redb"] {
            let path = state_of(&home).join(file);
            let whole = fs::read(&path)?;
            let mut damaged = whole.clone();
            // The middle of a line of JSON; of the registry, its head.
            let at = if file == "registry.redb" { 0 } else { damaged.len() / 2 };
            damaged[at] ^= 1;
            fs::write(&path, &damaged)?;
            let mut command = Command::new("timeout");
            command.args(["20", KEYSTONE_MESH, "up", "--interface", "damaged0", "--state-dir"]);
            command.arg(state_of(&home)).arg("--run-dir").arg(state_of(&home).with_file_name("run"));
            let said = format!("{:#}", home.host().run(&mut command).err().context("it started")?);
            ensure!(said.contains(file) && said.contains("left as it"), "{file}: {said}");
            ensure!(fs::read(&path)? == damaged, "{file} is as it was");
            ensure!(!has_interface(home.host(), "damaged0"), "{file}: no interface is left");
            fs::write(&path, &whole)?;
        }
        home.up(&[])?;
        home.wait_until("is whole again", crate::stage::PATIENCE, |_| true)?;
        Ok(())
    });
}

/// A program that does something before it becomes `keystone-mesh`.
fn wrapper(host: &Host, before: &str) -> Result<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = host.folder()?.join("keystone-mesh");
    fs::write(&path, format!("#!/bin/sh\n{before} {KEYSTONE_MESH} \"$@\"\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// What a daemon says that does not start, where another has written the configuration.
fn run_to_its_end(end: &End) -> Result<String> {
    let folder = end.host().folder()?;
    let mut command = Command::new("timeout");
    command.args(["20", KEYSTONE_MESH, "up", "--config"]).arg(folder.join("config.toml"));
    command.args(["--listen-port", &end.settings().listen_port.to_string(), "--state-dir"]);
    command.arg(folder.join("state")).arg("--run-dir").arg(folder.join("other-run"));
    Ok(format!("{:#}", end.host().run(&mut command).err().context("it started")?))
}
