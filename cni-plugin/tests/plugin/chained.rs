//! Together with the reference plugins: behind us `portmap`, `bandwidth`, `tuning` and `firewall`, and `host-local` in place
//! of our own addresses.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use keystone_lab::wait;
use serde_json::{Value, json};

use crate::runtime::{REFERENCE, Target, files, host_links, inside, ip, netns};
use crate::{DATA, assert_nothing_left, on_a_node, ours, with};

const HOST_LOCAL: &str = "/run/host-local";

fn delegated(range: &str) -> crate::runtime::Network {
    let ranges = json!([[{ "subnet": range }], [{ "subnet": "fd00:9::/64" }]]);
    let routes = json!([{ "dst": "0.0.0.0/0" }, { "dst": "192.0.2.0/24" }]);
    let mut network =
        with(json!({ "ipam": { "type": "host-local", "ranges": ranges, "routes": routes, "dataDir": HOST_LOCAL } }));
    // Debian's host-local does not speak 1.1.0.
    network.version = "1.0.0".into();
    network
}

/// Leases of host-local, without its lock and its notes of the last addresses.
fn host_local_leases() -> Vec<String> {
    let mut names = files(&Path::new(HOST_LOCAL).join("pods"));
    names.retain(|name| name.parse::<std::net::IpAddr>().is_ok());
    names
}

#[test]
fn other_plugins_stand_behind_us() {
    on_a_node("chained::other_plugins_stand_behind_us", || {
        assert!(Path::new(REFERENCE).join("portmap").is_file(), "the package containernetworking-plugins is missing");
        let (a, b) = (netns("a")?, netns("b")?);
        let mut network = ours()
            .then(json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }))
            .then(json!({ "type": "bandwidth", "ingressRate": 8_000_000, "ingressBurst": 8_000_000 }))
            .then(json!({ "type": "tuning", "sysctl": { "net.ipv4.conf.eth0.arp_filter": "1" } }))
            .then(json!({ "type": "firewall" }));
        network.version = "1.0.0".into();
        network.runtime_config =
            json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
        let target = Target::of("c1", &a);
        let result = network.add(target).unwrap();
        assert_eq!(result["ips"][0]["address"], "10.244.1.2/32");
        // Each but portmap: 1.1.1 looks for IPv4's rules among IPv6's.
        let more = json!({ "prevResult": result });
        for plugin in network.plugins.iter().filter(|plugin| plugin["type"] != "portmap") {
            network.call("CHECK", plugin, target, &more).unwrap();
        }
        assert_eq!(inside(&a, "cat /proc/sys/net/ipv4/conf/eth0/arp_filter")?.trim(), "1");
        let host = result["interfaces"][0]["name"].as_str().unwrap();
        assert!(ip(None, &format!("link show dev {host}"))?[0]["qdisc"] == "tbf", "bandwidth found the host's end");

        // A pod behind another address of the host reaches the port.
        crate::runtime::ip_do(None, "address add 192.0.2.1/32 dev lo")?;
        ours().add(Target::of("c2", &b)).unwrap();
        let mut server = Command::new("nsenter");
        server.args([&format!("--net={a}"), "busybox", "nc", "-l", "-p", "80", "-e", "echo", "hello"]);
        let _server = Server(server.spawn()?);
        wait::until("the pod's answer", Duration::from_secs(20), Duration::from_millis(100), || {
            let heard = inside(&b, "busybox nc -w 2 192.0.2.1 8080 </dev/null").unwrap_or_default();
            Ok(heard.contains("hello").then_some(()))
        })?;

        network.del(target, &result).unwrap();
        ours().del(Target::of("c2", &b), &Value::Null).unwrap();
        assert_nothing_left()
    });
}

/// A program that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

#[test]
fn another_plugin_gives_the_addresses() {
    on_a_node("chained::another_plugin_gives_the_addresses", || {
        let (a, b) = (netns("a")?, netns("b")?);
        let network = delegated("10.9.0.0/24");
        let target = Target::of("c1", &a);
        let result = network.add(target).unwrap();
        let addresses: Vec<&str> =
            result["ips"].as_array().unwrap().iter().filter_map(|ip| ip["address"].as_str()).collect();
        assert_eq!(addresses, ["10.9.0.2/32", "fd00:9::2/128"]);
        let routes: Vec<&str> =
            result["routes"].as_array().unwrap().iter().filter_map(|route| route["dst"].as_str()).collect();
        assert_eq!(routes, ["0.0.0.0/0", "::/0", "192.0.2.0/24"]);
        assert_eq!(host_local_leases().len(), 2);
        network.check(target, &result).unwrap();
        network.add(Target::of("c2", &b)).unwrap();
        inside(&b, "ping -c 1 -W 5 10.9.0.2 && ping -c 1 -W 5 fd00:9::2")?;
        // A second ADD does not cost the first its addresses.
        assert_eq!(network.add(target).unwrap_err().code, 101);
        assert_eq!(host_local_leases().len(), 4);
        network.check(target, &result).unwrap();

        network.del(target, &result).unwrap();
        network.del(target, &Value::Null).unwrap();
        network.del(Target::of("c2", ""), &Value::Null).unwrap();
        assert_eq!(host_local_leases(), Vec::<String>::new());
        assert_eq!(files(Path::new(DATA)), Vec::<String>::new(), "our own store is not touched");
        assert_nothing_left()
    });
}

#[test]
fn addresses_of_another_plugin_are_given_back_when_the_rest_fails() {
    on_a_node("chained::addresses_of_another_plugin_are_given_back_when_the_rest_fails", || {
        let pod = netns("a")?;
        let target = Target::of("c1", &pod);
        // Somebody has the pod's address already.
        crate::runtime::ip_do(None, "route add 10.9.0.2/32 dev lo scope link")?;
        let refused = delegated("10.9.0.0/24").add(target).unwrap_err();
        assert_eq!(refused.code, 103, "{refused:?}");
        assert!(refused.details.contains("ip route show 10.9.0.2"), "{refused:?}");
        assert_eq!(host_local_leases(), Vec::<String>::new());
        // One that is the node's own.
        let refused = delegated("10.98.0.0/24").add(target).unwrap_err();
        assert_eq!(refused.code, 7, "{refused:?}");
        assert_eq!(host_local_leases(), Vec::<String>::new());
        assert_eq!(host_links()?, Vec::<String>::new());
        // An error of its own keeps its code and says whose it is.
        fs::remove_dir_all(HOST_LOCAL)?;
        fs::write(HOST_LOCAL, "")?;
        let refused = delegated("10.9.0.0/24").add(target).unwrap_err();
        assert!(refused.message.starts_with("host-local: "), "{refused:?}");
        assert_nothing_left()
    });
}

#[test]
fn a_plugin_that_is_not_installed_is_told() {
    on_a_node("chained::a_plugin_that_is_not_installed_is_told", || {
        let pod = netns("a")?;
        let refused = with(json!({ "ipam": { "type": "no-such-plugin" } })).add(Target::of("c1", &pod)).unwrap_err();
        assert_eq!(refused.code, 105);
        assert!(refused.message.contains(REFERENCE), "{}", refused.message);
        Ok(())
    });
}
