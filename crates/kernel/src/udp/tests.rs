//! Properties of the packet code: what is divided and joined again is what it was, and whoever is told is told right.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use portolan_net::Family;
use portolan_program::udp::Answer;
use proptest::prelude::*;

use super::checksum::{Sum, pseudo_header};
use super::coalesce::Coalescer;
use super::header::{self, Fragment, Header, ICMP, ICMP_V6, TCP, UDP};
use super::icmp::{self, Limiter};
use super::segment::{self, Large};
use super::vnet::{Kind, VnetHeader};

/// A packet with right checksums.
#[derive(Debug, Clone)]
struct Sample {
    is_v6: bool,
    kind: Kind,
    options: usize,
    sequence: u32,
    identification: u16,
    dont_fragment: bool,
    flags: u8,
    hops: u8,
    payload: Vec<u8>,
}

impl Sample {
    fn transport(&self) -> usize {
        if self.is_v6 { 40 } else { 20 }
    }

    fn header(&self) -> usize {
        self.transport() + if self.kind == Kind::Tcp { 20 + self.options * 4 } else { 8 }
    }

    fn protocol(&self) -> u8 {
        if self.kind == Kind::Tcp { TCP } else { UDP }
    }

    fn bytes(&self) -> Vec<u8> {
        let length = self.header() + self.payload.len();
        let mut bytes = vec![0; self.header()];
        if self.is_v6 {
            bytes[0] = 0x60;
            bytes[6] = self.protocol();
            bytes[7] = self.hops;
            bytes[8..24].copy_from_slice(&Ipv6Addr::new(0xfd42, 0, 0, 1, 0, 0, 0, 2).octets());
            bytes[24..40].copy_from_slice(&Ipv6Addr::new(0xfd42, 0, 0, 2, 0, 0, 0, 2).octets());
        } else {
            bytes[0] = 0x45;
            bytes[6] = if self.dont_fragment { 0x40 } else { 0 };
            bytes[8] = self.hops;
            bytes[9] = self.protocol();
            bytes[12..16].copy_from_slice(&[10, 42, 1, 2]);
            bytes[16..20].copy_from_slice(&[10, 42, 2, 2]);
        }
        let transport = self.transport();
        bytes[transport..transport + 4].copy_from_slice(&[0x9c, 0x40, 0x14, 0x51]);
        if self.kind == Kind::Tcp {
            bytes[transport + 4..transport + 8].copy_from_slice(&self.sequence.to_be_bytes());
            bytes[transport + 8..transport + 12].copy_from_slice(&77u32.to_be_bytes());
            bytes[transport + 12] = ((5 + self.options) << 4) as u8;
            bytes[transport + 13] = self.flags;
            bytes[transport + 20..].fill(1);
        } else {
            let length = (length - transport) as u16;
            bytes[transport + 4..transport + 6].copy_from_slice(&length.to_be_bytes());
        }
        header::set_length(&mut bytes, length, Some(self.identification));
        bytes.extend_from_slice(&self.payload);
        let family = if self.is_v6 { Family::V6 } else { Family::V4 };
        let sum = pseudo_header(header::addresses(family, &bytes), self.protocol(), length - transport);
        let at = transport + if self.kind == Kind::Tcp { 16 } else { 6 };
        let sum = match sum.add(&bytes[transport..]).finish() {
            [0, 0] if self.kind == Kind::Udp => [0xff, 0xff],
            sum => sum,
        };
        bytes[at..at + 2].copy_from_slice(&sum);
        bytes
    }
}

fn samples(most: usize) -> impl Strategy<Value = Sample> {
    let payload = proptest::collection::vec(any::<u8>(), 1..most);
    let numbers = (any::<u32>(), any::<u16>(), 2u8.., 0usize..8);
    (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), numbers, payload).prop_map(
        |(is_v6, is_tcp, dont_fragment, pushes, (sequence, identification, hops, options), payload)| Sample {
            is_v6,
            kind: if is_tcp { Kind::Tcp } else { Kind::Udp },
            options,
            sequence,
            identification,
            dont_fragment,
            flags: if pushes { 0x18 } else { 0x10 },
            hops,
            payload,
        },
    )
}

/// Whether all checksums of a packet are right, by adding everything up.
fn is_sound(packet: &[u8]) -> bool {
    let Some(parsed) = Header::parse(packet) else { return false };
    let head_is_sound =
        parsed.family == Family::V6 || Sum::default().add(&packet[..parsed.transport]).finish() == [0, 0];
    let sum = pseudo_header(header::addresses(parsed.family, packet), parsed.protocol, packet.len() - parsed.transport);
    head_is_sound && parsed.length == packet.len() && sum.add(&packet[parsed.transport..]).finish() == [0, 0]
}

fn divided(packet: &[u8], kind: Kind, size: usize) -> Option<Vec<Vec<u8>>> {
    let parsed = Header::parse(packet)?;
    let vnet = VnetHeader { checksum: Some((parsed.transport, 0)), segments: Some((kind, size)) };
    let large = Large::measure(&vnet, &parsed, packet)?;
    let part = |part| {
        let mut head = vec![0; large.header];
        let payload = large.write(packet, part, &mut head);
        head.extend_from_slice(&packet[payload]);
        head
    };
    Some((0..large.count()).map(part).collect())
}

/// Joins packets; each comes out with how it would be divided.
fn joined(packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
    let mut coalescer = Coalescer::new(true);
    let mut arena = Vec::new();
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for packet in packets {
        ranges.push(arena.len()..arena.len() + packet.len());
        arena.extend_from_slice(packet);
    }
    for range in ranges {
        if let Some(parsed) = Header::parse(&arena[range.clone()]) {
            coalescer.push(&arena, range.start..range.start + parsed.length, &parsed);
        }
    }
    coalescer.finish(&arena);
    let whole = |write: &super::coalesce::Write| {
        let mut bytes = write.head().to_vec();
        coalescer.pieces(write).for_each(|piece| bytes.extend_from_slice(&arena[piece]));
        assert_eq!(bytes.len(), write.length);
        (VnetHeader::decode(&write.vnet).unwrap(), bytes)
    };
    coalescer.ready.iter().map(whole).collect()
}

/// What the kernel makes of joined packets when they leave again.
fn divided_again(writes: &[(VnetHeader, Vec<u8>)]) -> Vec<Vec<u8>> {
    let parts = |(vnet, bytes): &(VnetHeader, Vec<u8>)| match vnet.segments {
        Some((kind, size)) => divided(bytes, kind, size).unwrap(),
        None => vec![bytes.clone()],
    };
    writes.iter().flat_map(parts).collect()
}

proptest! {
    #[test]
    fn each_part_is_sound_and_carries_its_share(sample in samples(9000), size in 1usize..1500) {
        let bytes = sample.bytes();
        prop_assert!(is_sound(&bytes));
        let parts = divided(&bytes, sample.kind, size).unwrap();
        let mut payload = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            prop_assert!(is_sound(part), "part {index}");
            prop_assert!(part.len() <= sample.header() + size);
            payload.extend_from_slice(&part[sample.header()..]);
        }
        prop_assert_eq!(&payload, &sample.payload);
        prop_assert_eq!(parts.len(), sample.payload.len().div_ceil(size));
    }

    #[test]
    fn what_was_divided_and_joined_is_what_it_was(sample in samples(9000), size in 150usize..1500) {
        // Never more than 64 parts: so many are joined of any kind.
        let bytes = sample.bytes();
        let parts = divided(&bytes, sample.kind, size).unwrap();
        let writes = joined(&parts);
        prop_assert_eq!(writes.len(), 1);
        // The checksum that someone completes is all that differs.
        let (vnet, mut whole) = writes.into_iter().next().unwrap();
        if let (Some((start, offset)), true) = (vnet.checksum, parts.len() > 1) {
            prop_assert!(segment::complete_checksum(&mut whole, start, offset, sample.protocol()));
            prop_assert_eq!(vnet.segments, Some((sample.kind, size)));
        }
        prop_assert_eq!(whole, bytes);
    }

    #[test]
    fn whatever_comes_together_leaves_as_it_came(
        flows in proptest::collection::vec((samples(4000), 200usize..1500), 1..5),
        order in proptest::collection::vec(any::<prop::sample::Index>(), 0..40),
        broken in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..3),
    ) {
        let mut queues: Vec<std::collections::VecDeque<Vec<u8>>> = flows
            .iter()
            .map(|(sample, size)| divided(&sample.bytes(), sample.kind, *size).unwrap().into())
            .collect();
        let mut packets = Vec::new();
        for index in order {
            let index = index.index(queues.len());
            packets.extend(queues[index].pop_front());
        }
        packets.extend(queues.into_iter().flatten());
        for (packet, byte) in broken {
            let packet = packet.index(packets.len());
            let at = byte.index(packets[packet].len());
            packets[packet][at] ^= 0x10;
        }
        let expected: Vec<Vec<u8>> = packets
            .iter()
            .filter_map(|packet| Some(packet[..Header::parse(packet)?.length].to_vec()))
            .collect();
        let mut left = divided_again(&joined(&packets));
        // Flows may overtake each other, and the identification of what may not be divided has no meaning.
        let plain = |packets: &mut Vec<Vec<u8>>| {
            for packet in packets.iter_mut().filter(|packet| packet[0] >> 4 == 4 && packet[6] & 0x40 != 0) {
                packet[4..6].fill(0);
                packet[10..12].fill(0);
            }
            packets.sort();
        };
        let mut expected = expected;
        plain(&mut left);
        plain(&mut expected);
        prop_assert_eq!(left, expected);
    }

    #[test]
    fn a_joined_packet_never_hides_a_broken_one(sample in samples(6000), at: prop::sample::Index, size in 500usize..1500) {
        let mut parts = divided(&sample.bytes(), sample.kind, size).unwrap();
        let part = at.index(parts.len());
        let byte = sample.header() + at.index(parts[part].len() - sample.header());
        parts[part][byte] ^= 1;
        let broken = parts[part].clone();
        let writes = joined(&parts);
        prop_assert!(writes.iter().any(|(vnet, bytes)| vnet.segments.is_none() && *bytes == broken));
    }

    #[test]
    fn fragments_make_up_the_packet(sample in samples(4000), limit in 68usize..1500) {
        let sample = Sample { is_v6: false, dont_fragment: false, ..sample };
        let bytes = sample.bytes();
        let parsed = Header::parse(&bytes).unwrap();
        let mut payload = vec![0; bytes.len() - 20];
        let ranges: Vec<_> = segment::fragments(&parsed, limit).collect();
        for (index, range) in ranges.iter().enumerate() {
            let mut head = vec![0; parsed.transport];
            segment::write_fragment(&bytes, &parsed, range, &mut head);
            head.extend_from_slice(&bytes[range.clone()]);
            prop_assert!(head.len() <= limit);
            let fragment = Header::parse(&head).unwrap();
            prop_assert_eq!(fragment.length, head.len());
            prop_assert_eq!(Sum::default().add(&head[..20]).finish(), [0, 0]);
            let bits = u16::from_be_bytes([head[6], head[7]]);
            let offset = usize::from(bits & 0x1fff) * 8;
            prop_assert_eq!(bits & 0x2000 != 0, index + 1 < ranges.len());
            payload[offset..offset + range.len()].copy_from_slice(&head[20..]);
        }
        prop_assert_eq!(&payload[..], &bytes[20..]);
    }

    #[test]
    fn a_hop_is_taken_and_the_packet_stays_sound(sample in samples(100)) {
        let mut bytes = sample.bytes();
        let parsed = Header::parse(&bytes).unwrap();
        header::take_hop(parsed.family, &mut bytes);
        prop_assert!(is_sound(&bytes));
        prop_assert_eq!(Header::parse(&bytes).unwrap().hops, sample.hops - 1);
    }

    #[test]
    fn nothing_that_arrives_does_harm(packets: Vec<Vec<u8>>, size in 1usize..2000, header: [u8; 10]) {
        let _ = joined(&packets);
        for mut packet in packets {
            // So that more than one in eight gets beyond the first byte.
            if let Some(first) = packet.first_mut() {
                *first = if *first & 1 == 0 { 0x40 | *first & 0x0f } else { 0x60 };
            }
            let _ = divided(&packet, Kind::Tcp, size);
            let _ = divided(&packet, Kind::Udp, size);
            let parsed = Header::parse(&packet);
            if let (Some(parsed), Some(vnet)) = (parsed, VnetHeader::decode(&header)) {
                let _ = Large::measure(&vnet, &parsed, &packet);
                let mut out = Vec::new();
                let _ = icmp::error(Answer::TooBig(1000), &packet, &parsed, &mut out);
                prop_assert!(out.len() <= 1240);
                let (start, offset) = vnet.checksum.unwrap_or_default();
                let _ = segment::complete_checksum(&mut packet, start, offset, parsed.protocol);
            }
        }
    }
}

#[test]
fn an_acknowledgement_waits_for_the_data_before_it() {
    let sample = Sample {
        is_v6: false,
        kind: Kind::Tcp,
        options: 3,
        sequence: 1,
        identification: 9,
        dont_fragment: true,
        flags: 0x10,
        hops: 64,
        payload: vec![7; 3000],
    };
    let mut packets = divided(&sample.bytes(), Kind::Tcp, 1000).unwrap();
    packets.push(Sample { sequence: 3001, payload: Vec::new(), flags: 0x11, ..sample }.bytes());
    let writes = joined(&packets);
    assert_eq!(writes.iter().map(|(_, bytes)| bytes.len()).collect::<Vec<_>>(), [3052, 52]);
}

#[test]
fn no_more_datagrams_are_joined_than_the_kernel_divides() {
    let sample = Sample {
        is_v6: false,
        kind: Kind::Udp,
        options: 0,
        sequence: 0,
        identification: 0,
        dont_fragment: true,
        flags: 0,
        hops: 64,
        payload: vec![1; 300 * 64],
    };
    let writes = joined(&divided(&sample.bytes(), Kind::Udp, 64).unwrap());
    assert_eq!(writes.iter().map(|(_, bytes)| (bytes.len() - 28) / 64).collect::<Vec<_>>(), [64, 64, 64, 64, 44]);
}

fn about(protocol: u8, kind: u8, is_v6: bool, source: IpAddr) -> Option<(IpAddr, Vec<u8>)> {
    let length = if is_v6 { 40 } else { 20 };
    let mut packet = vec![0; length + 8];
    match source {
        IpAddr::V4(source) => {
            packet[0] = 0x45;
            packet[8..10].copy_from_slice(&[1, protocol]);
            packet[12..16].copy_from_slice(&source.octets());
            packet[16..20].copy_from_slice(&Ipv4Addr::new(10, 42, 2, 2).octets());
        }
        IpAddr::V6(source) => {
            packet[0] = 0x60;
            packet[6..8].copy_from_slice(&[protocol, 1]);
            packet[8..24].copy_from_slice(&source.octets());
            packet[24..40].copy_from_slice(&Ipv6Addr::new(0xfd42, 0, 0, 2, 0, 0, 0, 2).octets());
        }
    }
    header::set_length(&mut packet, length + 8, None);
    packet[length] = kind;
    let parsed = Header::parse(&packet).unwrap();
    let mut out = Vec::new();
    let told = icmp::error(Answer::TimeExceeded, &packet, &parsed, &mut out)?;
    assert_eq!(out[8..], packet);
    Some((told, out))
}

#[test]
fn the_sender_is_told_but_never_about_an_error_and_never_a_group() {
    let pod: IpAddr = [10, 42, 1, 2].into();
    let (told, message) = about(UDP, 0, false, pod).unwrap();
    assert_eq!((told, message[0], message[1]), (pod, 11, 0));
    assert_eq!(Sum::default().add(&message).finish(), [0, 0]);
    assert!(about(ICMP, 8, false, pod).is_some(), "an echo request");
    assert!(about(ICMP, 3, false, pod).is_none(), "unreachable");
    assert!(about(ICMP, 11, false, pod).is_none(), "time exceeded");
    for nobody in [[0, 0, 0, 0], [224, 0, 0, 1], [255, 255, 255, 255], [127, 0, 0, 1]] {
        assert!(about(UDP, 0, false, nobody.into()).is_none(), "{nobody:?}");
    }
    let pod: IpAddr = "fd42:0:0:1::2".parse().unwrap();
    let (told, message) = about(UDP, 0, true, pod).unwrap();
    assert_eq!((told, message[0], message[1]), (pod, 3, 0));
    assert!(about(ICMP_V6, 128, true, pod).is_some(), "an echo request");
    for kind in [1, 2, 3, 137] {
        assert!(about(ICMP_V6, kind, true, pod).is_none(), "type {kind}");
    }
    assert!(about(UDP, 0, true, "ff02::1".parse().unwrap()).is_none());
}

#[test]
fn too_big_says_what_would_pass() {
    let sample = Sample {
        is_v6: false,
        kind: Kind::Udp,
        options: 0,
        sequence: 0,
        identification: 0,
        dont_fragment: true,
        flags: 0,
        hops: 64,
        payload: vec![0; 1400],
    };
    for (is_v6, head, most) in [(false, [3, 4], 556), (true, [2, 0], 1240)] {
        let bytes = Sample { is_v6, ..sample.clone() }.bytes();
        let mut out = Vec::new();
        icmp::error(Answer::TooBig(1372), &bytes, &Header::parse(&bytes).unwrap(), &mut out).unwrap();
        assert_eq!(out[..2], head);
        assert_eq!(out[4..8], 1372u32.to_be_bytes());
        assert_eq!(out.len(), most);
    }
}

#[test]
fn one_sender_cannot_use_up_the_answers_of_all() {
    let mut limiter = Limiter::new();
    let (loud, quiet): (IpAddr, IpAddr) = ([10, 42, 1, 2].into(), [10, 42, 1, 3].into());
    let count = |limiter: &mut Limiter, now_ms| (0..1000).filter(|_| limiter.allows(loud, now_ms)).count();
    assert_eq!(count(&mut limiter, 1), 20);
    assert!(limiter.allows(quiet, 1));
    assert_eq!(count(&mut limiter, 101), 10);
    assert_eq!(count(&mut limiter, 100_000), 20);
}

#[test]
fn extension_headers_are_followed_to_the_transport_header() {
    let mut packet = vec![0; 40 + 8 + 8 + 8];
    packet[0] = 0x60;
    // Hop-by-hop options, then a fragment header, then UDP.
    packet[6] = 0;
    packet[40] = 44;
    packet[48] = UDP;
    let length = packet.len();
    header::set_length(&mut packet, length, None);
    let parsed = Header::parse(&packet).unwrap();
    assert_eq!((parsed.transport, parsed.protocol, parsed.fragment), (56, UDP, Fragment::First));
    packet[51] = 8;
    assert_eq!(Header::parse(&packet).unwrap().fragment, Fragment::Later);
}
