//! A key-value store with etcd's semantics, behind one trait.
//!
//! [`Store`] is what every driver promises: one global revision that each changing transaction
//! raises by one, multi-version reads, compare-and-swap transactions, leases with a time to live,
//! watches that replay from a revision, and compaction. [`Embedded`] is the driver that needs no
//! other process: redb for what must survive, memory for what is read. [`Etcd`] is the driver for a
//! real etcd. [`conformance`] states the promise as checks that any driver runs.
//!
//! It does not know what keys and values mean. The embedded driver holds its whole content in memory:
//! it is made for a cluster's objects, not for bulk data.

pub mod conformance;
pub mod limits;

mod check;
mod clock;
mod driver;
mod embedded;
mod error;
mod etcd;
mod types;
mod watch;

pub use clock::{Clock, ManualClock, SystemClock};
pub use driver::{BoxFuture, Store};
pub use embedded::{Embedded, Location, Options};
pub use error::StoreError;
pub use etcd::{Etcd, EtcdConfig, EtcdCredentials, EtcdEndpoint, EtcdTls};
pub use types::{
    Compare, Event, EventKind, KeyRange, KeyValue, LeaseId, LeaseStatus, Operation, OperationResult, RangeRequest,
    RangeResponse, Relation, Revision, Target, Transaction, TransactionResult, WatchRequest,
};
pub use watch::{WatchCancelled, WatchMessage, WatchSender, Watcher, watch_channel};
