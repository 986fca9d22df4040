//! Dividing what TUN hands over: a packet of up to 64 kB into packets of the path (RFC 9293 for TCP, RFC 768 for UDP),
//! and a packet into fragments (RFC 791 §3.2).
//!
//! Only headers are written. Payloads stay where they are, and the kernel gathers both when it sends.

use std::ops::Range;

use portolan_net::Family;

use super::checksum::{Sum, pseudo_header};
use super::header::{self, Fragment, Header, TCP, TCP_LENGTH, UDP, UDP_LENGTH};
use super::vnet::{Kind, VnetHeader};

/// The longest header of a packet that is divided: more than IPv6, some extensions, and TCP with all its options.
pub(super) const HEADER_MAX: usize = 192;

const FIN: u8 = 0x01;
const PUSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// A packet that is to be divided, measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Large {
    kind: Kind,
    family: Family,
    transport: usize,
    /// Where the payload begins: the length of each part's header.
    pub(super) header: usize,
    /// The payload of each part but the last.
    pub(super) size: usize,
    length: usize,
}

impl Large {
    /// Measures a packet that came with a header that asks for division. `None` if the two do not fit.
    pub(super) fn measure(vnet: &VnetHeader, header: &Header, packet: &[u8]) -> Option<Large> {
        let (kind, size) = vnet.segments?;
        let transport = header.transport;
        let length = match (kind, header.protocol) {
            (Kind::Tcp, TCP) => usize::from(packet.get(transport + 12)? >> 4) * 4,
            (Kind::Udp, UDP) => UDP_LENGTH,
            _ => return None,
        };
        let least = if kind == Kind::Tcp { TCP_LENGTH } else { UDP_LENGTH };
        let begin = transport + length;
        let fits = length >= least && begin <= HEADER_MAX && begin < header.length && header.length == packet.len();
        (fits && header.fragment == Fragment::Whole).then_some(Large {
            kind,
            family: header.family,
            transport,
            header: begin,
            size,
            length: header.length,
        })
    }

    /// How many parts there are.
    pub(super) fn count(&self) -> usize {
        (self.length - self.header).div_ceil(self.size)
    }

    /// The length of the longest part.
    pub(super) fn longest(&self) -> usize {
        self.header + self.size.min(self.length - self.header)
    }

    /// Writes the header of a part, with all checksums, and says where its payload is.
    pub(super) fn write(&self, packet: &[u8], part: usize, head: &mut [u8]) -> Range<usize> {
        let begin = self.header + part * self.size;
        let end = (begin + self.size).min(self.length);
        let is_last = end == self.length;
        head.copy_from_slice(&packet[..self.header]);
        let length = self.header + end - begin;
        // Linux counts the identification up, whether or not the packet may be divided.
        let identification = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(part as u16);
        header::set_length(head, length, Some(identification));
        let transport = &mut head[self.transport..];
        let checksum = match self.kind {
            Kind::Tcp => {
                let first = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
                let sequence = first.wrapping_add((part * self.size) as u32);
                transport[4..8].copy_from_slice(&sequence.to_be_bytes());
                if !is_last {
                    transport[13] &= !(FIN | PUSH);
                }
                if part > 0 {
                    transport[13] &= !CWR;
                }
                16
            }
            Kind::Udp => {
                transport[4..6].copy_from_slice(&((length - self.transport) as u16).to_be_bytes());
                6
            }
        };
        transport[checksum..checksum + 2].fill(0);
        let protocol = if self.kind == Kind::Tcp { TCP } else { UDP };
        let sum = pseudo_header(header::addresses(self.family, packet), protocol, length - self.transport)
            .add(transport)
            .add(&packet[begin..end]);
        transport[checksum..checksum + 2].copy_from_slice(&or_ones(sum, self.kind));
        begin..end
    }
}

/// Completes the checksum of a packet, over what begins at `start`, into the place `offset` bytes after. The sum of
/// the imagined header is there already. `false` if there is no such place.
pub(super) fn complete_checksum(packet: &mut [u8], start: usize, offset: usize, protocol: u8) -> bool {
    let at = start + offset;
    if at + 2 > packet.len() {
        return false;
    }
    let kind = if protocol == UDP { Kind::Udp } else { Kind::Tcp };
    let sum = Sum::default().add(&packet[start..]);
    packet[at..at + 2].copy_from_slice(&or_ones(sum, kind));
    true
}

/// A UDP checksum of zero says that there is none, so that zero is sent as its other representation (RFC 768).
fn or_ones(sum: Sum, kind: Kind) -> [u8; 2] {
    match sum.finish() {
        [0, 0] if kind == Kind::Udp => [0xff, 0xff],
        bytes => bytes,
    }
}

/// Where the fragments of an IPv4 packet's payload lie, for packets of up to `limit` bytes.
pub(super) fn fragments(header: &Header, limit: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let (begin, end) = (header.transport, header.length);
    // All but the last have a multiple of eight bytes (RFC 791 §3.2).
    let step = (limit.saturating_sub(begin) & !7).max(8);
    (begin..end).step_by(step).map(move |from| from..(from + step).min(end))
}

/// Writes the header of a fragment: `range` is where its payload lies in the packet.
pub(super) fn write_fragment(packet: &[u8], header: &Header, range: &Range<usize>, head: &mut [u8]) {
    head.copy_from_slice(&packet[..header.transport]);
    let bits = u16::from_be_bytes([head[6], head[7]]);
    let more = range.end < header.length || bits & 0x2000 != 0;
    let offset = (bits & 0x1fff) + ((range.start - header.transport) / 8) as u16;
    let bits = (bits & 0xc000) | if more { 0x2000 } else { 0 } | (offset & 0x1fff);
    head[6..8].copy_from_slice(&bits.to_be_bytes());
    if range.start > header.transport {
        drop_uncopied_options(&mut head[header::V4_LENGTH..]);
    }
    header::set_length(head, header.transport + range.len(), None);
}

/// Options without the flag "copied" are in the first fragment only (RFC 791 §3.1): elsewhere they become padding.
fn drop_uncopied_options(options: &mut [u8]) {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    let mut at = 0;
    while let Some(kind) = options.get(at).copied() {
        let length = match kind {
            END => return,
            NO_OPERATION => 1,
            _ => usize::from(options.get(at + 1).copied().unwrap_or(0)).max(2),
        };
        let end = (at + length).min(options.len());
        if kind & 0x80 == 0 {
            options[at..end].fill(NO_OPERATION);
        }
        at = end;
    }
}
