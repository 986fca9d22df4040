//! All Services and Nodes, decoded, for whoever gives out addresses and ports.
//!
//! Whoever holds the lock around it is the only one to write either kind. Every write that was
//! answered before is in the watches' queues already, so draining them is being up to date; the cost
//! follows what changed, not how much there is.

use std::sync::Arc;

use futures::FutureExt;
use portolan_store::{EventKind, KeyRange, KeyValue, RangeRequest, Store, WatchMessage, WatchRequest, Watcher};

use super::decode;
use crate::admission::{Holders, Objects};
use crate::fields::{name, namespace};
use crate::resources::{Resource, Resources};
use crate::status::ApiError;

#[derive(Default)]
pub(super) struct Allocation {
    services: Cached,
    nodes: Cached,
}

/// The objects of one kind, kept up to date by a watch.
#[derive(Default)]
struct Cached {
    objects: Objects,
    /// What they hold, where they are Services.
    holders: Holders,
    watcher: Option<Watcher>,
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
                Some(Ok(WatchMessage::Progress { .. })) => {}
                Some(Ok(WatchMessage::Events { events, .. })) => {
                    for event in events {
                        match (event.kind, &event.previous) {
                            (EventKind::Put, _) => self.put(resource, &event.current)?,
                            (EventKind::Delete, Some(previous)) => self.remove(resource, previous)?,
                            (EventKind::Delete, None) => self.watcher = None,
                        }
                    }
                }
                Some(Err(_)) => self.watcher = None,
            }
        }
        let range = KeyRange::prefix(resource.prefix());
        let read = store.range(RangeRequest::new(range.clone())).await?;
        self.objects.clear();
        self.holders = Holders::default();
        for item in &read.items {
            self.put(resource, item)?;
        }
        self.watcher = Some(store.watch(WatchRequest::new(range, read.revision + 1)).await?);
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
