//! The header before every packet on the TUN device.

#![no_main]

use keystone_mesh::tun::virtio::{HEADER_LEN, VirtioError, VirtioHeader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    match VirtioHeader::decode(data) {
        Ok(header) => {
            let encoded = header.encode();
            assert_eq!(VirtioHeader::decode(&encoded), Ok(header));
            assert_eq!(encoded[2..], data[2..HEADER_LEN]);
            // Flags that are not ours, and the hint of ECN, are not kept.
            assert_eq!((encoded[0], encoded[1]), (data[0] & 1, data[1] & 0x7f));
        }
        Err(VirtioError::Truncated(len)) => assert!(len == data.len() && len < HEADER_LEN),
        Err(VirtioError::UnknownGso(gso)) => assert!(![0, 1, 4, 5].contains(&gso)),
    }
});
