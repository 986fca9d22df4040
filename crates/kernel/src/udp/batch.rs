//! Datagrams of one batch on their way out: where their bytes lie, and which of them share one message.

use std::net::SocketAddr;
use std::ops::Range;

use super::segment::HEADER_MAX;
use super::socket::Sending;
use super::table::Table;

/// Datagrams in one message: the kernel's least limit (`UDP_MAX_SEGMENTS`, 64 until Linux 6.10).
const SEGMENTS_MAX: usize = 64;
/// Bytes in one message: the longest IP packet, less IPv6's header and UDP's.
const MESSAGE_MAX: usize = 65_535 - 48;

/// Where bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In what was read from the device.
    Arena,
    /// In what was written since.
    Scratch,
}

/// One datagram: a header that was written, and a payload that was not touched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Datagram {
    pub(super) peer: u32,
    /// Its place in the batch.
    order: u32,
    head: u32,
    head_length: u16,
    place: Place,
    body: u32,
    body_length: u32,
    /// Whether it goes in a message of its own.
    pub(super) is_alone: bool,
    /// Whether the kernel divides it if the path is narrower: IPv6 packets of up to 1280 bytes (RFC 2473 §7.1).
    pub(super) divided_outside: bool,
}

impl Datagram {
    pub(super) fn length(&self) -> usize {
        usize::from(self.head_length) + self.body_length as usize
    }

    /// The same, in a message of its own or not.
    pub(super) fn alone(self, is_alone: bool) -> Datagram {
        Datagram { is_alone, ..self }
    }
}

/// A batch.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) arena: Vec<u8>,
    pub(super) scratch: Vec<u8>,
    pub(super) datagrams: Vec<Datagram>,
}

impl Batch {
    pub(super) fn new(arena: usize) -> Batch {
        Batch { arena: vec![0; arena], scratch: Vec::new(), datagrams: Vec::new() }
    }

    pub(super) fn clear(&mut self) {
        self.scratch.clear();
        self.datagrams.clear();
    }

    pub(super) fn bytes(&self, place: Place, range: Range<usize>) -> &[u8] {
        let bytes = if place == Place::Arena { &self.arena } else { &self.scratch };
        bytes.get(range).unwrap_or_default()
    }

    /// Adds a datagram whose header is written by `write`, which says where the payload is.
    pub(super) fn add_with_head(
        &mut self,
        peer: u32,
        head_length: usize,
        place: Place,
        write: impl FnOnce(&[u8], &mut [u8]) -> Range<usize>,
    ) {
        let head = self.scratch.len();
        let mut written = [0; HEADER_MAX];
        let written = &mut written[..head_length.min(HEADER_MAX)];
        let body = match place {
            Place::Arena => write(&self.arena, written),
            Place::Scratch => write(&self.scratch, written),
        };
        self.scratch.extend_from_slice(written);
        self.push(peer, head..head + head_length, place, body);
    }

    /// Adds a datagram that lies in one piece.
    pub(super) fn add(&mut self, peer: u32, place: Place, range: Range<usize>) {
        self.push(peer, 0..0, place, range);
    }

    fn push(&mut self, peer: u32, head: Range<usize>, place: Place, body: Range<usize>) {
        self.datagrams.push(Datagram {
            peer,
            order: self.datagrams.len() as u32,
            head: head.start as u32,
            head_length: head.len() as u16,
            place,
            body: body.start as u32,
            body_length: body.len() as u32,
            is_alone: false,
            divided_outside: false,
        });
    }

    /// Adds a datagram again.
    pub(super) fn push_again(&mut self, datagram: &Datagram) {
        self.datagrams.push(Datagram { order: self.datagrams.len() as u32, ..*datagram });
    }

    /// Copies a datagram into one piece of the scratch.
    pub(super) fn gather(&mut self, datagram: &Datagram) -> Range<usize> {
        let begin = self.scratch.len();
        let (head, body) = ranges(datagram);
        self.scratch.extend_from_within(head);
        match datagram.place {
            Place::Arena => self.scratch.extend_from_slice(self.arena.get(body).unwrap_or_default()),
            Place::Scratch => self.scratch.extend_from_within(body),
        }
        begin..self.scratch.len()
    }

    /// Brings the datagrams of each peer together, in their order.
    pub(super) fn sort(&mut self) {
        let is_mixed = self.datagrams.windows(2).any(|pair| pair[0].peer != pair[1].peer);
        if is_mixed {
            self.datagrams.sort_unstable_by_key(|datagram| (datagram.peer, datagram.order));
        }
    }

    /// Adds a datagram's bytes to the last message.
    ///
    /// # Safety
    ///
    /// The batch must not change until the messages are cleared.
    pub(super) unsafe fn attach(&self, datagram: &Datagram, sending: &mut Sending) {
        let (head, body) = ranges(datagram);
        // SAFETY: the caller keeps the batch as it is until the messages are cleared.
        unsafe {
            sending.part(self.bytes(Place::Scratch, head));
            sending.part(self.bytes(datagram.place, body));
        }
    }
}

fn ranges(datagram: &Datagram) -> (Range<usize>, Range<usize>) {
    let head = datagram.head as usize;
    let body = datagram.body as usize;
    (head..head + usize::from(datagram.head_length), body..body + datagram.body_length as usize)
}

/// How many of the datagrams, from the first on, share a message: to one peer, of one length, where the last may be
/// shorter.
pub(super) fn group(datagrams: &[Datagram]) -> usize {
    let Some((first, rest)) = datagrams.split_first() else { return 0 };
    if first.is_alone || first.divided_outside {
        return 1;
    }
    let each = first.length();
    let (mut total, mut count) = (each, 1);
    for datagram in rest.iter().take(SEGMENTS_MAX - 1) {
        let length = datagram.length();
        let fits = datagram.peer == first.peer
            && !datagram.is_alone
            && !datagram.divided_outside
            && length <= each
            && total + length <= MESSAGE_MAX;
        if !fits {
            break;
        }
        total += length;
        count += 1;
        if length < each {
            break;
        }
    }
    count
}

/// Where a peer is.
pub(super) fn address_of(table: &Table, datagram: &Datagram) -> Option<SocketAddr> {
    table.peer(datagram.peer).map(|peer| peer.address)
}
