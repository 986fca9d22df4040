//! The one thread that changes the store: it plans, commits, applies, answers, in that order.

use std::collections::BTreeSet;
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::disk::Disk;
use super::plan::{Plan, Planned};
use super::state::{Change, Lease, State};
use super::{read, write};
use crate::clock::Clock;
use crate::error::StoreError;
use crate::limits::{
    GROUP_COMMIT_MAX, HISTORY_BYTES_MAX, LEASE_CHECK_INTERVAL, LEASES_MAX, PROGRESS_INTERVAL,
    TRANSACTION_OPERATIONS_MAX,
};
use crate::types::{KeyRange, LeaseId, LeaseStatus, Operation, Revision, Transaction, TransactionResult};

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

pub(super) enum Command {
    Transaction { transaction: Transaction, answer: Answer<TransactionResult> },
    Grant { id: LeaseId, time_to_live: Duration, answer: Answer<LeaseStatus> },
    Revoke { id: LeaseId, answer: Answer<()> },
    Compact { revision: Revision, answer: Answer<()> },
    Tick { answer: Option<Answer<()>> },
}

pub(super) struct Writer {
    pub(super) state: Arc<RwLock<State>>,
    pub(super) disk: Disk,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) history: u64,
}

/// Transactions that share a commit, with those who wait for them.
type Group = Vec<(Transaction, Answer<TransactionResult>)>;

impl Writer {
    pub(super) fn spawn(self, commands: mpsc::Receiver<Command>) -> Result<JoinHandle<()>, StoreError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(|error| StoreError::Backend { reason: format!("cannot start the writer: {error}") })?;
        let thread = std::thread::Builder::new().name("store-writer".to_owned());
        thread
            .spawn(move || runtime.block_on(self.run(commands)))
            .map_err(|error| StoreError::Backend { reason: format!("cannot start the writer: {error}") })
    }

    /// Serves until the last handle is gone. Blocking on the disk is fine here: the thread has no
    /// other task.
    async fn run(self, mut commands: mpsc::Receiver<Command>) {
        let mut checks = tokio::time::interval(LEASE_CHECK_INTERVAL);
        checks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let first = tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => command,
                    None => break,
                },
                _ = checks.tick() => Command::Tick { answer: None },
            };
            let mut group = Group::new();
            let mut next = Some(first);
            while let Some(command) = next.take() {
                match command {
                    Command::Transaction { transaction, answer } => group.push((transaction, answer)),
                    other => {
                        self.commit(std::mem::take(&mut group));
                        self.alone(other);
                    }
                }
                if group.len() < GROUP_COMMIT_MAX {
                    next = commands.try_recv().ok();
                }
            }
            self.commit(group);
            self.trim();
        }
        write(&self.state).close();
    }

    /// Runs a group of transactions in one commit. Each has its own revision and its own outcome.
    fn commit(&self, group: Group) {
        if group.is_empty() {
            return;
        }
        let mut outcomes = Vec::with_capacity(group.len());
        let mut changes = Vec::new();
        {
            let state = read(&self.state);
            let mut plan = Plan::new(&state);
            for (transaction, answer) in group {
                let outcome = plan.transaction(&transaction).map(|Planned { result, change }| {
                    changes.extend(change);
                    result
                });
                outcomes.push((outcome, answer));
            }
        }
        let committed = self.make_durable(&changes);
        for (outcome, answer) in outcomes {
            // Whoever asked may have gone away; the outcome stands.
            let _ = answer.send(committed.clone().and(outcome));
        }
    }

    fn make_durable(&self, changes: &[Change]) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        let commit = self.disk.begin()?;
        for change in changes {
            commit.change(change)?;
        }
        commit.finish()?;
        let now = self.clock.now();
        let mut state = write(&self.state);
        for change in changes {
            state.apply(change.clone(), now);
        }
        Ok(())
    }

    /// Runs what shares its commit with nothing else.
    fn alone(&self, command: Command) {
        match command {
            Command::Grant { id, time_to_live, answer } => {
                let _ = answer.send(self.grant(id, time_to_live));
            }
            Command::Revoke { id, answer } => {
                let _ = answer.send(self.revoke(id));
            }
            Command::Compact { revision, answer } => {
                let _ = answer.send(self.compact(revision));
            }
            Command::Tick { answer } => {
                let result = self.tick();
                match answer {
                    Some(answer) => {
                        let _ = answer.send(result);
                    }
                    None => {
                        if let Err(error) = result {
                            tracing::warn!(%error, "leases could not be ended; retried at the next check");
                        }
                    }
                }
            }
            Command::Transaction { transaction, answer } => self.commit(vec![(transaction, answer)]),
        }
    }

    fn grant(&self, id: LeaseId, time_to_live: Duration) -> Result<LeaseStatus, StoreError> {
        let id = {
            let state = read(&self.state);
            if state.leases.len() >= LEASES_MAX {
                let actual = state.leases.len() + 1;
                return Err(StoreError::TooLarge { what: "the number of leases", limit: LEASES_MAX, actual });
            }
            if id != 0 && state.leases.contains_key(&id) {
                return Err(StoreError::LeaseExists(id));
            }
            if id == 0 { state.leases.last_key_value().map_or(0, |(last, _)| *last).max(0) + 1 } else { id }
        };
        let commit = self.disk.begin()?;
        commit.lease(id, Some(time_to_live))?;
        commit.finish()?;
        let now = self.clock.now();
        let expires = now.saturating_add(time_to_live);
        let mut state = write(&self.state);
        state.leases.insert(id, Lease { time_to_live, expires, keys: BTreeSet::new() });
        state.lease_status(id, now)
    }

    /// Removes a lease and its keys in one revision. A lease may hold more keys than a transaction
    /// of a client may touch; in etcd, too, that bound does not apply here.
    fn revoke(&self, id: LeaseId) -> Result<(), StoreError> {
        let mut events = Vec::new();
        let revision = {
            let state = read(&self.state);
            let lease = state.leases.get(&id).ok_or(StoreError::LeaseNotFound(id))?;
            let keys: Vec<_> = lease.keys.iter().cloned().collect();
            for keys in keys.chunks(TRANSACTION_OPERATIONS_MAX) {
                let success = keys.iter().map(|key| Operation::Delete(KeyRange::key(key.as_slice()))).collect();
                let planned = Plan::new(&state).transaction(&Transaction { success, ..Transaction::default() })?;
                events.extend(planned.change.into_iter().flat_map(|change| change.events));
            }
            state.revision + 1
        };
        let change = (!events.is_empty()).then_some(Change { revision, events });
        let commit = self.disk.begin()?;
        if let Some(change) = &change {
            commit.change(change)?;
        }
        commit.lease(id, None)?;
        commit.finish()?;
        let mut state = write(&self.state);
        if let Some(change) = change {
            state.apply(change, self.clock.now());
        }
        state.leases.remove(&id);
        Ok(())
    }

    fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        let commit = self.disk.begin()?;
        {
            let state = read(&self.state);
            if revision <= state.compacted {
                return Err(StoreError::Compacted { requested: revision, compacted: state.compacted });
            }
            state.readable(revision)?;
            commit.compact(&state, revision)?;
        }
        commit.finish()?;
        write(&self.state).compact(revision);
        Ok(())
    }

    fn tick(&self) -> Result<(), StoreError> {
        let now = self.clock.now();
        let over: Vec<LeaseId> = {
            let state = read(&self.state);
            state.leases.iter().filter(|(_, lease)| lease.expires <= now).map(|(id, _)| *id).collect()
        };
        for id in over {
            match self.revoke(id) {
                Ok(()) | Err(StoreError::LeaseNotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        write(&self.state).mark_progress(now, PROGRESS_INTERVAL);
        Ok(())
    }

    /// Bounds history without being asked.
    fn trim(&self) {
        let Some(revision) = read(&self.state).trim_to(self.history, HISTORY_BYTES_MAX) else { return };
        if let Err(error) = self.compact(revision) {
            tracing::warn!(%error, "history could not be trimmed; retried after the next write");
        }
    }
}
