//! What the forwarder must know of a packet's headers, and nothing more.
//!
//! Packets come from pods and from other nodes: nothing in them is believed before it was measured.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portolan_net::Family;

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMP: u8 = 1;
pub(super) const ICMP_V6: u8 = 58;

/// Length of an IPv4 header without options (RFC 791).
pub(super) const V4_LENGTH: usize = 20;
/// Length of an IPv6 header (RFC 8200).
pub(super) const V6_LENGTH: usize = 40;
/// Length of a UDP header (RFC 768).
pub(super) const UDP_LENGTH: usize = 8;
/// Length of a TCP header without options (RFC 9293).
pub(super) const TCP_LENGTH: usize = 20;

/// Where the checksum of IPv4's header is.
pub(super) const V4_CHECKSUM: usize = 10;

/// IPv6 extension headers that are followed at most: no honest packet has more.
const EXTENSIONS_MAX: usize = 8;

/// A fragment's place in its packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment {
    /// A whole packet.
    Whole,
    /// The first fragment: it has the transport header.
    First,
    /// A later one.
    Later,
}

/// A packet's headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) family: Family,
    /// The packet's length in bytes, by its own header.
    pub(super) length: usize,
    /// Where the transport header begins.
    pub(super) transport: usize,
    /// The transport protocol.
    pub(super) protocol: u8,
    pub(super) fragment: Fragment,
    /// IPv4's flag; IPv6 is never divided on its way.
    pub(super) dont_fragment: bool,
    /// TTL or hop limit.
    pub(super) hops: u8,
}

impl Header {
    /// Reads the headers. `None` if it is no IP packet, or shorter than it says.
    pub(super) fn parse(packet: &[u8]) -> Option<Header> {
        match packet.first()? >> 4 {
            4 => Header::parse_v4(packet),
            6 => Header::parse_v6(packet),
            _ => None,
        }
    }

    fn parse_v4(packet: &[u8]) -> Option<Header> {
        let head = packet.first_chunk::<V4_LENGTH>()?;
        let transport = usize::from(head[0] & 0x0f) * 4;
        let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
        if transport < V4_LENGTH || length < transport || length > packet.len() {
            return None;
        }
        let bits = u16::from_be_bytes([head[6], head[7]]);
        let fragment = match (bits & 0x1fff, bits & 0x2000) {
            (0, 0) => Fragment::Whole,
            (0, _) => Fragment::First,
            _ => Fragment::Later,
        };
        let dont_fragment = bits & 0x4000 != 0;
        Some(Header {
            family: Family::V4,
            length,
            transport,
            protocol: head[9],
            fragment,
            dont_fragment,
            hops: head[8],
        })
    }

    fn parse_v6(packet: &[u8]) -> Option<Header> {
        let head = packet.first_chunk::<V6_LENGTH>()?;
        let length = V6_LENGTH + usize::from(u16::from_be_bytes([head[4], head[5]]));
        if length > packet.len() {
            return None;
        }
        let mut header = Header {
            family: Family::V6,
            length,
            transport: V6_LENGTH,
            protocol: head[6],
            fragment: Fragment::Whole,
            dont_fragment: true,
            hops: head[7],
        };
        header.follow_extensions(packet);
        Some(header)
    }

    /// Steps over extension headers (RFC 8200 §4). It stops where they end, or where they cannot be read.
    fn follow_extensions(&mut self, packet: &[u8]) {
        for _ in 0..EXTENSIONS_MAX {
            if self.fragment == Fragment::Later {
                return;
            }
            let Some([next, second, third, fourth]) =
                packet.get(self.transport..self.length).and_then(|rest| rest.first_chunk::<4>())
            else {
                return;
            };
            let length = match self.protocol {
                // Hop-by-hop, routing and destination options.
                0 | 43 | 60 => (usize::from(*second) + 1) * 8,
                44 => {
                    let bits = u16::from_be_bytes([*third, *fourth]);
                    self.fragment = if bits & 0xfff8 != 0 { Fragment::Later } else { Fragment::First };
                    8
                }
                // Authentication header (RFC 4302 §2.2).
                51 => (usize::from(*second) + 2) * 4,
                _ => return,
            };
            if self.transport + length > self.length {
                return;
            }
            self.transport += length;
            self.protocol = *next;
        }
    }
}

/// Where source and destination lie, one after the other.
pub(super) fn addresses(family: Family, packet: &[u8]) -> &[u8] {
    let range = if family == Family::V4 { 12..20 } else { 8..40 };
    packet.get(range).unwrap_or_default()
}

/// The source.
pub(super) fn source(packet: &[u8]) -> Option<IpAddr> {
    if packet.first()? >> 4 == 4 { v4_at(packet, 12) } else { v6_at(packet, 8) }
}

/// The destination.
pub(super) fn destination(packet: &[u8]) -> Option<IpAddr> {
    if packet.first()? >> 4 == 4 { v4_at(packet, 16) } else { v6_at(packet, 24) }
}

fn v4_at(packet: &[u8], at: usize) -> Option<IpAddr> {
    Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?).into())
}

fn v6_at(packet: &[u8], at: usize) -> Option<IpAddr> {
    Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?).into())
}

/// Takes one hop from a packet that has more than one.
pub(super) fn take_hop(family: Family, packet: &mut [u8]) {
    match family {
        Family::V4 => {
            if let Some(head) = packet.first_chunk_mut::<V4_LENGTH>() {
                let old = [head[8], head[9]];
                head[8] = head[8].saturating_sub(1);
                let sum = super::checksum::replace([head[10], head[11]], old, [head[8], head[9]]);
                head[V4_CHECKSUM..V4_CHECKSUM + 2].copy_from_slice(&sum);
            }
        }
        Family::V6 => {
            if let Some(hops) = packet.get_mut(7) {
                *hops = hops.saturating_sub(1);
            }
        }
    }
}

/// Writes a length into an IP header, and for IPv4 the identification and a new checksum.
pub(super) fn set_length(head: &mut [u8], length: usize, identification: Option<u16>) {
    let is_v4 = head.first().is_some_and(|first| first >> 4 == 4);
    if is_v4 {
        let header_length = usize::from(head[0] & 0x0f) * 4;
        head[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        if let Some(identification) = identification {
            head[4..6].copy_from_slice(&identification.to_be_bytes());
        }
        seal_v4(&mut head[..header_length]);
    } else {
        head[4..6].copy_from_slice(&((length - V6_LENGTH) as u16).to_be_bytes());
    }
}

/// Writes the checksum of an IPv4 header.
pub(super) fn seal_v4(head: &mut [u8]) {
    head[V4_CHECKSUM..V4_CHECKSUM + 2].fill(0);
    let sum = super::checksum::Sum::default().add(head).finish();
    head[V4_CHECKSUM..V4_CHECKSUM + 2].copy_from_slice(&sum);
}
