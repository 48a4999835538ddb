//! What each verb does when things are not as they should be.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use keystone_cni::facts::PodFacts;
use keystone_lab::wait;
use serde_json::{Value, json};

use crate::runtime::{Target, files, host_links, host_routes, ip, ip_do, netns, remove_netns};
use crate::{DATA, FACTS, assert_nothing_left, facts, on_a_node, ours, with, write_facts};

/// Breaks something of the pod in this namespace with this interface on the host.
type Fault = fn(&str, &str) -> Result<()>;

/// Takes something out of the facts.
type Lack = fn(&mut PodFacts);

fn small(addresses: &str) -> crate::runtime::Network {
    with(json!({ "ipam": { "type": "keystone-cni", "ranges": [addresses] } }))
}

#[test]
fn a_second_add_is_refused_and_leaves_the_first_alone() {
    on_a_node("verbs::a_second_add_is_refused_and_leaves_the_first_alone", || {
        let (a, b) = (netns("a")?, netns("b")?);
        let target = Target::of("c1", &a);
        let first = ours().add(target).unwrap();
        assert_eq!(ours().add(target).unwrap_err().code, 101);
        ours().check(target, &first).unwrap();
        // The same container in another namespace.
        assert_eq!(ours().add(Target::of("c1", &b)).unwrap_err().code, 101);
        ours().check(target, &first).unwrap();
        // An interface of somebody else's.
        ip_do(Some(&b), "link add eth0 type veth peer name other")?;
        assert_eq!(ours().add(Target::of("c2", &b)).unwrap_err().code, 101);
        assert_eq!(files(&Path::new(DATA).join("pods/holders")).len(), 1);
        ours().del(target, &first).unwrap();
        assert_nothing_left()
    });
}

#[test]
fn a_second_interface_of_a_pod_is_refused_and_leaves_the_first_alone() {
    on_a_node("verbs::a_second_interface_of_a_pod_is_refused_and_leaves_the_first_alone", || {
        let pod = netns("a")?;
        let target = Target::of("c1", &pod);
        let first = ours().add(target).unwrap();
        let refused = ours().add(Target { ifname: "net1", ..target }).unwrap_err();
        assert_eq!(refused.code, 103);
        assert!(refused.details.contains("first interface"), "{refused:?}");
        ours().check(target, &first).unwrap();
        assert_eq!((host_links()?.len(), files(&Path::new(DATA).join("pods/holders")).len()), (1, 1));
        Ok(())
    });
}

#[test]
fn a_pod_whose_steps_fail_one_after_the_other_leaves_nothing() {
    on_a_node("verbs::a_pod_whose_steps_fail_one_after_the_other_leaves_nothing", || {
        use keystone_cni::apply::{Apply, apply};
        use keystone_cni::attachment::Attachment;
        use keystone_cni::kernel::Kernel;
        use keystone_cni::plan::{Step, Wanted};
        use keystone_cni::spec::{Code, Error};

        /// The real kernel, but for one step that it never sees.
        struct FailsAt(Kernel, usize);
        impl Apply for FailsAt {
            fn apply(&mut self, step: &Step) -> keystone_cni::spec::Result<()> {
                match self.1.checked_sub(1) {
                    Some(left) => {
                        self.1 = left;
                        self.0.apply(step)
                    }
                    None => Err(Error::new(Code::Kernel, "as told")),
                }
            }

            fn delete_pair(&mut self, host: &str) -> keystone_cni::spec::Result<bool> {
                self.0.delete_pair(host)
            }
        }

        let attachment = Attachment { network: "pods".into(), container: "c1".into(), ifname: "eth0".into() };
        let addresses = vec!["10.244.1.2".parse()?, "fd00:244:1::2".parse()?];
        let wanted = Wanted { mac: attachment.pod_mac(), attachment, mtu: 1300, addresses, routes: vec![] };
        let plan = wanted.plan()?;
        let pod = netns("a")?;
        for fails_at in 0..plan.steps.len() {
            let kernel = Kernel::with_pod(Path::new(&pod))?;
            assert_eq!(apply(&plan, &mut FailsAt(kernel, fails_at)).unwrap_err().message, "as told");
            assert_nothing_left()?;
            assert_eq!(ip(Some(&pod), "link show")?.len(), 1, "step {fails_at}: nothing but lo is in the pod");
        }
        apply(&plan, &mut Kernel::with_pod(Path::new(&pod))?)?;
        Ok(())
    });
}

#[test]
fn del_succeeds_whatever_is_missing() {
    on_a_node("verbs::del_succeeds_whatever_is_missing", || {
        let none = Value::Null;
        // Nothing was ever there, not even the directory of leases.
        ours().del(Target::of("never", "/run/netns/never"), &none).unwrap();
        ours().del(Target::of("never", ""), &none).unwrap();

        let pod = netns("a")?;
        for how in
            ["twice", "no namespace", "namespace gone", "interface gone", "lease gone", "holder gone", "facts gone"]
        {
            let target = Target::of("c1", &pod);
            let result = ours().add(target).unwrap();
            match how {
                "twice" => assert!(ours().del(target, &result).is_ok()),
                "no namespace" => assert!(ours().del(Target::of("c1", ""), &none).is_ok()),
                "namespace gone" => {
                    remove_netns("a")?;
                    assert!(ours().del(target, &none).is_ok());
                    netns("a")?;
                }
                "interface gone" => ip_do(Some(&pod), "link delete eth0")?,
                "lease gone" => fs::remove_dir_all(DATA)?,
                "holder gone" => {
                    let holders = Path::new(DATA).join("pods/holders");
                    fs::remove_file(holders.join(&files(&holders)[0]))?;
                }
                _ => fs::remove_file(FACTS)?,
            }
            ours().del(target, &none).unwrap_or_else(|refused| panic!("{how}: {refused:?}"));
            if how == "holder gone" {
                ours().gc(&[]).unwrap();
            }
            assert_nothing_left()?;
        }
        Ok(())
    });
}

#[test]
fn gc_removes_exactly_what_is_not_named() {
    on_a_node("verbs::gc_removes_exactly_what_is_not_named", || {
        let mut other = ours();
        other.name = "other".into();
        let other_net = with(json!({ "ipam": { "type": "keystone-cni", "ranges": ["10.9.0.0/24"] } }));
        let other = crate::runtime::Network { name: "other".into(), ..other_net };
        let pods: Vec<String> = (0..4).map(|number| netns(&format!("n{number}"))).collect::<Result<_>>()?;
        let results: Vec<Value> = pods
            .iter()
            .enumerate()
            .map(|(number, pod)| ours().add(Target::of(&format!("c{number}"), pod)).unwrap())
            .collect();
        let elsewhere = netns("elsewhere")?;
        let others = other.add(Target::of("c0", &elsewhere)).unwrap();

        // c1's namespace is gone, c2's leases are lost, c3 is simply not named.
        remove_netns("n1")?;
        let name = results[2]["interfaces"][0]["name"].as_str().unwrap();
        fs::remove_file(Path::new(DATA).join("pods/holders").join(name))?;
        ours().gc(&[("c0", "eth0"), ("stranger", "eth0")]).unwrap();

        ours().check(Target::of("c0", &pods[0]), &results[0]).unwrap();
        other.check(Target::of("c0", &elsewhere), &others).unwrap();
        assert_eq!(host_links()?.len(), 2);
        assert_eq!(host_routes()?.len(), 3);
        assert_eq!(files(&Path::new(DATA).join("pods/addresses")).len(), 2);
        ours().gc(&[]).unwrap();
        other.gc(&[]).unwrap();
        assert_nothing_left()
    });
}

#[test]
fn gc_without_a_list_removes_nothing() {
    on_a_node("verbs::gc_without_a_list_removes_nothing", || {
        let pod = netns("a")?;
        let result = ours().add(Target::of("c1", &pod)).unwrap();
        let nobody = Target { container: "", netns: "", ifname: "" };
        assert_eq!(ours().call("GC", &ours().plugins[0], nobody, &json!({})).unwrap_err().code, 7);
        ours().check(Target::of("c1", &pod), &result).unwrap();
        Ok(())
    });
}

#[test]
fn check_finds_whatever_is_missing() {
    on_a_node("verbs::check_finds_whatever_is_missing", || {
        let pod = netns("a")?;
        let target = Target::of("c1", &pod);
        let faults: [(&str, Fault); 9] = [
            ("pod's eth0 is down", |pod, _| ip_do(Some(pod), "link set eth0 down")),
            ("lost its address 10.244.1", |pod, _| ip_do(Some(pod), "-4 address flush dev eth0")),
            ("lost its route to ::/0", |pod, _| ip_do(Some(pod), "-6 route delete default")),
            ("lost its neighbour entry of 169.254.1.1", |pod, _| {
                ip_do(Some(pod), "-4 neighbour flush all nud permanent")
            }),
            ("hardware address", |pod, _| ip_do(Some(pod), "link set eth0 address 02:00:00:00:00:07")),
            ("no interface eth0", |pod, _| ip_do(Some(pod), "link set eth0 down name other")),
            ("no route to fd00:244:1::", |_, host| ip_do(None, &format!("-6 route flush dev {host} proto 153"))),
            ("not the other end", |_, host| ip_do(None, &format!("link set {host} address 02:00:00:00:00:07"))),
            ("the store has no lease", |_, _| Ok(fs::remove_dir_all(DATA)?)),
        ];
        for (expected, fault) in faults {
            let result = ours().add(target).unwrap();
            ours().check(target, &result).unwrap();
            fault(&pod, result["interfaces"][0]["name"].as_str().unwrap())?;
            let refused = ours().check(target, &result).unwrap_err();
            assert_eq!(refused.code, 104, "{expected}: {refused:?}");
            assert!(refused.message.contains(expected), "{expected}: {}", refused.message);
            ours().del(target, &result).unwrap();
        }
        let result = ours().add(target).unwrap();
        remove_netns("a")?;
        assert_eq!(ours().check(target, &result).unwrap_err().code, 3);
        assert_eq!(ours().check(target, &Value::Null).unwrap_err().code, 7);
        Ok(())
    });
}

#[test]
fn status_says_what_is_missing_and_needs_no_daemon() {
    on_a_node("verbs::status_says_what_is_missing_and_needs_no_daemon", || {
        ours().status().unwrap();

        let parts: [(Lack, &str); 3] = [
            (|facts| facts.ready.mesh_address = false, "a mesh address"),
            (|facts| facts.ready.pod_cidr = false, "a pod CIDR"),
            (|facts| facts.ready.peer = false, "a reachable peer"),
        ];
        let mut all = facts();
        for (take, named) in parts {
            let mut facts = facts();
            take(&mut facts);
            take(&mut all);
            facts.not_ready = vec!["because of the moon".into()];
            write_facts(&facts)?;
            let refused = ours().status().unwrap_err();
            assert_eq!(refused.code, 50);
            assert!(refused.message.contains(named) && refused.details.contains("moon"), "{refused:?}");
            // A pod that has to be made meanwhile is made.
            let pod = netns("a")?;
            ours().add(Target::of("c1", &pod)).unwrap();
            ours().del(Target::of("c1", &pod), &Value::Null).unwrap();
            remove_netns("a")?;
        }
        write_facts(&all)?;
        let refused = ours().status().unwrap_err();
        assert!(refused.message.contains("a mesh address, a pod CIDR or a reachable peer"), "{}", refused.message);

        let mut overlapping = facts();
        overlapping.pod_cidrs = vec!["10.98.0.0/24".parse()?];
        write_facts(&overlapping)?;
        assert_eq!(ours().status().unwrap_err().code, 50);
        for content in ["{", r#"{"version":9}"#] {
            fs::write(FACTS, content)?;
            assert_eq!(ours().status().unwrap_err().code, 50);
        }
        fs::remove_file(FACTS)?;
        assert_eq!(ours().status().unwrap_err().code, 50);
        // Whether somebody else's network is ready is not for its helper to say; that its configuration is broken is.
        with(json!({ "mode": "helper" })).status().unwrap();
        assert_eq!(with(json!({ "mode": "helper", "moon": true })).status().unwrap_err().code, 2);
        Ok(())
    });
}

#[test]
fn a_full_range_is_told_and_an_address_that_is_given_back_serves_again() {
    on_a_node("verbs::a_full_range_is_told_and_an_address_that_is_given_back_serves_again", || {
        let pods: Vec<String> = (0..6).map(|number| netns(&format!("n{number}"))).collect::<Result<_>>()?;
        let network = small("10.7.0.0/29");
        for (number, pod) in pods.iter().take(5).enumerate() {
            network.add(Target::of(&format!("c{number}"), pod)).unwrap();
        }
        let full = network.add(Target::of("c5", &pods[5])).unwrap_err();
        assert_eq!(full.code, 100);
        assert!(full.message.contains("all 5 addresses"), "{}", full.message);
        assert_eq!(ip(Some(&pods[5]), "link show")?.len(), 1, "nothing is made");
        network.del(Target::of("c3", &pods[3]), &Value::Null).unwrap();
        let result = network.add(Target::of("c5", &pods[5])).unwrap();
        assert_eq!(result["ips"][0]["address"], "10.7.0.5/32");
        Ok(())
    });
}

#[test]
fn a_damaged_store_is_told_and_harms_nobody_else() {
    on_a_node("verbs::a_damaged_store_is_told_and_harms_nobody_else", || {
        let (a, b) = (netns("a")?, netns("b")?);
        let network = small("10.7.0.0/29");
        let first = network.add(Target::of("c1", &a)).unwrap();
        let holder = Path::new(DATA).join("pods/holders").join(first["interfaces"][0]["name"].as_str().unwrap());
        let addresses = Path::new(DATA).join("pods/addresses");
        fs::remove_file(&holder)?;
        symlink("nonsense", &holder)?;
        // The next address is a file, the one after it a directory: neither is given out.
        fs::write(addresses.join("10.7.0.3"), "nonsense")?;
        fs::create_dir(addresses.join("10.7.0.4"))?;
        fs::write(Path::new(DATA).join("pods/boot"), "nonsense")?;
        symlink("nonsense", addresses.join("not an address"))?;

        let refused = network.check(Target::of("c1", &a), &first).unwrap_err();
        assert_eq!(refused.code, 102, "{refused:?}");
        assert!(refused.message.contains(holder.to_str().unwrap()), "{}", refused.message);
        let second = network.add(Target::of("c2", &b)).unwrap();
        assert_eq!(second["ips"][0]["address"], "10.7.0.5/32");

        let list = std::process::Command::new(crate::PLUGIN).args(["ipam", "list", "--data-dir", DATA]).output()?;
        let list = String::from_utf8(list.stdout)?;
        assert_eq!(list.matches("damaged: ").count(), 4, "{list}");
        assert!(list.contains("10.7.0.5"), "{list}");

        network.del(Target::of("c1", &a), &first).unwrap();
        let refused = network.gc(&[("c2", "eth0")]).unwrap_err();
        assert!(refused.code == 102 && refused.message.contains("10.7.0.4"), "{refused:?}");
        fs::remove_dir(addresses.join("10.7.0.4"))?;
        network.gc(&[("c2", "eth0")]).unwrap();
        assert_eq!(files(&addresses), ["10.7.0.5"]);
        network.check(Target::of("c2", &b), &second).unwrap();
        Ok(())
    });
}

#[test]
fn a_store_that_is_no_directory_is_told() {
    on_a_node("verbs::a_store_that_is_no_directory_is_told", || {
        let pod = netns("a")?;
        fs::write(DATA, "")?;
        assert_eq!(ours().add(Target::of("c1", &pod)).unwrap_err().code, 102);
        fs::remove_file(DATA)?;
        assert_nothing_left()
    });
}

#[test]
fn leases_of_an_earlier_boot_are_forgotten() {
    on_a_node("verbs::leases_of_an_earlier_boot_are_forgotten", || {
        let pod = netns("a")?;
        let network = small("10.7.0.0/30");
        network.add(Target::of("c1", &pod)).unwrap();
        assert_eq!(network.add(Target::of("c2", &netns("b")?)).unwrap_err().code, 100);
        // The machine falls over and starts again.
        remove_netns("a")?;
        wait::until(
            "its links and routes are gone with it",
            Duration::from_secs(20),
            Duration::from_millis(5),
            || Ok((host_links()?.is_empty() && host_routes()?.is_empty()).then_some(())),
        )?;
        let boot = Path::new(DATA).join("pods/boot");
        fs::remove_file(&boot)?;
        symlink("00000000-0000-0000-0000-000000000000", &boot)?;
        let result = network.add(Target::of("c2", "/run/netns/b")).unwrap();
        assert_eq!(result["ips"][0]["address"], "10.7.0.2/32");
        assert_eq!(files(&Path::new(DATA).join("pods/holders")).len(), 1);
        Ok(())
    });
}

#[test]
fn the_list_names_who_has_which_address() {
    on_a_node("verbs::the_list_names_who_has_which_address", || {
        let pod = netns("a")?;
        ours().add(Target::of("c1", &pod)).unwrap();
        let list = |options: &[&str]| {
            let output =
                std::process::Command::new(crate::PLUGIN).args(["ipam", "list"]).args(options).output().unwrap();
            (output.status.success(), String::from_utf8(output.stdout).unwrap())
        };
        let (_, json) = list(&["--data-dir", DATA, "--output", "json"]);
        let json: Value = serde_json::from_str(&json)?;
        assert_eq!(json["leases"][0]["addresses"], json!(["10.244.1.2", "fd00:244:1::2"]));
        assert_eq!((&json["leases"][0]["container"], &json["leases"][0]["network"]), (&json!("c1"), &json!("pods")));
        let (_, table) = list(&["--data-dir", DATA]);
        assert_eq!(table.lines().count(), 2, "{table}");
        assert!(list(&["--data-dir", "/nonexistent"]).0);
        assert!(!list(&["--output", "yaml"]).0);
        Ok(())
    });
}
