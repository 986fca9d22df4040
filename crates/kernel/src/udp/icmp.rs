//! ICMP errors: what a sender is told whose packet cannot go on (RFC 792, RFC 1191, RFC 1812 §4.3.2, RFC 4443 §2.4).
//!
//! Bytes only; who sends them is in `answer`.

use std::net::IpAddr;

use portolan_net::Family;
use portolan_program::udp::Answer;

use super::checksum::Sum;
use super::header::{self, Fragment, Header, ICMP, ICMP_V6, V4_LENGTH, V6_LENGTH};

/// An IPv4 error is no longer than this (RFC 1812 §4.3.2.3).
const V4_MAX: usize = 576;
/// An IPv6 error is no longer than this (RFC 4443 §2.4 (c)).
const V6_MAX: usize = 1280;
/// The header of each error.
const LENGTH: usize = 8;

/// Writes the error about a packet into `out`, which is emptied, and says whom it is for. `None` if nobody may be told
/// about this packet (RFC 1812 §4.3.2.7, RFC 4443 §2.4 (e)). The kernel writes ICMPv6's checksum, since it covers a
/// source address that the kernel chooses.
pub(super) fn error(answer: Answer, packet: &[u8], parsed: &Header, out: &mut Vec<u8>) -> Option<IpAddr> {
    let source = header::source(packet)?;
    let destination = header::destination(packet)?;
    let is_host = !source.is_unspecified() && !source.is_multicast() && !source.is_loopback();
    let is_broadcast = |address: IpAddr| matches!(address, IpAddr::V4(address) if address.is_broadcast());
    if !is_host || is_broadcast(source) || is_broadcast(destination) || destination.is_multicast() {
        return None;
    }
    if parsed.fragment == Fragment::Later || is_error(packet, parsed) {
        return None;
    }
    out.clear();
    let (kind, code, information, most) = match (parsed.family, answer) {
        (Family::V4, Answer::NoRoute) => (3, 0, 0, V4_MAX - V4_LENGTH),
        (Family::V4, Answer::TooBig(bytes)) => (3, 4, bytes.min(0xffff), V4_MAX - V4_LENGTH),
        (Family::V4, Answer::TimeExceeded) => (11, 0, 0, V4_MAX - V4_LENGTH),
        (Family::V6, Answer::NoRoute) => (1, 0, 0, V6_MAX - V6_LENGTH),
        (Family::V6, Answer::TooBig(bytes)) => (2, 0, bytes, V6_MAX - V6_LENGTH),
        (Family::V6, Answer::TimeExceeded) => (3, 0, 0, V6_MAX - V6_LENGTH),
    };
    out.extend_from_slice(&[kind, code, 0, 0]);
    out.extend_from_slice(&information.to_be_bytes());
    let quoted = packet.len().min(most - LENGTH);
    out.extend_from_slice(&packet[..quoted]);
    if parsed.family == Family::V4 {
        let sum = Sum::default().add(out).finish();
        out[2..4].copy_from_slice(&sum);
    }
    Some(source)
}

/// Whether the packet is itself an ICMP error: nobody is told about those. One of IPv6 whose type cannot be read counts
/// as one.
fn is_error(packet: &[u8], parsed: &Header) -> bool {
    let kind = packet.get(parsed.transport).copied();
    match (parsed.family, parsed.protocol) {
        (Family::V4, ICMP) => !matches!(kind, Some(0 | 8 | 9 | 10 | 13..=18)),
        // Errors are those below 128; 137 is a redirect.
        (Family::V6, ICMP_V6) => kind.is_none_or(|kind| kind < 128 || kind == 137),
        _ => false,
    }
}

/// Errors a second, for all senders together: what Linux allowed itself for 20 years (`icmp_msgs_per_sec`).
const TOTAL_A_SECOND: u32 = 1_000;
/// Errors at once, for all senders together (`icmp_msgs_burst`).
const TOTAL_BURST: u32 = 50;
/// Errors a second for the senders of one bucket, so that one sender does not use up what all have.
const SENDER_A_SECOND: u32 = 100;
/// Errors at once for the senders of one bucket.
const SENDER_BURST: u32 = 20;
/// Buckets that senders share by a hash of their address.
const BUCKETS: usize = 256;

/// Who may be told how often (RFC 4443 §2.4 (f) asks for a token bucket).
#[derive(Debug)]
pub(super) struct Limiter {
    total: Bucket,
    senders: Vec<Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// In thousandths.
    tokens: u64,
    at_ms: u64,
}

impl Bucket {
    fn take(&mut self, now_ms: u64, a_second: u32, burst: u32) -> bool {
        let full = u64::from(burst) * 1000;
        let gained = now_ms.saturating_sub(self.at_ms).saturating_mul(u64::from(a_second));
        self.tokens = self.tokens.saturating_add(gained).min(full);
        self.at_ms = now_ms;
        let has = self.tokens >= 1000;
        if has {
            self.tokens -= 1000;
        }
        has
    }
}

impl Limiter {
    pub(super) fn new() -> Limiter {
        let full = |burst: u32| Bucket { tokens: u64::from(burst) * 1000, at_ms: 0 };
        Limiter { total: full(TOTAL_BURST), senders: vec![full(SENDER_BURST); BUCKETS] }
    }

    /// Whether one more error may go to a sender now.
    pub(super) fn allows(&mut self, sender: IpAddr, now_ms: u64) -> bool {
        let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        let hash = match sender {
            IpAddr::V4(address) => address.octets().iter().fold(0xcbf2_9ce4_8422_2325, mix),
            IpAddr::V6(address) => address.octets().iter().fold(0xcbf2_9ce4_8422_2325, mix),
        };
        let index = (hash ^ (hash >> 32)) as usize % BUCKETS;
        let of_sender = self.senders.get_mut(index);
        of_sender.is_some_and(|bucket| bucket.take(now_ms, SENDER_A_SECOND, SENDER_BURST))
            && self.total.take(now_ms, TOTAL_A_SECOND, TOTAL_BURST)
    }
}
