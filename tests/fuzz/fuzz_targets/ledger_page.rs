//! Pages of the address ledger, as anyone who may edit a ConfigMap can make them.
//!
//! The first byte is the page's number, the rest its `data` as JSON. Whatever is read is written back as it was, a
//! faulty line's number is given to nobody, and what is claimed afterwards is read back by the next controller.

#![no_main]

use std::collections::BTreeMap;
use std::sync::LazyLock;

use keystone_fuzz::{Input, sample};
use keystone_mesh_core::admission::QUARANTINE;
use keystone_mesh_core::ledger::{Holder, Ledger, PageEdit};
use keystone_mesh_core::network::Network;
use libfuzzer_sys::fuzz_target;

/// A network that ends within the second page.
static NETWORK: LazyLock<Network> =
    LazyLock::new(|| Network { ipv4: "10.98.0.0/23".parse().expect("a prefix"), ..sample::network(1).get().clone() });

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let (page, now) = (u32::from(input.byte() % 3), u64::from(input.byte()) * QUARANTINE / 16);
    let Ok(data) = serde_json::from_slice::<BTreeMap<String, String>>(input.rest()) else { return };

    let mut ledger = Ledger::default();
    let faults = ledger.handle_page(page, &data).len();
    assert_eq!(ledger, reread(&ledger), "read, written and read again");
    match ledger.edits_since(&Ledger::default()).as_slice() {
        [] => assert!(data.is_empty()),
        [edit] => assert_eq!((edit.page, &edit.data), (page, &data)),
        more => panic!("one page became {}", more.len()),
    }

    let before: BTreeMap<u32, Holder> = ledger.live().map(|(host, holder)| (host, holder.clone())).collect();
    let acknowledged = ledger.clone();
    let newcomers = (1..4_u8)
        .map(|byte| Holder::Node(format!("new-{byte}").parse().expect("a node name"), sample::identity(byte).id()));
    for holder in newcomers.chain(before.values().cloned()) {
        let held = ledger.held_by(&holder);
        let Ok(host) = ledger.claim(&NETWORK, &holder, now) else { continue };
        assert!(held.is_none_or(|held| held == host), "a holder keeps its number");
        assert!(before.get(&host).is_none_or(|other| *other == holder), "a number that is another's");
        let line = data.get(&host.to_string());
        assert!(held.is_some() || line.is_none_or(|line| line.parse::<keystone_mesh_core::ledger::Claim>().is_ok()));
        assert_eq!(ledger.claim(&NETWORK, &holder, now), Ok(host));
    }
    assert_eq!(ledger, reread(&ledger));
    assert!(ledger.edits_since(&acknowledged).len() <= 2);
    let mut elsewhere = acknowledged.clone();
    for PageEdit { page, data } in ledger.edits_since(&acknowledged) {
        assert!(elsewhere.handle_page(page, &data).len() <= faults);
    }
    assert_eq!(elsewhere, ledger, "the edits are all that changed");
});

fn reread(ledger: &Ledger) -> Ledger {
    let mut fresh = Ledger::default();
    for PageEdit { page, data } in ledger.edits_since(&Ledger::default()) {
        fresh.handle_page(page, &data);
    }
    fresh
}
