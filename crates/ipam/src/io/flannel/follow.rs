//! Following the leases of others: list, watch, and list again where the history is gone.

use std::sync::Arc;

use portolan_store::{KeyRange, RangeRequest, Store, StoreError, WatchMessage, WatchRequest, Watcher};
use tokio::sync::{mpsc, watch};

use super::backoff::Backoff;
use super::manager::within;
use super::{LeaseError, Message};
use crate::flannel::{Change, Layout, Subnet, Table};

struct Follower<'follower> {
    store: Arc<dyn Store>,
    range: KeyRange,
    table: Table,
    messages: &'follower mpsc::Sender<Message>,
    own: watch::Receiver<Option<Subnet>>,
    has_failed: bool,
    /// The version of the problems that the reader knows.
    told: Option<u64>,
}

/// Runs until it is dropped.
pub(super) async fn follow(
    store: Arc<dyn Store>,
    layout: Layout,
    messages: &mpsc::Sender<Message>,
    mut own: watch::Receiver<Option<Subnet>>,
    mut backoff: Backoff,
) {
    // One's own lease must not pass for another's.
    let Ok(first) = own.wait_for(Option::is_some).await.map(|own| *own) else { return std::future::pending().await };
    let range = layout.subnets();
    let mut table = Table::new(layout);
    table.set_own(first);
    let mut follower = Follower { store, range, table, messages, own, has_failed: false, told: None };
    let mut is_listed = false;
    loop {
        let outcome = follower.watch(&mut is_listed, &mut backoff).await;
        match outcome {
            // History is gone, or the store is another one: only a list helps.
            Err(LeaseError::Store(StoreError::Compacted { .. } | StoreError::FutureRevision { .. })) => {
                is_listed = false;
            }
            Err(error) => {
                follower.has_failed = true;
                let _ = messages.send(Message::Following(Some(error.to_string()))).await;
            }
            Ok(()) => {}
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

impl Follower<'_> {
    /// Lists where needed, and watches until the watch ends.
    async fn watch(&mut self, is_listed: &mut bool, backoff: &mut Backoff) -> Result<(), LeaseError> {
        if !*is_listed {
            self.list().await?;
            *is_listed = true;
        }
        // A store that was put back to an older state would keep a watch of the future silent.
        let (requested, current) = (self.table.revision(), within(self.store.revision()).await?);
        if current < requested {
            return Err(StoreError::FutureRevision { requested, current }.into());
        }
        let start = requested + 1;
        let request = WatchRequest { previous: false, progress: true, ..WatchRequest::new(self.range.clone(), start) };
        let mut watcher = within(self.store.watch(request)).await?;
        backoff.reset();
        if std::mem::take(&mut self.has_failed) {
            let _ = self.messages.send(Message::Following(None)).await;
        }
        self.read(&mut watcher).await;
        Ok(())
    }

    async fn list(&mut self) -> Result<(), LeaseError> {
        let listed = within(self.store.range(RangeRequest::new(self.range.clone()))).await?;
        let changes = self.table.replace(listed.revision, listed.items.iter().map(Arc::as_ref));
        self.tell(changes).await;
        Ok(())
    }

    async fn read(&mut self, watcher: &mut Watcher) {
        loop {
            let changes = tokio::select! {
                message = watcher.next() => match message {
                    Ok(WatchMessage::Events { revision, events }) => {
                        self.table.apply(revision, &events)
                    }
                    Ok(WatchMessage::Progress { revision }) => {
                        self.table.mark(revision);
                        continue;
                    }
                    Err(_) => return,
                },
                changed = self.own.changed() => {
                    if changed.is_err() {
                        // Whoever holds the lease is gone for good; the watch goes on without.
                        return std::future::pending().await;
                    }
                    let own = *self.own.borrow_and_update();
                    self.table.set_own(own)
                }
            };
            if !changes.is_empty() || self.told != Some(self.table.problems_version()) {
                self.tell(changes).await;
            }
        }
    }

    async fn tell(&mut self, changes: Vec<Change>) {
        let version = self.table.problems_version();
        let problems = (self.told != Some(version)).then(|| self.table.problems());
        self.told = Some(version);
        // A reader that is gone ends the task elsewhere.
        let _ = self.messages.send(Message::Leases { changes, problems }).await;
    }
}
