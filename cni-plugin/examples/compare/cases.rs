//! What each verb does when things are not as they should be, observed.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use crate::contest::{Contestant, DATA, Left, pod};
use crate::runtime::{Answer, Target, inside, ip_do, netns, remove_netns};

const FIRST: &str = "/run/netns/first";
const SECOND: &str = "/run/netns/second";

/// A case: what is done, and what is seen of it.
type Case = (&'static str, fn(&Contestant) -> Result<String>);

const CASES: &[Case] = &[
    ("ADD into a namespace that does not exist", add_without_namespace),
    ("a second ADD for the same container", second_add),
    ("ADD with a container ID in use, into another namespace", reused_container),
    ("a second DEL", second_del),
    ("DEL after the namespace is gone", del_without_namespace),
    ("DEL with an empty `CNI_NETNS`", del_with_empty_namespace),
    ("DEL of a container that never was", del_of_nobody),
    ("DEL after the store is lost", del_without_store),
    ("CHECK of a whole pod", check_whole),
    ("CHECK after the pod lost its address", check_without_address),
    ("CHECK after the host lost its route to the pod", check_without_host_route),
    ("CHECK after the lease is lost", check_without_lease),
    ("ADD when every address is taken", full_range),
    ("ADD when a lease is garbage", garbage_lease),
    ("ADD when the place of the store is a file", store_is_file),
    ("the address of a deleted pod, at the next ADD", address_after_del),
    ("leases of pods that died with the machine", leases_of_earlier_boot),
    ("ADD with an unknown key in the configuration", unknown_key),
    ("ADD with an unknown CNI version", unknown_version),
    ("ADD with malformed JSON", malformed),
    ("ADD with an interface name of 16 characters", long_name),
    ("ADD with the container ID `../../x`", hostile_container),
    ("GC (1.1.0) that names one of two pods", gc),
    ("STATUS (1.1.0)", status),
    ("first packet to a fresh pod", first_packet),
    ("first IPv6 packet to a fresh pod, right after ADD", first_packet_v6),
];

/// The table, one column for each contestant.
pub(crate) fn table(contestants: &[Contestant]) -> Result<String> {
    netns("first")?;
    netns("second")?;
    ip_do(None, "address add 192.0.2.1/32 dev lo")?;
    ip_do(None, "address add 2001:db8::1/128 dev lo nodad")?;
    let mut text = String::from("| case |");
    for contestant in contestants {
        text.push_str(&format!(" {} |", contestant.title));
    }
    text.push_str("\n| --- |");
    text.push_str(&" --- |".repeat(contestants.len()));
    for (title, case) in CASES {
        text.push_str(&format!("\n| {title} |"));
        for contestant in contestants {
            contestant.clean()?;
            refresh("first")?;
            refresh("second")?;
            let seen = case(contestant).unwrap_or_else(|error| format!("cannot be tried: {error:#}"));
            text.push_str(&format!(" {} |", seen.replace('|', "\\|").replace('\n', " ")));
        }
    }
    contestants.iter().try_for_each(Contestant::clean)?;
    remove_netns("first")?;
    remove_netns("second")?;
    Ok(text + "\n")
}

/// A namespace as a runtime makes it.
fn refresh(name: &str) -> Result<()> {
    let _was_removed_by_a_case = remove_netns(name);
    netns(name)?;
    inside(&format!("/run/netns/{name}"), "ip link set lo up").map(|_| ())
}

fn said(answer: &Answer) -> String {
    match answer {
        Ok(_) => "succeeds".into(),
        Err(refused) if refused.code == 0 => "fails without a CNI error".into(),
        Err(refused) => format!("refused, code {}", refused.code),
    }
}

fn and_left(answer: &Answer, left: Left) -> String {
    let left = match (left.links, left.leases) {
        (0, 0) => "nothing left".into(),
        (0, leases) => format!("**{leases} lease left**"),
        (links, 0) => format!("**{links} link left**"),
        (links, leases) => format!("**{links} link and {leases} lease left**"),
    };
    format!("{}; {left}", said(answer))
}

fn make(it: &Contestant) -> Result<Value> {
    it.network.add(pod("c1", FIRST)).map_err(|refused| anyhow::anyhow!("ADD: {refused:?}"))
}

fn add_without_namespace(it: &Contestant) -> Result<String> {
    let answer = it.network.add(pod("c1", "/run/netns/none"));
    Ok(and_left(&answer, it.left()?))
}

fn first_one(it: &Contestant, result: &Value) -> &'static str {
    match (it.answers(result), it.holds(result)) {
        (true, true) => "the first one is whole",
        (true, false) => "**the first one lost its lease: its address is given out again**",
        (false, true) => "**the first one lost its network**",
        (false, false) => "**the first one lost network and lease**",
    }
}

fn second_add(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    let answer = it.network.add(pod("c1", FIRST));
    Ok(format!("{}; {}", said(&answer), first_one(it, &result)))
}

fn reused_container(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    let answer = it.network.add(pod("c1", SECOND));
    Ok(format!("{}; {}", said(&answer), first_one(it, &result)))
}

fn second_del(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    it.network.del(pod("c1", FIRST), &result).map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
    let answer = it.network.del(pod("c1", FIRST), &result);
    Ok(and_left(&answer, it.left()?))
}

fn del_without_namespace(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    remove_netns("first")?;
    let answer = it.network.del(pod("c1", FIRST), &result);
    Ok(and_left(&answer, Left { links: 0, ..it.left()? }))
}

fn del_with_empty_namespace(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    let answer = it.network.del(pod("c1", ""), &result);
    Ok(and_left(&answer, it.left()?))
}

fn del_of_nobody(it: &Contestant) -> Result<String> {
    let answer = it.network.del(pod("never", FIRST), &Value::Null);
    Ok(and_left(&answer, it.left()?))
}

fn del_without_store(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    fs::remove_dir_all(DATA)?;
    let answer = it.network.del(pod("c1", FIRST), &result);
    Ok(and_left(&answer, it.left()?))
}

fn check_whole(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    Ok(said(&it.network.check(pod("c1", FIRST), &result)))
}

fn check_without_address(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    ip_do(Some(FIRST), "-4 address flush dev eth0")?;
    Ok(said(&it.network.check(pod("c1", FIRST), &result)))
}

fn check_without_host_route(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    let address =
        result["ips"][0]["address"].as_str().and_then(|address| address.split('/').next()).unwrap_or_default();
    if ip_do(None, &format!("route delete {address}")).is_err() {
        return Ok("has no such route".into());
    }
    Ok(said(&it.network.check(pod("c1", FIRST), &result)))
}

fn check_without_lease(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    fs::remove_dir_all(DATA)?;
    Ok(said(&it.network.check(pod("c1", FIRST), &result)))
}

fn full_range(it: &Contestant) -> Result<String> {
    let network = it.with_range("10.70.0.0/30");
    network.add(pod("c1", FIRST)).map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
    let answer = network.add(pod("c2", SECOND));
    let left = it.left()?;
    // The first pod's own are no leftovers.
    let links = left.links.saturating_sub(1);
    let leases = left.leases.saturating_sub(1);
    let _gone = network.del(pod("c1", FIRST), &Value::Null);
    Ok(and_left(&answer, Left { links, leases }))
}

fn garbage_lease(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    let address =
        result["ips"][0]["address"].as_str().and_then(|address| address.split('/').next()).unwrap_or_default();
    let path = it.store().join(address);
    fs::remove_file(&path)?;
    fs::write(&path, "garbage")?;
    let answer = it.network.add(pod("c2", SECOND));
    let removed = it.network.del(pod("c1", FIRST), &result);
    let kept = if path.exists() { "the garbage stays" } else { "the garbage is gone" };
    Ok(format!("another pod {}; DEL of its own {}, {kept}", said(&answer), said(&removed)))
}

fn store_is_file(it: &Contestant) -> Result<String> {
    fs::write(DATA, "garbage")?;
    let answer = it.network.add(pod("c1", FIRST));
    Ok(and_left(&answer, Left { leases: 0, ..it.left()? }))
}

fn address_after_del(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    it.network.del(pod("c1", FIRST), &result).map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
    let next = it.network.add(pod("c2", SECOND)).map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
    let same = next["ips"][0]["address"] == result["ips"][0]["address"];
    Ok(if same { "**is given out at once**" } else { "rests for a round" }.into())
}

fn leases_of_earlier_boot(it: &Contestant) -> Result<String> {
    make(it)?;
    let boot = Path::new(DATA).join(&it.network.name).join("boot");
    if fs::symlink_metadata(&boot).is_ok() {
        fs::remove_file(&boot)?;
        std::os::unix::fs::symlink("00000000-0000-0000-0000-000000000000", &boot)?;
    }
    refresh("first")?;
    let network = &it.network;
    network.add(pod("c2", SECOND)).map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
    Ok(match it.left()?.leases {
        1 => "are forgotten at the first ADD".into(),
        more => format!("**stay: {} of {more}**", more - 1),
    })
}

fn unknown_key(it: &Contestant) -> Result<String> {
    let mut network = it.network.clone();
    network.plugins[0]["mtuu"] = 1400.into();
    Ok(said(&network.add(pod("c1", FIRST))))
}

fn unknown_version(it: &Contestant) -> Result<String> {
    let mut network = it.network.clone();
    network.version = "9.9.9".into();
    let answer = network.add(pod("c1", FIRST));
    Ok(and_left(&answer, it.left()?))
}

fn malformed(it: &Contestant) -> Result<String> {
    let mut network = it.network.clone();
    network.plugins[0]["ipam"] = json!("nonsense");
    let answer = network.add(pod("c1", FIRST));
    Ok(and_left(&answer, it.left()?))
}

fn long_name(it: &Contestant) -> Result<String> {
    let answer = it.network.add(Target { container: "c1", netns: FIRST, ifname: "abcdefghijklmnop" });
    Ok(and_left(&answer, it.left()?))
}

fn hostile_container(it: &Contestant) -> Result<String> {
    let answer = it.network.add(pod("../../x", FIRST));
    Ok(and_left(&answer, it.left()?))
}

fn gc(it: &Contestant) -> Result<String> {
    make(it)?;
    it.network.add(pod("c2", SECOND)).map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
    let mut network = it.network.clone();
    network.version = "1.1.0".into();
    let answer = network.gc(&[("c1", "eth0")]);
    let left = it.left()?;
    let exact = if left == (Left { links: 1, leases: 1 }) {
        "exactly the other one is gone"
    } else {
        "**both are still there**"
    };
    Ok(format!("{}; {exact}", said(&answer)))
}

fn status(it: &Contestant) -> Result<String> {
    let mut network = it.network.clone();
    network.version = "1.1.0".into();
    Ok(said(&network.status()))
}

fn first_packet(it: &Contestant) -> Result<String> {
    let result = make(it)?;
    Ok(if it.answers(&result) { "arrives" } else { "**is lost**" }.into())
}

fn first_packet_v6(it: &Contestant) -> Result<String> {
    let network = it.with_range("fd00:67::/64");
    let started = std::time::Instant::now();
    let result = network.add(pod("c1", FIRST)).map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
    let took = started.elapsed().as_millis();
    let arrives = it.answers(&result);
    Ok(format!("{}, ADD took {took} ms", if arrives { "arrives" } else { "**is lost**" }))
}
