//! How long to wait after a failure: doubling, bounded, with jitter from a seed.

use std::time::Duration;

use crate::limits::{BACKOFF_FIRST, BACKOFF_MAX};

/// Waits that double up to a bound. Each is between half of its nominal length and all of it, so
/// that the nodes of a cluster do not come back to a restarted server all at once.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    failures: u32,
    random: u64,
}

impl Backoff {
    /// Starts with the shortest wait. Two seeds give two sequences.
    pub(crate) fn new(seed: u64) -> Backoff {
        Backoff { failures: 0, random: seed }
    }

    /// The next wait.
    pub(crate) fn next_wait(&mut self) -> Duration {
        let doublings = self.failures.min(16);
        self.failures = self.failures.saturating_add(1);
        let nominal = BACKOFF_FIRST.saturating_mul(1 << doublings).min(BACKOFF_MAX);
        let half = u64::try_from(nominal.as_micros() / 2).unwrap_or(u64::MAX);
        Duration::from_micros(half + self.random_below(half + 1))
    }

    /// After a success.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014): enough to spread waits.
    fn random_below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_bound_and_start_over_after_a_success() {
        let mut backoff = Backoff::new(7);
        let mut nominal = BACKOFF_FIRST;
        for _ in 0..100 {
            let wait = backoff.next_wait();
            assert!(wait >= nominal / 2 && wait <= nominal, "{wait:?} of {nominal:?}");
            nominal = (nominal * 2).min(BACKOFF_MAX);
        }
        backoff.reset();
        assert!(backoff.next_wait() <= BACKOFF_FIRST);
    }

    #[test]
    fn the_seed_decides() {
        let waits = |seed| {
            let mut backoff = Backoff::new(seed);
            (0..8).map(|_| backoff.next_wait()).collect::<Vec<_>>()
        };
        assert_eq!(waits(1), waits(1));
        assert_ne!(waits(1), waits(2));
    }
}
