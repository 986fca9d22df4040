//! Reading frames that were captured: Ethernet, IPv4, IPv6, TCP, UDP, ICMP.
//!
//! It reads what the tracer needs to recognise its own probe and nothing more. It never panics,
//! whatever the bytes.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{Packet, Protocol};

/// A captured packet, and what tells one probe from all other traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Addresses, protocol and ports.
    pub packet: Packet,
    /// TCP sequence number, which no address translation changes.
    pub tcp_sequence: Option<u32>,
    /// TCP flags (RFC 9293 §3.1): 0x02 SYN, 0x10 ACK, 0x04 RST.
    pub tcp_flags: u8,
    /// Type of an ICMP message: 8 or 128 of an echo request, 0 or 129 of its answer.
    pub icmp_type: Option<u8>,
    /// Time to live, or hop limit.
    pub time_to_live: u8,
    /// What follows the transport header.
    pub payload: Vec<u8>,
}

/// Why bytes are not a frame that we read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes end inside a header.
    #[error("the frame ends inside its {0} header")]
    Truncated(&'static str),
    /// Neither IPv4 nor IPv6.
    #[error("EtherType {0:#06x} is neither IPv4 nor IPv6")]
    NotIp(u16),
    /// A transport protocol that is not read here.
    #[error("protocol {0} is not TCP, UDP, SCTP or ICMP")]
    UnknownProtocol(u8),
    /// A fragment other than the first has no ports.
    #[error("a later fragment has no transport header")]
    LaterFragment,
}

/// Reads an Ethernet frame (IEEE 802.3, with at most one 802.1Q tag).
pub fn parse_ethernet(bytes: &[u8]) -> Result<Frame, FrameError> {
    let truncated = FrameError::Truncated("Ethernet");
    let mut kind = read_u16(bytes, 12).ok_or(truncated)?;
    let mut offset = 14;
    if kind == 0x8100 {
        kind = read_u16(bytes, 16).ok_or(truncated)?;
        offset = 18;
    }
    match kind {
        0x0800 | 0x86dd => parse_ip(bytes.get(offset..).ok_or(truncated)?),
        other => Err(FrameError::NotIp(other)),
    }
}

/// Reads an IP packet; the version field decides the family.
pub fn parse_ip(bytes: &[u8]) -> Result<Frame, FrameError> {
    match bytes.first().map(|byte| byte >> 4) {
        Some(4) => parse_ipv4(bytes),
        Some(6) => parse_ipv6(bytes),
        _ => Err(FrameError::Truncated("IP")),
    }
}

/// RFC 791 §3.1.
fn parse_ipv4(bytes: &[u8]) -> Result<Frame, FrameError> {
    let header: &[u8; 20] = bytes.first_chunk().ok_or(FrameError::Truncated("IPv4"))?;
    let header_length = usize::from(header[0] & 0x0f) * 4;
    if u16::from_be_bytes([header[6] & 0x1f, header[7]]) != 0 {
        return Err(FrameError::LaterFragment);
    }
    // Short frames are padded on the wire: the length field says where the packet ends.
    let total_length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let end = if total_length == 0 { bytes.len() } else { total_length.min(bytes.len()) };
    let source = Ipv4Addr::new(header[12], header[13], header[14], header[15]);
    let destination = Ipv4Addr::new(header[16], header[17], header[18], header[19]);
    let rest = bytes.get(header_length.max(20)..end).ok_or(FrameError::Truncated("IPv4"))?;
    parse_transport(source.into(), destination.into(), header[9], header[8], rest)
}

/// RFC 8200 §3. Packets with extension headers other than a first fragment's are not read.
fn parse_ipv6(bytes: &[u8]) -> Result<Frame, FrameError> {
    let header: &[u8; 40] = bytes.first_chunk().ok_or(FrameError::Truncated("IPv6"))?;
    let end = (40 + usize::from(u16::from_be_bytes([header[4], header[5]]))).min(bytes.len());
    let address = |offset: usize| -> Option<Ipv6Addr> {
        bytes.get(offset..offset + 16).and_then(|octets| <[u8; 16]>::try_from(octets).ok()).map(Ipv6Addr::from)
    };
    let truncated = FrameError::Truncated("IPv6");
    let source = address(8).ok_or(truncated)?;
    let destination = address(24).ok_or(truncated)?;
    let rest = bytes.get(40..end).ok_or(truncated)?;
    parse_transport(source.into(), destination.into(), header[6], header[7], rest)
}

fn parse_transport(
    source: IpAddr,
    destination: IpAddr,
    protocol_number: u8,
    time_to_live: u8,
    bytes: &[u8],
) -> Result<Frame, FrameError> {
    let protocol = Protocol::from_number(protocol_number).ok_or(FrameError::UnknownProtocol(protocol_number))?;
    let truncated = FrameError::Truncated(protocol.name());
    let mut frame = Frame {
        packet: Packet { source, destination, protocol, source_port: 0, destination_port: 0, mark: 0 },
        tcp_sequence: None,
        tcp_flags: 0,
        icmp_type: None,
        time_to_live,
        payload: Vec::new(),
    };
    let header_length = match protocol {
        Protocol::Icmp => {
            let identifier = read_u16(bytes, 4).ok_or(truncated)?;
            frame.icmp_type = bytes.first().copied();
            (frame.packet.source_port, frame.packet.destination_port) = (identifier, identifier);
            8
        }
        Protocol::Tcp | Protocol::Udp | Protocol::Sctp => {
            frame.packet.source_port = read_u16(bytes, 0).ok_or(truncated)?;
            frame.packet.destination_port = read_u16(bytes, 2).ok_or(truncated)?;
            match protocol {
                Protocol::Tcp => {
                    let header: &[u8; 20] = bytes.first_chunk().ok_or(truncated)?;
                    frame.tcp_sequence = Some(u32::from_be_bytes([header[4], header[5], header[6], header[7]]));
                    frame.tcp_flags = header[13];
                    usize::from(header[12] >> 4) * 4
                }
                Protocol::Sctp => 12,
                Protocol::Udp | Protocol::Icmp => 8,
            }
        }
    };
    frame.payload = bytes.get(header_length..).unwrap_or_default().to_vec();
    Ok(frame)
}

fn read_u16(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(offset)?, *bytes.get(offset + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = parse_ethernet(&bytes);
            let _ = parse_ip(&bytes);
        }

        #[test]
        fn any_ipv4_header_is_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 20..80)) {
            bytes[0] = 0x45;
            let _ = parse_ip(&bytes);
        }
    }

    #[test]
    fn tells_an_echo_request_from_its_answer() {
        for kind in [8, 0] {
            let mut bytes = vec![0x45, 0, 0, 30, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
            bytes.extend([kind, 0, 0, 0, 0xbe, 0xef, 0, 1, b'h', b'i']);
            let frame = parse_ip(&bytes).expect("a packet");
            assert_eq!((frame.icmp_type, frame.packet.source_port), (Some(kind), 0xbeef));
            assert_eq!(frame.payload, b"hi");
        }
    }

    #[test]
    fn reads_a_udp_datagram_and_leaves_the_padding_out() {
        let mut bytes = vec![0; 12];
        bytes.extend([0x08, 0x00]);
        bytes.extend([0x45, 0, 0, 30, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        bytes.extend([0x30, 0x39, 0x00, 0x35, 0, 10, 0, 0, b'h', b'i', 0, 0, 0, 0]);
        let frame = parse_ethernet(&bytes).expect("a frame");
        assert_eq!(frame.packet.to_string(), "10.0.0.1:12345 → 10.0.0.2:53");
        assert_eq!(frame.payload, b"hi");
        assert_eq!(frame.time_to_live, 64);
    }
}
