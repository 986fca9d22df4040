//! The embedded driver: redb for what must survive, memory for what is read.
//!
//! ```text
//!  transaction, lease ──▶ queue ──▶ writer thread: plan ──▶ one redb commit ──▶ apply ──▶ answers
//!                                   (as many as wait, at most GROUP_COMMIT_MAX)   │
//!  range ───────────────────────────────────────── state behind a lock ◀──────────┤
//!  watch ◀── bounded queue of each watcher ◀──────────────────────────────────────┘
//! ```
//!
//! A change becomes visible after it is durable, to readers and watchers alike. Writers that wait
//! while a commit is under way share the next one, so a burst does not pay one sync each.

mod disk;
mod plan;
mod state;
mod writer;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use self::disk::Disk;
use self::state::State;
use self::writer::{Command, Writer};
use crate::clock::{Clock, SystemClock};
use crate::driver::{BoxFuture, Store};
use crate::error::StoreError;
use crate::limits::{HISTORY_REVISIONS_MAX, WRITER_QUEUE_MAX};
use crate::types::{
    LeaseId, LeaseStatus, RangeRequest, RangeResponse, Revision, Transaction, TransactionResult, WatchRequest,
};
use crate::watch::Watcher;

/// Where the store lives.
#[derive(Debug, Clone)]
pub enum Location {
    /// In a file, made when missing. Answered writes survive the end of the process by any means.
    File(PathBuf),
    /// In memory only.
    Memory,
}

/// How to open the store.
#[derive(Clone)]
pub struct Options {
    /// Where the store lives.
    pub location: Location,
    /// The clock by which leases expire.
    pub clock: Arc<dyn Clock>,
    /// Revisions that stay readable before the store compacts itself.
    pub history_revisions: u64,
}

impl Options {
    /// The machine's clock and the default history.
    pub fn new(location: Location) -> Self {
        Self { location, clock: Arc::new(SystemClock::default()), history_revisions: HISTORY_REVISIONS_MAX }
    }
}

/// The embedded driver. Dropping it waits for the writes under way, and closes the file.
pub struct Embedded {
    state: Arc<RwLock<State>>,
    clock: Arc<dyn Clock>,
    queue: Option<mpsc::Sender<Command>>,
    writer: Option<JoinHandle<()>>,
}

impl Embedded {
    /// Opens the store and reads it into memory.
    pub fn open(options: Options) -> Result<Self, StoreError> {
        let disk = match &options.location {
            Location::File(path) => Disk::open(path)?,
            Location::Memory => Disk::in_memory()?,
        };
        let state = Arc::new(RwLock::new(disk.load(options.clock.now())?));
        let (queue, commands) = mpsc::channel(WRITER_QUEUE_MAX);
        let writer = Writer {
            state: Arc::clone(&state),
            disk,
            clock: Arc::clone(&options.clock),
            history: options.history_revisions.max(1),
        };
        let writer = writer.spawn(commands)?;
        Ok(Self { state, clock: options.clock, queue: Some(queue), writer: Some(writer) })
    }

    /// Ends the leases whose time is over and marks idle watches, now and not at the next check.
    /// With a clock that a test moves, this is how time takes effect.
    pub async fn tick(&self) -> Result<(), StoreError> {
        self.ask(|answer| Command::Tick { answer: Some(answer) }).await
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Command,
    ) -> Result<T, StoreError> {
        let (sender, answer) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(StoreError::Closed)?;
        queue.send(command(sender)).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::warn!("the store's writer ended by a panic");
        }
    }
}

impl Store for Embedded {
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResponse, StoreError>> {
        Box::pin(async move { read(&self.state).range(&request) })
    }

    fn transaction(&self, transaction: Transaction) -> BoxFuture<'_, Result<TransactionResult, StoreError>> {
        Box::pin(self.ask(|answer| Command::Transaction { transaction, answer }))
    }

    fn lease_grant(&self, id: LeaseId, time_to_live: Duration) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        Box::pin(self.ask(move |answer| Command::Grant { id, time_to_live, answer }))
    }

    fn lease_keep_alive(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        Box::pin(async move {
            let now = self.clock.now();
            let mut state = write(&self.state);
            let lease = state.leases.get_mut(&id).ok_or(StoreError::LeaseNotFound(id))?;
            lease.expires = now.saturating_add(lease.time_to_live);
            let status = state.lease_status(id, now)?;
            Ok(LeaseStatus { keys: Vec::new(), ..status })
        })
    }

    fn lease_revoke(&self, id: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.ask(move |answer| Command::Revoke { id, answer }))
    }

    fn lease_time_to_live(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        Box::pin(async move { read(&self.state).lease_status(id, self.clock.now()) })
    }

    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<Watcher, StoreError>> {
        Box::pin(async move { write(&self.state).watch(&request, self.clock.now()) })
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.ask(move |answer| Command::Compact { revision, answer }))
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(async move { Ok(read(&self.state).revision) })
    }
}

// A panic while the lock is held is a bug in pure code that changes nothing half-way; serving on is
// better than taking every reader down with it.
fn read(state: &RwLock<State>) -> RwLockReadGuard<'_, State> {
    state.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(state: &RwLock<State>) -> RwLockWriteGuard<'_, State> {
    state.write().unwrap_or_else(PoisonError::into_inner)
}
