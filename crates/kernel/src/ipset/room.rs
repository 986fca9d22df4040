//! Observe and apply.

use std::collections::BTreeMap;

use nix::errno::Errno;
use portolan_program::ipset::{Change, Entry, IpSet, Program, SetKey, SetKind, diff};

use super::wire::{self, Command, HEADER_LENGTH};
use crate::error::KernelError;
use crate::rawnetlink::{DumpPart, Protocol, Socket};

/// Our sets in one network namespace: that of the thread which opened it.
#[derive(Debug)]
pub struct IpsetRoom {
    socket: Socket,
}

/// What became of changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How many netlink messages were sent.
    pub messages: usize,
    /// The changes that the kernel did not make, by their position, and why. All others were made.
    pub failed: Vec<(usize, KernelError)>,
}

impl IpsetRoom {
    /// Opens the room, and asks for the sets that are there: the kernel loads the module `ip_set` for that.
    ///
    /// # Errors
    ///
    /// If the kernel has no sets, or the process may not use them.
    pub fn open() -> Result<IpsetRoom, KernelError> {
        let mut room = IpsetRoom { socket: Socket::open(Protocol::Netfilter, &[])? };
        match room.observe() {
            Ok(_) => Ok(room),
            Err(error) => match error.errno() {
                Some(errno @ (Errno::EINVAL | Errno::EOPNOTSUPP)) => Err(KernelError::system(
                    "use sets: the kernel has them not (CONFIG_IP_SET); load them with `modprobe ip_set`, or choose \
                     another Services mode",
                    errno,
                )),
                _ => Err(error),
            },
        }
    }

    /// Reads our sets. Entries that this room cannot have written are not in the program.
    pub fn observe(&mut self) -> Result<Program, KernelError> {
        let mut sets: BTreeMap<SetKey, (SetKind, Vec<Entry>)> = BTreeMap::new();
        self.socket.dump_each(wire::list(), |part| match part {
            DumpPart::Begin => sets.clear(),
            DumpPart::Object(message) => {
                let attributes = message.attributes(HEADER_LENGTH);
                // The kind of a set stands in its first part alone.
                let Some(head) = wire::read_part(&attributes, None) else { return };
                let kind = head.kind.or_else(|| sets.get(&head.key).map(|(kind, _)| kind.clone()));
                let Some(kind) = kind else { return };
                let entries = wire::read_part(&attributes, Some(&kind)).map(|part| part.entries).unwrap_or_default();
                sets.entry(head.key).or_insert_with(|| (kind, Vec::new())).1.extend(entries);
            }
        })?;
        let read = |(key, (kind, entries)): (SetKey, (SetKind, Vec<Entry>))| {
            (key, IpSet { kind, entries: entries.into_iter().map(|entry| (entry, None)).collect() })
        };
        Ok(Program { sets: sets.into_iter().map(read).collect() })
    }

    /// Makes changes, in their order. One that fails does not stop the others.
    pub fn apply(&mut self, changes: &[Change]) -> Report {
        let before = self.socket.sent();
        let outcomes = self.socket.batch(changes.iter().map(encode).collect());
        let failed = changes.iter().zip(outcomes).enumerate().filter_map(|(at, (change, outcome))| {
            let error = outcome.err()?;
            let is_gone = error.errno() == Some(Errno::ENOENT);
            let removes = matches!(change, Change::Clear(_) | Change::Destroy(_));
            (!(is_gone && removes)).then_some((at, error))
        });
        let failed = failed.collect();
        Report { messages: self.socket.sent() - before, failed }
    }

    /// Deletes our sets. Rules that look them up must be gone before.
    pub fn clean(&mut self) -> Result<Report, KernelError> {
        let observed = self.observe()?;
        Ok(self.apply(&diff(&observed, &Program::default())))
    }
}

/// Additions of what is there, and removals of what is not, are fine to the kernel as long as `NLM_F_EXCL` is not
/// given.
fn encode(change: &Change) -> Vec<u8> {
    match change {
        Change::Clear(key) | Change::Destroy(key) => wire::about_set(Command::Destroy, *key),
        Change::Create(key, kind) => wire::create(*key, kind),
        Change::Add(key, entry) => wire::entry(Command::Add, *key, entry),
        Change::Remove(key, entry) => wire::entry(Command::Remove, *key, entry),
        Change::Flush(key) => wire::about_set(Command::Flush, *key),
    }
}
