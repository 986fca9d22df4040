//! Observe and apply.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use nix::errno::Errno;
use portolan_net::Family;
use portolan_program::nftables::{Change, Key, Name, Program, SetKind, TableKey, blank, diff, sort_balancing};

use super::constants::{GET_CHAIN, GET_ELEMENT, GET_RULE, GET_SET, GET_TABLE, HEADER_LENGTH, element, rule, set};
use super::decode::{self, ElementReader};
use super::encode::{Encoded, batch_frame, encode, forget_client, remove_rule, start};
use super::foreign;
use crate::error::KernelError;
use crate::rawnetlink::{DumpPart, MessageBuilder, OwnedMessage, Protocol, Socket};

/// Changes in one transaction: 20,000 elements are about 2 MiB, of which there are three copies on their
/// way. A longer list is split. Its phases make every split safe: what is there only misses what is
/// yet to come, and nothing is sent to a backend that is not there.
const TRANSACTION_CHANGES_MAX: usize = 20_000;

/// How often a transaction is tried again without the changes that the kernel objected to, before what
/// is left is halved. Two rounds find a bad element: its message first, then itself.
const ROUNDS_MAX: u32 = 6;

/// How often a transaction that met another one is tried again.
const CONFLICTS_MAX: u32 = 8;

/// How often all is read again because others changed the ruleset meanwhile.
const OBSERVATIONS_MAX: u32 = 8;

/// Our nftables tables in one network namespace.
#[derive(Debug)]
pub struct NftablesRoom {
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

impl NftablesRoom {
    /// Opens the room in the network namespace of the calling thread, and checks that the kernel has
    /// all that our rules need: it is given such rules in a transaction that is never completed.
    ///
    /// # Errors
    ///
    /// If the kernel lacks nf_tables or one of its expressions, or the process may not change it.
    pub fn open() -> Result<NftablesRoom, KernelError> {
        let mut room = NftablesRoom { socket: Socket::open(Protocol::Netfilter, &[])? };
        for family in Family::ALL {
            room.probe(family)?;
        }
        Ok(room)
    }

    /// Reads our tables. What is in them and not of this room is in the program as unknown.
    pub fn observe(&mut self) -> Result<Program, KernelError> {
        let mut last = KernelError::Unstable(OBSERVATIONS_MAX);
        for _ in 0..OBSERVATIONS_MAX {
            match self.observe_once() {
                Ok(program) => return Ok(program),
                // A table that goes away between two dumps.
                Err(error) if error.errno() == Some(Errno::ENOENT) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// For each rule of a chain of anybody's table, the chain that it leads to, if to any. It reads that chain alone;
    /// a chain that is not there has no rules.
    pub fn targets(&mut self, family: Family, table: &str, chain: &str) -> Result<Vec<Option<String>>, KernelError> {
        let rules = self.dump(GET_RULE, family, |it| {
            it.put_str(rule::TABLE, table).put_str(rule::CHAIN, chain);
        });
        match rules {
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(Vec::new()),
            rules => Ok(rules?.iter().map(foreign::leads_to).collect()),
        }
    }

    /// The port that marks notifications of our own requests.
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Makes changes, in their order, in as few transactions as their number allows. Changes that the
    /// kernel refuses are left out and reported; the others are made.
    pub fn apply(&mut self, changes: &[Change]) -> Report {
        let before = self.socket.sent();
        let mut failed = Vec::new();
        let mut start = 0;
        while start < changes.len() {
            let rest = changes.get(start..).unwrap_or_default();
            let turn = rest.first().map(Turn::of);
            let alike = rest.iter().take_while(|change| Some(Turn::of(change)) == turn).count();
            let range = start..start + alike.min(TRANSACTION_CHANGES_MAX);
            start = range.end;
            match turn {
                Some(Turn::RemoveRules) => self.remove_rules(range, changes, &mut failed),
                Some(Turn::ForgetClients) => self.forget_clients(range, changes, &mut failed),
                Some(Turn::Others) | None => self.apply_some(range.collect(), changes, &mut failed),
            }
        }
        failed.sort_by_key(|(index, _)| *index);
        Report { messages: self.socket.sent() - before, failed }
    }

    /// Deletes our tables.
    pub fn clean(&mut self) -> Result<Report, KernelError> {
        let observed = self.observe()?;
        Ok(self.apply(&diff(&Program::default(), &observed)))
    }

    /// Removes rules. They are named by numbers that the kernel gives, so it is asked first. They come in
    /// a transaction of their own, behind all that made them useless.
    fn remove_rules(&mut self, range: Range<usize>, all: &[Change], failed: &mut Vec<(usize, KernelError)>) {
        let mut messages = Vec::new();
        for index in range.clone() {
            let Some(Change::RemoveRule(key, chain, wanted)) = all.get(index) else { continue };
            let found = self.dump(GET_RULE, key.family, |it| {
                it.put_str(rule::TABLE, key.name.as_str()).put_str(rule::CHAIN, chain);
            });
            let rules = match found {
                Ok(rules) => rules,
                Err(error) => {
                    failed.push((index, error));
                    continue;
                }
            };
            // A rule that is gone already needs nothing.
            let is_wanted = |message: &&OwnedMessage| {
                decode::read_rule(message)
                    .is_some_and(|(table, name, rule)| table == *key && name == *chain && rule.is_same(wanted))
            };
            if let Some(handle) = rules.iter().find(is_wanted).and_then(decode::handle_of) {
                messages.push(Encoded { bytes: remove_rule(*key, chain, handle), changes: index..index + 1 });
            }
        }
        if messages.is_empty() {
            return;
        }
        if let Err(errors) = self.transaction(&messages) {
            let error = errors.into_iter().next().map_or(KernelError::Malformed("no reason"), |(_, error)| error);
            failed.extend(messages.iter().map(|message| (message.changes.start, error.clone())));
        }
    }

    /// Takes clients of endpoints that are gone out of the maps that packets filled. Who is remembered is read
    /// first, once for each map. A client that is missed is refused by the rules, and forgotten then.
    fn forget_clients(&mut self, range: Range<usize>, all: &[Change], failed: &mut Vec<(usize, KernelError)>) {
        let mut maps: BTreeMap<(TableKey, &Name), Vec<usize>> = BTreeMap::new();
        for index in range {
            if let Some(Change::ForgetClients { table, clients, .. }) = all.get(index) {
                maps.entry((*table, clients)).or_default().push(index);
            }
        }
        for ((table, clients), indices) in maps {
            let gone: BTreeSet<Key> = indices.iter().filter_map(|index| endpoint_of(all.get(*index)?)).collect();
            if let Err(error) = self.forget(table, clients, &gone) {
                failed.extend(indices.into_iter().map(|index| (index, error.clone())));
            }
        }
    }

    fn forget(&mut self, table: TableKey, clients: &str, gone: &BTreeSet<Key>) -> Result<(), KernelError> {
        let mut builder = start(GET_ELEMENT, 0, table.family);
        builder.put_str(element::LIST_TABLE, table.name.as_str()).put_str(element::LIST_SET, clients);
        let mut found = Vec::new();
        self.socket.dump_each(builder.finish(), |part| match part {
            DumpPart::Begin => found.clear(),
            DumpPart::Object(message) => {
                let list = message.attributes(HEADER_LENGTH);
                found.extend(decode::clients_of(table.family, &list, gone));
            }
        })?;
        let message = |(index, key): (usize, Vec<u8>)| forget_client(table, clients, &key, index);
        let mut messages: Vec<Encoded> = found.into_iter().enumerate().map(message).collect();
        for _ in 0..ROUNDS_MAX {
            if messages.is_empty() {
                return Ok(());
            }
            let Err(errors) = self.transaction(&messages) else { return Ok(()) };
            // One whose time was over meanwhile is forgotten already.
            let mut expired = BTreeSet::new();
            for (position, error) in errors {
                match (position, error.errno()) {
                    (Some(position), Some(Errno::ENOENT)) => drop(expired.insert(position)),
                    _ if is_conflict(&error) => {}
                    _ => return Err(error),
                }
            }
            let mut position = 0..;
            messages.retain(|_| position.next().is_none_or(|position| !expired.contains(&position)));
        }
        Err(KernelError::Unstable(ROUNDS_MAX))
    }

    fn probe(&mut self, family: Family) -> Result<(), KernelError> {
        let changes = diff(&blank(family), &Program::default());
        let changes: Vec<&Change> = changes.iter().collect();
        let (begin, _) = batch_frame();
        let mut messages = vec![begin];
        messages.extend(encode(&changes, |_| false).into_iter().map(|message| message.bytes));
        let Err(errors) = self.socket.transaction(&mut messages) else { return Ok(()) };
        let error = errors.into_iter().next().map_or(KernelError::Malformed("no reason"), |(_, error)| error);
        match error.errno() {
            // Tables of ours with another shape are no lack of the kernel; they will be replaced.
            Some(Errno::EEXIST | Errno::EBUSY) => Ok(()),
            Some(errno @ (Errno::EPERM | Errno::EACCES)) => {
                Err(KernelError::system("change nftables; run as root or with CAP_NET_ADMIN", errno))
            }
            Some(errno @ (Errno::EOPNOTSUPP | Errno::ENOENT | Errno::EINVAL | Errno::EAFNOSUPPORT)) => {
                Err(KernelError::system(missing_feature(family), errno))
            }
            _ => Err(error),
        }
    }

    fn observe_once(&mut self) -> Result<Program, KernelError> {
        let mut program = Program::default();
        for family in Family::ALL {
            program.tables.extend(decode::tables(&self.dump(GET_TABLE, family, |_| {})?));
        }
        for key in program.tables.keys().copied().collect::<Vec<_>>() {
            let sets = self.dump(GET_SET, key.family, |it| {
                it.put_str(set::TABLE, key.name.as_str());
            })?;
            let chains = self.dump(GET_CHAIN, key.family, |_| {})?;
            let rules = self.dump(GET_RULE, key.family, |it| {
                it.put_str(rule::TABLE, key.name.as_str());
            })?;
            let Some(table) = program.tables.get_mut(&key) else { continue };
            table.sets.extend(mine(key, sets.iter().filter_map(decode::read_set)));
            table.chains.extend(mine(key, chains.iter().filter_map(decode::read_chain)));
            for (name, rule) in mine(key, rules.iter().filter_map(decode::read_rule)) {
                if let Some(chain) = table.chains.get_mut(&name) {
                    chain.rules.push(rule);
                }
            }
            for chain in table.chains.values_mut() {
                sort_balancing(&mut chain.rules);
            }
            for (name, into) in table.sets.iter_mut().filter(|(_, set)| is_read(set.kind)) {
                let mut builder = start(GET_ELEMENT, 0, key.family);
                builder.put_str(element::LIST_TABLE, key.name.as_str()).put_str(element::LIST_SET, name);
                let mut reader = ElementReader::new(key.family, into.kind);
                self.socket.dump_each(builder.finish(), |part| match part {
                    DumpPart::Begin => reader = ElementReader::new(key.family, into.kind),
                    DumpPart::Object(message) => reader.take(&message.attributes(HEADER_LENGTH)),
                })?;
                reader.finish(into);
            }
        }
        Ok(program)
    }

    fn dump(
        &mut self,
        kind: u16,
        family: Family,
        fill: impl FnOnce(&mut MessageBuilder),
    ) -> Result<Vec<OwnedMessage>, KernelError> {
        let mut builder = start(kind, 0, family);
        fill(&mut builder);
        self.socket.dump(builder.finish())
    }

    /// Makes the changes at these positions in one transaction, without those that the kernel refuses.
    fn apply_some(&mut self, mut alive: Vec<usize>, all: &[Change], failed: &mut Vec<(usize, KernelError)>) {
        let mut alone = BTreeSet::new();
        let mut conflicts = 0;
        let mut round = 0;
        while !alive.is_empty() {
            let changes: Vec<&Change> = alive.iter().filter_map(|index| all.get(*index)).collect();
            let messages = encode(&changes, |position| alone.contains(&alive[position]));
            let Err(errors) = self.transaction(&messages) else { return };
            if errors.iter().any(|(_, error)| is_conflict(error)) && conflicts < CONFLICTS_MAX {
                conflicts += 1;
                continue;
            }
            round += 1;
            let blamed = blame(&messages, errors);
            let general = blamed.general;
            if blamed.changes.is_empty() || round > ROUNDS_MAX {
                let first = blamed.changes.into_iter().next().map(|(_, error)| error);
                let error = general.or(first).unwrap_or(KernelError::Malformed("no reason"));
                self.halve(&alive, all, &error, failed);
                return;
            }
            let mut refused = BTreeSet::new();
            for (range, error) in blamed.changes {
                if range.len() == 1 {
                    let index = alive[range.start];
                    if refused.insert(index) {
                        failed.push((index, error));
                    }
                } else {
                    alone.extend(range.map(|position| alive[position]));
                }
            }
            alive.retain(|index| !refused.contains(index));
        }
    }

    /// Where the kernel does not say which change it objects to, one half is made without the other.
    fn halve(&mut self, alive: &[usize], all: &[Change], error: &KernelError, failed: &mut Vec<(usize, KernelError)>) {
        let is_for_all = matches!(error.errno(), Some(Errno::EPERM | Errno::EOPNOTSUPP | Errno::EBADF));
        if alive.len() < 2 || is_for_all {
            failed.extend(alive.iter().map(|index| (*index, error.clone())));
            return;
        }
        let (first, second) = alive.split_at(alive.len() / 2);
        self.apply_some(first.to_vec(), all, failed);
        self.apply_some(second.to_vec(), all, failed);
    }

    /// One transaction. Errors come with the position of the message, or none if it is nobody's.
    fn transaction(&mut self, messages: &[Encoded]) -> Result<(), Vec<(Option<usize>, KernelError)>> {
        let (begin, end) = batch_frame();
        let mut list = Vec::with_capacity(messages.len() + 2);
        list.push(begin);
        list.extend(messages.iter().map(|message| message.bytes.clone()));
        list.push(end);
        let positions = 1..=messages.len();
        let place = |(index, error): (usize, KernelError)| (positions.contains(&index).then(|| index - 1), error);
        self.socket.transaction(&mut list).map_err(|errors| errors.into_iter().map(place).collect())
    }
}

/// How a change is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    RemoveRules,
    ForgetClients,
    Others,
}

impl Turn {
    fn of(change: &Change) -> Turn {
        match change {
            Change::RemoveRule(..) => Turn::RemoveRules,
            Change::ForgetClients { .. } => Turn::ForgetClients,
            _ => Turn::Others,
        }
    }
}

fn endpoint_of(change: &Change) -> Option<Key> {
    match change {
        Change::ForgetClients { key, .. } => Some(*key),
        _ => None,
    }
}

/// Whether a set's elements are part of a program.
fn is_read(kind: SetKind) -> bool {
    kind != SetKind::Unknown && !kind.is_learned()
}

fn missing_feature(family: Family) -> String {
    format!(
        "use nftables for {family}: the kernel needs Linux 5.6 or newer with nf_tables and its expressions fib, ct, \
         numgen, dynset, nat, masq and reject (CONFIG_NF_TABLES, CONFIG_NFT_FIB_INET, CONFIG_NFT_NUMGEN, \
         CONFIG_NFT_NAT, CONFIG_NFT_MASQ, CONFIG_NFT_REJECT); load them with `modprobe nf_tables`, or choose another Services mode"
    )
}

/// What belongs to one table.
fn mine<N, T>(key: TableKey, items: impl Iterator<Item = (TableKey, N, T)>) -> impl Iterator<Item = (N, T)> {
    items.filter(move |(table, ..)| *table == key).map(|(_, name, item)| (name, item))
}

/// Whether another transaction came between (`NFNL_BATCH_GENID`, module loading).
fn is_conflict(error: &KernelError) -> bool {
    matches!(error.errno(), Some(Errno::ERESTART | Errno::EAGAIN | Errno::EINTR))
}

struct Blame {
    /// Ranges of changes, each with the error of its message.
    changes: Vec<(Range<usize>, KernelError)>,
    /// An error that no message is to blame for.
    general: Option<KernelError>,
}

fn blame(messages: &[Encoded], errors: Vec<(Option<usize>, KernelError)>) -> Blame {
    let mut blame = Blame { changes: Vec::new(), general: None };
    for (position, error) in errors {
        match position.and_then(|position| messages.get(position)) {
            Some(message) => blame.changes.push((message.changes.clone(), error)),
            None => blame.general = Some(error),
        }
    }
    blame
}
