//! The helper behind another plugin, the reference `ptp`.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use crate::runtime::{Network, REFERENCE, Target, ip, netns};
use crate::{PLUGIN, on_a_node};

fn behind_ptp(version: &str) -> Network {
    let ptp = json!({
        "type": "ptp",
        "mtu": 1500,
        "ipam": { "type": "host-local", "subnet": "10.9.0.0/24", "routes": [{ "dst": "0.0.0.0/0" }], "dataDir": "/run/host-local" },
    });
    let mut network = Network::ours(Path::new(PLUGIN), version, json!({ "mode": "helper" }));
    network.plugins.insert(0, ptp);
    network
}

fn mtu(netns: Option<&str>, name: &str) -> Result<Value> {
    Ok(ip(netns, &format!("link show dev {name}"))?[0]["mtu"].clone())
}

#[test]
fn the_helper_fits_a_foreign_interface_to_the_mesh_and_hands_the_result_on() {
    on_a_node("helper::the_helper_fits_a_foreign_interface_to_the_mesh_and_hands_the_result_on", || {
        assert!(Path::new(REFERENCE).join("ptp").is_file(), "the package containernetworking-plugins is missing");
        let pod = netns("a")?;
        let target = Target::of("c1", &pod);
        for version in ["0.4.0", "1.0.0"] {
            let network = behind_ptp(version);
            let result = network.add(target).unwrap();
            assert_eq!(result["cniVersion"], version);
            assert!(result["ips"][0]["address"].as_str().unwrap().starts_with("10.9.0."));
            let host = result["interfaces"][0]["name"].as_str().unwrap();
            assert_eq!((mtu(Some(&pod), "eth0")?, mtu(None, host)?), (json!(1300), json!(1300)));
            let route = &ip(Some(&pod), "route show 10.98.0.0/16")?[0];
            assert_eq!((&route["gateway"], &route["metrics"][0]["mtu"]), (&json!("10.9.0.1"), &json!(1300)));
            network.check(target, &result).unwrap();
            crate::runtime::ip_do(Some(&pod), "route delete 10.98.0.0/16")?;
            assert_eq!(network.check(target, &result).unwrap_err().code, 104);
            network.del(target, &result).unwrap();
            network.del(target, &result).unwrap();
        }
        Ok(())
    });
}

#[test]
fn the_helper_has_to_stand_behind_another_plugin() {
    on_a_node("helper::the_helper_has_to_stand_behind_another_plugin", || {
        let pod = netns("a")?;
        let alone = Network::ours(Path::new(PLUGIN), "1.1.0", json!({ "mode": "helper" }));
        assert_eq!(alone.add(Target::of("c1", &pod)).unwrap_err().code, 7);
        let previous = json!({ "cniVersion": "1.1.0", "interfaces": [], "ips": [] });
        let none = alone.call("ADD", &alone.plugins[0], Target::of("c1", &pod), &json!({ "prevResult": previous }));
        assert_eq!(none.unwrap_err().code, 7);
        assert_eq!(alone.gc(&[]), Ok(Value::Null));
        Ok(())
    });
}
