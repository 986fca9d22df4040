//! Joining what came in: packets of one flow that follow each other become one of up to 64 kB, which the kernel carries
//! to its socket, or to the pod's interface, at the price of one.
//!
//! The rules are those of the kernel's own receive offload: only packets that the kernel would divide into just the
//! same again are joined, and their checksums are verified before, since afterwards nobody can. All others pass as they
//! are. Packets of one flow keep their order.

use std::ops::Range;

use portolan_net::Family;

use super::checksum::pseudo_header;
use super::header::{self, Fragment, Header, TCP, TCP_LENGTH, UDP, UDP_LENGTH, V4_LENGTH, V6_LENGTH};
use super::vnet::{self, Kind, VnetHeader};

/// Flows that are joined at a time.
const FLOWS_MAX: usize = 16;
/// Packets that become one. The kernel takes 1024 pieces in one write (`UIO_MAXIOV`).
pub(super) const PIECES_MAX: usize = 256;
/// The same for UDP: the kernel's least limit for what it is to divide (`UDP_MAX_SEGMENTS`, 64 until Linux 6.10).
const UDP_PIECES_MAX: usize = 64;
/// The longest IP packet.
const PACKET_MAX: usize = 65_535;
/// IPv6, and TCP with all its options.
const HEADER_MAX: usize = V6_LENGTH + 60;

const ACK: u8 = 0x10;
const PUSH: u8 = 0x08;

/// One packet for the TUN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Write {
    /// What is written before it.
    pub(super) vnet: [u8; vnet::LENGTH],
    head: [u8; HEADER_MAX],
    head_length: usize,
    first: usize,
    /// How many packets it was.
    pub(super) packets: usize,
    /// Its length in bytes.
    pub(super) length: usize,
}

impl Write {
    /// The header that replaces the packets' own; empty for a packet that passes as it is.
    pub(super) fn head(&self) -> &[u8] {
        &self.head[..self.head_length]
    }
}

/// A piece of the arena, and the one after it in the same packet.
#[derive(Debug, Clone, Copy)]
struct Piece {
    begin: u32,
    end: u32,
    next: Option<u32>,
}

/// A packet that grows.
#[derive(Debug, Clone)]
struct Flow {
    key: u64,
    kind: Kind,
    family: Family,
    transport: usize,
    header: usize,
    /// The first packet, whole.
    range: Range<usize>,
    is_verified: bool,
    /// The payload of each packet but the last.
    size: usize,
    length: usize,
    packets: usize,
    next_sequence: u32,
    next_identification: u16,
    first: usize,
    last: usize,
    flags: u8,
}

/// What a packet has that can be joined.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    key: u64,
    kind: Kind,
    family: Family,
    transport: usize,
    header: usize,
    payload: usize,
    sequence: u32,
    flags: u8,
}

/// Joins the packets of one batch.
#[derive(Debug, Default)]
pub(super) struct Coalescer {
    joins_udp: bool,
    flows: Vec<Flow>,
    pieces: Vec<Piece>,
    /// What is to be written, in order.
    pub(super) ready: Vec<Write>,
}

/// Whether a packet can be joined with others of its flow.
enum Looked {
    Can(Candidate),
    /// It cannot, and those before it in its flow must go first.
    Breaks(u64),
    /// It cannot, and belongs to no flow.
    Alone,
}

impl Coalescer {
    /// `joins_udp`: whether the kernel takes joined UDP datagrams (Linux 6.2).
    pub(super) fn new(joins_udp: bool) -> Coalescer {
        Coalescer { joins_udp, ..Coalescer::default() }
    }

    /// Forgets the last batch.
    pub(super) fn clear(&mut self) {
        self.flows.clear();
        self.pieces.clear();
        self.ready.clear();
    }

    /// Takes a packet, which lies in the arena and whose headers were read.
    pub(super) fn push(&mut self, arena: &[u8], range: Range<usize>, parsed: &Header) {
        let Some(packet) = arena.get(range.clone()) else { return };
        match self.look(packet, parsed) {
            Looked::Alone => self.pass(range),
            Looked::Breaks(key) => {
                self.finish_flow(arena, key);
                self.pass(range);
            }
            Looked::Can(candidate) => self.join(arena, range, &candidate),
        }
    }

    /// Ends the batch: everything is ready then.
    pub(super) fn finish(&mut self, arena: &[u8]) {
        for index in 0..self.flows.len() {
            let flow = self.flows[index].clone();
            self.emit(arena, &flow);
        }
        self.flows.clear();
    }

    /// The pieces of a packet, in order.
    pub(super) fn pieces<'a>(&'a self, write: &Write) -> impl Iterator<Item = Range<usize>> + 'a {
        let mut next = Some(write.first as u32);
        std::iter::from_fn(move || {
            let piece = self.pieces.get(next? as usize)?;
            next = piece.next;
            Some(piece.begin as usize..piece.end as usize)
        })
    }

    fn look(&self, packet: &[u8], parsed: &Header) -> Looked {
        let header_length = if parsed.family == Family::V4 { V4_LENGTH } else { V6_LENGTH };
        let is_plain = parsed.fragment == Fragment::Whole && parsed.transport == header_length;
        if !is_plain {
            return Looked::Alone;
        }
        let transport = parsed.transport;
        match parsed.protocol {
            TCP => look_tcp(packet, parsed, transport),
            UDP if self.joins_udp => look_udp(packet, parsed, transport),
            _ => Looked::Alone,
        }
    }

    fn pass(&mut self, range: Range<usize>) {
        let length = range.len();
        let first = self.add_piece(range);
        self.ready.push(Write { vnet: vnet::PLAIN, head: [0; HEADER_MAX], head_length: 0, first, packets: 1, length });
    }

    fn join(&mut self, arena: &[u8], range: Range<usize>, candidate: &Candidate) {
        if let Some(index) = self.flows.iter().position(|flow| flow.key == candidate.key) {
            if self.append(arena, index, &range, candidate) {
                return;
            }
            self.finish_at(arena, index);
        }
        // What asks for no more data ends a packet: there is nothing to wait for.
        if candidate.flags & PUSH != 0 && candidate.kind == Kind::Tcp {
            return self.pass(range);
        }
        if self.flows.len() == FLOWS_MAX {
            self.finish_at(arena, 0);
        }
        let first = self.add_piece(range.clone());
        let packet = &arena[range.clone()];
        self.flows.push(Flow {
            key: candidate.key,
            kind: candidate.kind,
            family: candidate.family,
            transport: candidate.transport,
            header: candidate.header,
            is_verified: false,
            size: candidate.payload,
            length: range.len(),
            packets: 1,
            next_sequence: candidate.sequence.wrapping_add(candidate.payload as u32),
            next_identification: identification(packet).wrapping_add(1),
            first,
            last: first,
            flags: candidate.flags,
            range,
        });
    }

    /// Appends a packet to a flow, if it continues it.
    fn append(&mut self, arena: &[u8], index: usize, range: &Range<usize>, candidate: &Candidate) -> bool {
        let Some(flow) = self.flows.get_mut(index) else { return false };
        let (packet, first) = (&arena[range.clone()], &arena[flow.range.clone()]);
        let continues = flow.kind == candidate.kind
            && flow.header == candidate.header
            && candidate.payload <= flow.size
            && flow.length + candidate.payload <= PACKET_MAX
            && flow.packets < if flow.kind == Kind::Udp { UDP_PIECES_MAX } else { PIECES_MAX }
            && (flow.kind == Kind::Udp || candidate.sequence == flow.next_sequence)
            && same_headers(first, packet, flow);
        if !continues {
            return false;
        }
        if !flow.is_verified {
            if !has_right_checksum(first, flow.family, flow.transport, flow.kind) {
                return false;
            }
            flow.is_verified = true;
        }
        if !has_right_checksum(packet, flow.family, flow.transport, flow.kind) {
            return false;
        }
        flow.length += candidate.payload;
        flow.packets += 1;
        flow.next_sequence = flow.next_sequence.wrapping_add(candidate.payload as u32);
        flow.next_identification = flow.next_identification.wrapping_add(1);
        flow.flags |= candidate.flags;
        let (is_shorter, last) = (candidate.payload < flow.size, flow.last);
        let ends = is_shorter || flow.kind == Kind::Tcp && candidate.flags & PUSH != 0;
        let added = self.add_piece(range.start + candidate.header..range.end);
        if let Some(last) = self.pieces.get_mut(last) {
            last.next = Some(added as u32);
        }
        self.flows[index].last = added;
        if ends {
            self.finish_at(arena, index);
        }
        true
    }

    fn finish_flow(&mut self, arena: &[u8], key: u64) {
        if let Some(index) = self.flows.iter().position(|flow| flow.key == key) {
            self.finish_at(arena, index);
        }
    }

    fn finish_at(&mut self, arena: &[u8], index: usize) {
        let flow = self.flows.remove(index);
        self.emit(arena, &flow);
    }

    fn emit(&mut self, arena: &[u8], flow: &Flow) {
        let mut write = Write {
            vnet: vnet::PLAIN,
            head: [0; HEADER_MAX],
            head_length: 0,
            first: flow.first,
            packets: flow.packets,
            length: flow.length,
        };
        if flow.packets > 1 {
            write.head_length = flow.header;
            let head = &mut write.head[..flow.header];
            head.copy_from_slice(&arena[flow.range.start..flow.range.start + flow.header]);
            header::set_length(head, flow.length, None);
            let (transport, protocol) = (flow.transport, if flow.kind == Kind::Tcp { TCP } else { UDP });
            let sum = pseudo_header(header::addresses(flow.family, head), protocol, flow.length - transport).partial();
            match flow.kind {
                Kind::Tcp => {
                    head[transport + 13] |= flow.flags & PUSH;
                    head[transport + 16..transport + 18].copy_from_slice(&sum);
                }
                Kind::Udp => {
                    let length = (flow.length - transport) as u16;
                    head[transport + 4..transport + 6].copy_from_slice(&length.to_be_bytes());
                    head[transport + 6..transport + 8].copy_from_slice(&sum);
                }
            }
            let is_v6 = flow.family == Family::V6;
            write.vnet = VnetHeader::encode(flow.kind, is_v6, transport, flow.header, flow.size);
            // The first packet's header is replaced.
            if let Some(piece) = self.pieces.get_mut(flow.first) {
                piece.begin += flow.header as u32;
            }
        }
        self.ready.push(write);
    }

    fn add_piece(&mut self, range: Range<usize>) -> usize {
        self.pieces.push(Piece { begin: range.start as u32, end: range.end as u32, next: None });
        self.pieces.len() - 1
    }
}

fn look_tcp(packet: &[u8], parsed: &Header, transport: usize) -> Looked {
    let Some(head) = packet.get(transport..).and_then(|rest| rest.first_chunk::<TCP_LENGTH>()) else {
        return Looked::Alone;
    };
    let key = key_of(packet, parsed, transport);
    let header = transport + usize::from(head[12] >> 4) * 4;
    let flags = head[13];
    let is_data = flags & !PUSH == ACK && header >= transport + TCP_LENGTH && header < parsed.length;
    if !is_data {
        return Looked::Breaks(key);
    }
    Looked::Can(Candidate {
        key,
        kind: Kind::Tcp,
        family: parsed.family,
        transport,
        header,
        payload: parsed.length - header,
        sequence: u32::from_be_bytes([head[4], head[5], head[6], head[7]]),
        flags,
    })
}

fn look_udp(packet: &[u8], parsed: &Header, transport: usize) -> Looked {
    let Some(head) = packet.get(transport..).and_then(|rest| rest.first_chunk::<UDP_LENGTH>()) else {
        return Looked::Alone;
    };
    let key = key_of(packet, parsed, transport);
    let length = usize::from(u16::from_be_bytes([head[4], head[5]]));
    let header = transport + UDP_LENGTH;
    let has_checksum = head[6..8] != [0, 0];
    if !has_checksum || length != parsed.length - transport || header >= parsed.length {
        return Looked::Breaks(key);
    }
    let payload = parsed.length - header;
    let (family, kind) = (parsed.family, Kind::Udp);
    Looked::Can(Candidate { key, kind, family, transport, header, payload, sequence: 0, flags: 0 })
}

/// A number that packets of one flow share. Two flows may share one too: the headers are compared before packets are
/// joined.
fn key_of(packet: &[u8], parsed: &Header, transport: usize) -> u64 {
    let addresses = header::addresses(parsed.family, packet);
    let ports = packet.get(transport..transport + 4).unwrap_or_default();
    let mut key = u64::from(parsed.protocol);
    for part in addresses.chunks(4).chain([ports]) {
        let word = part.first_chunk::<4>().map_or(0, |word| u32::from_ne_bytes(*word));
        key = (key ^ u64::from(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    key
}

/// Whether the headers are those that division would write.
fn same_headers(first: &[u8], packet: &[u8], flow: &Flow) -> bool {
    let transport = flow.transport;
    let same = |range: Range<usize>| first.get(range.clone()) == packet.get(range);
    let same_network = match flow.family {
        // Version, length of header, type of service; flags; hops, protocol; addresses.
        Family::V4 => same(0..2) && same(6..10) && same(12..20) && is_next(packet, flow),
        // All but the length.
        Family::V6 => same(0..4) && same(6..40),
    };
    let same_transport = match flow.kind {
        // Ports; acknowledged; length of header; window; urgent pointer and options.
        Kind::Tcp => {
            same(transport..transport + 4)
                && same(transport + 8..transport + 13)
                && same(transport + 14..transport + 16)
                && same(transport + 18..flow.header)
        }
        Kind::Udp => same(transport..transport + 4),
    };
    same_network && same_transport
}

/// The identification of a packet that may be divided is its own: it must be the one that division would give it. That
/// of one that may not be divided has no meaning (RFC 6864 §4.1).
fn is_next(packet: &[u8], flow: &Flow) -> bool {
    let may_not_be_divided = packet.get(6).is_some_and(|byte| byte & 0x40 != 0);
    may_not_be_divided || identification(packet) == flow.next_identification
}

fn identification(packet: &[u8]) -> u16 {
    packet.get(4..6).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

fn has_right_checksum(packet: &[u8], family: Family, transport: usize, kind: Kind) -> bool {
    let protocol = if kind == Kind::Tcp { TCP } else { UDP };
    let sum = pseudo_header(header::addresses(family, packet), protocol, packet.len() - transport);
    let header_is_right = family == Family::V6 || is_zero(super::checksum::Sum::default().add(&packet[..transport]));
    header_is_right && is_zero(sum.add(&packet[transport..]))
}

fn is_zero(sum: super::checksum::Sum) -> bool {
    sum.finish() == [0, 0]
}
