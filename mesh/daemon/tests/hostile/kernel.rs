//! Somebody takes away what the daemon put into the kernel.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use keystone_lab::ping::Pinger;
use keystone_lab::{Host, wait};

use crate::stage::{PATIENCE, PING_EVERY, POLL, both_reply};
use crate::{control_plane, in_world, talking_pair, worker};

#[test]
fn a_deleted_interface_comes_back_with_its_traffic() {
    in_world("kernel::a_deleted_interface_comes_back_with_its_traffic", |world| {
        let (mut pair, pings) = talking_pair(world)?;
        let (host, interface) = (pair.ours.host().clone(), pair.ours.interface().to_owned());
        for round in 0..3 {
            let before = index(&host, &interface)?;
            ip(&host, &format!("link delete dev {interface}"))?;
            let deleted = Instant::now();
            wait::until("another interface of that name", PATIENCE, POLL, || {
                Ok(index(&host, &interface).ok().filter(|index| *index != before))
            })?;
            let back = both_reply(&pings, deleted, PATIENCE)?;
            println!("round {round}: traffic again after {:.0} ms", back.duration_since(deleted).as_secs_f64() * 1e3);
            ensure!(pair.ours.ended()?.is_none(), "the same process goes on");
        }
        Ok(())
    });
}

#[test]
fn a_control_plane_goes_on_after_its_interface_was_deleted() {
    in_world("kernel::a_control_plane_goes_on_after_its_interface_was_deleted", |world| {
        let home = control_plane(world)?;
        let member = worker(world, &home, "member")?;
        let pings = Pinger::start(member.host(), home.mesh_v4()?, PING_EVERY)?;
        pings.first_reply(PATIENCE)?;
        for round in 0..3 {
            ip(home.host(), "link delete dev ksmesh0")?;
            let deleted = Instant::now();
            let back = pings.reply_to_request_after(deleted, PATIENCE).with_context(|| home.log_tail(20))?;
            println!("round {round}: traffic again after {:.0} ms", back.duration_since(deleted).as_secs_f64() * 1e3);
            home.check_alive()?;
        }
        worker(world, &home, "late").context("a join afterwards")?;
        Ok(())
    });
}

#[test]
fn deleted_addresses_routes_and_rules_come_back() {
    in_world("kernel::deleted_addresses_routes_and_rules_come_back", |world| {
        let (pair, pings) = talking_pair(world)?;
        let (host, interface) = (pair.ours.host().clone(), pair.ours.interface().to_owned());
        let whole = state(&host, &interface)?;
        ensure!(whole.contains("10.77.0.2") && whole.contains("fd77::2") && whole.contains("5184"), "{whole}");
        for deletion in [
            format!("address flush dev {interface} scope global"),
            "-4 route flush table 5184".into(),
            "-6 route flush table 5184".into(),
            "-4 rule delete pref 5184".into(),
            "-6 rule delete pref 5184".into(),
            format!("link set dev {interface} down"),
            format!("link set dev {interface} mtu 1300"),
        ] {
            ip(&host, &deletion)?;
            let deleted = Instant::now();
            let mut last = String::new();
            let restored = wait::until(&deletion, PATIENCE, POLL, || {
                last = state(&host, &interface)?;
                Ok((last == whole).then_some(()))
            });
            ensure!(restored.is_ok(), "{deletion}: it was\n{whole}\nand is\n{last}\n{}", pair.ours.log_tail(10));
            both_reply(&pings, Instant::now(), PATIENCE)?;
            println!("{deletion}: restored within {:.0} ms", deleted.elapsed().as_secs_f64() * 1e3);
        }
        Ok(())
    });
}

/// Everything of ours in the kernel, as text; sorted, because what is put back stands at the end of a list.
pub(crate) fn state(host: &Host, interface: &str) -> Result<String> {
    let mut lines = Vec::new();
    for question in [
        format!("-o link show dev {interface}"),
        format!("-o address show dev {interface} scope global"),
        "-4 route show table 5184".into(),
        "-6 route show table 5184".into(),
        "-4 rule show pref 5184".into(),
        "-6 rule show pref 5184".into(),
    ] {
        // A table that never had a route does not exist, and `ip` says so with an error.
        let answer = ip(host, &question).unwrap_or_default();
        lines.extend(answer.lines().map(|line| line.trim().to_owned()));
    }
    lines.sort_unstable();
    Ok(lines.join("\n"))
}

pub(crate) fn ip(host: &Host, arguments: &str) -> Result<String> {
    host.run(Command::new("ip").args(arguments.split_whitespace()))
}

/// Tells an interface from a later one of the same name.
pub(crate) fn index(host: &Host, interface: &str) -> Result<String> {
    let line = ip(host, &format!("-o link show dev {interface}"))?;
    Ok(line.split(':').next().unwrap_or_default().to_owned())
}
