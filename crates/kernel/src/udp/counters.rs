//! What passed, and what did not and why.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use portolan_program::udp::DropReason;

/// All that the forwarder counted since it started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that went to peers.
    pub sent_packets: u64,
    /// Their bytes, without what was put around them.
    pub sent_bytes: u64,
    /// Packets from peers that came out of the device.
    pub received_packets: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// ICMP errors that senders were told.
    pub answers: u64,
    /// Packets that went no further. Every reason is there, also with zero.
    pub drops: BTreeMap<DropReason, u64>,
}

impl Counters {
    /// How many packets went no further for a reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops.get(&reason).copied().unwrap_or(0)
    }
}

/// One thread's counters. Only that thread writes them.
#[derive(Debug, Default)]
pub(super) struct Tally {
    passed_packets: AtomicU64,
    passed_bytes: AtomicU64,
    answers: AtomicU64,
    drops: [AtomicU64; DropReason::ALL.len()],
}

impl Tally {
    pub(super) fn pass(&self, packets: usize, bytes: usize) {
        self.passed_packets.fetch_add(packets as u64, Ordering::Relaxed);
        self.passed_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self, reason: DropReason, packets: usize) {
        if let Some(counter) = self.drops.get(reason as usize) {
            counter.fetch_add(packets as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn answer(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
    }
}

/// Adds up what the threads counted: those that send, and those that receive.
pub(super) fn add_up<'a>(
    outward: impl Iterator<Item = &'a Tally>,
    inward: impl Iterator<Item = &'a Tally>,
    total: &mut Counters,
) {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut add_drops = |tally: &Tally| {
        for reason in DropReason::ALL {
            *total.drops.entry(reason).or_default() += tally.drops.get(reason as usize).map_or(0, read);
        }
        total.answers += read(&tally.answers);
    };
    for tally in outward {
        add_drops(tally);
        total.sent_packets += read(&tally.passed_packets);
        total.sent_bytes += read(&tally.passed_bytes);
    }
    for tally in inward {
        add_drops(tally);
        total.received_packets += read(&tally.passed_packets);
        total.received_bytes += read(&tally.passed_bytes);
    }
}
