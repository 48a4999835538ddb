//! Two thousand pods whose ADD and DEL are killed at any moment, 32 at a time: what is alive stays whole, and after a GC
//! nothing else is left.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::runtime::{Network, Target, files, finish, host_links, host_routes, netns, remove_netns};
use crate::{DATA, assert_nothing_left, on_a_node, with};

const SEQUENCES: usize = 2000;
const AT_ONCE: usize = 32;
/// Namespaces that are kept until the end, so that GC and not the kernel has to remove what is in them.
const KEPT: usize = 150;
/// The seed; another one is another storm.
const SEED: u64 = 7;

/// xorshift64*: a sequence for each seed, good enough to choose moments.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

/// Pods that were made and not removed, with their namespaces and results.
type Alive = Mutex<Vec<(String, String, Value)>>;

#[test]
fn nothing_is_left_of_two_thousand_pods_whose_calls_are_killed_at_random() {
    on_a_node("storm::nothing_is_left_of_two_thousand_pods_whose_calls_are_killed_at_random", || {
        let network = with(json!({ "ipam": { "type": "keystone-cni", "ranges": ["10.64.0.0/20", "fd00:64::/64"] } }));
        let (next, kept, alive) = (AtomicUsize::new(0), AtomicUsize::new(0), Alive::default());
        thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_ONCE)
                .map(|_| {
                    scope.spawn(|| -> Result<()> {
                        loop {
                            let number = next.fetch_add(1, Ordering::Relaxed);
                            if number >= SEQUENCES {
                                return Ok(());
                            }
                            sequence(&network, number, &kept, &alive).with_context(|| format!("sequence {number}"))?;
                        }
                    })
                })
                .collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("no worker panics"))
        })?;

        let alive = alive.into_inner()?;
        assert!(alive.len() > 20, "the storm leaves some alive: {}", alive.len());
        let valid: Vec<(&str, &str)> = alive.iter().map(|(container, _, _)| (container.as_str(), "eth0")).collect();
        network.gc(&valid).map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
        for (container, netns, result) in &alive {
            let checked = network.check(Target::of(container, netns), result);
            assert_eq!(checked, Ok(Value::Null), "{container}");
        }
        let addresses: BTreeSet<&str> = alive
            .iter()
            .flat_map(|(_, _, result)| result["ips"].as_array().unwrap())
            .filter_map(|ip| ip["address"].as_str())
            .collect();
        assert_eq!(addresses.len(), 2 * alive.len(), "no address twice");
        assert_eq!(host_links()?.len(), alive.len());
        assert_eq!(host_routes()?.len(), 2 * alive.len());
        assert_eq!(files(&Path::new(DATA).join("pods/addresses")).len(), 2 * alive.len());
        assert_eq!(files(&Path::new(DATA).join("pods/holders")).len(), alive.len());

        network.gc(&[]).map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
        assert_nothing_left()
    });
}

/// A few calls for one container, each killed with one chance in two.
fn sequence(network: &Network, number: usize, kept: &AtomicUsize, alive: &Alive) -> Result<()> {
    let mut random = Random(SEED.wrapping_mul(1 << 32) + number as u64 + 1);
    let (container, namespace) = (format!("c{number}"), format!("n{number}"));
    let path = netns(&namespace)?;
    let target = Target::of(&container, &path);
    let mut made = None;
    for _call in 0..=random.below(3) {
        let verb = if random.below(3) == 0 { "DEL" } else { "ADD" };
        let kill = random.below(2) == 0;
        let mut child = network.start(verb, &network.plugins[0], target, &json!({}))?;
        if kill {
            thread::sleep(Duration::from_micros(random.below(6000)));
            // Whatever of it was done is done: the attachment is nobody's until an ADD succeeds again.
            child.kill()?;
        }
        let answer = finish(child);
        match (verb, kill, answer) {
            ("ADD", false, answer) => match answer? {
                Ok(result) => made = Some(result),
                // Something of an earlier call, killed or not, is still there, and a runtime would DEL first.
                Err(refused) => assert_eq!(refused.code, 101, "{refused:?}"),
            },
            ("ADD", true, Ok(Ok(result))) => made = Some(result),
            ("ADD", true, _) => {}
            (_, false, answer) => {
                made = None;
                answer?.map_err(|refused| anyhow::anyhow!("DEL: {refused:?}"))?;
            }
            (_, true, _) => made = None,
        }
    }
    match made {
        Some(result) if kept.fetch_add(1, Ordering::Relaxed) < KEPT => {
            alive.lock().expect("no worker panics").push((container, path, result));
            Ok(())
        }
        None if kept.fetch_add(1, Ordering::Relaxed) < KEPT => Ok(()),
        Some(_) | None => remove_netns(&namespace),
    }
}
