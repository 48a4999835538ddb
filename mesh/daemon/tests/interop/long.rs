//! Minutes of traffic: every combination at once, each on hosts of its own, across a rekey and two kills.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use keystone_lab::ping::Pinger;
use keystone_lab::{World, wait};

use crate::stage::{PATIENCE, POLL, Pair, Shape, both_reply, status};
use crate::{OTHERS, millis};

/// By then the initiator has made a second handshake: it does at 120 s (REKEY_AFTER_TIME, WireGuard paper, section 6.1).
const REKEY_PATIENCE: Duration = Duration::from_secs(150);
/// A handshake of this age is the first one.
const OLD: f64 = 100.0;
/// A reply that has not come by then is lost.
const LATE: Duration = Duration::from_secs(3);

/// Whoever was killed speaks first: it has no session and makes one at once. A second, and what a busy machine takes.
const AT_ONCE: Duration = Duration::from_secs(5);
/// The other side speaks, in a session that the killed one no longer has: it notices after KEEPALIVE_TIMEOUT +
/// REKEY_TIMEOUT, 15 s.
const BY_PROTOCOL: Duration = Duration::from_secs(30);

/// What one pair did.
struct Told {
    sent: usize,
    lost: usize,
    age_before: f64,
    ours_back: Duration,
    other_back: Duration,
}

pub(crate) fn play(world: &World) -> Result<()> {
    let shapes: Vec<Shape> = shapes().collect();
    let told: Vec<Result<Told>> = thread::scope(|scope| {
        let running: Vec<_> =
            shapes.iter().enumerate().map(|(n, &shape)| scope.spawn(move || pair_of(world, n, shape))).collect();
        running.into_iter().map(|run| run.join().unwrap_or_else(|_| Err(anyhow!("it panicked")))).collect()
    });
    println!("other          calls  psk    outside  pings  lost  rekey at  ours killed  other killed");
    let mut failed = 0;
    for (shape, told) in shapes.iter().zip(&told) {
        let calls = if shape.we_call { "ours" } else { "other" };
        let outside = if shape.over_v6 { "IPv6" } else { "IPv4" };
        let told = match told {
            Ok(t) => format!(
                "{:5}  {:4}  {:6.1} s  {:8.0} ms  {:9.0} ms",
                t.sent,
                t.lost,
                t.age_before,
                millis(t.ours_back),
                millis(t.other_back)
            ),
            Err(error) => {
                failed += 1;
                format!("FAILED: {error:#}")
            }
        };
        println!("{:13}  {calls:5}  {:5}  {outside:7}  {told}", shape.other.label(), shape.psk);
    }
    ensure!(failed == 0, "{failed} of {} combinations failed", shapes.len());
    Ok(())
}

fn shapes() -> impl Iterator<Item = Shape> {
    let flags = [false, true];
    OTHERS.into_iter().flat_map(move |other| {
        flags.into_iter().flat_map(move |we_call| {
            flags
                .into_iter()
                .flat_map(move |psk| flags.into_iter().map(move |over_v6| Shape { other, we_call, psk, over_v6 }))
        })
    })
}

fn pair_of(world: &World, number: usize, shape: Shape) -> Result<Told> {
    let mut pair = Pair::new(world, &number.to_string(), shape)?;
    let told = speak(&mut pair, shape);
    told.with_context(|| format!("ours says:\n{}the other says:\n{}", pair.ours.log_tail(8), pair.other.log_tail(8)))
}

fn speak(pair: &mut Pair, shape: Shape) -> Result<Told> {
    pair.start()?;
    let pings = if shape.we_call { pair.ping_other()? } else { pair.ping_us()? };
    let start = both_reply(&pings, Instant::now(), PATIENCE).context("at first")?;
    let age_before = across_a_rekey(pair)?;
    let (sent, lost) = losses(&pings, start, Instant::now() - LATE);
    ensure!(lost <= 1, "{lost} of {sent} pings are lost across the rekey");

    pair.ours.kill()?;
    let at = Instant::now();
    pair.ours.start().context("again")?;
    let patience = if shape.we_call { AT_ONCE } else { BY_PROTOCOL };
    let ours_back = both_reply(&pings, at, patience).context("after the kill of ours")?.duration_since(at);

    pair.other.kill()?;
    let at = Instant::now();
    pair.other.start().context("again")?;
    let patience = if shape.we_call { BY_PROTOCOL } else { AT_ONCE };
    let other_back = both_reply(&pings, at, patience).context("after the kill of the other")?.duration_since(at);
    Ok(Told { sent, lost, age_before, ours_back, other_back })
}

/// Waits until the last handshake is another than the first; its age then, just before.
fn across_a_rekey(pair: &Pair) -> Result<f64> {
    let mut oldest: f64 = 0.0;
    let rekeyed = wait::until("a second handshake", REKEY_PATIENCE, POLL * 10, || {
        let age = status(&pair.ours)?.peers[0].last_handshake_s.context("there was a handshake")?;
        if oldest > OLD && age < oldest {
            return Ok(Some(()));
        }
        oldest = oldest.max(age);
        Ok(None)
    });
    rekeyed.with_context(|| format!("the last handshake is {oldest:.0} s old"))?;
    // What was on its way at the change of keys has arrived, or is lost.
    let settled = Instant::now();
    wait::until("the last replies", LATE * 3, POLL, || Ok((settled.elapsed() > LATE * 2).then_some(())))?;
    Ok(oldest)
}

/// Requests sent between the two moments, and how many of them never got a reply.
fn losses(pings: &[Pinger; 2], from: Instant, to: Instant) -> (usize, usize) {
    let (sent, answered) =
        pings.iter().map(|ping| ping.trace().counts(from, to)).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    (sent, sent - answered)
}
