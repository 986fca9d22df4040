//! The promise that every driver keeps.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use crate::error::StoreError;
use crate::types::{
    LeaseId, LeaseStatus, RangeRequest, RangeResponse, Revision, Transaction, TransactionResult, WatchRequest,
};
use crate::watch::Watcher;

/// A future that can be sent to another thread: what makes [`Store`] usable as `Arc<dyn Store>`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A key-value store with etcd's semantics.
///
/// - A request that has been answered is durable; one that failed had no effect, unless the error is
///   [`StoreError::OutcomeUnknown`], which says that nobody knows.
/// - Reads see every transaction that was answered before they began.
/// - A watch delivers each change of its range once, in order, all changes of a revision together.
pub trait Store: Send + Sync {
    /// Reads keys, now or as of a revision.
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResponse, StoreError>>;

    /// Runs one branch of a transaction, in one revision.
    fn transaction(&self, transaction: Transaction) -> BoxFuture<'_, Result<TransactionResult, StoreError>>;

    /// Grants a lease; `id` 0 lets the store choose. A store may grant more time than was asked for:
    /// etcd has whole seconds, and two at least.
    fn lease_grant(&self, id: LeaseId, time_to_live: Duration) -> BoxFuture<'_, Result<LeaseStatus, StoreError>>;

    /// Starts a lease's time anew.
    fn lease_keep_alive(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>>;

    /// Ends a lease and removes its keys, in one revision.
    fn lease_revoke(&self, id: LeaseId) -> BoxFuture<'_, Result<(), StoreError>>;

    /// How a lease stands.
    fn lease_time_to_live(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>>;

    /// Opens a watch. When it ends, [`Watcher`] says why and where to resume. A driver whose connection
    /// breaks resumes the watch itself. The compacted revision can be read, and a watch begins after it:
    /// etcd forgets the removals that it made.
    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<Watcher, StoreError>>;

    /// Forgets history before `revision`, which itself stays readable. The embedded store does so by
    /// itself; with etcd somebody must ask, or configure etcd to.
    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>>;

    /// The newest revision.
    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>>;
}
