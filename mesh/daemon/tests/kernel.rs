//! The kernel driver against the real kernel, checked with `ip`.
//!
//! Each test runs in a process and network namespace of its own: the test binary starts itself again under
//! `unshare --net`, as root or, where that is allowed, in a user namespace. Nothing outlives it.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "helpers of tests print and panic as tests do")]

use std::cell::Cell;
use std::net::IpAddr;
use std::process::{Command, Output};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use keystone_mesh::kernel::{Changes, KernelState};
use keystone_mesh_core::kernel::{Desired, KernelOp, Route, Warning};
use serde_json::Value;

const MESH: &str = "kern0";
const DEADLINE: Duration = Duration::from_secs(5);

/// Names the test that a child process of this binary is to run.
const INSIDE: &str = "KEYSTONE_KERNEL_TEST";

fn isolated<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F) {
    if std::env::var(INSIDE).as_deref() == Ok(name) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let bounded = async { tokio::time::timeout(DEADLINE * 6, test()).await.expect("no test takes so long") };
        return tokio::task::LocalSet::new().block_on(&runtime, bounded);
    }
    let unshare = ["--map-root-user", "--net", "--kill-child", "--"];
    let probe = Command::new("unshare").args(unshare).args(["test", "-c", "/dev/net/tun"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        let reason = match probe {
            Ok(output) => {
                format!("no network namespace with a /dev/net/tun: {}", String::from_utf8_lossy(&output.stderr))
            }
            Err(error) => format!("unshare (util-linux) cannot be started: {error}"),
        };
        assert!(std::env::var_os("CI").is_none(), "nothing is skipped in CI: {reason}");
        println!("SKIPPED {name}: {reason}");
        return;
    }
    let binary = std::env::current_exe().unwrap();
    let mut inside = Command::new("unshare");
    inside.args(unshare).arg(binary).args(["--exact", name, "--nocapture"]).env(INSIDE, name);
    let output = inside.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    // Its test runner's own lines would count twice.
    printed.lines().filter(|line| !line.starts_with("test result")).for_each(|line| println!("{line}"));
    println!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && printed.contains("1 passed"), "{name} failed inside its namespace");
}

fn run(command: &str) -> Output {
    let mut words = command.split_whitespace();
    Command::new(words.next().unwrap()).args(words).output().unwrap()
}

fn ip(arguments: &str) {
    let output = run(&format!("ip {arguments}"));
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What `ip -j` prints; an empty list where it prints nothing or knows no such table or interface.
fn shown(arguments: &str) -> Vec<Value> {
    let output = run(&format!("ip -j {arguments}"));
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// The destinations in our table, of both families.
fn mesh_routes() -> Vec<String> {
    let both = [shown("-4 route show table 5184"), shown("-6 route show table 5184")].concat();
    let mut destinations: Vec<String> = both.iter().map(|route| route["dst"].as_str().unwrap().to_owned()).collect();
    destinations.sort_unstable();
    destinations
}

/// The rules at our priority, of both families.
fn mesh_rules() -> usize {
    shown("-4 rule show pref 5184").len() + shown("-6 rule show pref 5184").len()
}

fn mesh_addresses() -> Vec<String> {
    let links = shown(&format!("addr show dev {MESH} scope global"));
    let infos = links.iter().filter_map(|link| link["addr_info"].as_array()).flatten();
    let mut addresses: Vec<String> =
        infos.map(|info| format!("{}/{}", info["local"].as_str().unwrap(), info["prefixlen"])).collect();
    addresses.sort_unstable();
    addresses
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn desired() -> Desired {
    Desired {
        mtu: 1420,
        up: true,
        addresses: vec![net("10.98.0.3/16"), net("fd00:98::3/128")],
        routes: vec![
            Route { dst: net("10.98.0.0/16"), mtu: None, via: None },
            Route { dst: net("10.98.7.0/24"), mtu: Some(1300), via: None },
            Route { dst: net("fd00:98::/48"), mtu: None, via: None },
        ],
        rule: true,
    }
}

const DESIRED_ADDRESSES: [&str; 2] = ["10.98.0.3/16", "fd00:98::3/128"];
const DESIRED_ROUTES: [&str; 3] = ["10.98.0.0/16", "10.98.7.0/24", "fd00:98::/48"];

fn tun() {
    ip(&format!("tuntap add dev {MESH} mode tun"));
}

/// An uplink without anybody behind it: the kernel here may know no dummy interfaces.
fn uplink(name: &str) {
    ip(&format!("link add {name} type veth peer name {name}-peer"));
    ip(&format!("link set {name} up"));
}

/// Applies, expects that all of it worked, and answers with the number of changes.
async fn settle(state: &KernelState, desired: &Desired) -> usize {
    let applied = state.apply(desired).await.unwrap();
    assert!(applied.failures.is_empty(), "{:?}", applied.failures);
    applied.changes
}

async fn changed(changes: &mut Changes) {
    tokio::time::timeout(DEADLINE, changes.changed()).await.expect("a notification").unwrap();
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn an_applied_state_is_what_ip_shows() {
    isolated("an_applied_state_is_what_ip_shows", || async {
        tun();
        let state = KernelState::new(MESH).unwrap();
        assert!(settle(&state, &desired()).await > 0);

        let link = &shown(&format!("link show dev {MESH}"))[0];
        assert_eq!(link["mtu"], 1420);
        assert!(link["flags"].as_array().unwrap().contains(&"UP".into()));
        assert_eq!(mesh_addresses(), DESIRED_ADDRESSES);
        assert_eq!(mesh_routes(), DESIRED_ROUTES);
        let measured = &shown("route show table 5184 10.98.7.0/24")[0];
        assert_eq!((measured["dev"].as_str(), measured["protocol"].as_str()), (Some(MESH), Some("152")));
        assert_eq!(measured["metrics"][0]["mtu"], 1300);

        for family in ["-4", "-6"] {
            let rules = shown(&format!("{family} rule show pref 5184"));
            let rule = rules.first().expect("a rule");
            assert_eq!((rule["table"].as_str(), rule["fwmark"].as_str()), (Some("5184"), Some("0x1000")), "{rule}");
            assert!(rule.get("not").is_some(), "{rule}");
        }
        let main = [shown("-4 route show table main"), shown("-6 route show table main")].concat();
        let of_mesh: Vec<&Value> = main.iter().filter(|r| r["dev"] == MESH && r["dst"] != "fe80::/64").collect();
        assert!(of_mesh.is_empty(), "the main table is not ours: {of_mesh:?}");

        assert_eq!(settle(&state, &desired()).await, 0, "a second apply changes nothing");
    });
}

#[test]
fn what_somebody_deletes_comes_back() {
    isolated("what_somebody_deletes_comes_back", || async {
        tun();
        let state = KernelState::new(MESH).unwrap();
        let mut changes = state.watch().unwrap();
        settle(&state, &desired()).await;
        let quiet = Rc::new(Cell::new(false));
        let quiet_of_task = quiet.clone();
        tokio::task::spawn_local(async move {
            loop {
                changes.changed().await.unwrap();
                // Failures may be: an interface goes down in the middle of an apply, and then comes the next.
                quiet_of_task.set(state.apply(&desired()).await.unwrap().changes == 0);
            }
        });

        let measured = || {
            let routes = shown("route show table 5184 10.98.7.0/24");
            routes.first().is_some_and(|route| route["metrics"][0]["mtu"] == 1300)
        };
        let up = || shown(&format!("link show dev {MESH} up")).iter().any(|link| link["mtu"] == 1420);
        let routed = || mesh_routes() == DESIRED_ROUTES && mesh_rules() == 2 && measured();
        let whole = || up() && mesh_addresses() == DESIRED_ADDRESSES && routed();
        let vandalism = [
            "route del 10.98.0.0/16 table 5184",
            "-6 route flush table 5184",
            "route change 10.98.7.0/24 dev kern0 table 5184 proto 152 metric 1024",
            "addr del 10.98.0.3/16 dev kern0",
            "addr flush dev kern0",
            "addr add 192.0.2.1/24 dev kern0",
            "rule del pref 5184",
            "-6 rule del pref 5184",
            "link set kern0 down",
            "link set kern0 mtu 1500",
        ];
        for act in vandalism {
            ip(act);
            let start = Instant::now();
            eventually(&format!("restored after `ip {act}`"), whole).await;
            println!("restored in {:?} after `ip {act}`", start.elapsed());
        }
        // Our own changes wake the watch too; that must come to an end.
        eventually("an apply that finds nothing to do", || quiet.get() && whole()).await;
    });
}

#[test]
fn everything_comes_back_with_the_interface() {
    isolated("everything_comes_back_with_the_interface", || async {
        let state = KernelState::new(MESH).unwrap();
        let mut changes = state.watch().unwrap();
        let applied = state.apply(&desired()).await.unwrap();
        assert_eq!(applied.warnings, [Warning::LinkMissing]);
        assert!(applied.failures.is_empty(), "{:?}", applied.failures);

        tun();
        changed(&mut changes).await;
        settle(&state, &desired()).await;
        assert_eq!(mesh_addresses(), DESIRED_ADDRESSES);
        assert_eq!(mesh_routes(), DESIRED_ROUTES);

        ip(&format!("link del {MESH}"));
        changed(&mut changes).await;
        let applied = state.apply(&desired()).await.unwrap();
        assert_eq!(applied.warnings, [Warning::LinkMissing], "reported again after it had ceased");
    });
}

#[test]
fn foreign_state_is_left_alone() {
    isolated("foreign_state_is_left_alone", || async {
        tun();
        uplink("eth0");
        ip("addr add 192.0.2.7/24 dev eth0");
        ip("route add 198.51.100.0/24 dev eth0 proto 152");
        ip("route add 198.51.100.0/24 dev eth0 table 5184");
        ip("-6 route add 2001:db8:1::/48 dev eth0 table 5184");
        ip("route add 10.98.7.0/24 dev eth0 table 5184 metric 1024");
        ip("rule add fwmark 7 lookup 5184 pref 5184");
        ip("rule add from 192.0.2.7 lookup main pref 100");
        let foreign = || {
            let rules: Vec<Value> = shown("rule show").into_iter().filter(|rule| rule.get("not").is_none()).collect();
            let routes = [shown("route show table all dev eth0"), shown("-6 route show table 5184 dev eth0")].concat();
            (rules, routes, ipv4_addresses("eth0"))
        };
        let before = foreign();

        let state = KernelState::new(MESH).unwrap();
        let applied = state.apply(&desired()).await.unwrap();
        assert_eq!(applied.warnings, [Warning::ForeignRoute { dst: net("10.98.7.0/24"), protocol: 3 }]);
        assert!(applied.failures.is_empty(), "{:?}", applied.failures);
        assert_eq!(foreign(), before);
        assert_eq!(settle(&state, &desired()).await, 0);

        state.remove().await.unwrap();
        assert_eq!(foreign(), before);
    });
}

fn ipv4_addresses(interface: &str) -> Vec<Value> {
    shown(&format!("-4 addr show dev {interface}"))
}

#[test]
fn removal_leaves_nothing_and_may_be_repeated() {
    isolated("removal_leaves_nothing_and_may_be_repeated", || async {
        tun();
        ip("link set lo up");
        let state = KernelState::new(MESH).unwrap();
        settle(&state, &desired()).await;
        ip("route add 203.0.113.0/24 dev lo table 5184 proto 152");

        let removed = KernelState::new(MESH).unwrap().remove().await.unwrap();
        assert!(removed.changes > 0 && removed.failures.is_empty(), "{removed:?}");
        assert!(run(&format!("ip link show dev {MESH}")).stdout.is_empty(), "the persistent TUN is gone");
        assert_eq!((mesh_routes(), mesh_rules()), (vec![], 0));

        let again = state.remove().await.unwrap();
        assert_eq!((again.changes, again.failures.len(), again.warnings), (0, 0, vec![]));
    });
}

#[test]
fn a_stranger_with_our_interface_name_is_left_alone() {
    isolated("a_stranger_with_our_interface_name_is_left_alone", || async {
        uplink(MESH);
        let state = KernelState::new(MESH).unwrap();
        let applied = state.apply(&desired()).await.unwrap();
        assert_eq!(applied.warnings, [Warning::LinkNotTun]);
        assert_eq!(mesh_addresses(), Vec::<String>::new());
        state.remove().await.unwrap();
        assert_eq!(shown(&format!("link show dev {MESH}")).len(), 1);
    });
}

#[test]
fn without_ipv6_the_mesh_runs_on_ipv4_and_says_so_once() {
    isolated("without_ipv6_the_mesh_runs_on_ipv4_and_says_so_once", || async {
        set_ipv6("all", false);
        tun();
        let state = KernelState::new(MESH).unwrap();
        let applied = state.apply(&desired()).await.unwrap();
        assert_eq!(applied.warnings, [Warning::Ipv6Disabled]);
        assert!(applied.failures.is_empty(), "{:?}", applied.failures);
        assert_eq!(mesh_addresses(), DESIRED_ADDRESSES[..1]);
        assert_eq!(mesh_routes(), DESIRED_ROUTES[..2]);

        let applied = state.apply(&desired()).await.unwrap();
        assert_eq!((applied.changes, applied.warnings), (0, vec![]));

        set_ipv6(MESH, true);
        settle(&state, &desired()).await;
        assert_eq!(mesh_addresses(), DESIRED_ADDRESSES);
        assert_eq!(mesh_routes(), DESIRED_ROUTES);

        set_ipv6(MESH, false);
        let applied = state.apply(&desired()).await.unwrap();
        assert_eq!(applied.warnings, [Warning::Ipv6Disabled], "reported again after it had ceased");
        state.remove().await.unwrap();
        assert_eq!((mesh_routes(), mesh_rules()), (vec![], 0));
    });
}

fn set_ipv6(interface: &str, on: bool) {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    std::fs::write(path, if on { "0" } else { "1" }).unwrap();
}

#[test]
fn the_daemons_own_datagrams_never_enter_the_mesh() {
    isolated("the_daemons_own_datagrams_never_enter_the_mesh", || async {
        tun();
        uplink("eth0");
        ip("addr add 192.0.2.7/24 dev eth0");
        ip("addr add 2001:db8::7/64 dev eth0 nodad");
        ip("route add default via 192.0.2.1");
        ip("-6 route add default via 2001:db8::1");
        settle(&KernelState::new(MESH).unwrap(), &desired()).await;

        for destination in ["10.98.5.5", "fd00:98::5"] {
            assert_eq!(shown(&format!("route get {destination}"))[0]["dev"], MESH);
            assert_eq!(shown(&format!("route get {destination} mark 0x1000"))[0]["dev"], "eth0");
        }
    });
}

#[test]
fn a_route_over_the_hosts_own_network_is_refused() {
    isolated("a_route_over_the_hosts_own_network_is_refused", || async {
        tun();
        uplink("eth0");
        ip("addr add 192.168.1.20/24 dev eth0");
        let mut desired = desired();
        desired.routes.push(Route { dst: net("192.168.0.0/16"), mtu: None, via: None });

        let applied = KernelState::new(MESH).unwrap().apply(&desired).await.unwrap();
        let covered = Warning::RouteCoversLocalNetwork {
            route: net("192.168.0.0/16"),
            network: net("192.168.1.0/24"),
            interface: "eth0".into(),
        };
        assert_eq!(applied.warnings, [covered]);
        assert_eq!(mesh_routes(), DESIRED_ROUTES);
        assert_eq!(shown("route get 192.168.1.1")[0]["dev"], "eth0");
    });
}

#[test]
fn a_refused_operation_is_reported_and_the_others_are_done() {
    isolated("a_refused_operation_is_reported_and_the_others_are_done", || async {
        tun();
        let impossible = Desired { mtu: 1_000_000, ..desired() };
        let state = KernelState::new(MESH).unwrap();
        for _ in 0..2 {
            let applied = state.apply(&impossible).await.unwrap();
            assert_eq!(applied.failures.len(), 1, "{:?}", applied.failures);
            let failure = &applied.failures[0];
            assert_eq!(failure.op, KernelOp::SetMtu(1_000_000));
            assert!(failure.to_string().starts_with("cannot set MTU 1000000: Invalid argument"), "{failure}");
            assert_eq!(mesh_addresses(), DESIRED_ADDRESSES);
            assert_eq!(mesh_routes(), DESIRED_ROUTES);
        }
    });
}

#[test]
fn an_address_changes_and_the_routes_stay() {
    isolated("an_address_changes_and_the_routes_stay", || async {
        tun();
        let state = KernelState::new(MESH).unwrap();
        settle(&state, &desired()).await;

        // One in the network of the first, which the kernel makes a secondary and deletes together with the first; and
        // one that keeps its bits and changes its prefix, which the kernel refuses beside the first.
        let moved = Desired { addresses: vec![net("10.98.0.4/16"), net("fd00:98::3/64")], ..desired() };
        settle(&state, &moved).await;
        assert_eq!(mesh_addresses(), ["10.98.0.4/16", "fd00:98::3/64"]);
        assert_eq!(mesh_routes(), DESIRED_ROUTES);
        assert_eq!(settle(&state, &moved).await, 0);
    });
}

#[test]
fn host_addresses_are_those_that_a_peer_can_reach() {
    isolated("host_addresses_are_those_that_a_peer_can_reach", || async {
        tun();
        ip("link set lo up");
        uplink("eth0");
        uplink("cni0");
        for address in ["192.0.2.7/24", "2001:db8::7/64", "169.254.9.9/16"] {
            ip(&format!("addr add {address} dev eth0 nodad"));
        }
        for address in ["10.42.0.1/24", "fd00:42::1/64"] {
            ip(&format!("addr add {address} dev cni0 nodad"));
        }
        ip("addr add 192.0.2.8/24 dev eth0-peer");
        let state = KernelState::new(MESH).unwrap();
        settle(&state, &desired()).await;

        let expected: [IpAddr; 2] = ["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
        let mesh = [net("10.98.0.0/16"), net("fd00:98::/48")];
        assert_eq!(state.host_addresses(&mesh).await.unwrap(), expected);
    });
}

#[test]
fn a_thousand_routes_are_applied_and_found_again() {
    isolated("a_thousand_routes_are_applied_and_found_again", || async {
        tun();
        let routes = (0..1000_u32).map(|n| {
            let dst = match n % 2 {
                0 => format!("10.{}.{}.0/24", 100 + n / 256, n % 256),
                _ => format!("fd00:98:{n:x}::/64"),
            };
            Route { dst: net(&dst), mtu: None, via: None }
        });
        let many = Desired { routes: routes.collect(), ..desired() };
        let state = KernelState::new(MESH).unwrap();

        let start = Instant::now();
        assert!(settle(&state, &many).await >= 1000);
        let applied = start.elapsed();
        let start = Instant::now();
        assert_eq!(settle(&state, &many).await, 0);
        println!("1000 routes: applied in {applied:?}, read and compared in {:?}", start.elapsed());
        assert_eq!(mesh_routes().len(), 1000);
    });
}
