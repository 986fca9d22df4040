//! Which of the servers on one store runs the controllers.
//!
//! The leader holds a key that ends with its lease. It prolongs the lease, and stops its work before the
//! lease can end; the others watch the key and take over when it goes. Controllers of two servers that run
//! at once would do no harm, as every write compares what it read; they would only be in each other's way.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use portolan_store::{
    Compare, EventKind, KeyRange, Operation, RangeRequest, Store, StoreError, Transaction, WatchMessage, WatchRequest,
};
use tokio::time::Instant;

use crate::limits::{LEADER_LEASE, LEADER_MARGIN, RESIGN_WAIT_MAX};

/// The key of whoever runs the controllers; its value is for people.
const LEADER_KEY: &str = "/leader/controllers";

/// How long to wait after the store did not answer.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);

/// One candidate.
pub(crate) struct Election {
    store: Arc<dyn Store>,
    identity: String,
    /// The lease under which it leads, 0 for none.
    lease: AtomicI64,
}

impl Election {
    pub(crate) fn new(store: Arc<dyn Store>, identity: String) -> Self {
        Self { store, identity, lease: AtomicI64::new(0) }
    }

    /// Does the work whenever this candidate leads. Runs until it is dropped.
    pub(crate) async fn run<F: Future<Output = ()>>(&self, work: impl Fn() -> F) {
        loop {
            let until = match self.win().await {
                Ok(until) => until,
                Err(error) => {
                    tracing::warn!(%error, "who runs the controllers cannot be decided; it is tried again");
                    self.resign().await;
                    tokio::time::sleep(FAILURE_PAUSE).await;
                    continue;
                }
            };
            tracing::info!(identity = self.identity, "this server runs the controllers");
            tokio::select! {
                () = work() => {}
                () = self.hold(until) => tracing::warn!("the controllers stop: the lease could not be prolonged"),
            }
            self.resign().await;
        }
    }

    /// Lets another lead at once, if this one did.
    pub(crate) async fn resign(&self) {
        let lease = self.lease.swap(0, Ordering::Relaxed);
        if lease != 0 {
            // If it cannot be said, the lease ends by itself.
            let _ = tokio::time::timeout(RESIGN_WAIT_MAX, self.store.lease_revoke(lease)).await;
        }
    }

    /// Waits until nobody leads and this one does; until when is the answer.
    async fn win(&self) -> Result<Instant, StoreError> {
        loop {
            self.vacancy().await?;
            let asked = Instant::now();
            let lease = self.store.lease_grant(0, LEADER_LEASE).await?;
            self.lease.store(lease.id, Ordering::Relaxed);
            let value = self.identity.clone().into_bytes();
            let put = Operation::Put { key: LEADER_KEY.into(), value, lease: lease.id };
            let take = Transaction::default().when(Compare::absent(LEADER_KEY)).then(put);
            if self.store.transaction(take).await?.succeeded {
                return Ok(asked + lease.granted);
            }
            self.resign().await;
        }
    }

    /// Waits until nobody leads.
    async fn vacancy(&self) -> Result<(), StoreError> {
        loop {
            let read = self.store.range(RangeRequest::new(KeyRange::key(LEADER_KEY))).await?;
            if read.items.is_empty() {
                return Ok(());
            }
            let request = WatchRequest::new(KeyRange::key(LEADER_KEY), read.revision + 1);
            let mut watcher = self.store.watch(request).await?;
            // However the watch ends, the key is looked at again.
            while let Ok(message) = watcher.next().await {
                if let WatchMessage::Events { events, .. } = message
                    && events.iter().any(|event| event.kind == EventKind::Delete)
                {
                    return Ok(());
                }
            }
        }
    }

    /// Prolongs the lease, and returns when it is not certain any more that it lives.
    async fn hold(&self, until: Instant) {
        let mut until = until;
        loop {
            tokio::time::sleep(LEADER_LEASE / 5).await;
            let asked = Instant::now();
            let prolonged = self.store.lease_keep_alive(self.lease.load(Ordering::Relaxed));
            match tokio::time::timeout_at(until - LEADER_MARGIN, prolonged).await {
                Ok(Ok(lease)) => until = asked + lease.granted,
                Ok(Err(StoreError::LeaseNotFound(_))) | Err(_) => return,
                Ok(Err(error)) => tracing::warn!(%error, "the leader's lease is not prolonged yet"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use portolan_store::{Embedded, Location, Options};
    use tokio::sync::mpsc;

    use super::*;

    /// Work that says when it begins, and never ends.
    fn working(
        name: &'static str,
        begun: mpsc::Sender<&'static str>,
    ) -> impl Fn() -> futures::future::BoxFuture<'static, ()> {
        move || {
            let begun = begun.clone();
            Box::pin(async move {
                let _ = begun.send(name).await;
                std::future::pending::<()>().await;
            })
        }
    }

    #[tokio::test]
    async fn one_leads_until_it_resigns() {
        let store: Arc<dyn Store> = Arc::new(Embedded::open(Options::new(Location::Memory)).unwrap());
        let (sender, mut begun) = mpsc::channel(4);
        let first = Arc::new(Election::new(Arc::clone(&store), "first".to_owned()));
        let second = Election::new(Arc::clone(&store), "second".to_owned());
        let leading = {
            let (first, sender) = (Arc::clone(&first), sender.clone());
            tokio::spawn(async move { first.run(working("first", sender)).await })
        };
        assert_eq!(begun.recv().await, Some("first"));
        tokio::spawn(async move { second.run(working("second", sender)).await });
        let read = store.range(RangeRequest::new(KeyRange::key(LEADER_KEY))).await.unwrap();
        assert_eq!(read.items[0].value, b"first");
        assert!(begun.try_recv().is_err());
        leading.abort();
        let _ = leading.await;
        first.resign().await;
        assert_eq!(begun.recv().await, Some("second"));
    }

    #[tokio::test]
    async fn who_loses_its_lease_stops_and_stands_again() {
        let store: Arc<dyn Store> = Arc::new(Embedded::open(Options::new(Location::Memory)).unwrap());
        let (sender, mut begun) = mpsc::channel(4);
        let only = Arc::new(Election::new(Arc::clone(&store), "only".to_owned()));
        let leading = Arc::clone(&only);
        tokio::spawn(async move { leading.run(working("only", sender)).await });
        assert_eq!(begun.recv().await, Some("only"));
        store.lease_revoke(only.lease.load(Ordering::Relaxed)).await.unwrap();
        assert_eq!(begun.recv().await, Some("only"));
    }
}
