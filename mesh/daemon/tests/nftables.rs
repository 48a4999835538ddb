//! Our tables in the real kernel, checked with nft(8).
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ipnet::IpNet;
use keystone_lab::sandbox::in_own_world;
use keystone_lab::wait;
use keystone_mesh::nftables::{Applied, KernelTable, NftError};
use keystone_mesh_core::kernel::Family;
use keystone_mesh_core::nftables::{
    Action, Chain, DataType, Element, Field, Hook, Match, Present, Rule, Set, Table, Verdict,
};
use keystone_mesh_core::pods;
use keystone_mesh_core::policy::{Cluster, Labels, Pod, Policy, compile};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use serde_json::json;

fn run(command: &str) -> Output {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default();
    Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{command}: {error}"))
}

fn nft(arguments: &str) -> String {
    let output = run(&format!("nft {arguments}"));
    assert!(output.status.success(), "nft {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// A table with one of everything.
fn everything() -> Table {
    let mut table = Table { name: "everything".into(), ..Table::default() };
    let v4 = DataType::Ipv4;
    let named = [Element::address(address("10.0.0.1")).and_ports(6, 80, 80)];
    let pair = [Element::address(address("fd00::1")).and_address(address("fd00::1"))];
    let ends = ["0.0.0.0/8", "10.1.0.0/16", "240.0.0.0/4"].map(|text| Element::prefix(net(text)));
    let ports = [Element::ports(6, 80, 90), Element::ports(6, 443, 443), Element::ports(17, 0, 65535)];
    let all = [Element::prefix(net("::/0"))];
    let sets = [
        ("pods", Set::of_keys(vec![v4], "app=web in \"default\"", [Element::address(address("10.0.0.1"))])),
        ("blocks", Set::of_ranges(vec![v4], "", ends)),
        ("all", Set::of_ranges(vec![DataType::Ipv6], "", all)),
        ("ports", Set::of_ranges(vec![DataType::Protocol, DataType::Port], "", ports)),
        ("named", Set::of_keys(vec![v4, DataType::Protocol, DataType::Port], "", named)),
        ("self", Set::of_keys(vec![DataType::Ipv6; 2], "", pair)),
    ];
    table.sets.extend(sets.map(|(name, set)| (name.to_owned(), set)));
    let mut verdicts = Set::verdicts(Family::V4, "isolated");
    for (place, verdict) in [Verdict::Accept, Verdict::Drop, Verdict::Jump("one".into())].into_iter().enumerate() {
        let place = u8::try_from(place).expect("three");
        verdicts.elements.insert(Element::address(IpAddr::from([10, 0, 0, place])), Some(verdict));
    }
    table.sets.insert("verdicts".into(), verdicts);
    let lookup = |fields: &[Field], set: &str| Match::In { fields: fields.to_vec(), set: set.into(), negated: false };
    let (from, to) = (Field::Source(Family::V4), Field::Destination(Family::V4));
    let (from6, to6) = (Field::Source(Family::V6), Field::Destination(Family::V6));
    let (protocol, port) = (Field::Protocol, Field::DestinationPort);
    let back = || Action::Verdict(Verdict::Return);
    let one = vec![
        Rule::new(vec![lookup(&[from], "pods"), lookup(&[protocol, port], "ports")], back(), "default/web"),
        Rule::new(vec![lookup(&[to, protocol, port], "named")], back(), ""),
        Rule::new(vec![lookup(&[from], "pods"), Match::Ports { protocol: 6, low: 80, high: 80 }], back(), ""),
        Rule::new(vec![Match::Ports { protocol: 17, low: 5000, high: 5010 }], back(), ""),
        Rule::new(vec![Match::Ports { protocol: 132, low: 0, high: u16::MAX }], back(), ""),
        Rule::new(vec![Match::not_in(from6, "all")], Action::Verdict(Verdict::Drop), ""),
        Rule::new(vec![], Action::CountedDrop, "isolated"),
    ];
    let forward = vec![
        Rule::new(vec![Match::Replies], Action::Verdict(Verdict::Accept), ""),
        Rule::new(vec![lookup(&[from6, to6], "self")], Action::Verdict(Verdict::Accept), ""),
        Rule::new(vec![], Action::AsMapped(from, "verdicts".into()), ""),
        Rule::new(vec![lookup(&[from], "blocks"), Match::not_in(to, "blocks")], back(), ""),
    ];
    let masquerade = Rule::new(vec![Match::NotOutBy("ksmesh0".into())], Action::Masquerade, "");
    table.chains.insert("one".into(), Chain { hook: None, rules: one });
    table.chains.insert("forward".into(), Chain { hook: Some(Hook::Forward), rules: forward });
    table.chains.insert("leave".into(), Chain { hook: Some(Hook::SourceNat), rules: vec![masquerade] });
    table
}

#[test]
fn a_table_is_what_nft_lists() {
    in_own_world("a_table_is_what_nft_lists", || {
        let mut kernel = KernelTable::open("everything")?;
        let applied = kernel.apply(everything())?;
        ensure!(applied.changes > 10 && !applied.anew, "{applied:?}");
        let listed = nft("list table inet everything");
        let words: Vec<String> =
            listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for expected in [
            "set pods {",
            "comment \"app=web in \"default\"\"",
            "elements = { 10.0.0.1 }",
            "elements = { 0.0.0.0/8, 10.1.0.0/16,",
            "240.0.0.0/4 }",
            "elements = { ::/0 }",
            "type inet_proto . inet_service",
            "elements = { tcp . 80-90,",
            "udp . 0-65535 }",
            "elements = { 10.0.0.1 . tcp . 80 }",
            "elements = { fd00::1 . fd00::1 }",
            "elements = { 10.0.0.0 : accept, 10.0.0.1 : drop,",
            "10.0.0.2 : jump one }",
            "type filter hook forward priority filter; policy accept;",
            "type nat hook postrouting priority srcnat; policy accept;",
            "ip saddr @pods meta l4proto . th dport @ports return comment \"default/web\"",
            "ip daddr . meta l4proto . th dport @named return",
            "ip saddr @pods tcp dport 80 return",
            "udp dport 5000-5010 return",
            "meta l4proto sctp return",
            "ip6 saddr != @all drop",
            "counter packets 0 bytes 0 drop comment \"isolated\"",
            "ct state established,related accept",
            "ip6 saddr . ip6 daddr @self accept",
            "ip saddr vmap @verdicts",
            "ip saddr @blocks ip daddr != @blocks return",
            "oifname != \"ksmesh0\" masquerade",
        ] {
            ensure!(words.iter().any(|line| line.contains(expected)), "{expected} is not in\n{listed}");
        }
        let there = KernelTable::open("everything")?.read()?;
        ensure!(there == Some(Present::from(everything())), "{there:#?}");
        ensure!(kernel.apply(everything())? == Applied::default(), "a second apply changes nothing");
        ensure!(KernelTable::open("everything")?.apply(everything())? == Applied::default(), "nor does another's");
        ensure!(kernel.remove()? && !kernel.remove()? && kernel.read()?.is_none(), "it is gone");
        Ok(())
    });
}

#[test]
fn what_somebody_changes_comes_back_and_other_tables_stay() {
    in_own_world("what_somebody_changes_comes_back_and_other_tables_stay", || {
        nft("add table inet foreign");
        nft("add chain inet foreign forward { type filter hook forward priority 0 ; }");
        nft("add rule inet foreign forward ip saddr 192.0.2.1 drop");
        nft("add table ip everything");
        let foreign = || (nft("list table inet foreign"), nft("list table ip everything"));
        let before = foreign();
        let mut kernel = KernelTable::open("everything")?;
        kernel.apply(everything())?;
        let whole = nft("list table inet everything");
        for act in [
            "flush chain inet everything one",
            "add rule inet everything one accept",
            "insert rule inet everything forward accept",
            "delete element inet everything verdicts { 10.0.0.2 }",
            "delete element inet everything blocks { 10.1.0.0/16 }",
            "add element inet everything blocks { 172.16.0.0/12 }",
            "add element inet everything ports { sctp . 7 }",
            "flush set inet everything pods",
            "add chain inet everything stranger",
            "add set inet everything stranger { type ether_addr ; }",
            "add chain inet everything forward { policy drop ; }",
            "flush table inet everything",
            "delete table inet everything",
        ] {
            nft(act);
            let applied = kernel.apply(everything())?;
            ensure!(applied.changes > 0, "{act}");
            let listed = nft("list table inet everything");
            ensure!(listed == whole, "after {act}:\n{listed}");
            ensure!(kernel.apply(everything())?.changes == 0, "twice after {act}");
        }
        ensure!(foreign() == before, "other tables are others'");
        Ok(())
    });
}

#[test]
fn a_refusal_says_what_was_refused_and_changes_nothing() {
    in_own_world("a_refusal_says_what_was_refused_and_changes_nothing", || {
        let mut kernel = KernelTable::open("everything")?;
        kernel.apply(everything())?;
        let before = nft("list table inet everything");
        let mut broken = everything();
        broken.sets.remove("pods");
        let Err(error) = kernel.apply(broken) else { anyhow::bail!("a rule that refers to no set was taken") };
        let said = error.to_string();
        println!("{said}");
        ensure!(matches!(error, NftError::Refused { .. }) && said.contains("@pods"), "{said}");
        ensure!(nft("list table inet everything") == before, "nothing was changed");
        let mut overlapping = everything();
        let blocks = overlapping.sets.entry("blocks".into());
        blocks.and_modify(|set| drop(set.elements.insert(Element::prefix(net("10.1.2.0/24")), None)));
        let said = kernel.apply(overlapping).map_err(|error| error.to_string());
        println!("{said:?}");
        kernel.apply(everything())?;
        ensure!(nft("list table inet everything") == before, "and it is whole");
        Ok(())
    });
}

#[test]
fn ranges_grow_and_shrink_in_one_transaction() {
    in_own_world("ranges_grow_and_shrink_in_one_transaction", || {
        let mut kernel = KernelTable::open(pods::TABLE)?;
        let cluster = [net("10.98.0.0/16"), net("fd00:98::/48")];
        for round in 0..40_u8 {
            // Nodes come and go: neighbours become one range and two again.
            let nodes = (0..20).filter(|node| node % 7 != round % 7 && node % 3 != round % 3);
            let own: Vec<IpNet> = nodes
                .flat_map(|node| [net(&format!("10.42.{node}.0/24")), net(&format!("fd00:42:0:{node:x}::/64"))])
                .collect();
            let all = [&own[..], &cluster].concat();
            let table = pods::masquerade(&own, &all, "ksmesh0");
            let applied = kernel.apply(table.clone())?;
            ensure!(!applied.anew, "round {round}: the kernel takes the difference");
            let there = KernelTable::open(pods::TABLE)?.read()?;
            ensure!(there == Some(Present::from(table)), "round {round}: {there:#?}");
        }
        println!("{}", nft(&format!("list table inet {}", pods::TABLE)));
        Ok(())
    });
}

#[test]
fn transactions_of_others_do_not_get_in_the_way() {
    in_own_world("transactions_of_others_do_not_get_in_the_way", || {
        let (stop, others) = (AtomicBool::new(false), AtomicUsize::new(0));
        nft("add table ip noise");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    nft("add chain ip noise c ; add rule ip noise c accept ; delete chain ip noise c");
                    others.fetch_add(1, Ordering::Relaxed);
                }
            });
            let result = (0..60).try_for_each(|round| {
                let mut kernel = KernelTable::open("everything")?;
                kernel.apply(everything())?;
                let there = kernel.read()?;
                ensure!(there == Some(Present::from(everything())), "round {round}");
                kernel.remove()?;
                Ok(())
            });
            stop.store(true, Ordering::Relaxed);
            result
        })?;
        println!("60 rounds while others made {} transactions", others.load(Ordering::Relaxed));
        Ok(())
    });
}

/// CPU time of this process in milliseconds, the kernel's work for it included: on a busy machine the better clock.
fn cpu_ms() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("a process may ask for its own usage");
    (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e3
}

/// `policies` over `pods`, all of them on one node, in ten namespaces; every policy selects a hundredth of its
/// namespace's pods and allows another hundredth, two ports and a block.
fn big(pods: u32, policies: usize) -> Cluster {
    let mut cluster = Cluster::default();
    for number in 0..10 {
        cluster.namespaces.insert(format!("ns-{number}").into(), Arc::default());
    }
    for number in 0..pods {
        let app = format!("app-{}", number / 10 % 100);
        let labels = Arc::new(Labels::from([("app".to_owned(), app)]));
        let addresses = vec![
            IpAddr::V4(Ipv4Addr::from(0x0a2a_0000 + number)),
            address(&format!("fd00:42::{:x}:{:x}", number >> 16, number & 0xffff)),
        ];
        let name = (format!("ns-{}", number % 10).into(), format!("pod-{number}").into());
        cluster.pods.insert(name, Pod { labels, node: Some("here".into()), addresses, ..Pod::default() });
    }
    for number in 0..policies {
        let select = |app: usize| json!({ "matchLabels": { "app": format!("app-{}", app % 100) } });
        let allow = json!([{
            "from": [{ "podSelector": select(number / 10 + 1) }, { "ipBlock": { "cidr": format!("192.0.{}.0/24", number % 200) } }],
            "ports": [{ "port": 8000 + number }, { "protocol": "UDP", "port": 53 }],
        }]);
        let mut egress = allow.clone();
        egress[0]["to"] = egress[0]["from"].take();
        egress[0].as_object_mut().map(|rule| rule.remove("from"));
        let spec = json!({
            "podSelector": select(number / 10), "policyTypes": ["Ingress", "Egress"], "ingress": allow, "egress": egress,
        });
        let name = (format!("ns-{}", number % 10).into(), format!("policy-{number}").into());
        cluster.policies.insert(name, Policy::read(&spec));
    }
    cluster
}

#[test]
fn a_thousand_policies_over_a_thousand_pods() {
    in_own_world("a_thousand_policies_over_a_thousand_pods", || {
        let mut cluster = big(1000, 1000);
        let mut kernel = KernelTable::open(keystone_mesh_core::policy::TABLE)?;
        let own = [net("10.42.0.0/16")];
        let mut measure = |what: &str, cluster: &Cluster| -> Result<Applied> {
            let (start, cpu) = (Instant::now(), cpu_ms());
            let compiled = compile(cluster, "here", &own);
            let (compiling, cpu_compiling) = (start.elapsed(), cpu_ms() - cpu);
            let applied = kernel.apply(compiled.table)?;
            let (all, cpu_all) = (start.elapsed(), cpu_ms() - cpu);
            println!(
                "{what}: compiled in {:.1} ms (CPU {cpu_compiling:.1}), applied in {:.1} ms (CPU {:.1}): {} steps, {} KiB",
                compiling.as_secs_f64() * 1e3,
                (all - compiling).as_secs_f64() * 1e3,
                cpu_all - cpu_compiling,
                applied.changes,
                applied.bytes / 1024
            );
            ensure!(all < Duration::from_secs(10), "an order of magnitude over a second: {all:?}");
            Ok(applied)
        };
        let all = measure("1,000 policies over 1,000 pods", &cluster)?;
        ensure!(all.changes > 4000, "{all:?}");
        let pod = cluster.pods.pop_first();
        let without = measure("a pod goes", &cluster)?;
        cluster.pods.extend(pod);
        let with = measure("it comes back", &cluster)?;
        ensure!(without.changes < 40 && with.changes < 40, "a pod is a few elements: {without:?}, {with:?}");
        let policies = std::mem::take(&mut cluster.policies);
        measure("all policies go", &cluster)?;
        cluster.policies = policies;
        measure("all come back", &cluster)?;
        let (start, cpu) = (Instant::now(), cpu_ms());
        let there = KernelTable::open(keystone_mesh_core::policy::TABLE)?.read()?;
        let (took, cpu) = (start.elapsed().as_secs_f64() * 1e3, cpu_ms() - cpu);
        println!("read back after a restart in {took:.1} ms (CPU {cpu:.1})");
        ensure!(
            there == Some(Present::from(compile(&cluster, "here", &own).table)),
            "the kernel has what was compiled"
        );
        Ok(())
    });
}

#[test]
fn a_transaction_of_megabytes_is_one_transaction() {
    in_own_world("a_transaction_of_megabytes_is_one_transaction", || {
        let elements =
            (0..100_000_u32).map(|number| Element::address(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + number))));
        let set = Set::of_keys(vec![DataType::Ipv4], "", elements);
        let sets = BTreeMap::from([("many".to_owned(), set)]);
        let table = Table { name: "large".into(), sets, ..Table::default() };
        let mut kernel = KernelTable::open("large")?;
        let applied = kernel.apply(table.clone())?;
        ensure!(applied.bytes > 1_500_000, "{applied:?}");
        // The kernel grows the set's hash table after the transaction, and skips elements in a dump meanwhile.
        let all = Some(Present::from(table));
        wait::until("all are there", Duration::from_secs(30), Duration::from_millis(100), || {
            Ok((KernelTable::open("large")?.read()? == all).then_some(()))
        })
    });
}
