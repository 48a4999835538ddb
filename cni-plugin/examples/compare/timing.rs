//! How long the verbs take.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::Value;

use crate::contest::{Contestant, pod};
use crate::runtime::{Answer, NETNS, Network, netns, remove_netns};

/// How many pods start at once: one, as many as a runtime does, and all that a node has by default.
const AT_ONCE: [usize; 3] = [1, 32, 110];

/// Calls of one pod alone in a round, so that its percentiles are some.
const ALONE: usize = 40;

/// How many work at once in the mass.
const WORKERS: usize = 32;

/// Many pods alive together, made and removed by [`WORKERS`] at a time.
pub(crate) fn mass(contestants: &[Contestant], pods: usize) -> Result<String> {
    eprintln!("making {pods} network namespaces");
    let namespaces: Vec<String> = (0..pods).map(|number| netns(&format!("m{number}"))).collect::<Result<_>>()?;
    let mut text = format!(
        "| {pods} pods, {WORKERS} at a time | ADD | refused | different addresses | DEL | refused | links, leases left |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n"
    );
    for contestant in contestants {
        eprintln!("{pods} pods of {}", contestant.title);
        contestant.clean()?;
        let (added, adding) = all(
            &contestant.network,
            &namespaces,
            WORKERS,
            |network, name, netns, _| network.add(pod(name, netns)),
            &[],
        );
        let results: Vec<Value> = added.iter().map(|(answer, _)| answer.clone().unwrap_or(Value::Null)).collect();
        let addresses: BTreeSet<String> = results
            .iter()
            .map(|result| result["ips"][0]["address"].to_string())
            .filter(|text| text != "null")
            .collect();
        let (deleted, deleting) = all(
            &contestant.network,
            &namespaces,
            WORKERS,
            |network, name, netns, result| network.del(pod(name, netns), result),
            &results,
        );
        let left = contestant.left()?;
        let refused = |answers: &[(Answer, Duration)]| answers.iter().filter(|(answer, _)| answer.is_err()).count();
        if let Some((Err(refused), _)) = added.iter().find(|(answer, _)| answer.is_err()) {
            eprintln!("{}: {refused:?}", contestant.title);
        }
        text.push_str(&format!(
            "| {} | {:.1} s | {} | {} | {:.1} s | {} | {}, {} |\n",
            contestant.title,
            adding.as_secs_f64(),
            refused(&added),
            addresses.len(),
            deleting.as_secs_f64(),
            refused(&deleted),
            left.links,
            left.leases,
        ));
    }
    for number in 0..pods {
        remove_netns(&format!("m{number}"))?;
    }
    Ok(text)
}

/// Percentiles of every verb, with 1, 32 and 110 at once, one contestant after the other in every round.
pub(crate) fn latencies(contestants: &[Contestant], rounds: usize) -> Result<String> {
    let most = AT_ONCE.into_iter().max().unwrap_or(1);
    let namespaces: Vec<String> = (0..most).map(|number| netns(&format!("t{number}"))).collect::<Result<_>>()?;
    let mut samples = vec![vec![[const { Vec::<Duration>::new() }; 3]; AT_ONCE.len()]; contestants.len()];
    for contestant in contestants {
        contestant.clean()?;
    }
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for (size, at_once) in AT_ONCE.into_iter().enumerate() {
            // Nobody is always the first.
            for turn in 0..contestants.len() {
                let place = (turn + round) % contestants.len();
                let repeat = if at_once == 1 { ALONE } else { 1 };
                for _ in 0..repeat {
                    let times = round_of(&contestants[place].network, &namespaces[..at_once])?;
                    for (all, more) in samples[place][size].iter_mut().zip(times) {
                        all.extend(more);
                    }
                }
            }
        }
    }
    for number in 0..most {
        remove_netns(&format!("t{number}"))?;
    }
    Ok(render(contestants, &mut samples))
}

/// ADD, CHECK and DEL of all pods, each verb all at once.
fn round_of(network: &Network, namespaces: &[String]) -> Result<[Vec<Duration>; 3]> {
    let workers = namespaces.len();
    let good = |answers: Vec<(Answer, Duration)>| -> Result<(Vec<Value>, Vec<Duration>)> {
        let mut both = (Vec::new(), Vec::new());
        for (answer, time) in answers {
            both.0.push(answer.map_err(|refused| anyhow::anyhow!("{}: {refused:?}", network.name))?);
            both.1.push(time);
        }
        Ok(both)
    };
    let (added, _) = all(network, namespaces, workers, |network, name, netns, _| network.add(pod(name, netns)), &[]);
    let (results, adds) = good(added)?;
    let (checked, _) =
        all(network, namespaces, workers, |network, name, netns, it| network.check(pod(name, netns), it), &results);
    let (deleted, _) =
        all(network, namespaces, workers, |network, name, netns, it| network.del(pod(name, netns), it), &results);
    Ok([adds, good(checked)?.1, good(deleted)?.1])
}

/// Does `what` for every namespace with `workers` threads; answers in order, with the time of each, and the whole time.
fn all(
    network: &Network,
    namespaces: &[String],
    workers: usize,
    what: impl Fn(&Network, &str, &str, &Value) -> Answer + Sync,
    previous: &[Value],
) -> (Vec<(Answer, Duration)>, Duration) {
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    let mut answers: Vec<(usize, Answer, Duration)> = thread::scope(|scope| {
        let work = || {
            let mut mine = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(netns) = namespaces.get(number) else { return mine };
                let name = netns.trim_start_matches(NETNS).trim_start_matches('/');
                let began = Instant::now();
                let answer = what(network, name, netns, previous.get(number).unwrap_or(&Value::Null));
                mine.push((number, answer, began.elapsed()));
            }
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    });
    let whole = started.elapsed();
    answers.sort_unstable_by_key(|(number, _, _)| *number);
    (answers.into_iter().map(|(_, answer, time)| (answer, time)).collect(), whole)
}

fn render(contestants: &[Contestant], samples: &mut [Vec<[Vec<Duration>; 3]>]) -> String {
    let mut text = String::from(
        "| p50 / p99 in ms | pods at once | ADD | CHECK | DEL | calls of each |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for (size, at_once) in AT_ONCE.into_iter().enumerate() {
        for (place, contestant) in contestants.iter().enumerate() {
            let verbs = &mut samples[place][size];
            let calls = verbs[0].len();
            let cells = verbs.each_mut().map(|times| {
                times.sort_unstable();
                format!("{:.1} / {:.1}", percentile(times, 50), percentile(times, 99))
            });
            text.push_str(&format!("| {} | {at_once} | {} | {calls} |\n", contestant.title, cells.join(" | ")));
        }
    }
    text
}

fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}
