//! Annotations of a Node or a Peer, as anyone who may patch them can make them.
//!
//! Whatever is read is written and read again the same; laid over good annotations, rubbish forges nothing; every
//! refusal has a reason, and people's wishes stay within their bounds.

#![no_main]

use std::collections::BTreeMap;
use std::sync::LazyLock;

use keystone_fuzz::sample;
use keystone_mesh_core::NodeId;
use keystone_mesh_core::annotations::{self, Decoded, KEYS, PREFIX};
use keystone_mesh_core::facts::Malformed;
use keystone_mesh_core::node::{MAX_FORCED, MAX_RELAYS, MAX_ROUTES, NodeName};
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use libfuzzer_sys::fuzz_target;

type Map = BTreeMap<String, String>;

/// The identity whose statements nobody else may make; the corpus has none of it.
const OURS: u8 = 99;
static OURS_ID: LazyLock<NodeId> = LazyLock::new(|| sample::identity(OURS).id());
static NAME: LazyLock<NodeName> = LazyLock::new(|| sample::record(OURS).get().name.clone());
static GOOD: LazyLock<Map> = LazyLock::new(|| {
    let mut good = annotations::of_record(&sample::record(OURS));
    good.extend(annotations::of_approval(&sample::approval(OURS, OURS)));
    good
});
static GOOD_PEER: LazyLock<Map> = LazyLock::new(|| sample::peer(OURS).to_annotations());

fuzz_target!(|data: &[u8]| {
    let Ok(map) = serde_json::from_slice::<Map>(data) else { return };
    // Most of the fuzzer's keys would be nobody's; as numbers they are those of the contract.
    let map: Map = map.into_iter().map(|(key, text)| (named(&key), text)).collect();

    let Decoded { record, approval, wishes, wish_faults } = annotations::decode(&NAME, &map);
    if let Some(record) = reasoned(record) {
        assert_eq!(annotations::record(&NAME, &annotations::of_record(&record)), Ok(Some(record)));
    }
    if let Some(approval) = reasoned(approval) {
        assert_eq!(annotations::approval(&NAME, &annotations::of_approval(&approval)), Ok(Some(approval)));
    }
    assert!(wishes.endpoints.len() <= MAX_FORCED && wishes.relays.len() <= MAX_RELAYS);
    assert!(wishes.routes.len() <= MAX_ROUTES && wishes.routes.iter().all(|net| net.trunc() == *net));
    assert!(wish_faults.iter().all(|fault| fault.to_string().len() < 2000));

    let mut over = GOOD.clone();
    over.extend(map.clone());
    if let Ok(Some(record)) = annotations::record(&NAME, &over)
        && record.get().identity == *OURS_ID
    {
        assert_eq!(record, sample::record(OURS), "forged");
    }
    if let Ok(Some(approval)) = annotations::approval(&NAME, &over)
        && approval.get().network == *OURS_ID
    {
        assert_eq!(approval, sample::approval(OURS, OURS), "forged");
    }
    let mut over = GOOD_PEER.clone();
    over.extend(map);
    if let Some(peer) = reasoned(SignedPlainPeer::from_annotations(&NAME, &over))
        && peer.get().network == *OURS_ID
    {
        assert_eq!(peer, sample::peer(OURS), "forged");
    }
});

fn named(key: &str) -> String {
    match key.parse::<usize>().ok().and_then(|at| KEYS.get(at)) {
        Some(known) => format!("{PREFIX}{}", known.name),
        None => key.to_owned(),
    }
}

fn reasoned<T>(read: Result<Option<T>, Malformed>) -> Option<T> {
    match read {
        Ok(read) => read,
        Err(Malformed(faults)) => {
            assert!(!faults.is_empty(), "refused without a reason");
            None
        }
    }
}
