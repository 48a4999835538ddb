//! The baseline: the reference plugins `bridge`, `host-local` and `portmap`, three machines on one network without any
//! translation, and the routes of the pods written by hand.

use std::path::Path;

use anyhow::{Context, Result};
use keystone_lab::{Nat, RouterSpec};
use serde_json::{Value, json};

use super::cluster::{Cluster, Machine, Member};
use crate::scenario::stage::Stage;
use crate::story::Story;

const PICTURE: &str = r"
    home: kube-apiserver, kubelet      worker-a: kubelet      worker-b: kubelet
      |                                  |                      |
    ==+==================================+======================+=====  one network, no NAT
";

pub(super) fn start(stage: &mut Stage, story: &mut Story) -> Result<Cluster> {
    story.chapter("The network");
    let spec = RouterSpec { nat: Nat::PortRestricted, ipv6: true, ..RouterSpec::default() };
    let hosts = stage.hosts_behind(["home", "worker-a", "worker-b"], "router", spec)?;
    story.text(PICTURE);
    story.chapter("The cluster");
    let [home, ..] = &hosts;
    let mut cluster = Cluster::start(story, home, home.v4().into())?;
    for host in hosts {
        let v6 = host.v6().context("the router gives IPv6 too")?;
        let addresses = [host.v4().into(), v6.into()];
        cluster.add(story, Machine { host, addresses, binds: Vec::new() }, &[])?;
    }
    for member in &cluster.members {
        carry_pods(member, &cluster.members)?;
    }
    Ok(cluster)
}

fn carry_pods(member: &Member, all: &[Member]) -> Result<()> {
    // Pods on one node speak over a bridge; their packets to Services have to be seen by kube-proxy's rules all the same.
    for setting in [
        "net/ipv4/ip_forward",
        "net/ipv6/conf/all/forwarding",
        "net/bridge/bridge-nf-call-iptables",
        "net/bridge/bridge-nf-call-ip6tables",
    ] {
        member.node.run("sh", &["-c", &format!("echo 1 > /proc/sys/{setting}")])?;
    }
    for other in all.iter().filter(|other| other.name() != member.name()) {
        for (pods, via) in other.pods.iter().zip(other.machine.addresses) {
            member.node.run("ip", &["route", "replace", pods, "via", &via.to_string(), "dev", "eth0"])?;
        }
    }
    let path = Path::new("/etc/cni/net.d/10-reference.conflist");
    member.node.write_file(path, &conflist(&member.pods).to_string())
}

fn conflist(pods: &[String]) -> Value {
    let ranges: Vec<Value> = pods.iter().map(|pods| json!([{ "subnet": pods }])).collect();
    json!({
        "cniVersion": "1.0.0",
        "name": "reference",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": ranges,
                    "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}
