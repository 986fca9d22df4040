//! What the embedded store knows, in memory: the index of keys and their versions, the log of
//! changes that can still be watched, leases and watchers.
//!
//! The writer alone changes keys; readers hold the lock only to collect shared pointers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::error::StoreError;
use crate::limits::{HISTORY_REVISIONS_SLACK, WATCHERS_MAX};
use crate::types::{
    Event, EventKind, KeyRange, KeyValue, LeaseId, LeaseStatus, RangeRequest, RangeResponse, Revision, WatchRequest,
};
use crate::watch::{WatchMessage, WatchSender, Watcher, watch_channel};

/// A key at a revision; no value when the revision removed it.
#[derive(Debug, Clone)]
pub(super) struct Version {
    pub(super) revision: Revision,
    pub(super) value: Option<Arc<KeyValue>>,
}

/// All that one revision changed, in key order.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) revision: Revision,
    pub(super) events: Vec<Event>,
}

impl Change {
    fn bytes(&self) -> usize {
        self.events.iter().map(event_bytes).sum()
    }
}

fn event_bytes(event: &Event) -> usize {
    event.current.key.len() + event.current.value.len()
}

#[derive(Debug, Clone)]
pub(super) struct Lease {
    pub(super) time_to_live: Duration,
    pub(super) expires: Duration,
    pub(super) keys: BTreeSet<Vec<u8>>,
}

#[derive(Debug)]
struct Watch {
    range: KeyRange,
    start: Revision,
    previous: bool,
    progress: bool,
    /// When it last got a message, by the store's clock.
    last_message: Duration,
    sender: WatchSender,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) revision: Revision,
    pub(super) compacted: Revision,
    pub(super) index: BTreeMap<Vec<u8>, Vec<Version>>,
    pub(super) log: VecDeque<Change>,
    /// Bytes of the keys and values that the log writes.
    log_bytes: usize,
    pub(super) leases: BTreeMap<LeaseId, Lease>,
    watches: BTreeMap<u64, Watch>,
    watches_opened: u64,
}

impl State {
    pub(super) fn new(revision: Revision, compacted: Revision) -> Self {
        Self {
            revision,
            compacted,
            index: BTreeMap::new(),
            log: VecDeque::new(),
            log_bytes: 0,
            leases: BTreeMap::new(),
            watches: BTreeMap::new(),
            watches_opened: 0,
        }
    }

    /// The key's present version.
    pub(super) fn current(&self, key: &[u8]) -> Option<&Arc<KeyValue>> {
        self.index.get(key)?.last()?.value.as_ref()
    }

    /// Whether `revision` can be read; 0 is always now.
    pub(super) fn readable(&self, revision: Revision) -> Result<Revision, StoreError> {
        match revision {
            0 => Ok(self.revision),
            requested if requested < self.compacted => {
                Err(StoreError::Compacted { requested, compacted: self.compacted })
            }
            requested if requested > self.revision => {
                Err(StoreError::FutureRevision { requested, current: self.revision })
            }
            requested => Ok(requested),
        }
    }

    pub(super) fn range(&self, request: &RangeRequest) -> Result<RangeResponse, StoreError> {
        let revision = self.readable(request.revision)?;
        let found = self.versions(&request.range, revision);
        Ok(select(found, request, self.revision))
    }

    /// The versions of a range's keys as of a revision, in key order.
    pub(super) fn versions<'state>(
        &'state self,
        range: &KeyRange,
        revision: Revision,
    ) -> impl Iterator<Item = &'state Arc<KeyValue>> {
        let entries = range.bounds().map(|bounds| self.index.range::<[u8], _>(bounds));
        entries.into_iter().flatten().filter_map(move |(_, versions)| {
            let after = versions.partition_point(|version| version.revision <= revision);
            versions[..after].last()?.value.as_ref()
        })
    }

    /// Takes in what a revision changed, and tells the watches.
    pub(super) fn apply(&mut self, change: Change, now: Duration) {
        self.revision = change.revision;
        for event in &change.events {
            self.take_event(event);
        }
        self.watches.retain(|_, watch| deliver(watch, &change, now));
        self.log_bytes += change.bytes();
        self.log.push_back(change);
    }

    /// Puts an event that was read back into the log, when it is recent enough to be watched.
    pub(super) fn log_event(&mut self, event: Event) {
        let revision = event.current.mod_revision;
        if revision < self.compacted {
            return;
        }
        self.log_bytes += event_bytes(&event);
        match self.log.back_mut() {
            Some(change) if change.revision == revision => change.events.push(event),
            _ => self.log.push_back(Change { revision, events: vec![event] }),
        }
    }

    /// The revision to compact at, when there are more than `history` revisions or more bytes than
    /// `bytes`. By bytes half is let go, so that it is not done again with the next write.
    pub(super) fn trim_to(&self, history: u64, bytes: usize) -> Option<Revision> {
        let slack = HISTORY_REVISIONS_SLACK.min(history);
        let by_count =
            (self.revision - self.compacted > history + slack).then(|| self.revision.saturating_sub(history));
        let mut left = self.log_bytes;
        let kept = self.log.iter().find(|change| {
            let is_small_enough = left <= bytes / 2;
            left -= change.bytes();
            is_small_enough
        });
        let by_bytes = (self.log_bytes > bytes).then(|| kept.map_or(self.revision, |change| change.revision));
        by_count.max(by_bytes).filter(|revision| *revision > self.compacted)
    }

    /// Takes in one event of a change: also how the database is read back at start.
    pub(super) fn take_event(&mut self, event: &Event) {
        let current = &event.current;
        if let Some(previous) = &event.previous
            && let Some(lease) = self.leases.get_mut(&previous.lease)
        {
            lease.keys.remove(&previous.key);
        }
        let value = match event.kind {
            EventKind::Put => {
                if let Some(lease) = self.leases.get_mut(&current.lease) {
                    lease.keys.insert(current.key.clone());
                }
                Some(Arc::clone(current))
            }
            EventKind::Delete => None,
        };
        let version = Version { revision: current.mod_revision, value };
        match self.index.get_mut(&current.key) {
            Some(versions) => versions.push(version),
            None => {
                self.index.insert(current.key.clone(), vec![version]);
            }
        }
    }

    /// Opens a watch: the backlog and the registration are one step, so nothing is lost between.
    pub(super) fn watch(&mut self, request: &WatchRequest, now: Duration) -> Result<Watcher, StoreError> {
        self.watches.retain(|_, watch| !watch.sender.is_closed());
        if self.watches.len() >= WATCHERS_MAX {
            let actual = self.watches.len() + 1;
            return Err(StoreError::TooLarge { what: "the number of watches", limit: WATCHERS_MAX, actual });
        }
        let start = match request.start_revision {
            0 => self.revision + 1,
            requested if requested <= self.compacted => {
                return Err(StoreError::Compacted { requested, compacted: self.compacted });
            }
            // A start in the future is legal in etcd: the watch is silent until then.
            requested => requested,
        };
        let first = self.log.partition_point(|change| change.revision < start);
        let backlog = self.log.range(first..);
        let backlog = backlog.filter_map(|change| message(change, &request.range, request.previous));
        let (sender, watcher) = watch_channel(backlog.collect(), start);
        self.watches_opened += 1;
        let watch = Watch {
            range: request.range.clone(),
            start,
            previous: request.previous,
            progress: request.progress,
            last_message: now,
            sender,
        };
        self.watches.insert(self.watches_opened, watch);
        Ok(watcher)
    }

    /// Gives idle watches a mark, and drops those whose reader is gone.
    pub(super) fn mark_progress(&mut self, now: Duration, idle: Duration) {
        let revision = self.revision;
        self.watches.retain(|_, watch| {
            let due = watch.progress && now.saturating_sub(watch.last_message) >= idle;
            if due && revision + 1 >= watch.start {
                watch.sender.send_progress(revision);
                watch.last_message = now;
            }
            !watch.sender.is_closed()
        });
    }

    /// Forgets what no read or watch from `revision` on needs.
    pub(super) fn compact(&mut self, revision: Revision) {
        let touched = self.log.partition_point(|change| change.revision <= revision);
        let mut keys = BTreeSet::new();
        for change in self.log.range(..touched) {
            keys.extend(change.events.iter().map(|event| event.current.key.clone()));
        }
        for key in keys {
            let Some(versions) = self.index.get_mut(&key) else { continue };
            let readable = versions.partition_point(|version| version.revision <= revision);
            versions.drain(..readable.saturating_sub(1));
            let removed = |version: &Version| version.value.is_none() && version.revision < revision;
            if versions.first().is_some_and(removed) {
                versions.remove(0);
            }
            if versions.is_empty() {
                self.index.remove(&key);
            }
        }
        let forgotten = self.log.partition_point(|change| change.revision < revision);
        self.log_bytes -= self.log.drain(..forgotten).map(|change| change.bytes()).sum::<usize>();
        self.compacted = revision;
    }

    pub(super) fn lease_status(&self, id: LeaseId, now: Duration) -> Result<LeaseStatus, StoreError> {
        let lease = self.leases.get(&id).ok_or(StoreError::LeaseNotFound(id))?;
        Ok(LeaseStatus {
            id,
            granted: lease.time_to_live,
            remaining: lease.expires.saturating_sub(now),
            keys: lease.keys.iter().cloned().collect(),
        })
    }

    /// Ends every watch, as the store closes.
    pub(super) fn close(&mut self) {
        self.watches.clear();
    }
}

/// Applies limit, count and keys-only to what a range holds.
pub(super) fn select<'found>(
    found: impl Iterator<Item = &'found Arc<KeyValue>>,
    request: &RangeRequest,
    revision: Revision,
) -> RangeResponse {
    let limit = match (request.count_only, request.limit) {
        (true, _) => 0,
        (false, 0) => usize::MAX,
        (false, limit) => limit,
    };
    let mut items = Vec::new();
    let mut count = 0;
    for item in found {
        count += 1;
        if items.len() < limit {
            items.push(if request.keys_only { Arc::new(without_value(item)) } else { Arc::clone(item) });
        }
    }
    let more = !request.count_only && items.len() < count;
    RangeResponse { items, more, count, revision }
}

fn without_value(item: &KeyValue) -> KeyValue {
    KeyValue { value: Vec::new(), key: item.key.clone(), ..*item }
}

/// What a watch of `range` sees of a change; `None` when nothing.
fn message(change: &Change, range: &KeyRange, previous: bool) -> Option<WatchMessage> {
    let events = change.events.iter().filter(|event| range.contains(&event.current.key));
    let events: Vec<Event> =
        events.map(|event| Event { previous: event.previous.clone().filter(|_| previous), ..event.clone() }).collect();
    (!events.is_empty()).then_some(WatchMessage::Events { revision: change.revision, events })
}

/// Whether the watch lives on.
fn deliver(watch: &mut Watch, change: &Change, now: Duration) -> bool {
    if change.revision < watch.start {
        return true;
    }
    match message(change, &watch.range, watch.previous) {
        Some(WatchMessage::Events { revision, events }) => {
            watch.last_message = now;
            watch.sender.send_events(revision, events)
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(revision: Revision, bytes: usize) -> Change {
        let key = vec![b'a'; bytes];
        let current = KeyValue {
            key,
            value: Vec::new(),
            create_revision: 1,
            mod_revision: revision,
            version: revision,
            lease: 0,
        };
        Change { revision, events: vec![Event { kind: EventKind::Put, current: Arc::new(current), previous: None }] }
    }

    #[test]
    fn history_is_bounded_by_revisions_and_by_bytes() {
        let mut state = State::new(1, 0);
        for revision in 2..=11 {
            state.apply(written(revision, 100), Duration::ZERO);
        }
        assert_eq!(state.trim_to(20, 1000), None);
        assert_eq!(state.trim_to(5, 1000), Some(6));
        // 400 of 800 bytes stay: those of the revisions 8 to 11.
        assert_eq!(state.trim_to(20, 800), Some(8));
        state.compact(8);
        assert_eq!((state.log_bytes, state.log.len()), (400, 4));
        assert_eq!(state.trim_to(20, 800), None);
        // One change that is too large alone is the only one that stays.
        state.apply(written(12, 5000), Duration::ZERO);
        assert_eq!(state.trim_to(20, 800), Some(12));
        state.compact(12);
        assert_eq!(state.trim_to(20, 800), None);
    }
}
