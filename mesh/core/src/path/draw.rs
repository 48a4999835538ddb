//! Transaction ids and jitter, drawn from a seed: the same seed draws the same, for tests and replays.

use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::probe::TxId;

/// Counter mode over SHA-256.
#[derive(Clone)]
pub(crate) struct Draw {
    seed: [u8; 16],
    drawn: u64,
}

impl Draw {
    pub(crate) fn new(seed: [u8; 16]) -> Self {
        Self { seed, drawn: 0 }
    }

    /// One that was not drawn before.
    pub(crate) fn txid(&mut self) -> TxId {
        let block = self.next();
        let (id, _) = block.split_first_chunk().expect("a digest has 32 bytes");
        TxId(*id)
    }

    /// `base`, 20 % more or less: nodes that started together do not go on in step.
    pub(crate) fn jitter(&mut self, base: Duration) -> Duration {
        let per_mille = 800 + u32::from(self.next()[0]) * 400 / 255;
        base * per_mille / 1000
    }

    fn next(&mut self) -> [u8; 32] {
        self.drawn += 1;
        Sha256::new().chain_update(self.seed).chain_update(self.drawn.to_be_bytes()).finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same_and_never_twice() {
        let (mut a, mut b) = (Draw::new([1; 16]), Draw::new([1; 16]));
        let ids: std::collections::BTreeSet<_> = (0..100).map(|_| a.txid()).collect();
        assert_eq!(ids.len(), 100);
        assert!((0..100).all(|_| ids.contains(&b.txid())));
        assert_ne!(Draw::new([2; 16]).txid(), Draw::new([1; 16]).txid());
    }

    #[test]
    fn jitter_stays_within_a_fifth() {
        let mut draw = Draw::new([3; 16]);
        let base = Duration::from_secs(10);
        assert!((0..500).map(|_| draw.jitter(base)).all(|d| d >= base * 4 / 5 && d <= base * 6 / 5));
    }
}
