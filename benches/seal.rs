//! The cryptography under the data plane: sealing and opening batches, and handshakes. It calls boringtun the way the
//! data plane does (straight into one buffer for the whole batch), so it is the floor that the data plane's own work
//! stands on: what a packet costs beyond these numbers is ours.

use std::hint::black_box;
use std::sync::Arc;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use keystone_benches::{TCP_HEADERS, tcp_packet};

/// A packet of the default MTU.
const PACKET: usize = 1280;
/// What sealing adds.
const OVERHEAD: usize = 32;
/// Room for the longest handshake message.
const INITIATION_LEN: usize = 148;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    seal_and_open(&mut criterion);
    handshake(&mut criterion);
    criterion.final_summary();
}

fn seal_and_open(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("seal");
    let packet = tcp_packet(1, 1, PACKET - TCP_HEADERS);
    for batch in [1, 8, 50] {
        let (mut a, mut b) = connected();
        let mut sealed = vec![0; batch * (PACKET + OVERHEAD) + INITIATION_LEN];
        group.throughput(Throughput::Bytes((batch * PACKET) as u64));
        group.bench_function(BenchmarkId::new("seal", batch), |bench| {
            bench.iter(|| seal(&mut a, black_box(&packet), batch, &mut sealed));
        });
        // Each batch is sealed anew outside of the measurement, because a message opens only once.
        let mut opened = vec![0; PACKET + OVERHEAD];
        group.bench_function(BenchmarkId::new("open", batch), |bench| {
            let setup = || {
                seal(&mut a, &packet, batch, &mut sealed);
                sealed.clone()
            };
            bench.iter_batched_ref(setup, |sealed| open(&mut b, sealed, batch, &mut opened), BatchSize::PerIteration);
        });
    }
    group.finish();
}

fn seal(tunnel: &mut Tunn, packet: &[u8], batch: usize, out: &mut [u8]) {
    for index in 0..batch {
        let result = tunnel.encapsulate(packet, &mut out[index * (PACKET + OVERHEAD)..]);
        assert!(matches!(result, TunnResult::WriteToNetwork(sealed) if sealed.len() == PACKET + OVERHEAD));
    }
}

fn open(tunnel: &mut Tunn, sealed: &[u8], batch: usize, out: &mut [u8]) {
    for message in sealed.chunks_exact(PACKET + OVERHEAD).take(batch) {
        let result = tunnel.decapsulate(None, message, out);
        assert!(matches!(result, TunnResult::WriteToTunnelV4(packet, _) if packet.len() == PACKET));
    }
}

/// Both ends of a whole handshake: four X25519 agreements at each.
fn handshake(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("seal");
    group.bench_function("handshake-both-ends", |bench| {
        bench.iter_batched_ref(tunnels, |(a, b)| shake_hands(a, b), BatchSize::SmallInput);
    });
    group.finish();
}

fn connected() -> (Tunn, Tunn) {
    let (mut a, mut b) = tunnels();
    shake_hands(&mut a, &mut b);
    (a, b)
}

fn shake_hands(a: &mut Tunn, b: &mut Tunn) {
    let (mut initiation, mut response, mut keepalive) = ([0; INITIATION_LEN], [0; INITIATION_LEN], [0; INITIATION_LEN]);
    let sent = written(a.format_handshake_initiation(&mut initiation, false));
    let sent = written(b.decapsulate(None, &initiation[..sent], &mut response));
    let sent = written(a.decapsulate(None, &response[..sent], &mut keepalive));
    let confirmed = b.decapsulate(None, &keepalive[..sent], &mut response);
    assert!(matches!(confirmed, TunnResult::Done), "the initiator's first message confirms the session");
}

fn tunnels() -> (Tunn, Tunn) {
    let (a, b) = (StaticSecret::from([1; 32]), StaticSecret::from([2; 32]));
    (tunnel(&a, &b, 1), tunnel(&b, &a, 2))
}

fn tunnel(own: &StaticSecret, peer: &StaticSecret, index: u32) -> Tunn {
    let no_limit = Arc::new(RateLimiter::new(&PublicKey::from(own), u64::MAX));
    Tunn::new(own.clone(), PublicKey::from(peer), None, None, index, Some(no_limit))
}

fn written(result: TunnResult<'_>) -> usize {
    let TunnResult::WriteToNetwork(message) = result else { panic!("no message: {result:?}") };
    message.len()
}
