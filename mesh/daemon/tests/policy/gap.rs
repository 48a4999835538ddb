//! A change has no moment in between.

use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use keystone_lab::sandbox::in_own_world;
use serde_json::json;

use crate::stage::{PATIENCE, Stage, labelled, within};

/// Sends numbered datagrams, each from a port of its own, until told to stop. How many went out.
fn flood(from: &str, to: IpAddr, port: u16, stop: &AtomicBool) -> Result<u32> {
    within(from, || {
        let mut sent = 0;
        while !stop.load(Ordering::Relaxed) {
            UdpSocket::bind("0.0.0.0:0")?.send_to(b"x", (to, port))?;
            sent += 1;
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(sent)
    })
}

#[test]
fn a_hundred_changes_let_nothing_through_and_stop_nothing() {
    in_own_world("gap::a_hundred_changes_let_nothing_through_and_stop_nothing", || {
        let mut stage = Stage::new()?;
        let web: IpAddr = stage.places["web"].v4.into();
        // Ports that nobody else listens on, so that what arrives is counted here.
        let receivers = [7001, 7002].map(|port| within("web", || UdpSocket::bind(("0.0.0.0", port)).unwrap()));
        let counts = [AtomicU32::new(0), AtomicU32::new(0)];
        let (stop, end) = (AtomicBool::new(false), AtomicBool::new(false));
        let policy = |round: usize| {
            let mut rules = vec![json!({ "from": [{ "podSelector": labelled("app", "client") }] })];
            // Each round other rules, blocks and ports stand beside the one that matters, so that chains and sets change.
            rules.push(json!({ "ports": [{ "port": 1000 + round }] }));
            rules.push(json!({ "from": [{ "ipBlock": { "cidr": format!("198.51.{round}.0/24") } }] }));
            let spec = json!({ "podSelector": labelled("app", "web"), "ingress": rules });
            ("default", if round.is_multiple_of(2) { "even" } else { "odd" }, spec)
        };
        stage.set_policies(&[policy(0)])?;
        std::thread::scope(|scope| -> Result<()> {
            for (receiver, count) in receivers.iter().zip(&counts) {
                receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
                let end = &end;
                scope.spawn(move || {
                    while !end.load(Ordering::Relaxed) {
                        if receiver.recv(&mut [0; 8]).is_ok() {
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            let allowed = scope.spawn(|| flood("far", web, 7001, &stop));
            let denied = scope.spawn(|| flood("db", web, 7002, &stop));
            let (start, mut away) = (Instant::now(), Vec::new());
            let changed = (1..=100).try_for_each(|round| {
                // A client goes and comes back.
                let addresses = &mut stage.pod("default", "client").addresses;
                match round % 10 {
                    3 => away.append(addresses),
                    7 => addresses.append(&mut away),
                    _ => {}
                }
                stage.set_policies(&[policy(round)])
            });
            let took = start.elapsed();
            stop.store(true, Ordering::Relaxed);
            let (allowed, denied) = (allowed.join().unwrap()?, denied.join().unwrap()?);
            let deadline = Instant::now() + PATIENCE;
            while counts[0].load(Ordering::Relaxed) < allowed && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            end.store(true, Ordering::Relaxed);
            changed?;
            let [arrived, leaked] = [0, 1].map(|place| counts[place].load(Ordering::Relaxed));
            println!(
                "100 changes in {took:?}: {arrived} of {allowed} allowed packets arrived, {leaked} of {denied} others"
            );
            ensure!(allowed > 20 && denied > 20, "packets went out all the while");
            ensure!(arrived == allowed && leaked == 0, "a change has a moment in between");
            Ok(())
        })
    });
}
