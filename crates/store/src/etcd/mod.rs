//! The driver for a real etcd, version 3.4 or later.
//!
//! ```text
//!  range, transaction, lease ──▶ client: token, fail-over, retries ──▶ one HTTP/2 connection per member
//!  watch ──▶ a stream and a task each: resumes where it was ──▶ bounded queue of the watcher
//! ```
//!
//! Reads are linearizable. What etcd does otherwise than the trait promises is bridged here: see the
//! design page for the list.

mod client;
mod config;
mod convert;
mod messages;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch as signal};
use tonic::{Code, Status};

pub use self::config::{EtcdConfig, EtcdCredentials, EtcdEndpoint, EtcdTls};

use self::client::{Client, Failure, Method, explain};
use self::convert::{Keys, nothing, probe, revision_of, signed, unsigned};
use self::messages as wire;
use crate::check;
use crate::driver::{BoxFuture, Store};
use crate::error::StoreError;
use crate::limits::{VALUE_BYTES_MAX, WATCHERS_MAX};
use crate::types::{
    LeaseId, LeaseStatus, Operation, RangeRequest, RangeResponse, Revision, Transaction, TransactionResult,
    WatchRequest,
};
use crate::watch::Watcher;

/// The driver for etcd. Dropping it ends its watches.
pub struct Etcd {
    client: Arc<Client>,
    keys: Keys,
    watches: Arc<Semaphore>,
    /// Dropped with the driver, which the watches' tasks see.
    open: signal::Sender<()>,
}

impl Etcd {
    /// Connects, and asks for the revision, so that what cannot work fails here.
    pub async fn connect(config: EtcdConfig) -> Result<Self, StoreError> {
        let keys = Keys::below(&config.prefix);
        let client = Arc::new(Client::new(config)?);
        let store =
            Self { client, keys, watches: Arc::new(Semaphore::new(WATCHERS_MAX)), open: signal::Sender::new(()) };
        store.current().await?;
        Ok(store)
    }

    /// The newest revision.
    async fn current(&self) -> Result<Revision, StoreError> {
        self.read(&probe(0)).await.map(|read| read.revision)
    }

    async fn read(&self, request: &RangeRequest) -> Result<RangeResponse, StoreError> {
        let Some(sent) = self.keys.range_request(request) else {
            // Nothing is in the range, but the revision may be one that cannot be read.
            return Box::pin(self.read(&probe(request.revision))).await.map(|read| nothing(read.revision));
        };
        let answer: Result<wire::RangeResponse, Failure> = self.client.call(Method::RANGE, sent).await;
        match answer {
            Ok(answer) => {
                let revision = revision_of(answer.header.as_ref());
                Ok(self.keys.range_response(answer, revision))
            }
            Err(failure) => Err(self.revision_failure(failure, request.revision).await),
        }
    }

    /// What a refused revision means. etcd says only that it is refused; the numbers are asked for.
    async fn revision_failure(&self, failure: Failure, requested: Revision) -> StoreError {
        match &failure {
            Failure::Refused { status, .. } if status.message() == COMPACTED => {
                match watch::oldest_revision(&self.client, &self.keys, requested).await {
                    Ok(compacted) => StoreError::Compacted { requested, compacted },
                    Err(error) => error,
                }
            }
            Failure::Refused { status, .. } if status.message() == FUTURE => match Box::pin(self.current()).await {
                Ok(current) => StoreError::FutureRevision { requested, current },
                Err(error) => error,
            },
            _ => plain(failure),
        }
    }

    async fn transact(&self, transaction: Transaction) -> Result<TransactionResult, StoreError> {
        check::transaction(&transaction)?;
        let mut operations = transaction.success.iter().chain(&transaction.failure);
        let only_reads = operations.all(|operation| matches!(operation, Operation::Range(_)));
        let method = if only_reads { Method::READ_TXN } else { Method::TXN };
        let answer = self.client.call(method, self.keys.transaction(&transaction)).await;
        match answer {
            Ok(answer) => self.keys.transaction_result(&transaction, answer),
            Err(Failure::Refused { status, .. }) if status.message() == LEASE_NOT_FOUND => {
                Err(StoreError::LeaseNotFound(self.missing_lease(&transaction).await))
            }
            Err(failure) => {
                let reads =
                    transaction.success.iter().chain(&transaction.failure).filter_map(|operation| match operation {
                        Operation::Range(request) => Some(request.revision),
                        _ => None,
                    });
                // The one that is refused: the oldest for compaction, the newest for the future.
                let is_future = matches!(&failure, Failure::Refused { status, .. } if status.message() == FUTURE);
                let reads = reads.filter(|revision| *revision != 0);
                let requested = if is_future { reads.max() } else { reads.min() };
                Err(self.revision_failure(failure, requested.unwrap_or(0)).await)
            }
        }
    }

    /// Which lease of a transaction is not there: etcd does not say.
    async fn missing_lease(&self, transaction: &Transaction) -> LeaseId {
        let puts = transaction.success.iter().chain(&transaction.failure);
        let leases: Vec<LeaseId> = puts
            .filter_map(|operation| match operation {
                Operation::Put { lease, .. } if *lease != 0 => Some(*lease),
                _ => None,
            })
            .collect();
        for lease in &leases {
            if matches!(self.lease_status(*lease).await, Err(StoreError::LeaseNotFound(_))) {
                return *lease;
            }
        }
        leases.first().copied().unwrap_or(0)
    }

    async fn grant(&self, id: LeaseId, time_to_live: Duration) -> Result<LeaseStatus, StoreError> {
        // Whole seconds, and never less than was asked for.
        let seconds = time_to_live.as_secs() + u64::from(time_to_live.subsec_nanos() > 0);
        let request = wire::LeaseGrantRequest { id, ttl: signed(seconds.max(1)) };
        let method = if id == 0 { Method::LEASE_GRANT_ANY } else { Method::LEASE_GRANT };
        let answer: Result<wire::LeaseGrantResponse, Failure> = self.client.call(method, request).await;
        match answer {
            Ok(granted) => Ok(fresh_lease(&granted)),
            Err(Failure::Refused { status, .. }) if status.message() == LEASE_EXISTS => {
                Err(StoreError::LeaseExists(id))
            }
            Err(failure) => Err(plain(failure)),
        }
    }

    async fn keep_alive(&self, id: LeaseId) -> Result<LeaseStatus, StoreError> {
        let opened =
            self.client.open::<_, wire::LeaseGrantResponse>(Method::LEASE_KEEP_ALIVE, wire::LeaseRequest { id });
        let opened = opened.await.map_err(|failure| lease_failure(failure, id))?;
        // A lease that is not there is kept alive for no time.
        if opened.first.ttl <= 0 { Err(StoreError::LeaseNotFound(id)) } else { Ok(fresh_lease(&opened.first)) }
    }

    async fn revoke(&self, id: LeaseId) -> Result<(), StoreError> {
        let answer: Result<wire::HeaderOnly, Failure> =
            self.client.call(Method::LEASE_REVOKE, wire::LeaseRequest { id }).await;
        match answer {
            Ok(_) => Ok(()),
            // An earlier try whose answer was lost revoked it.
            Err(Failure::Refused { status, repeated: true }) if status.message() == LEASE_NOT_FOUND => Ok(()),
            Err(failure) => Err(lease_failure(failure, id)),
        }
    }

    async fn lease_status(&self, id: LeaseId) -> Result<LeaseStatus, StoreError> {
        let request = wire::LeaseTimeToLiveRequest { id, keys: true };
        let answer: Result<wire::LeaseTimeToLiveResponse, Failure> =
            self.client.call(Method::LEASE_TIME_TO_LIVE, request).await;
        let answer = answer.map_err(|failure| lease_failure(failure, id))?;
        if answer.ttl < 0 {
            return Err(StoreError::LeaseNotFound(id));
        }
        Ok(LeaseStatus {
            id,
            granted: Duration::from_secs(unsigned(answer.granted_ttl)),
            remaining: Duration::from_secs(unsigned(answer.ttl)),
            keys: self.keys.own_keys(answer.keys),
        })
    }

    async fn open_watch(&self, request: WatchRequest) -> Result<Watcher, StoreError> {
        let permit = Arc::clone(&self.watches).try_acquire_owned().map_err(|_| StoreError::TooLarge {
            what: "the number of watches",
            limit: WATCHERS_MAX,
            actual: WATCHERS_MAX + 1,
        })?;
        // etcd begins "now" at a member that may be behind, and tells of compaction a while after it
        // agreed to watch. So the revision is looked at first.
        let (current, start) = match request.start_revision {
            0 => self.current().await.map(|current| (current, current + 1))?,
            start => match self.read(&probe(start - 1)).await {
                Ok(read) => (read.revision, start),
                // A start in the future is fine: the watch is silent until then.
                Err(StoreError::FutureRevision { current, .. }) => (current, start),
                Err(StoreError::Compacted { compacted, .. }) => {
                    return Err(StoreError::Compacted { requested: start, compacted });
                }
                Err(error) => return Err(error),
            },
        };
        let context = watch::Context {
            client: Arc::clone(&self.client),
            keys: self.keys.clone(),
            request,
            permit,
            open: self.open.subscribe(),
        };
        watch::open(context, start, current).await
    }

    async fn forget(&self, revision: Revision) -> Result<(), StoreError> {
        let request = wire::CompactionRequest { revision: signed(revision) };
        let answer: Result<wire::HeaderOnly, Failure> = self.client.call(Method::COMPACT, request).await;
        match answer {
            Ok(_) => Ok(()),
            Err(failure) => Err(self.revision_failure(failure, revision).await),
        }
    }
}

impl Store for Etcd {
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResponse, StoreError>> {
        Box::pin(async move { self.read(&request).await })
    }

    fn transaction(&self, transaction: Transaction) -> BoxFuture<'_, Result<TransactionResult, StoreError>> {
        Box::pin(self.transact(transaction))
    }

    fn lease_grant(&self, id: LeaseId, time_to_live: Duration) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        Box::pin(self.grant(id, time_to_live))
    }

    fn lease_keep_alive(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        Box::pin(self.keep_alive(id))
    }

    fn lease_revoke(&self, id: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.revoke(id))
    }

    fn lease_time_to_live(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        Box::pin(self.lease_status(id))
    }

    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<Watcher, StoreError>> {
        Box::pin(self.open_watch(request))
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.forget(revision))
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(self.current())
    }
}

// What etcd says, by its `rpctypes`.
const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";
const LEASE_NOT_FOUND: &str = "etcdserver: requested lease not found";
const LEASE_EXISTS: &str = "etcdserver: lease already exists";
const REQUEST_TOO_LARGE: &str = "etcdserver: request is too large";

fn lease_failure(failure: Failure, id: LeaseId) -> StoreError {
    match failure {
        Failure::Refused { status, .. } if status.message() == LEASE_NOT_FOUND => StoreError::LeaseNotFound(id),
        failure => plain(failure),
    }
}

/// A failure whose meaning does not depend on the request.
fn plain(failure: Failure) -> StoreError {
    match failure {
        Failure::Other(error) => error,
        Failure::Refused { status, .. } => refusal(&status),
    }
}

fn refusal(status: &Status) -> StoreError {
    let message = status.message();
    let is_login = message.contains("authentication failed") || message.contains("user name is empty");
    let reason = explain(status);
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => StoreError::Denied { reason },
        Code::InvalidArgument | Code::FailedPrecondition if is_login => StoreError::Denied { reason },
        // The whole request is bounded, and not the value alone: by etcd's `--max-request-bytes`.
        _ if message == REQUEST_TOO_LARGE || message.contains("received message larger than max") => {
            StoreError::TooLarge { what: "a request to etcd", limit: VALUE_BYTES_MAX, actual: VALUE_BYTES_MAX + 1 }
        }
        _ => StoreError::Backend { reason },
    }
}

fn fresh_lease(granted: &wire::LeaseGrantResponse) -> LeaseStatus {
    let granted_for = Duration::from_secs(unsigned(granted.ttl));
    LeaseStatus { id: granted.id, granted: granted_for, remaining: granted_for, keys: Vec::new() }
}
