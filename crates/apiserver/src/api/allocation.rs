//! All Services and Nodes, decoded, for whoever gives out addresses and ports.
//!
//! Whoever holds the lock around it is the only one in this server to write either kind. In an embedded
//! store every write that was answered before is in the watches' queues already, so draining them is being
//! up to date; the cost follows what changed, not how much there is.
//!
//! Other servers may give out addresses from the same store. So whoever takes something writes a guard in
//! the same transaction, and compares it with what it was when the view was complete:
//!
//! ```text
//!   refresh ─▶ admit ─▶ takes something? ─▶ guard at revision G ─▶ view complete up to G? ─▶ write if guard
//!                ▲                                                   │ no                    is still at G
//!                └──────────────── wait for the watch, or read anew ◀┘
//! ```

use std::sync::Arc;

use futures::FutureExt;
use portolan_store::{
    Compare, EventKind, KeyRange, KeyValue, Operation, RangeRequest, Store, Transaction, WatchMessage, WatchRequest,
    Watcher,
};
use tokio::sync::MutexGuard;

use super::decode;
use crate::admission::{Holders, Objects};
use crate::fields::{name, namespace};
use crate::limits::ALLOCATION_WAIT_MAX;
use crate::resources::{Resource, Resources};
use crate::status::ApiError;

#[derive(Default)]
pub(super) struct Allocation {
    services: Cached,
    nodes: Cached,
}

/// What a write of an object must hold still until it is made.
#[derive(Default)]
pub(super) struct Admitted<'api> {
    /// Held, so that nobody else in this server gives out anything.
    pub(super) _lock: Option<MutexGuard<'api, Allocation>>,
    /// Where the write takes something: that no other server gave out anything since.
    pub(super) guard: Option<Guard>,
}

impl Admitted<'_> {
    /// The write, with the guard.
    pub(super) fn guarded(&self, transaction: Transaction) -> Transaction {
        let Some(guard) = &self.guard else { return transaction };
        let touch = Operation::Put { key: guard.key.into(), value: Vec::new(), lease: 0 };
        transaction.when(Compare::unchanged(guard.key, guard.revision)).then(touch)
    }
}

/// The key that whoever takes something of a kind writes.
pub(super) struct Guard {
    key: &'static str,
    /// Its last write; 0 for none.
    revision: u64,
}

/// The objects of one kind, kept up to date by a watch.
#[derive(Default)]
struct Cached {
    objects: Objects,
    /// What they hold, where they are Services.
    holders: Holders,
    watcher: Option<Watcher>,
    /// Every change up to here is in the objects.
    known: u64,
}

impl Allocation {
    /// Whether writes of a kind need the lock.
    pub(super) fn concerns(resource: &Resource) -> bool {
        resource.is("", "Service") || resource.is("", "Node")
    }

    pub(super) async fn refresh(&mut self, store: &Arc<dyn Store>, resources: &Resources) -> Result<(), ApiError> {
        for (plural, cached) in [("services", &mut self.services), ("nodes", &mut self.nodes)] {
            if let Some(resource) = resources.find("", "v1", plural) {
                cached.refresh(store, resource).await?;
            }
        }
        Ok(())
    }

    /// The guard of a kind, with a view that is complete up to it. `true` when the view changed for that.
    pub(super) async fn guard(
        &mut self,
        store: &Arc<dyn Store>,
        resource: &Resource,
    ) -> Result<(Guard, bool), ApiError> {
        let is_service = resource.is("", "Service");
        let (key, cached) =
            if is_service { ("/holders/services", &mut self.services) } else { ("/holders/nodes", &mut self.nodes) };
        let read = store.range(RangeRequest::new(KeyRange::key(key))).await?;
        let revision = read.items.first().map_or(0, |item| item.mod_revision);
        let is_behind = cached.known < revision;
        if is_behind {
            cached.catch_up(store, resource, revision).await?;
        }
        Ok((Guard { key, revision }, is_behind))
    }

    /// Reads all anew: what is said to be taken may have been let go elsewhere.
    pub(super) async fn reread(&mut self, store: &Arc<dyn Store>, resources: &Resources) -> Result<(), ApiError> {
        (self.services.watcher, self.nodes.watcher) = (None, None);
        self.refresh(store, resources).await
    }

    pub(super) fn holders(&self) -> &Holders {
        &self.services.holders
    }

    pub(super) fn nodes(&self) -> &Objects {
        &self.nodes.objects
    }
}

impl Cached {
    async fn refresh(&mut self, store: &Arc<dyn Store>, resource: &Resource) -> Result<(), ApiError> {
        while let Some(watcher) = self.watcher.as_mut() {
            match watcher.next().now_or_never() {
                None => return Ok(()),
                Some(Ok(message)) => self.take(resource, message)?,
                Some(Err(_)) => self.watcher = None,
            }
        }
        self.read(store, resource).await
    }

    /// Waits until a revision that changed something here is known.
    async fn catch_up(&mut self, store: &Arc<dyn Store>, resource: &Resource, revision: u64) -> Result<(), ApiError> {
        while self.known < revision
            && let Some(watcher) = self.watcher.as_mut()
        {
            match tokio::time::timeout(ALLOCATION_WAIT_MAX, watcher.next()).await {
                Ok(Ok(message)) => self.take(resource, message)?,
                Ok(Err(_)) | Err(_) => self.watcher = None,
            }
        }
        if self.watcher.is_none() { self.read(store, resource).await } else { Ok(()) }
    }

    fn take(&mut self, resource: &Resource, message: WatchMessage) -> Result<(), ApiError> {
        let (WatchMessage::Events { revision, .. } | WatchMessage::Progress { revision }) = &message;
        let revision = *revision;
        if let WatchMessage::Events { events, .. } = message {
            for event in events {
                match (event.kind, &event.previous) {
                    (EventKind::Put, _) => self.put(resource, &event.current)?,
                    (EventKind::Delete, Some(previous)) => self.remove(resource, previous)?,
                    (EventKind::Delete, None) => self.watcher = None,
                }
            }
        }
        self.known = self.known.max(revision);
        Ok(())
    }

    async fn read(&mut self, store: &Arc<dyn Store>, resource: &Resource) -> Result<(), ApiError> {
        let range = KeyRange::prefix(resource.prefix());
        let read = store.range(RangeRequest::new(range.clone())).await?;
        self.objects.clear();
        self.holders = Holders::default();
        for item in &read.items {
            self.put(resource, item)?;
        }
        self.watcher = Some(store.watch(WatchRequest::new(range, read.revision + 1)).await?);
        self.known = read.revision;
        Ok(())
    }

    fn put(&mut self, resource: &Resource, item: &KeyValue) -> Result<(), ApiError> {
        let object = decode(resource, "v1", item)?;
        let key = (namespace(&object).to_owned(), name(&object).to_owned());
        if resource.is("", "Service") {
            if let Some(old) = self.objects.get(&key) {
                self.holders.remove(old);
            }
            self.holders.add(&object);
        }
        self.objects.insert(key, object);
        Ok(())
    }

    fn remove(&mut self, resource: &Resource, item: &KeyValue) -> Result<(), ApiError> {
        let object = decode(resource, "v1", item)?;
        let key = (namespace(&object).to_owned(), name(&object).to_owned());
        if let Some(old) = self.objects.remove(&key) {
            self.holders.remove(&old);
        }
        Ok(())
    }
}
