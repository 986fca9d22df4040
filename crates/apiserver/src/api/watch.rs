//! Changes of objects as they happen.
//!
//! A store's event becomes ADDED, MODIFIED or DELETED by what the selection said of the object before
//! and says of it now: an object whose labels no longer match is DELETED for this watcher.

use std::collections::VecDeque;
use std::sync::Arc;

use portolan_store::{
    Event, EventKind, KeyRange, RangeRequest, StoreError, WatchCancelled, WatchMessage, WatchRequest, Watcher,
};
use serde_json::Value;

use super::{Api, Place, Selection, decode, stamp};
use crate::resources::Resource;
use crate::status::ApiError;

/// From where a watch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WatchStart {
    /// The present objects as ADDED, then what follows.
    Present,
    /// What follows the revision.
    After(u64),
}

/// What happened to an object, as a watcher with a selection sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WatchKind {
    Added,
    Modified,
    Deleted,
}

impl WatchKind {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// One message of a watch.
#[derive(Debug)]
pub(crate) enum WatchEvent {
    Object(WatchKind, Value),
    /// Everything up to this revision was sent.
    Bookmark(u64),
    /// The objects that were there at this revision were sent.
    PresentEnd(u64),
}

/// An open watch.
pub(crate) struct Watching {
    resource: Arc<Resource>,
    version: String,
    selection: Selection,
    pending: VecDeque<WatchEvent>,
    watcher: Watcher,
}

impl Api {
    pub(crate) async fn watch(
        &self,
        place: &Place,
        selection: Selection,
        start: WatchStart,
    ) -> Result<Watching, ApiError> {
        let range = KeyRange::prefix(place.prefix());
        let mut pending = VecDeque::new();
        let revision = match start {
            WatchStart::After(revision) => {
                let current = self.store.revision().await?;
                if revision > current {
                    // The client knows another store's future. It lists anew when told that this is over.
                    return Err(ApiError::expired(format!("resource version {revision} is not of this cluster")));
                }
                revision
            }
            WatchStart::Present => {
                let read = self.store.range(RangeRequest::new(range.clone())).await?;
                for item in &read.items {
                    let object = place.decode(item)?;
                    if selection.matches(&object) {
                        pending.push_back(WatchEvent::Object(WatchKind::Added, object));
                    }
                }
                pending.push_back(WatchEvent::PresentEnd(read.revision));
                read.revision
            }
        };
        let request = WatchRequest { progress: true, ..WatchRequest::new(range, revision + 1) };
        let watcher = self.store.watch(request).await?;
        let resource = Arc::clone(&place.resource);
        Ok(Watching { resource, version: place.version.clone(), selection, pending, watcher })
    }
}

impl Watching {
    /// The next message. After an error there are no more. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<WatchEvent, ApiError> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Ok(event);
            }
            match self.watcher.next().await {
                Ok(WatchMessage::Progress { revision }) => return Ok(WatchEvent::Bookmark(revision)),
                Ok(WatchMessage::Events { events, .. }) => {
                    for event in events {
                        let seen = self.see(&event)?;
                        self.pending.extend(seen);
                    }
                }
                Err(WatchCancelled::TooSlow { .. }) => {
                    return Err(ApiError::expired("the watch fell too far behind; resume or list again"));
                }
                Err(error @ (WatchCancelled::Compacted { .. } | WatchCancelled::Replaced { .. })) => {
                    return Err(ApiError::expired(format!("too old resource version: {error}")));
                }
                Err(WatchCancelled::Closed { .. }) => return Err(StoreError::Closed.into()),
            }
        }
    }

    fn see(&self, event: &Event) -> Result<Option<WatchEvent>, ApiError> {
        let had_before = event.kind == EventKind::Delete || event.current.version > 1;
        if had_before && event.previous.is_none() {
            // Without it nobody can say whether the watcher knows the object: it must list again.
            return Err(ApiError::expired("too old resource version: what it was before is forgotten"));
        }
        let decode = |item| decode(&self.resource, &self.version, item);
        let before = event.previous.as_deref().map(decode).transpose()?;
        let matched_before = before.as_ref().is_some_and(|object| self.selection.matches(object));
        let gone = |before: Option<Value>| {
            before.filter(|_| matched_before).map(|mut object| {
                stamp(&mut object, event.current.mod_revision);
                WatchEvent::Object(WatchKind::Deleted, object)
            })
        };
        if event.kind == EventKind::Delete {
            return Ok(gone(before));
        }
        let object = decode(&event.current)?;
        Ok(match (matched_before, self.selection.matches(&object)) {
            (false, true) => Some(WatchEvent::Object(WatchKind::Added, object)),
            (true, true) => Some(WatchEvent::Object(WatchKind::Modified, object)),
            (true, false) => gone(before),
            (false, false) => None,
        })
    }
}
