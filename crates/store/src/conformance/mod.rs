//! The promise of [`Store`] as checks. Every driver runs all of them.
//!
//! A check gets a store that it may fill under its own key prefix, and a way to let time pass: the
//! embedded driver moves a clock, a driver of a real etcd sleeps. Revisions are compared with each
//! other and never assumed, so a store that others use too passes.

mod keys;
mod leases;
mod watches;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::driver::{BoxFuture, Store};
use crate::error::StoreError;
use crate::types::{KeyRange, KeyValue, RangeRequest, Revision, Transaction};
use crate::watch::{WatchCancelled, WatchMessage, Watcher};

/// How long a check waits for what a store must deliver on its own.
const DELIVERY_MAX: Duration = Duration::from_secs(10);

/// A driver under test.
pub trait Harness: Send + Sync {
    /// Makes a store. The checks use distinct keys, so it may be the same one each time.
    fn make(&self) -> BoxFuture<'_, Result<Arc<dyn Store>, StoreError>>;

    /// Lets time pass for the store that was made last, and takes effect before it returns.
    fn advance(&self, by: Duration) -> BoxFuture<'_, ()>;
}

/// What a driver does not keep.
#[derive(Debug, thiserror::Error)]
#[error("the store fails the check {check:?}: {reason}")]
pub struct Failure {
    /// Which check.
    pub check: &'static str,
    /// What was wrong.
    pub reason: String,
}

/// What went wrong within a check.
#[derive(Debug)]
pub(crate) struct Broken(String);

impl<E: fmt::Display> From<E> for Broken {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

type Outcome = Result<(), Broken>;

/// Ends a check when what is promised does not hold.
macro_rules! promise {
    ($holds:expr, $($text:tt)+) => {
        if !$holds {
            return Err($crate::conformance::Broken::from(format!($($text)+)));
        }
    };
}
use promise;

/// Runs every check, in order, until one fails.
pub async fn run(harness: &dyn Harness) -> Result<(), Failure> {
    macro_rules! checks {
        ($($module:ident::$check:ident),+ $(,)?) => {
            $({
                let name = concat!(stringify!($module), "::", stringify!($check));
                let failed = |reason| Failure { check: name, reason };
                let store = harness.make().await.map_err(|error| failed(error.to_string()))?;
                let context = Context { store, harness, prefix: concat!("/conformance/", stringify!($check), "/") };
                $module::$check(&context).await.map_err(|broken| failed(broken.0))?;
            })+
        };
    }
    checks!(
        keys::a_key_that_is_written_is_read,
        keys::revisions_rise_by_one_with_each_change,
        keys::a_range_is_ordered_limited_and_counted,
        keys::a_range_of_the_past_shows_the_past,
        keys::a_failed_compare_runs_the_other_branch,
        keys::every_kind_of_compare_works,
        keys::a_transaction_has_one_revision,
        keys::a_transaction_sees_its_own_steps,
        keys::a_key_changes_once_in_a_transaction,
        keys::an_empty_key_is_refused,
        keys::of_two_writers_one_wins,
        keys::compaction_hides_the_past_and_keeps_the_present,
        keys::the_future_cannot_be_read,
        leases::a_lease_takes_its_keys_along,
        leases::a_lease_that_is_kept_alive_lives,
        leases::a_revoked_lease_takes_its_keys_along,
        leases::a_rewritten_key_leaves_its_lease,
        leases::a_missing_lease_is_refused,
        watches::a_watch_from_now_sees_what_follows,
        watches::a_watch_replays_from_a_revision,
        watches::a_watch_carries_what_was_before,
        watches::a_watch_gets_a_revision_as_one_message,
        watches::a_watch_before_compaction_is_refused,
        watches::a_slow_watch_is_cut_off_and_resumes,
    );
    Ok(())
}

/// What a check works with.
pub(crate) struct Context<'run> {
    store: Arc<dyn Store>,
    harness: &'run dyn Harness,
    prefix: &'static str,
}

impl Context<'_> {
    fn key(&self, name: &str) -> Vec<u8> {
        format!("{}{name}", self.prefix).into_bytes()
    }

    fn all(&self) -> KeyRange {
        KeyRange::prefix(self.prefix)
    }

    async fn put(&self, name: &str, value: &str) -> Result<Revision, StoreError> {
        Ok(self.store.transaction(Transaction::put(self.key(name), value)).await?.revision)
    }

    async fn delete(&self, name: &str) -> Result<Revision, StoreError> {
        Ok(self.store.transaction(Transaction::delete(KeyRange::key(self.key(name)))).await?.revision)
    }

    async fn get(&self, name: &str) -> Result<Option<Arc<KeyValue>>, StoreError> {
        let read = self.store.range(RangeRequest::new(KeyRange::key(self.key(name)))).await?;
        Ok(read.items.into_iter().next())
    }

    /// The check's keys and values as text, as of a revision.
    async fn content(&self, revision: Revision) -> Result<Vec<String>, StoreError> {
        let request = RangeRequest { revision, ..RangeRequest::new(self.all()) };
        let read = self.store.range(request).await?;
        Ok(read.items.iter().map(|item| self.text(item)).collect())
    }

    fn text(&self, item: &KeyValue) -> String {
        let key = String::from_utf8_lossy(&item.key[self.prefix.len()..]).into_owned();
        format!("{key}={}", String::from_utf8_lossy(&item.value))
    }

    /// The next message with changes; a progress mark is skipped.
    async fn events(&self, watcher: &mut Watcher) -> Result<(Revision, Vec<String>), Broken> {
        loop {
            match next(watcher).await? {
                Ok(WatchMessage::Progress { .. }) => {}
                Ok(WatchMessage::Events { revision, events }) => {
                    let texts = events.iter().map(|event| format!("{:?} {}", event.kind, self.text(&event.current)));
                    return Ok((revision, texts.collect()));
                }
                Err(cancelled) => return Err(cancelled.into()),
            }
        }
    }
}

async fn next(watcher: &mut Watcher) -> Result<Result<WatchMessage, WatchCancelled>, Broken> {
    let message = tokio::time::timeout(DELIVERY_MAX, watcher.next()).await;
    message.map_err(|_| Broken(format!("no message within {DELIVERY_MAX:?}")))
}
