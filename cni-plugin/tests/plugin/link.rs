//! What a pod's link is like.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use keystone_lab::{tool, wait};
use serde_json::json;

use crate::runtime::{Target, host_routes, inside, ip, ip_do, netns};
use crate::{facts, on_a_node, ours, with, write_facts};

/// One packet there and back, at the first try.
fn reaches(from: &str, to: &str) -> Result<()> {
    inside(from, &format!("ping -c 1 -W 5 {to}")).map(|_| ())
}

/// Gives the host an address and waits until it answers for it.
fn own_address(address: &str) -> Result<()> {
    ip_do(None, &format!("address add {address} dev lo"))?;
    let own = address.split('/').next().unwrap_or_default();
    wait::until("an address of the host", Duration::from_secs(20), Duration::from_millis(5), || {
        let table = [ip(None, "-4 route show table local")?, ip(None, "-6 route show table local")?].concat();
        Ok(table.iter().any(|route| route["dst"] == own).then_some(()))
    })
}

#[test]
fn a_pod_has_both_families_the_mtu_of_the_facts_and_the_same_hardware_address_each_time() {
    on_a_node("link::a_pod_has_both_families_the_mtu_of_the_facts_and_the_same_hardware_address_each_time", || {
        let pod = netns("a")?;
        let target = Target::of("c1", &pod);
        let result = ours().add(target).unwrap();
        let link = &ip(Some(&pod), "address show dev eth0")?[0];
        assert_eq!(
            (link["mtu"].as_u64(), link["address"].as_str()),
            (Some(1300), result["interfaces"][1]["mac"].as_str())
        );
        let addresses: Vec<_> =
            link["addr_info"].as_array().unwrap().iter().filter(|it| it["scope"] == "global").collect();
        assert_eq!(
            (addresses[0]["local"].as_str(), addresses[0]["prefixlen"].as_u64()),
            (Some("10.244.1.2"), Some(32))
        );
        assert_eq!(
            (addresses[1]["local"].as_str(), addresses[1]["prefixlen"].as_u64()),
            (Some("fd00:244:1::2"), Some(128))
        );
        assert_eq!(addresses[1].get("tentative"), None);

        let host = result["interfaces"][0]["name"].as_str().unwrap();
        let host = &ip(None, &format!("address show dev {host}"))?[0];
        assert_eq!((host["mtu"].as_u64(), host["address"].as_str()), (Some(1300), Some("02:6b:73:00:00:01")));
        assert_eq!(host["addr_info"].as_array().unwrap().len(), 0, "the host's end has no address: {host}");
        assert_eq!(host["ifalias"], "eth0 of container c1 in network pods");
        assert_eq!(host_routes()?, ["10.244.1.2", "fd00:244:1::2"]);

        ours().del(target, &result).unwrap();
        let again = ours().add(target).unwrap();
        assert_eq!(again["interfaces"], result["interfaces"]);
        // The address rests for a round.
        assert_eq!(again["ips"][0]["address"], "10.244.1.3/32");
        Ok(())
    });
}

#[test]
fn pods_reach_each_other_the_host_and_themselves_with_the_first_packet() {
    on_a_node("link::pods_reach_each_other_the_host_and_themselves_with_the_first_packet", || {
        let (a, b) = (netns("a")?, netns("b")?);
        own_address("192.0.2.1/32")?;
        own_address("2001:db8::1/128")?;
        ours().add(Target::of("c1", &a)).unwrap();
        ours().add(Target::of("c2", &b)).unwrap();
        for to in ["10.244.1.3", "fd00:244:1::3", "192.0.2.1", "2001:db8::1"] {
            reaches(&a, to)?;
        }
        tool::feed(std::process::Command::new("ping").args(["-c", "1", "-W", "5", "10.244.1.2"]), "")?;
        tool::feed(std::process::Command::new("ping").args(["-c", "1", "-W", "5", "fd00:244:1::2"]), "")?;
        // Nobody had to ask for a hardware address, on either side.
        for (place, family) in [(None, "-4"), (None, "-6"), (Some(a.as_str()), "-4"), (Some(a.as_str()), "-6")] {
            for neighbour in ip(place, &format!("{family} neighbour show"))? {
                let state = neighbour["state"].to_string();
                assert!(state.contains("PERMANENT") || state.contains("NOARP"), "{neighbour}");
            }
        }
        Ok(())
    });
}

#[test]
fn a_pod_reaches_itself_through_a_service() {
    on_a_node("link::a_pod_reaches_itself_through_a_service", || {
        let pod = netns("a")?;
        own_address("192.0.2.1/32")?;
        own_address("2001:db8::1/128")?;
        ours().add(Target::of("c1", &pod)).unwrap();
        // What kube-proxy does for a ClusterIP, with its masquerade of packets that come back to where they are from.
        let rules = "table inet service {\n\
             chain to { type nat hook prerouting priority dstnat;\n\
               ip daddr 10.96.0.1 dnat ip to 10.244.1.2\n\
               ip6 daddr fd00:96::1 dnat ip6 to fd00:244:1::2\n }\n\
             chain from { type nat hook postrouting priority srcnat;\n\
               ip saddr 10.244.1.2 ip daddr 10.244.1.2 masquerade\n\
               ip6 saddr fd00:244:1::2 ip6 daddr fd00:244:1::2 masquerade\n }\n }\n";
        tool::feed(std::process::Command::new("nft").args(["-f", "-"]), rules)?;
        reaches(&pod, "10.96.0.1")?;
        reaches(&pod, "fd00:96::1")
    });
}

#[test]
fn a_pod_of_one_family_has_nothing_of_the_other() {
    on_a_node("link::a_pod_of_one_family_has_nothing_of_the_other", || {
        let (a, b) = (netns("a")?, netns("b")?);
        let mut four = facts();
        four.pod_cidrs.truncate(1);
        write_facts(&four)?;
        let result = ours().add(Target::of("c1", &a)).unwrap();
        assert_eq!(
            (result["ips"].as_array().unwrap().len(), &result["ips"][0]["address"]),
            (1, &json!("10.244.1.2/32"))
        );
        assert_eq!(host_routes()?, ["10.244.1.2"]);

        let six = with(json!({ "ipam": { "type": "keystone-cni", "ranges": ["fd00:7::/64"] } }));
        let result = six.add(Target::of("c2", &b)).unwrap();
        assert_eq!(
            (result["ips"].as_array().unwrap().len(), &result["ips"][0]["address"]),
            (1, &json!("fd00:7::2/128"))
        );
        assert_eq!(ip(Some(&b), "-4 route show")?, Vec::<serde_json::Value>::new());
        own_address("2001:db8::1/128")?;
        reaches(&b, "2001:db8::1")
    });
}

#[test]
fn ipv6_is_turned_on_where_a_runtime_turned_it_off() {
    on_a_node("link::ipv6_is_turned_on_where_a_runtime_turned_it_off", || {
        let pod = netns("a")?;
        inside(
            &pod,
            "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6",
        )?;
        ours().add(Target::of("c1", &pod)).unwrap();
        own_address("2001:db8::1/128")?;
        tool::feed(std::process::Command::new("ping").args(["-c", "1", "-W", "5", "fd00:244:1::2"]), "").map(|_| ())
    });
}

#[test]
fn a_read_only_proc_is_no_obstacle_where_the_settings_are_right_and_is_named_where_they_are_not() {
    on_a_node(
        "link::a_read_only_proc_is_no_obstacle_where_the_settings_are_right_and_is_named_where_they_are_not",
        || {
            let pod = netns("a")?;
            let target = Target::of("c1", &pod);
            fs::write("/proc/sys/net/ipv4/ip_forward", "0")?;
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
            tool::feed(std::process::Command::new("mount").args(["--bind", "/proc/sys", "/proc/sys"]), "")?;
            tool::feed(std::process::Command::new("mount").args(["-o", "remount,bind,ro", "/proc/sys"]), "")?;
            let refused = ours().add(target).unwrap_err();
            assert_eq!(refused.code, 103);
            assert!(refused.message.contains("/proc/sys/net/ipv4/ip_forward has to be 1"), "{}", refused.message);
            crate::assert_nothing_left()?;

            tool::feed(std::process::Command::new("mount").args(["-o", "remount,bind,rw", "/proc/sys"]), "")?;
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            tool::feed(std::process::Command::new("mount").args(["-o", "remount,bind,ro", "/proc/sys"]), "")?;
            ours().add(target).unwrap();
            Ok(())
        },
    );
}

#[test]
fn the_mtu_of_the_configuration_comes_before_that_of_the_facts() {
    on_a_node("link::the_mtu_of_the_configuration_comes_before_that_of_the_facts", || {
        let pod = netns("a")?;
        let result = with(json!({ "mtu": 1400 })).add(Target::of("c1", &pod)).unwrap();
        assert_eq!(result["interfaces"][1]["mtu"], 1400);
        assert_eq!(ip(Some(&pod), "link show dev eth0")?[0]["mtu"], 1400);
        Ok(())
    });
}

#[test]
fn a_runtime_may_ask_for_addresses() {
    on_a_node("link::a_runtime_may_ask_for_addresses", || {
        let (a, b) = (netns("a")?, netns("b")?);
        let mut network = with(json!({ "capabilities": { "ips": true, "mac": true } }));
        network.runtime_config = json!({ "ips": ["10.244.1.77/24"], "mac": "02:00:5e:00:53:01" });
        let result = network.add(Target::of("c1", &a)).unwrap();
        assert_eq!(result["ips"][0]["address"], "10.244.1.77/32");
        assert_eq!(result["ips"][1]["address"], "fd00:244:1::2/128");
        assert_eq!(ip(Some(&a), "link show dev eth0")?[0]["address"], "02:00:5e:00:53:01");
        let taken = network.add(Target::of("c2", &b)).unwrap_err();
        assert_eq!(taken.code, 100);
        assert!(taken.message.contains("c1 eth0"), "{}", taken.message);
        for (ips, code) in [(json!(["10.244.1.1"]), 7), (json!(["192.0.2.7"]), 7), (json!(["x"]), 7)] {
            network.runtime_config = json!({ "ips": ips });
            assert_eq!(network.add(Target::of("c2", &b)).unwrap_err().code, code);
        }
        network.runtime_config = json!({ "ips": ["10.244.1.5", "10.244.1.6"] });
        assert_eq!(network.add(Target::of("c2", &b)).unwrap_err().code, 7);
        Ok(())
    });
}

#[test]
fn every_version_answers_in_its_own_form() {
    on_a_node("link::every_version_answers_in_its_own_form", || {
        for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let pod = netns(version)?;
            let mut network = ours();
            network.version = version.into();
            let target = Target::of("c1", &pod);
            let result = network.add(target).unwrap();
            assert_eq!(result["cniVersion"], version);
            let old = version.starts_with("0.");
            assert_eq!(result["ips"][1]["version"].as_str(), old.then_some("6"), "{version}");
            assert_eq!(result["interfaces"][1].get("mtu").is_some(), version == "1.1.0");
            assert_eq!(
                network.check(target, &result).map_err(|refused| refused.code).err(),
                (version < "0.4.0").then_some(1)
            );
            assert_eq!(
                network.gc(&[("c1", "eth0")]).map_err(|refused| refused.code).err(),
                (version < "1.1.0").then_some(1)
            );
            network.del(target, &result).unwrap();
        }
        crate::assert_nothing_left()
    });
}
