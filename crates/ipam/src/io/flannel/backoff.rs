//! How long to wait after a failure: doubling, bounded, with jitter from a seed.

use std::time::Duration;

use crate::limits::{STORE_BACKOFF_FIRST, STORE_BACKOFF_MAX};

/// Waits between half of a nominal length that doubles and all of it, so that the nodes of a cluster do
/// not come back to a restarted store all at once.
#[derive(Debug)]
pub(super) struct Backoff {
    failures: u32,
    random: Random,
}

impl Backoff {
    pub(super) fn new(seed: u64) -> Backoff {
        Backoff { failures: 0, random: Random::new(seed) }
    }

    pub(super) fn next_wait(&mut self) -> Duration {
        let nominal = STORE_BACKOFF_FIRST.saturating_mul(1 << self.failures.min(16)).min(STORE_BACKOFF_MAX);
        self.failures = self.failures.saturating_add(1);
        let half = u64::try_from(nominal.as_micros() / 2).unwrap_or(u64::MAX / 2);
        Duration::from_micros(half + self.random.next() % (half + 1))
    }

    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
