//! What can go wrong, told apart by what the caller can do about it.

use std::path::PathBuf;

use crate::types::{LeaseId, Revision};

/// Why the store did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// History before `compacted` is gone: read the current state and go on from there.
    #[error("revision {requested} was compacted: the oldest revision that can be read is {compacted}; list again")]
    Compacted {
        /// The revision that was asked for.
        requested: Revision,
        /// The oldest revision that can still be read.
        compacted: Revision,
    },
    /// The revision has not happened: the caller's knowledge is from another store.
    #[error("revision {requested} is in the future: the store is at {current}; was it replaced? list again")]
    FutureRevision {
        /// The revision that was asked for.
        requested: Revision,
        /// The store's newest revision.
        current: Revision,
    },
    /// The lease expired, was revoked or never was.
    #[error("lease {0} does not exist: it expired or was revoked; grant a new one")]
    LeaseNotFound(LeaseId),
    /// A lease with the wanted id is there already.
    #[error("lease {0} exists already: choose another id, or 0 to have one chosen")]
    LeaseExists(LeaseId),
    /// One transaction changes one key twice, which has no defined outcome within one revision.
    #[error("key {key:?} is changed twice in one transaction: split it into two")]
    DuplicateKey {
        /// The key, as far as it is text.
        key: String,
    },
    /// A key is empty, which names nothing.
    #[error("a key is empty: give it at least one byte")]
    EmptyKey,
    /// A bound of [`limits`](crate::limits) would be exceeded.
    #[error("{what} is over the limit of {limit}: {actual}")]
    TooLarge {
        /// What is bounded.
        what: &'static str,
        /// The bound.
        limit: usize,
        /// What was asked for.
        actual: usize,
    },
    /// The database file is open in another process.
    #[error("the store {path:?} is in use by another process: stop it, or choose another data directory")]
    InUse {
        /// The database file.
        path: PathBuf,
    },
    /// The database file cannot be opened.
    #[error("cannot open the store {path:?}: {reason}")]
    Open {
        /// The database file.
        path: PathBuf,
        /// What the system or the database said.
        reason: String,
    },
    /// A record in the database does not decode.
    #[error("the store holds a record that does not decode ({reason}): restore it from a copy, or start a new one")]
    Corrupt {
        /// What is wrong with the record.
        reason: &'static str,
    },
    /// Reading or writing the medium failed; nothing of the request took effect.
    #[error("the store's medium failed: {reason}; check the disk's space and health")]
    Backend {
        /// What the medium said.
        reason: String,
    },
    /// How to reach the store is not said in a way that can work.
    #[error("the store's configuration cannot be used: {reason}")]
    Configuration {
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// No member of etcd could be reached; nothing of the request took effect.
    #[error("no member of etcd answers ({reason}): look whether etcd runs and can be reached; nothing was changed")]
    Unreachable {
        /// What each member said or did.
        reason: String,
    },
    /// A change was sent, and the answer was lost: it took effect or it did not.
    #[error("etcd's answer was lost, so the change may or may not have been made ({reason}): read before trying again")]
    OutcomeUnknown {
        /// What happened to the answer.
        reason: String,
    },
    /// etcd does not let this user in, or not at these keys; nothing took effect.
    #[error("etcd refuses ({reason}): look at the user, its password or certificate, and its role's keys")]
    Denied {
        /// What etcd said.
        reason: String,
    },
    /// The store was shut down.
    #[error("the store is closed")]
    Closed,
}
