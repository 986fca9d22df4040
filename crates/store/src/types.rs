//! Keys, values, requests and answers: the words of etcd's API without its encoding.

use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

/// The store's global version: raised by one by each transaction that changes something.
pub type Revision = u64;

/// Names a lease. 0 is "no lease".
pub type LeaseId = i64;

/// One version of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Vec<u8>,
    /// The value.
    pub value: Vec<u8>,
    /// The revision that created the key, since it was last absent.
    pub create_revision: Revision,
    /// The revision that wrote this version.
    pub mod_revision: Revision,
    /// How many times the key was written since it was created, from 1.
    pub version: u64,
    /// The lease that the key ends with, 0 for none.
    pub lease: LeaseId,
}

/// What a `BTreeMap` takes as a range.
type Bounds<'range> = (Bound<&'range [u8]>, Bound<&'range [u8]>);

/// A half-open range of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key in the range.
    pub start: Vec<u8>,
    /// The first key after the range; `None` for no end.
    pub end: Option<Vec<u8>>,
}

impl KeyRange {
    /// Exactly one key.
    pub fn key(key: impl Into<Vec<u8>>) -> Self {
        let start = key.into();
        let mut end = start.clone();
        end.push(0);
        Self { start, end: Some(end) }
    }

    /// All keys that begin with `prefix`.
    pub fn prefix(prefix: impl Into<Vec<u8>>) -> Self {
        let start = prefix.into();
        // The first key after the prefix: its last byte below 0xff raised by one.
        let mut end = start.clone();
        while end.last() == Some(&0xff) {
            end.pop();
        }
        let end = end
            .last_mut()
            .is_some_and(|last| {
                *last += 1;
                true
            })
            .then_some(end);
        Self { start, end }
    }

    /// From `start` to before `end`.
    pub fn span(start: impl Into<Vec<u8>>, end: impl Into<Vec<u8>>) -> Self {
        Self { start: start.into(), end: Some(end.into()) }
    }

    /// Every key.
    pub fn all() -> Self {
        Self { start: Vec::new(), end: None }
    }

    /// Whether `key` is in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= self.start.as_slice() && self.end.as_deref().is_none_or(|end| key < end)
    }

    /// The bounds for a `BTreeMap`; `None` when the range is empty, which a map would panic on.
    pub(crate) fn bounds(&self) -> Option<Bounds<'_>> {
        match self.end.as_deref() {
            Some(end) if end <= self.start.as_slice() => None,
            Some(end) => Some((Bound::Included(&self.start), Bound::Excluded(end))),
            None => Some((Bound::Included(&self.start), Bound::Unbounded)),
        }
    }
}

/// What to read.
#[derive(Debug, Clone)]
pub struct RangeRequest {
    /// Which keys.
    pub range: KeyRange,
    /// As of which revision; 0 is now.
    pub revision: Revision,
    /// At most this many keys; 0 is all.
    pub limit: usize,
    /// Leave the values out.
    pub keys_only: bool,
    /// Return only the count.
    pub count_only: bool,
}

impl RangeRequest {
    /// All of `range`, now.
    pub fn new(range: KeyRange) -> Self {
        Self { range, revision: 0, limit: 0, keys_only: false, count_only: false }
    }
}

/// What was read.
#[derive(Debug, Clone)]
pub struct RangeResponse {
    /// The keys in order.
    pub items: Vec<Arc<KeyValue>>,
    /// Whether `limit` left keys out.
    pub more: bool,
    /// How many keys are in the range, whatever the limit.
    pub count: usize,
    /// The store's newest revision when it was read; within a transaction, the one before it.
    pub revision: Revision,
}

/// How two values relate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// The key's is the given one.
    Equal,
    /// The key's is not the given one.
    NotEqual,
    /// The key's is greater.
    Greater,
    /// The key's is less.
    Less,
}

/// What of a key is compared. An absent key has revisions, version and lease 0, and no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The revision of its last write.
    ModRevision(Revision),
    /// The revision of its creation.
    CreateRevision(Revision),
    /// The number of its writes.
    Version(u64),
    /// Its lease.
    Lease(LeaseId),
    /// Its value. No relation holds for an absent key.
    Value(Vec<u8>),
}

/// One condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The key.
    pub key: Vec<u8>,
    /// How the key's property must relate to the given one.
    pub relation: Relation,
    /// Which property, and the given value.
    pub target: Target,
}

impl Compare {
    /// The key does not exist.
    pub fn absent(key: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), relation: Relation::Equal, target: Target::CreateRevision(0) }
    }

    /// The key was last written by `revision`.
    pub fn unchanged(key: impl Into<Vec<u8>>, revision: Revision) -> Self {
        Self { key: key.into(), relation: Relation::Equal, target: Target::ModRevision(revision) }
    }

    pub(crate) fn holds(&self, current: Option<&KeyValue>) -> bool {
        let ordering = match &self.target {
            Target::ModRevision(given) => current.map_or(0, |kv| kv.mod_revision).cmp(given),
            Target::CreateRevision(given) => current.map_or(0, |kv| kv.create_revision).cmp(given),
            Target::Version(given) => current.map_or(0, |kv| kv.version).cmp(given),
            Target::Lease(given) => current.map_or(0, |kv| kv.lease).cmp(given),
            Target::Value(given) => match current {
                Some(kv) => kv.value.as_slice().cmp(given.as_slice()),
                None => return false,
            },
        };
        match self.relation {
            Relation::Equal => ordering.is_eq(),
            Relation::NotEqual => ordering.is_ne(),
            Relation::Greater => ordering.is_gt(),
            Relation::Less => ordering.is_lt(),
        }
    }
}

/// One step of a transaction.
#[derive(Debug, Clone)]
pub enum Operation {
    /// Write a key.
    Put {
        /// The key.
        key: Vec<u8>,
        /// Its new value.
        value: Vec<u8>,
        /// The lease it ends with, 0 for none.
        lease: LeaseId,
    },
    /// Remove all keys of a range.
    Delete(KeyRange),
    /// Read, with the effect of the steps before.
    Range(RangeRequest),
}

/// What a step did.
#[derive(Debug, Clone)]
pub enum OperationResult {
    /// The version that was replaced.
    Put {
        /// `None` when the key was created.
        previous: Option<Arc<KeyValue>>,
    },
    /// The versions that were removed, in key order.
    Delete {
        /// What was removed.
        deleted: Vec<Arc<KeyValue>>,
    },
    /// What was read.
    Range(RangeResponse),
}

/// Conditions and two branches: all of one branch happens, in one revision, or nothing.
#[derive(Debug, Clone, Default)]
pub struct Transaction {
    /// All must hold for the success branch.
    pub compares: Vec<Compare>,
    /// What to do when all hold.
    pub success: Vec<Operation>,
    /// What to do otherwise.
    pub failure: Vec<Operation>,
}

impl Transaction {
    /// Write a key, whatever is there.
    pub fn put(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self { success: vec![Operation::Put { key: key.into(), value: value.into(), lease: 0 }], ..Self::default() }
    }

    /// Remove the keys of `range`.
    pub fn delete(range: KeyRange) -> Self {
        Self { success: vec![Operation::Delete(range)], ..Self::default() }
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Adds a step to the success branch.
    #[must_use]
    pub fn then(mut self, operation: Operation) -> Self {
        self.success.push(operation);
        self
    }

    /// Adds a step to the failure branch.
    #[must_use]
    pub fn otherwise(mut self, operation: Operation) -> Self {
        self.failure.push(operation);
        self
    }
}

/// What a transaction did.
#[derive(Debug, Clone)]
pub struct TransactionResult {
    /// Which branch ran.
    pub succeeded: bool,
    /// The store's revision after it: its own when it changed something.
    pub revision: Revision,
    /// One answer per step of the branch that ran.
    pub results: Vec<OperationResult>,
}

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It was written.
    Put,
    /// It was removed, by a request or with its lease.
    Delete,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The new version; for a removal the key and the revision of the removal, with no value.
    pub current: Arc<KeyValue>,
    /// The version before, when the watch asked for it and it is still known.
    pub previous: Option<Arc<KeyValue>>,
}

/// What to watch.
#[derive(Debug, Clone)]
pub struct WatchRequest {
    /// Which keys.
    pub range: KeyRange,
    /// The first revision whose changes are wanted; 0 is "what happens from now on".
    pub start_revision: Revision,
    /// Whether events carry the version before.
    pub previous: bool,
    /// Whether an idle watch gets a mark that says how far it has seen.
    pub progress: bool,
}

impl WatchRequest {
    /// Changes of `range` from `start_revision` on.
    pub fn new(range: KeyRange, start_revision: Revision) -> Self {
        Self { range, start_revision, previous: true, progress: false }
    }
}

/// How a lease stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseStatus {
    /// The lease.
    pub id: LeaseId,
    /// The time to live that it was granted with.
    pub granted: Duration,
    /// What is left of it.
    pub remaining: Duration,
    /// The keys that end with it, in order. Only told when the lease's time to live is asked for: whoever
    /// grants a lease or keeps it alive pays for no more than that.
    pub keys: Vec<Vec<u8>>,
}
