//! From the device to the peers: reads what the kernel routes into the TUN device, finds the peer, takes a hop, divides
//! what is large, and sends as many datagrams as there are in as few calls as can be.
//!
//! A thread waits only when nothing is there: a batch is what came while the last one was sent, so that a single packet
//! goes at once, and many go together.

use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use portolan_net::Family;
use portolan_program::udp::{Answer, DropReason};

use super::answer::Answerer;
use super::batch::{Batch, Datagram, Place, address_of, group};
use super::counters::Tally;
use super::forwarder::{End, Ends, Shared};
use super::header::{self, Header};
use super::segment::{self, Large};
use super::socket::{Sending, path_mtu};
use super::table::{Held, Table, overhead};
use super::vnet::{self, VnetHeader};

/// Packets of one batch.
const READS_MAX: usize = 128;
/// The longest packet that the device hands over.
const PACKET_MAX: usize = 1 << 16;
/// Bytes of one batch: a few of the largest packets, so that all of it stays in a core's cache.
const ARENA_BYTES: usize = 4 * PACKET_MAX;
/// How often what was refused is sent in another form: each alone, then as fragments.
const ROUNDS_MAX: usize = 3;
/// The least that IPv6 carries (RFC 8200 §5).
const V6_LEAST: u32 = 1280;
/// The least that IPv4 carries (RFC 791 §3.2).
const V4_LEAST: u32 = 68;

/// One thread.
pub(super) struct Outward {
    shared: Arc<Shared>,
    ends: Arc<Ends>,
    tally: Arc<Tally>,
    held: Held,
    answerer: Answerer,
    batch: Batch,
    redo: Vec<Datagram>,
    /// Where each message begins among the datagrams, and how many it has.
    begins: Vec<(usize, usize)>,
    now_ms: u64,
}

/// How a packet meets the path.
#[derive(Debug, PartialEq, Eq)]
enum Fit {
    Fits,
    /// It is divided into fragments of up to so many bytes.
    Fragments(usize),
    /// The kernel divides the datagram.
    Outside,
    TooBig(u32),
}

fn fit(parsed: &Header, length: usize, limit: u32) -> Fit {
    if length <= limit as usize {
        return Fit::Fits;
    }
    match parsed.family {
        Family::V6 if limit < V6_LEAST && length <= V6_LEAST as usize => Fit::Outside,
        Family::V6 => Fit::TooBig(limit.max(V6_LEAST)),
        Family::V4 if parsed.dont_fragment => Fit::TooBig(limit),
        Family::V4 => Fit::Fragments(limit.max(V4_LEAST) as usize),
    }
}

impl Outward {
    pub(super) fn new(shared: Arc<Shared>, ends: Arc<Ends>, tally: Arc<Tally>, answerer: Answerer) -> Outward {
        let held = Held::new(shared.table.clone());
        Outward {
            shared,
            ends,
            tally,
            held,
            answerer,
            batch: Batch::new(ARENA_BYTES),
            redo: Vec::new(),
            begins: Vec::new(),
            now_ms: 0,
        }
    }

    /// Forwards until it is told to stop, or the device is gone.
    pub(super) fn run(mut self) -> End {
        let mut sending = Sending::default();
        while !self.shared.is_stopped() {
            self.batch.clear();
            self.now_ms = self.shared.now_ms();
            let table = self.held.current().clone();
            match self.fill(&table) {
                Ok(0) => self.wait(),
                Ok(_) => self.flush(&table, &mut sending),
                Err(errno) => return End::Lost(errno),
            }
        }
        End::Stopped
    }

    fn wait(&self) {
        let mut descriptors = [
            PollFd::new(self.ends.queue.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.shared.stop.as_fd(), PollFlags::POLLIN),
        ];
        // An interrupted wait is a short one.
        let _ = poll(&mut descriptors, PollTimeout::NONE);
    }

    /// Reads what is there, up to a batch. How many packets it was.
    fn fill(&mut self, table: &Table) -> Result<usize, Errno> {
        let (mut at, mut count) = (0, 0);
        while count < READS_MAX && at + PACKET_MAX <= self.batch.arena.len() {
            let mut before = [0; vnet::LENGTH];
            match self.ends.queue.read(&mut before, &mut self.batch.arena[at..at + PACKET_MAX]) {
                Ok(read) => {
                    count += 1;
                    let end = at + read.saturating_sub(vnet::LENGTH);
                    if self.take(table, &before, at..end).is_none() {
                        self.tally.dropped(DropReason::Malformed, 1);
                    }
                    at = end;
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                // The kernel dropped a packet that it could not describe.
                Err(Errno::EINVAL) => {
                    count += 1;
                    self.tally.dropped(DropReason::Malformed, 1);
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(count)
    }

    /// Takes one packet. `None` if it is malformed.
    fn take(&mut self, table: &Table, before: &[u8; vnet::LENGTH], range: Range<usize>) -> Option<()> {
        let vnet = VnetHeader::decode(before)?;
        let packet = self.batch.arena.get_mut(range.clone())?;
        let parsed = Header::parse(packet)?;
        if let (Some((start, offset)), None) = (vnet.checksum, vnet.segments) {
            let fits = segment::complete_checksum(packet, start, offset, parsed.protocol);
            fits.then_some(())?;
        }
        let large = match vnet.segments {
            Some(_) => Some(Large::measure(&vnet, &parsed, packet)?),
            None => None,
        };
        let count = large.as_ref().map_or(1, Large::count);
        let destination = header::destination(packet)?;
        let is_broadcast = matches!(destination, IpAddr::V4(address) if address.is_broadcast());
        if destination.is_multicast() || is_broadcast {
            self.tally.dropped(DropReason::NotUnicast, count);
            return Some(());
        }
        let range = range.start..range.start + parsed.length;
        let Some(peer) = table.lookup(destination) else {
            self.refuse(DropReason::NoRoute, Answer::NoRoute, (Place::Arena, range), &parsed, large.as_ref());
            return Some(());
        };
        if parsed.hops <= 1 {
            let answer = Answer::TimeExceeded;
            self.refuse(DropReason::TimeExceeded, answer, (Place::Arena, range), &parsed, large.as_ref());
            return Some(());
        }
        header::take_hop(parsed.family, &mut self.batch.arena[range.clone()]);
        match large {
            Some(large) => self.place_large(table, peer, range, &parsed, &large),
            None => self.place(table, peer, (Place::Arena, range), &parsed),
        }
        Some(())
    }

    /// The largest packet for a peer now.
    fn limit(&self, table: &Table, peer: u32) -> u32 {
        let known = table.peer(peer).and_then(|peer| peer.inside_max(self.now_ms));
        known.map_or(self.shared.mtu(), |known| known.min(self.shared.mtu()))
    }

    /// Makes datagrams of a packet that is whole.
    fn place(&mut self, table: &Table, peer: u32, at: (Place, Range<usize>), parsed: &Header) {
        match fit(parsed, at.1.len(), self.limit(table, peer)) {
            Fit::Fits => self.batch.add(peer, at.0, at.1),
            Fit::Outside => {
                self.batch.add(peer, at.0, at.1);
                self.mark_last_outside();
            }
            Fit::Fragments(limit) => {
                for fragment in segment::fragments(parsed, limit) {
                    let (place, begin) = (at.0, at.1.start);
                    self.batch.add_with_head(peer, parsed.transport, place, |bytes, head| {
                        segment::write_fragment(&bytes[begin..], parsed, &fragment, head);
                        begin + fragment.start..begin + fragment.end
                    });
                }
            }
            Fit::TooBig(bytes) => self.refuse(DropReason::TooBig, Answer::TooBig(bytes), at, parsed, None),
        }
    }

    /// Makes datagrams of a packet that is to be divided.
    fn place_large(&mut self, table: &Table, peer: u32, range: Range<usize>, parsed: &Header, large: &Large) {
        let met = fit(parsed, large.longest(), self.limit(table, peer));
        if let Fit::TooBig(bytes) = met {
            let at = (Place::Arena, range);
            return self.refuse(DropReason::TooBig, Answer::TooBig(bytes), at, parsed, Some(large));
        }
        for part in 0..large.count() {
            let begin = range.start;
            self.batch.add_with_head(peer, large.header, Place::Arena, |bytes, head| {
                let payload = large.write(&bytes[range.clone()], part, head);
                begin + payload.start..begin + payload.end
            });
            match met {
                Fit::Outside => self.mark_last_outside(),
                // Rare: a sender that lets routers divide what it did not divide itself.
                Fit::Fragments(_) => {
                    if let Some(datagram) = self.batch.datagrams.pop() {
                        self.place_again(table, &datagram);
                    }
                }
                Fit::Fits | Fit::TooBig(_) => {}
            }
        }
    }

    fn mark_last_outside(&mut self) {
        if let Some(last) = self.batch.datagrams.last_mut() {
            last.divided_outside = true;
        }
    }

    /// Makes datagrams of one that did not fit.
    fn place_again(&mut self, table: &Table, datagram: &Datagram) {
        let range = self.batch.gather(datagram);
        let Some(parsed) = Header::parse(self.batch.bytes(Place::Scratch, range.clone())) else { return };
        self.place(table, datagram.peer, (Place::Scratch, range), &parsed);
    }

    /// Drops a packet, and tells its sender.
    fn refuse(
        &mut self,
        reason: DropReason,
        answer: Answer,
        at: (Place, Range<usize>),
        parsed: &Header,
        large: Option<&Large>,
    ) {
        self.tally.dropped(reason, large.map_or(1, Large::count));
        let packet = self.batch.bytes(at.0, at.1);
        // What is quoted is what would have been sent: the first part, with its checksum.
        let first = large.map(|large| {
            let mut head = vec![0; large.header];
            let payload = large.write(packet, 0, &mut head);
            head.extend_from_slice(packet.get(payload).unwrap_or_default());
            head
        });
        if self.answerer.answer(answer, first.as_deref().unwrap_or(packet), parsed, self.now_ms) {
            self.tally.answer();
        }
    }

    /// Sends the batch.
    fn flush(&mut self, table: &Table, sending: &mut Sending) {
        for _ in 0..ROUNDS_MAX {
            if self.batch.datagrams.is_empty() {
                return;
            }
            self.batch.sort();
            for is_v6 in [false, true] {
                self.send_family(table, is_v6, sending);
            }
            self.batch.datagrams.clear();
            let redo = std::mem::take(&mut self.redo);
            for datagram in &redo {
                if datagram.is_alone {
                    self.batch.push_again(datagram);
                } else {
                    self.place_again(table, datagram);
                }
            }
            self.redo = redo;
            self.redo.clear();
        }
        self.tally.dropped(DropReason::TooBig, self.batch.datagrams.len());
    }

    /// Sends the datagrams to peers of one family.
    fn send_family(&mut self, table: &Table, is_v6: bool, sending: &mut Sending) {
        let ends = self.ends.clone();
        let Some((local, socket)) = ends.socket(is_v6) else { return };
        let divides = socket.divides && self.shared.divides();
        sending.clear();
        let mut at = 0;
        let mut begins = std::mem::take(&mut self.begins);
        begins.clear();
        while let Some(datagram) = self.batch.datagrams.get(at) {
            let to = address_of(table, datagram).filter(|to| to.is_ipv6() == is_v6);
            let Some(to) = to else {
                at += 1;
                continue;
            };
            let count = if divides { group(&self.batch.datagrams[at..]) } else { 1 };
            sending.begin(to, (count > 1).then(|| datagram.length()));
            for datagram in &self.batch.datagrams[at..at + count] {
                // SAFETY: the batch changes only after `sending` was cleared: nothing below adds to it before that.
                unsafe { self.batch.attach(datagram, sending) };
            }
            begins.push((at, count));
            at += count;
        }
        let mut from = 0;
        while from < sending.len() {
            let (first, count) = begins[from];
            let outside = self.batch.datagrams[first].divided_outside;
            if outside && socket.divide_outside(true).is_err() {
                self.tally.dropped(DropReason::UnderlayRefused, count);
                from += 1;
                continue;
            }
            let sent = sending.send(socket, from);
            if outside {
                // The same call has succeeded when the socket was opened.
                let _ = socket.divide_outside(false);
            }
            match sent {
                Ok(messages) => {
                    let done = &begins[from..(from + messages.max(1)).min(begins.len())];
                    let datagrams = done.iter().flat_map(|(at, count)| &self.batch.datagrams[*at..at + count]);
                    let (packets, bytes) =
                        datagrams.fold((0, 0), |(packets, bytes), it| (packets + 1, bytes + it.length()));
                    self.tally.pass(packets, bytes);
                    from += messages.max(1);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    self.failed(table, errno, first..first + count, local);
                    from += 1;
                }
            }
        }
        sending.clear();
        self.begins = begins;
    }

    /// One message was refused.
    fn failed(&mut self, table: &Table, errno: Errno, datagrams: Range<usize>, local: IpAddr) {
        let count = datagrams.len();
        match errno {
            // The device cannot take several datagrams in one message, or not of this length.
            Errno::EIO | Errno::EINVAL | Errno::EMSGSIZE if count > 1 => {
                if errno == Errno::EIO {
                    self.shared.stop_dividing();
                }
                let alone = self.batch.datagrams[datagrams].iter();
                self.redo.extend(alone.map(|it| it.alone(true)));
            }
            Errno::EMSGSIZE => {
                let datagram = self.batch.datagrams[datagrams.start];
                self.learn(table, &datagram, local);
                self.redo.push(datagram.alone(false));
            }
            Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM => self.tally.dropped(DropReason::UnderlayFull, count),
            _ => self.tally.dropped(DropReason::UnderlayRefused, count),
        }
    }

    /// A datagram is larger than the path: asks the kernel how much the path carries.
    fn learn(&self, table: &Table, datagram: &Datagram, local: IpAddr) {
        let Some(peer) = table.peer(datagram.peer) else { return };
        let known = path_mtu(local, peer.address).map_or(u32::MAX, |mtu| mtu.saturating_sub(overhead(&peer.address)));
        let less = (datagram.length() as u32).saturating_sub(1);
        peer.narrow(known.min(less).max(V4_LEAST), self.now_ms);
    }
}
