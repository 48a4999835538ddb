//! Records, approvals and network documents as maps of facts.
//!
//! Three questions about one map: what is read of it reads the same again; laid over a good statement it changes
//! nothing without being refused; and what is signed of its values is read by everyone as it was meant.

#![no_main]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::LazyLock;

use keystone_fuzz::sample;
use keystone_mesh_core::facts::{FieldError, Malformed, Reader};
use keystone_mesh_core::network::{Network, SignedNetwork, check_prefix};
use keystone_mesh_core::node::{
    Approval, MAX_ENDPOINTS, MAX_FORCED, MAX_POD_CIDRS, MAX_RELAYS, MAX_ROUTES, NodeRecord, SignedApproval, SignedRecord,
};
use keystone_mesh_core::plain_peer::SignedPlainPeer;
use keystone_mesh_core::{Identity, NodeId};
use libfuzzer_sys::fuzz_target;

type Map = BTreeMap<String, String>;

/// The identity whose statements nobody else may make; the corpus has none of it.
const OURS: u8 = 99;
static OUR_IDENTITY: LazyLock<Identity> = LazyLock::new(|| sample::identity(OURS));
static GOOD: LazyLock<(Map, Map, Map)> = LazyLock::new(|| {
    (sample::record(OURS).to_map(), sample::approval(OURS, 1).to_map(), sample::network(OURS).to_map())
});

fuzz_target!(|data: &[u8]| {
    let Ok(map) = serde_json::from_slice::<Map>(data) else { return };
    read_again(&map, SignedRecord::from_map, SignedRecord::to_map);
    read_again(&map, SignedApproval::from_map, SignedApproval::to_map);
    read_again(&map, SignedNetwork::from_map, SignedNetwork::to_map);
    read_again(&map, SignedPlainPeer::from_map, SignedPlainPeer::to_map);

    let ours = OUR_IDENTITY.id();
    let (record, approval, network) = &*GOOD;
    not_forged(&map, record, SignedRecord::from_map, SignedRecord::to_map, |r| r.get().identity == ours);
    not_forged(&map, approval, SignedApproval::from_map, SignedApproval::to_map, |a| a.get().network == ours);
    not_forged(&map, network, SignedNetwork::from_map, SignedNetwork::to_map, |n| n.get().id == ours);

    sign_record(&map, ours);
    sign_approval(&map, ours);
    sign_network(&map, ours);
});

fn read_again<T: PartialEq + Debug>(map: &Map, from: fn(&Map) -> Result<T, Malformed>, to: fn(&T) -> Map) {
    match from(map) {
        Ok(statement) => assert_eq!(from(&to(&statement)), Ok(statement)),
        Err(Malformed(faults)) => assert!(!faults.is_empty(), "refused without a reason"),
    }
}

fn not_forged<T>(
    over: &Map,
    good: &Map,
    from: fn(&Map) -> Result<T, Malformed>,
    to: fn(&T) -> Map,
    is_ours: impl Fn(&T) -> bool,
) {
    let mut map = good.clone();
    map.extend(over.clone());
    if let Ok(statement) = from(&map)
        && is_ours(&statement)
    {
        assert_eq!(to(&statement), *good, "forged");
    }
}

fn sign_record(map: &Map, identity: NodeId) {
    let mut reader = Reader::new(map);
    let (name, key, seq) = (reader.required("name"), reader.required("public-key"), reader.required("seq"));
    let (Some(name), Some(public_key), Some(seq)) = (name, key, seq) else { return };
    let record = NodeRecord {
        name,
        identity,
        public_key,
        endpoints: reader.list("endpoints", MAX_ENDPOINTS),
        nat: reader.optional("nat").unwrap_or_default(),
        relays: reader.list("relay", MAX_RELAYS),
        routes: reader.list("routes-wanted", MAX_ROUTES),
        seq,
    };
    let signed = record.clone().sign(&OUR_IDENTITY);
    let read = SignedRecord::from_map(&signed.to_map()).expect("a signed record is read");
    assert_eq!(read.get(), &record);
    assert_eq!(serde_json::from_slice::<SignedRecord>(&serde_json::to_vec(&signed).expect("JSON")).ok(), Some(signed));
}

fn sign_approval(map: &Map, network: NodeId) {
    let mut reader = Reader::new(map);
    let (name, identity, serial) =
        (reader.required("name"), reader.required("approved"), reader.required("approval-serial"));
    let (Some(name), Some(identity), Some(serial)) = (name, identity, serial) else { return };
    let mut addresses: Vec<ipnet::IpNet> = reader.list("addresses", 8);
    addresses.retain(|net| net.prefix_len() == net.max_prefix_len());
    let approval = Approval {
        network,
        name,
        identity,
        addresses,
        routes: reader.list("routes", MAX_ROUTES),
        pod_cidrs: reader.list("pod-cidrs", MAX_POD_CIDRS),
        endpoints: reader.list("approved-endpoints", MAX_FORCED),
        relays: reader.list("approved-relays", MAX_RELAYS),
        location: reader.optional("approved-location"),
        serial,
    };
    let signed = approval.clone().sign(&OUR_IDENTITY);
    assert_eq!(SignedApproval::from_map(&signed.to_map()).expect("a signed approval is read").get(), &approval);
}

fn sign_network(map: &Map, id: NodeId) {
    let mut reader = Reader::new(map);
    let (ipv4, ipv6, serial) = (reader.required("ipv4"), reader.required("ipv6"), reader.required("serial"));
    let (Some(ipv4), Some(ipv6), Some(serial)) = (ipv4, ipv6, serial) else { return };
    let network = Network {
        id,
        ipv4,
        ipv6,
        relays: reader.list("relays", MAX_RELAYS),
        gateways: reader.list("gateways", 8),
        serial,
    };
    let prefixes_ok = network.prefixes().into_iter().all(|prefix| check_prefix(prefix).is_ok());
    match network.clone().sign(&OUR_IDENTITY) {
        Ok(signed) => {
            let read = SignedNetwork::from_map(&signed.to_map()).expect("what is signed can be read");
            assert_eq!(read.get(), &network);
        }
        // Written out, default values can be longer than they were read; a list that is too long is no forgery.
        Err(Malformed(faults)) => assert!(
            !prefixes_ok || faults.iter().all(|fault| matches!(fault, FieldError::TooLong { .. })),
            "{faults:?}"
        ),
    }
}
