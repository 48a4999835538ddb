//! The configuration file: what is read writes itself in a form that reads the same, and what is accepted keeps its
//! bounds. Files that name key files are only parsed: a fuzzer has no business opening paths.

#![no_main]

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;

use keystone_mesh::config::{Config, Options};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(options) = toml::from_str::<Options>(text) else { return };
    let written = toml::to_string(&options).expect("what was read can be written");
    let again: Options = toml::from_str(&written).expect("and read again");
    assert_eq!(toml::to_string(&again).expect("as before"), written);

    let reads_files = options.private_key_file.is_some() || options.peer.iter().any(|p| p.preshared_key_file.is_some());
    if reads_files {
        return;
    }
    let mut file = std::fs::File::from(memfd_create("config", MFdFlags::empty()).expect("a file in memory"));
    file.write_all(data).expect("memory");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let Ok(config) = Config::load(Options::default(), Some(path.as_ref())) else { return };
    assert!((1..=15).contains(&config.interface.len()));
    assert!((1280..=65503).contains(&config.mtu));
    assert!((1..=64).contains(&config.shards));
    let nets: Vec<_> = config.plain_peers.iter().flat_map(|peer| &peer.config.allowed_ips).collect();
    let owners =
        config.plain_peers.iter().flat_map(|p| p.config.allowed_ips.iter().map(move |net| (net, p.config.key)));
    assert_eq!(
        owners.collect::<BTreeSet<_>>().len(),
        nets.iter().collect::<BTreeSet<_>>().len(),
        "one way for each network"
    );
});
