//! What a container runtime sends the CNI plugin: the configuration with the previous result in it, the names in the
//! environment, and the facts file. The first byte chooses.

#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use keystone_cni::attachment::{Attachment, is_host_name};
use keystone_cni::ipam::pools;
use keystone_cni::plan::Wanted;
use keystone_cni::spec::{Call, Config, Dns, Ipam, Success, Version};
use keystone_fuzz::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    match input.byte() % 3 {
        0 => configuration(input.rest()),
        1 => environment(input.rest()),
        _ => result(input.rest()),
    }
});

fn configuration(bytes: &[u8]) {
    let config = match Config::parse(bytes.to_vec()) {
        Ok(config) => config,
        Err(error) => {
            assert!(!error.message.is_empty() && error.message.len() < 2100, "a refusal shows the whole input");
            return;
        }
    };
    // It becomes the name of a directory.
    assert!(!config.network.contains('/') && config.network != ".." && config.network.len() <= 200);
    if let Ipam::Delegated(plugin) = &config.ipam {
        assert!(!plugin.contains('/') && plugin != "..");
    }
    if let Some(previous) = &config.previous {
        round_trip(previous);
    }
    let Ipam::Own(ranges) = &config.ipam else { return };
    let Ok(pools) = pools(ranges, "fuzz") else { return };
    let addresses = pools.iter().filter_map(|pool| pool.behind(None).next()).collect::<Vec<_>>();
    for (pool, address) in pools.iter().zip(&addresses) {
        assert!(pool.contains(*address) && pool.size() > 0);
    }
    let attachment = Attachment { network: config.network, container: "c1".into(), ifname: "eth0".into() };
    assert!(is_host_name(&attachment.host_name()));
    let mac = config.runtime.mac.unwrap_or_else(|| attachment.pod_mac());
    let wanted = Wanted { attachment, mac, mtu: config.mtu.unwrap_or(1280), addresses, routes: Vec::new() };
    if wanted.plan().is_ok() {
        let result = wanted.result("/run/netns/c1", Dns::default());
        assert_eq!(Success::parse("ours", &result.to_json(Version::LATEST)), Ok(result));
    }
}

/// Variables, each up to a zero byte, in the order of their names here.
fn environment(bytes: &[u8]) {
    let names = ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_PATH", "CNI_ARGS"];
    let values: Vec<&[u8]> = bytes.split(|byte| *byte == 0).collect();
    let variable = |name: &str| {
        let place = names.iter().position(|known| *known == name)?;
        values.get(place).map(|value| OsString::from_vec(value.to_vec()))
    };
    match Call::parse(&variable) {
        Ok(call) => {
            assert!(!call.container.contains(['/', ' ', '\n']) && call.ifname.len() <= 15 && !call.ifname.contains('/'));
            assert!(call.path.iter().all(|directory| directory.is_absolute()));
            // They are written into one line, with blanks between them.
            assert!(call.pod.is_none_or(|pod| !pod.contains([' ', '\n'])));
        }
        Err(error) => assert!(error.message.len() < 2100),
    }
}

fn result(bytes: &[u8]) {
    if let Ok(json) = serde_json::from_slice(bytes) {
        round_trip(&json);
    }
}

fn round_trip(json: &serde_json::Value) {
    let Ok(result) = Success::parse("fuzz", json) else { return };
    for version in Version::ALL {
        Success::parse("ours", &result.to_json(version)).expect("what was read is written and read again");
    }
    assert_eq!(Success::parse("ours", &result.to_json(Version::LATEST)), Ok(result));
}
