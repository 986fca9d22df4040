//! From the peers to the device: receives as many datagrams as there are in one call, drops what no peer sent, joins
//! packets that follow each other in a flow, and writes them to the TUN device.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use portolan_program::udp::DropReason;

use super::coalesce::{Coalescer, PIECES_MAX, Write};
use super::counters::Tally;
use super::forwarder::{End, Ends, Shared};
use super::header::Header;
use super::socket::{Message, Receiving};
use super::table::{Held, Table};

/// Messages of one batch.
const MESSAGES_MAX: usize = 32;
/// Messages of one batch while they are long, so that all of it stays in a core's cache.
const LONG_MESSAGES_MAX: usize = 4;
/// From how many bytes on a batch counts as long.
const LONG_BATCH: usize = 1 << 17;

/// One thread.
pub(super) struct Inward {
    shared: Arc<Shared>,
    ends: Arc<Ends>,
    tally: Arc<Tally>,
    held: Held,
    coalescer: Coalescer,
    most: usize,
}

impl Inward {
    pub(super) fn new(shared: Arc<Shared>, ends: Arc<Ends>, tally: Arc<Tally>, divides_udp: bool) -> Inward {
        let held = Held::new(shared.table.clone());
        Inward { shared, ends, tally, held, coalescer: Coalescer::new(divides_udp), most: MESSAGES_MAX }
    }

    /// Forwards until it is told to stop, or the device is gone.
    pub(super) fn run(mut self) -> End {
        let mut receiving = Receiving::new(MESSAGES_MAX);
        let ends = self.ends.clone();
        while !self.shared.is_stopped() {
            let mut count = 0;
            for (_, socket) in [false, true].into_iter().filter_map(|is_v6| ends.socket(is_v6)) {
                // An error that waits at a socket is one of an earlier message's: it is gone once it was read.
                let received = receiving.receive(socket, self.most).unwrap_or(0);
                count += received;
                if let Err(errno) = self.deliver(&receiving, received) {
                    return End::Lost(errno);
                }
            }
            if count == 0 {
                self.wait();
            }
        }
        End::Stopped
    }

    fn wait(&self) {
        let stop = PollFd::new(self.shared.stop.as_fd(), PollFlags::POLLIN);
        let ends = [self.ends.socket(false), self.ends.socket(true)];
        let [v4, v6] = ends.map(|it| it.map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        // An interrupted wait is a short one.
        let _ = match (v4, v6) {
            (Some(one), Some(other)) => poll(&mut [stop, one, other], PollTimeout::NONE),
            (Some(one), None) | (None, Some(one)) => poll(&mut [stop, one], PollTimeout::NONE),
            (None, None) => poll(&mut [stop], PollTimeout::NONE),
        };
    }

    fn deliver(&mut self, receiving: &Receiving, messages: usize) -> Result<(), Errno> {
        if messages == 0 {
            return Ok(());
        }
        let table = self.held.current().clone();
        self.coalescer.clear();
        let (mut bytes, mut known) = (0, None);
        for message in (0..messages).filter_map(|index| receiving.message(index)) {
            bytes += message.length;
            self.open(receiving.buffer(), &message, &table, &mut known);
        }
        self.most = if bytes > LONG_BATCH { LONG_MESSAGES_MAX } else { MESSAGES_MAX };
        self.coalescer.finish(receiving.buffer());
        for write in &self.coalescer.ready {
            self.write(receiving.buffer(), write)?;
        }
        Ok(())
    }

    /// Takes the packets out of a message. `known` is the peer that sent the one before.
    fn open(&mut self, buffer: &[u8], message: &Message, table: &Table, known: &mut Option<SocketAddr>) {
        let each = message.each.max(1);
        let datagrams = message.length.div_ceil(each).max(1);
        let is_known = message.source.is_some()
            && (message.source == *known || message.source.is_some_and(|source| table.knows(source)));
        if !is_known {
            return self.tally.dropped(DropReason::UnknownPeer, datagrams);
        }
        *known = message.source;
        if message.is_cut || message.length == 0 {
            return self.tally.dropped(DropReason::Malformed, datagrams);
        }
        let end = message.begin + message.length;
        for begin in (message.begin..end).step_by(each) {
            let packet = buffer.get(begin..(begin + each).min(end)).unwrap_or_default();
            match Header::parse(packet) {
                Some(parsed) => self.coalescer.push(buffer, begin..begin + parsed.length, &parsed),
                None => self.tally.dropped(DropReason::Malformed, 1),
            }
        }
    }

    fn write(&self, buffer: &[u8], write: &Write) -> Result<(), Errno> {
        let mut parts = [IoSlice::new(&[]); PIECES_MAX + 2];
        let mut count = 1;
        parts[0] = IoSlice::new(&write.vnet);
        if !write.head().is_empty() {
            parts[1] = IoSlice::new(write.head());
            count = 2;
        }
        for piece in self.coalescer.pieces(write) {
            if let Some(part) = parts.get_mut(count) {
                *part = IoSlice::new(buffer.get(piece).unwrap_or_default());
                count += 1;
            }
        }
        loop {
            match self.ends.queue.write(&parts[..count]) {
                Ok(_) => {
                    // What stands in a joined packet's own header, each had.
                    let heads = write.head().len() * (write.packets - 1);
                    self.tally.pass(write.packets, write.length + heads);
                    return Ok(());
                }
                Err(Errno::EINTR) => {}
                Err(errno @ (Errno::EBADFD | Errno::EBADF | Errno::ENODEV)) => return Err(errno),
                Err(_) => {
                    self.tally.dropped(DropReason::DeviceRefused, write.packets);
                    return Ok(());
                }
            }
        }
    }
}
