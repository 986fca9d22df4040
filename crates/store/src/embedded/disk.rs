//! What the embedded store keeps on disk: one table of records by revision and key, the leases, and
//! the two revisions that bound history.
//!
//! ```text
//! records   revision (8 bytes, big endian) ++ key  ->  kind, create revision, version, lease, value
//! leases    id  ->  time to live in milliseconds
//! meta      "revision" | "compacted" | "format"  ->  number
//! ```
//!
//! A record is written once and never changed; compaction removes those that are neither watchable
//! nor a key's present version. So a write costs one insertion whatever the store holds.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::state::{Change, Lease, State};
use crate::error::StoreError;
use crate::types::{Event, EventKind, KeyValue, LeaseId, Revision};

const RECORDS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("records");
const LEASES: TableDefinition<i64, u64> = TableDefinition::new("leases");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

const META_REVISION: &str = "revision";
const META_COMPACTED: &str = "compacted";
const META_FORMAT: &str = "format";

/// The layout above. Raised when it changes, so that an older program refuses a newer file.
const FORMAT: u64 = 1;

/// The store's revision before anything was written, as in etcd.
const FIRST_REVISION: Revision = 1;

/// Bytes of a record before its value: kind, create revision, version, lease.
const RECORD_HEADER: usize = 1 + 8 + 8 + 8;

const KIND_PUT: u8 = 0;
const KIND_DELETE: u8 = 1;

#[derive(Debug)]
pub(super) struct Disk {
    database: Database,
}

/// One commit in the making.
pub(super) struct Commit {
    transaction: WriteTransaction,
}

impl Disk {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.to_owned() },
            other => StoreError::Open { path: path.to_owned(), reason: other.to_string() },
        })?;
        Self::prepare(database, path)
    }

    pub(super) fn in_memory() -> Result<Self, StoreError> {
        let path = PathBuf::from("(memory)");
        let database = redb::Builder::new()
            .create_with_backend(redb::backends::InMemoryBackend::new())
            .map_err(|error| StoreError::Open { path: path.clone(), reason: error.to_string() })?;
        Self::prepare(database, &path)
    }

    fn prepare(database: Database, path: &Path) -> Result<Self, StoreError> {
        let disk = Self { database };
        let commit = disk.begin()?;
        let format = {
            let mut meta = commit.transaction.open_table(META).map_err(backend)?;
            commit.transaction.open_table(RECORDS).map_err(backend)?;
            commit.transaction.open_table(LEASES).map_err(backend)?;
            let format = meta.get(META_FORMAT).map_err(backend)?.map(|value| value.value());
            if format.is_none() {
                meta.insert(META_FORMAT, FORMAT).map_err(backend)?;
            }
            format.unwrap_or(FORMAT)
        };
        if format != FORMAT {
            let reason = format!("it has format {format}, this program knows {FORMAT}; use the program that wrote it");
            return Err(StoreError::Open { path: path.to_owned(), reason });
        }
        commit.finish()?;
        Ok(disk)
    }

    /// Reads everything back. Leases start their time anew, as after a change of etcd's leader: the
    /// store was away, so their holders could not keep them alive.
    pub(super) fn load(&self, now: Duration) -> Result<State, StoreError> {
        let transaction = self.database.begin_read().map_err(backend)?;
        let meta = transaction.open_table(META).map_err(backend)?;
        let number = |name: &str, default: u64| {
            meta.get(name).map(|value| value.map_or(default, |value| value.value())).map_err(backend)
        };
        let mut state = State::new(number(META_REVISION, FIRST_REVISION)?, number(META_COMPACTED, 0)?);
        for entry in transaction.open_table(LEASES).map_err(backend)?.iter().map_err(backend)? {
            let (id, milliseconds) = entry.map_err(backend)?;
            let time_to_live = Duration::from_millis(milliseconds.value());
            let lease = Lease { time_to_live, expires: now + time_to_live, keys: BTreeSet::new() };
            state.leases.insert(id.value(), lease);
        }
        for entry in transaction.open_table(RECORDS).map_err(backend)?.iter().map_err(backend)? {
            let (key, value) = entry.map_err(backend)?;
            let (kind, current) = decode(key.value(), value.value())?;
            let previous = state.current(&current.key).cloned();
            let event = Event { kind, current: Arc::new(current), previous };
            state.take_event(&event);
            state.log_event(event);
        }
        Ok(state)
    }

    pub(super) fn begin(&self) -> Result<Commit, StoreError> {
        Ok(Commit { transaction: self.database.begin_write().map_err(backend)? })
    }
}

impl Commit {
    /// Adds what one revision changed.
    pub(super) fn change(&self, change: &Change) -> Result<(), StoreError> {
        let mut records = self.transaction.open_table(RECORDS).map_err(backend)?;
        for event in &change.events {
            let (key, value) = encode(event);
            records.insert(key.as_slice(), value.as_slice()).map_err(backend)?;
        }
        let mut meta = self.transaction.open_table(META).map_err(backend)?;
        meta.insert(META_REVISION, change.revision).map_err(backend)?;
        Ok(())
    }

    pub(super) fn lease(&self, id: LeaseId, time_to_live: Option<Duration>) -> Result<(), StoreError> {
        let mut leases = self.transaction.open_table(LEASES).map_err(backend)?;
        match time_to_live {
            Some(time) => {
                let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
                leases.insert(id, milliseconds).map_err(backend)?;
            }
            None => {
                leases.remove(id).map_err(backend)?;
            }
        }
        Ok(())
    }

    /// Removes the records that only revisions before `revision` could read.
    pub(super) fn compact(&self, state: &State, revision: Revision) -> Result<(), StoreError> {
        let mut records = self.transaction.open_table(RECORDS).map_err(backend)?;
        let touched = state.log.partition_point(|change| change.revision <= revision);
        for event in state.log.range(..touched).flat_map(|change| &change.events) {
            if let Some(previous) = event.previous.as_ref().filter(|previous| previous.mod_revision < revision) {
                let key = record_key(previous.mod_revision, &previous.key);
                records.remove(key.as_slice()).map_err(backend)?;
            }
            if event.kind == EventKind::Delete && event.current.mod_revision < revision {
                let key = record_key(event.current.mod_revision, &event.current.key);
                records.remove(key.as_slice()).map_err(backend)?;
            }
        }
        let mut meta = self.transaction.open_table(META).map_err(backend)?;
        meta.insert(META_COMPACTED, revision).map_err(backend)?;
        Ok(())
    }

    /// Makes it durable: redb's default durability returns after the file is synced.
    pub(super) fn finish(self) -> Result<(), StoreError> {
        self.transaction.commit().map_err(backend)
    }
}

fn record_key(revision: Revision, key: &[u8]) -> Vec<u8> {
    [revision.to_be_bytes().as_slice(), key].concat()
}

fn encode(event: &Event) -> (Vec<u8>, Vec<u8>) {
    let current = &event.current;
    let mut value = Vec::with_capacity(RECORD_HEADER + current.value.len());
    value.push(match event.kind {
        EventKind::Put => KIND_PUT,
        EventKind::Delete => KIND_DELETE,
    });
    value.extend_from_slice(&current.create_revision.to_be_bytes());
    value.extend_from_slice(&current.version.to_be_bytes());
    value.extend_from_slice(&current.lease.to_be_bytes());
    value.extend_from_slice(&current.value);
    (record_key(current.mod_revision, &current.key), value)
}

fn decode(key: &[u8], value: &[u8]) -> Result<(EventKind, KeyValue), StoreError> {
    let (mod_revision, key) =
        key.split_first_chunk().ok_or(StoreError::Corrupt { reason: "a record's key has no revision" })?;
    let short = StoreError::Corrupt { reason: "a record's header is cut short" };
    let fields = || {
        let (kind, rest) = value.split_first()?;
        let (create_revision, rest) = rest.split_first_chunk()?;
        let (version, rest) = rest.split_first_chunk()?;
        let (lease, rest) = rest.split_first_chunk()?;
        Some((*kind, *create_revision, *version, *lease, rest))
    };
    let (kind, create_revision, version, lease, value) = fields().ok_or(short)?;
    let kind = match kind {
        KIND_PUT => EventKind::Put,
        KIND_DELETE => EventKind::Delete,
        _ => return Err(StoreError::Corrupt { reason: "a record is neither a write nor a removal" }),
    };
    let record = KeyValue {
        key: key.to_vec(),
        value: value.to_vec(),
        create_revision: u64::from_be_bytes(create_revision),
        mod_revision: u64::from_be_bytes(*mod_revision),
        version: u64::from_be_bytes(version),
        lease: i64::from_be_bytes(lease),
    };
    Ok((kind, record))
}

fn backend(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Backend { reason: error.into().to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_record_decodes_to_what_was_encoded(
            key in proptest::collection::vec(any::<u8>(), 0..40),
            value in proptest::collection::vec(any::<u8>(), 0..200),
            numbers in any::<(u64, u64, u64, i64)>(),
            removed in any::<bool>(),
        ) {
            let (create_revision, mod_revision, version, lease) = numbers;
            let record = KeyValue { key, value, create_revision, mod_revision, version, lease };
            let kind = if removed { EventKind::Delete } else { EventKind::Put };
            let event = Event { kind, current: Arc::new(record.clone()), previous: None };
            let (key, value) = encode(&event);
            prop_assert_eq!(decode(&key, &value).unwrap(), (kind, record));
        }

        #[test]
        fn any_bytes_decode_or_are_refused(
            key in proptest::collection::vec(any::<u8>(), 0..40),
            value in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let _ = decode(&key, &value);
        }
    }
}
