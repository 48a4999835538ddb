//! What policies cost a packet.

use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Result;
use keystone_lab::sandbox::in_own_world;
use keystone_mesh_core::policy::Policy;
use serde_json::{Value, json};

use crate::stage::{PATIENCE, Stage, labelled, within};

/// Round trips for one figure; each is a flow of its own, so that every rule is asked.
const ROUND_TRIPS: u32 = 3000;

/// The median of round trips from a client to web, each from another port.
fn median(to: IpAddr) -> Result<Duration> {
    within("client", || {
        let mut all = Vec::new();
        for _ in 0..ROUND_TRIPS {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(PATIENCE))?;
            let start = Instant::now();
            socket.send_to(b"x", (to, 53))?;
            socket.recv(&mut [0; 8])?;
            all.push(start.elapsed());
        }
        all.sort_unstable();
        Ok(all[all.len() / 2])
    })
}

fn allowing(app: &str, number: usize) -> Value {
    json!({
        "podSelector": labelled("app", app),
        "ingress": [{
            "from": [{ "podSelector": labelled("app", &format!("other-{number}")) }, { "podSelector": labelled("app", "client") }],
            "ports": [{ "protocol": "UDP", "port": 53 }, { "port": 1 + number }],
        }],
    })
}

#[test]
fn a_packet_pays_for_the_policies_of_its_pod_alone() {
    in_own_world("cost::a_packet_pays_for_the_policies_of_its_pod_alone", || {
        let mut stage = Stage::new()?;
        let web = stage.places["web"].v4.into();
        println!("median of {ROUND_TRIPS} round trips by UDP, each a flow of its own, from pod to pod");
        type AppOf = fn(usize) -> &'static str;
        let situations: [(&str, AppOf, usize); 4] = [
            ("no policy", |_| "web", 0),
            ("one policy, which selects the receiver", |_| "web", 1),
            (
                "1,000 policies, one of which selects the receiver",
                |number| if number == 0 { "web" } else { "db" },
                1000,
            ),
            ("1,000 policies, all of which select the receiver", |_| "web", 1000),
        ];
        for (what, app, count) in situations {
            let policies = (0..count).map(|number| {
                let name = ("default".into(), format!("policy-{number:04}").into());
                (name, Policy::read(&allowing(app(number), number)))
            });
            stage.cluster.policies = policies.collect();
            stage.enforce()?;
            println!("  {:8.1} us  {what}", median(web)?.as_secs_f64() * 1e6);
        }
        Ok(())
    });
}
