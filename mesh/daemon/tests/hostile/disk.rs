//! A full disk.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use keystone_lab::mesh::{Node, Route};
use keystone_lab::ping::Pinger;
use keystone_lab::wait;
use nix::mount::{MsFlags, mount};

use crate::stage::{PATIENCE, PING_EVERY, POLL};
use crate::{control_plane, in_world, join, node, state_of, worker};

#[test]
fn a_full_disk_costs_a_worker_nothing_but_the_news() {
    in_world("disk::a_full_disk_costs_a_worker_nothing_but_the_news", |world| {
        let home = control_plane(world)?;
        let full = node(&world.public_host("full")?)?;
        small_disk(&state_of(&full), "64k")?;
        join(&full, &home)?;
        home.wait_for_path("full", Route::Direct, PATIENCE)?;
        let snapshot = state_of(&full).join("snapshot");
        let filler = state_of(&full).join("filler");

        let old = settled(&snapshot)?;
        fill(&filler)?;
        let second = worker(world, &home, "second")?;
        full.wait_until("knows the second worker", PATIENCE, |status| status.peer("second").is_some())?;
        says(&full, "the snapshot is not kept")?;
        says(&full, "No space left on device")?;
        ensure!(fs::read(&snapshot)? == old, "the old snapshot is whole");
        ensure!(!state_of(&full).join("snapshot.tmp").exists(), "nothing half written is left");
        let pings = Pinger::start(full.host(), second.mesh_v4()?, PING_EVERY)?;
        pings.reply_to_request_after(Instant::now(), PATIENCE).context("traffic to the second worker")?;

        // Killed and started with the disk still full, it knows what it knew, and learns the rest again.
        full.kill()?;
        full.up(&[])?;
        full.wait_until("knows the second worker again", PATIENCE, |status| status.peer("second").is_some())?;
        pings.reply_to_request_after(Instant::now(), PATIENCE).context("traffic after a restart")?;

        fs::remove_file(&filler)?;
        let _third = worker(world, &home, "third")?;
        wait::until("the snapshot has the third worker", PATIENCE, POLL, || {
            let text = fs::read_to_string(&snapshot)?;
            Ok((text.contains("third") && text.contains("second")).then_some(()))
        })
    });
}

#[test]
fn a_full_disk_of_the_control_plane_refuses_and_forgets_nothing() {
    in_world("disk::a_full_disk_of_the_control_plane_refuses_and_forgets_nothing", |world| {
        let host = world.public_host("home")?;
        let home = node(&host)?;
        small_disk(&state_of(&home), "8m")?;
        home.init()?;
        let gateway = format!("{}:51840", host.v4());
        home.up(&["--gateway", &gateway])?;
        home.wait_until("is ready", PATIENCE, |_| true)?;
        let member = worker(world, &home, "member")?;
        home.wait_for_path("member", Route::Direct, PATIENCE)?;
        let pings = Pinger::start(member.host(), home.mesh_v4()?, PING_EVERY)?;
        pings.first_reply(PATIENCE)?;
        let filler = state_of(&home).join("filler");

        fill(&filler)?;
        // The registry's file has room of its own for a while.
        let refused = (0..10_000).find_map(|_| home.create_token(1).err()).context("every token found room")?;
        let refused = format!("{refused:#}");
        ensure!(refused.contains("No space left on device"), "{refused}");
        home.check_alive()?;
        pings.reply_to_request_after(Instant::now(), PATIENCE).context("traffic goes on")?;
        ensure!(home.status()?.peer("member").is_some(), "nobody is forgotten");

        fs::remove_file(&filler)?;
        worker(world, &home, "late").context("with room again, joins go on")?;

        home.kill()?;
        home.up(&["--gateway", &gateway])?;
        home.wait_until("knows both after a restart", PATIENCE, |status| {
            status.peer("member").is_some() && status.peer("late").is_some()
        })?;
        pings.reply_to_request_after(Instant::now(), PATIENCE).context("traffic after a restart")?;
        Ok(())
    });
}

/// A filesystem of that size in place of a folder.
fn small_disk(folder: &Path, size: &str) -> Result<()> {
    fs::create_dir_all(folder)?;
    let options = format!("size={size},mode=0700");
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).context("mount a small disk")
}

/// Takes all room that is left.
fn fill(filler: &Path) -> Result<()> {
    let mut file = fs::File::create(filler)?;
    let page = [0; 4096];
    while file.write_all(&page).is_ok() {}
    Ok(())
}

/// The contents of a file once they are there and have not changed for longer than the daemon waits between two writes.
fn settled(path: &Path) -> Result<Vec<u8>> {
    let mut last: (Vec<u8>, Instant) = (Vec::new(), Instant::now());
    wait::until("the snapshot is written", PATIENCE, POLL, || {
        let contents = fs::read(path).unwrap_or_default();
        if contents != last.0 {
            last = (contents, Instant::now());
        }
        Ok((!last.0.is_empty() && last.1.elapsed().as_secs_f64() > 2.5).then(|| last.0.clone()))
    })
}

fn says(node: &Node, text: &str) -> Result<()> {
    let what = format!("{} says {text:?}", node.name());
    wait::until(&what, PATIENCE, POLL, || Ok(node.log_tail(200).contains(text).then_some(())))
}
