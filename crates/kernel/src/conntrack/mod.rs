//! Connection tracking, over ctnetlink (`linux/netfilter/nfnetlink_conntrack.h`).
//!
//! It lists the UDP entries of a family, deletes single ones, and counts all. What is stale is not decided
//! here. An entry is deleted by its tuple *and* its number, so that a new connection, which took the place of
//! the one that was seen, is left alone.

mod addresses;
mod message;

pub use addresses::local_addresses;

use std::net::SocketAddr;

use nix::errno::Errno;
use portolan_net::Family;

use crate::error::KernelError;
use crate::rawnetlink::{DumpPart, Protocol, Socket};

/// One direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// Where its packets come from.
    pub source: SocketAddr,
    /// Where they go.
    pub destination: SocketAddr,
}

/// A UDP flow that the kernel knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    /// The packets of the one who began, before any translation.
    pub original: Tuple,
    /// The packets that answer, before they are translated back: their source is who really serves.
    pub reply: Tuple,
    /// Whether an answer was seen.
    pub is_answered: bool,
    /// The kernel's number of it. Another flow of the same tuple has another.
    pub id: u32,
    /// The conntrack zone; 0 where nobody sets one.
    pub zone: u16,
}

/// How many connections there are and may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// Those that there are, of every protocol.
    pub entries: u32,
    /// `nf_conntrack_max`; `None` on a kernel that does not tell (before 5.11).
    pub most: Option<u32>,
}

/// Connection tracking in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
}

impl Conntrack {
    /// Opens a socket.
    pub fn open() -> Result<Conntrack, KernelError> {
        Ok(Conntrack { socket: Socket::open(Protocol::Netfilter, &[])? })
    }

    /// The UDP entries of a family that are asked for. Kernels from 5.8 on look at no other ones, and what is
    /// not asked for takes no memory.
    pub fn select_udp(
        &mut self,
        family: Family,
        mut is_wanted: impl FnMut(&Entry) -> bool,
    ) -> Result<Vec<Entry>, KernelError> {
        let mut entries = Vec::new();
        self.socket.dump_each(message::list_udp(family), |part| match part {
            DumpPart::Begin => entries.clear(),
            DumpPart::Object(object) => {
                entries.extend(message::read_udp(object.payload).filter(|entry| is_wanted(entry)));
            }
        })?;
        Ok(entries)
    }

    /// Deletes entries; returns how many there still were, and what the kernel refused.
    pub fn delete(&mut self, entries: &[Entry]) -> (usize, Vec<(Entry, KernelError)>) {
        let outcomes = self.socket.batch(entries.iter().map(message::delete).collect());
        let mut deleted = 0;
        let mut refused = Vec::new();
        for (entry, outcome) in entries.iter().zip(outcomes) {
            match outcome {
                Ok(()) => deleted += 1,
                // It ended by itself meanwhile.
                Err(error) if error.errno() == Some(Errno::ENOENT) => {}
                Err(error) => refused.push((*entry, error)),
            }
        }
        (deleted, refused)
    }

    /// How many connections there are.
    pub fn count(&mut self) -> Result<Count, KernelError> {
        let answers = self.socket.query(message::statistics())?;
        let count = answers.iter().find_map(|answer| message::read_count(&answer.payload));
        count.ok_or(KernelError::Malformed("the statistics of connection tracking have no count"))
    }
}
