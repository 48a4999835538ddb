//! The API server goes, forgets, or falls silent.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keystone_kubelab::PORT;
use nix::sys::signal::Signal;

use crate::world::{Machine, PATIENCE, create, delete, in_world};

const AUTO: &[&str] = &["--approval=auto"];

#[test]
fn what_happened_before_a_compaction_is_seen_after_it() {
    in_world("outages::what_happened_before_a_compaction_is_seen_after_it", |world| {
        let controller = world.controller("a", 9001, AUTO)?;
        let machines = Machine::many("w", 6);
        world.with_client(async |client| create(&client, &machines[..4]).await)?;
        world.until_approved(&machines[..4], PATIENCE)?;

        // While it sleeps nodes come and go, and the history that would tell of it is forgotten.
        controller.process.signal(Signal::SIGSTOP)?;
        world.with_client(async |client| {
            delete(&client, &machines[..2]).await?;
            create(&client, &machines[4..]).await
        })?;
        world.server.compact()?;
        world.server.kill()?;
        world.server.restart()?;
        controller.process.signal(Signal::SIGCONT)?;
        world.until_approved(&machines[2..], PATIENCE)?;
        Ok(())
    });
}

#[test]
fn an_api_server_that_was_away_finds_the_same_controller_at_work() {
    in_world("outages::an_api_server_that_was_away_finds_the_same_controller_at_work", |world| {
        let mut controller = world.controller("a", 9001, AUTO)?;
        let machines = Machine::many("w", 8);
        world.with_client(async |client| create(&client, &machines[..4]).await)?;
        world.until_approved(&machines[..4], PATIENCE)?;
        world.server.kill()?;
        controller.until_logged("does not lead any longer", PATIENCE)?;
        world.server.restart()?;
        world.with_client(async |client| {
            create(&client, &machines[4..]).await?;
            delete(&client, &machines[..1]).await
        })?;
        world.until_approved(&machines[1..], PATIENCE)?;
        assert!(controller.process.ended()?.is_none());

        world.server.kill()?;
        world.server.kill_etcd()?;
        world.server.restart()?;
        world.with_client(async |client| delete(&client, &machines[1..2]).await)?;
        world.until_approved(&machines[2..], PATIENCE)?;
        assert!(controller.process.ended()?.is_none());
        Ok(())
    });
}

#[test]
fn an_api_server_that_stood_still_is_taken_up_again() {
    in_world("outages::an_api_server_that_stood_still_is_taken_up_again", |world| {
        let mut controller = world.controller("a", 9001, AUTO)?;
        let machines = Machine::many("w", 4);
        world.with_client(async |client| create(&client, &machines[..2]).await)?;
        world.until_approved(&machines[..2], PATIENCE)?;
        world.server.freeze()?;
        controller.until_logged("does not lead any longer", PATIENCE)?;
        world.server.thaw()?;
        world.with_client(async |client| create(&client, &machines[2..]).await)?;
        world.until_approved(&machines, PATIENCE)?;
        assert!(controller.process.ended()?.is_none());
        Ok(())
    });
}

#[test]
fn a_watch_that_falls_silent_is_opened_again() {
    in_world("outages::a_watch_that_falls_silent_is_opened_again", |world| {
        let road = Road::start(7443)?;
        let access = world.server.admin().clone().at("https://127.0.0.1:7443");
        let flags = ["--approval=auto", "--watch-life=5"];
        let controller = world.controller_as(&access, "a", 9001, &flags)?;
        let machines = Machine::many("w", 4);
        world.with_client(async |client| create(&client, &machines[..2]).await)?;
        world.until_approved(&machines[..2], PATIENCE)?;

        road.silence();
        world.with_client(async |client| {
            create(&client, &machines[2..]).await?;
            delete(&client, &machines[..1]).await
        })?;
        world.until_approved(&machines[1..], PATIENCE)?;
        drop(controller);
        Ok(())
    });
}

#[test]
fn an_api_server_that_cannot_be_reached_is_told_with_cause_and_remedy() {
    in_world("outages::an_api_server_that_cannot_be_reached_is_told_with_cause_and_remedy", |world| {
        let good = world.server.admin().kubeconfig();
        let mut another_cluster = good.clone();
        another_cluster["clusters"][0]["cluster"]["certificate-authority-data"] =
            good["users"][0]["user"]["client-certificate-data"].clone();
        let at = |server: &str| world.server.admin().clone().at(server).kubeconfig();
        let cases = [
            ("another-cluster", another_cluster, "certificate", "they are another cluster's"),
            ("another-name", at(&format!("https://127.0.0.2:{PORT}")), "127.0.0.2", "--tls-san"),
            ("another-port", at("https://127.0.0.1:9"), "onnection refused", "is this its address?"),
        ];
        for (number, (name, config, cause, remedy)) in (9001..).zip(cases) {
            let controller = world.controller_by(&config, name, number, &[])?;
            for line in ["the leader lease could not be read", "the watch failed"] {
                controller.until_logged(line, PATIENCE)?;
                let log = controller.log();
                let line = log.lines().find(|found| found.contains(line)).context("the line")?;
                ensure!(line.contains(cause) && line.contains(remedy), "{name}: {line}");
            }
        }
        Ok(())
    });
}

/// A road to the API server on which connections can fall silent: they stay open and carry nothing any more, as behind
/// a NAT that forgot them. Those that are opened later work.
struct Road(Arc<AtomicU64>);

impl Road {
    fn start(port: u16) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port))?;
        let generation = Arc::new(AtomicU64::new(0));
        let current = generation.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if let Ok(server) = TcpStream::connect(("127.0.0.1", PORT)) {
                    let born = current.load(Ordering::SeqCst);
                    Self::carry(&client, &server, born, &current);
                    Self::carry(&server, &client, born, &current);
                }
            }
        });
        Ok(Self(generation))
    }

    fn carry(from: &TcpStream, to: &TcpStream, born: u64, current: &Arc<AtomicU64>) {
        let (Ok(from), Ok(to), current) = (from.try_clone(), to.try_clone(), current.clone()) else { return };
        thread::spawn(move || {
            let (mut reader, mut writer) = (&from, &to);
            let mut buffer = [0; 16 << 10];
            while let Ok(length) = io::Read::read(&mut reader, &mut buffer) {
                let silent = current.load(Ordering::SeqCst) != born;
                if length == 0 || (!silent && io::Write::write_all(&mut writer, &buffer[..length]).is_err()) {
                    break;
                }
            }
            if current.load(Ordering::SeqCst) == born {
                let _ = to.shutdown(std::net::Shutdown::Both);
            } else {
                // Not even its end is heard of.
                thread::sleep(Duration::from_secs(600));
            }
        });
    }

    fn silence(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}
