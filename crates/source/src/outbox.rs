//! What waits for the receiver, one table's worth: merged by object and bounded.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::SystemTime;

use portolan_net::{Family, NodeName};
use portolan_state::{Change, Object, ObjectRef};

use crate::SourceEvent;
use crate::limits::{PENDING_CHANGES_MAX, PENDING_EVENTS_MAX, PENDING_TRIGGERS_MAX, SHARED_NAMES_MAX};

/// Events in their order, then the changes that came after them.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    events: VecDeque<SourceEvent>,
    changes: BTreeMap<ObjectRef, Change>,
    /// What the changes of slices that wait were caused by.
    triggers: Vec<(Family, SystemTime)>,
}

impl Outbox {
    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.events.is_empty() && self.changes.is_empty()
    }

    /// Whether the watch must wait for the receiver.
    pub(crate) fn is_full(&self) -> bool {
        self.events.len() >= PENDING_EVENTS_MAX || self.changes.len() >= PENDING_CHANGES_MAX
    }

    /// A change of one object. An earlier one of the same object that still waits is forgotten: only
    /// the latest value counts.
    pub(crate) fn push_change(&mut self, object: ObjectRef, change: Change) {
        self.changes.insert(object, change);
    }

    /// When what a change of a slice tells of happened. It waits with the change.
    pub(crate) fn push_trigger(&mut self, family: Family, at: SystemTime) {
        if self.triggers.len() < PENDING_TRIGGERS_MAX {
            self.triggers.push((family, at));
        }
    }

    /// A whole table: the changes that still wait are older than it, and covered by it.
    pub(crate) fn push_replace(&mut self, replace: Change) {
        self.changes.clear();
        self.triggers.clear();
        self.events.push_back(SourceEvent::Changes(vec![replace]));
    }

    /// An event that must keep its place among the changes.
    pub(crate) fn push_event(&mut self, event: SourceEvent) {
        if !self.changes.is_empty() {
            let triggers = self.pop_triggers();
            self.events.extend(triggers);
            let changes = std::mem::take(&mut self.changes).into_values().collect();
            self.events.push_back(SourceEvent::Changes(changes));
        }
        self.events.push_back(event);
    }

    /// What to send next.
    pub(crate) fn pop(&mut self) -> Option<SourceEvent> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        if let Some(triggers) = self.pop_triggers() {
            return Some(triggers);
        }
        let changes: Vec<Change> = std::mem::take(&mut self.changes).into_values().collect();
        (!changes.is_empty()).then_some(SourceEvent::Changes(changes))
    }

    fn pop_triggers(&mut self) -> Option<SourceEvent> {
        (!self.triggers.is_empty()).then(|| SourceEvent::Triggered(std::mem::take(&mut self.triggers)))
    }
}

/// One copy of each node's name, shared by the endpoints on it: 100,000 endpoints name few nodes.
#[derive(Debug, Default)]
pub(crate) struct SharedNames(BTreeSet<NodeName>);

impl SharedNames {
    /// Makes an object use the shared copies.
    pub(crate) fn share(&mut self, object: &mut Object) {
        match object {
            Object::EndpointSlice(slice) => slice.endpoints.iter_mut().for_each(|it| self.share_name(&mut it.node)),
            Object::Pod(pod) => self.share_name(&mut pod.node),
            Object::Namespace(_) | Object::Node(_) | Object::Service(_) | Object::Attachment(_) | Object::Subnet(_) => {
            }
        }
    }

    fn share_name(&mut self, name: &mut Option<NodeName>) {
        let Some(name) = name else { return };
        if let Some(shared) = self.0.get(name) {
            *name = shared.clone();
        } else if self.0.len() < SHARED_NAMES_MAX {
            self.0.insert(name.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use portolan_net::ObjectKind;
    use portolan_state::Namespace;

    use super::*;

    fn upsert(name: &str) -> (ObjectRef, Change) {
        let object = Object::Namespace(Namespace { name: name.into() });
        (object.reference(), Change::Upsert(object, Vec::new()))
    }

    #[test]
    fn only_the_latest_value_of_an_object_waits() {
        let mut outbox = Outbox::default();
        let (reference, change) = upsert("a");
        outbox.push_change(reference.clone(), change);
        outbox.push_change(reference.clone(), Change::Delete(reference.clone()));
        assert_eq!(outbox.pop(), Some(SourceEvent::Changes(vec![Change::Delete(reference)])));
        assert!(outbox.is_empty());
        assert_eq!(outbox.pop(), None);
    }

    #[test]
    fn a_replace_covers_what_is_older_and_an_event_keeps_its_place() {
        let mut outbox = Outbox::default();
        let ((a, upsert_a), (b, upsert_b)) = (upsert("a"), upsert("b"));
        outbox.push_change(a, upsert_a);
        let replace = Change::Replace(ObjectKind::Namespace, Vec::new(), Vec::new());
        outbox.push_replace(replace.clone());
        outbox.push_change(b, upsert_b.clone());
        let connected = SourceEvent::Connected { table: ObjectKind::Namespace };
        outbox.push_event(connected.clone());
        assert_eq!(outbox.pop(), Some(SourceEvent::Changes(vec![replace])));
        assert_eq!(outbox.pop(), Some(SourceEvent::Changes(vec![upsert_b])));
        assert_eq!(outbox.pop(), Some(connected));
        assert_eq!(outbox.pop(), None);
    }

    #[test]
    fn the_cause_of_a_change_comes_before_it_and_goes_with_it() {
        let mut outbox = Outbox::default();
        let (reference, change) = upsert("a");
        let trigger = (Family::V4, SystemTime::UNIX_EPOCH);
        outbox.push_trigger(trigger.0, trigger.1);
        outbox.push_change(reference.clone(), change.clone());
        assert_eq!(outbox.pop(), Some(SourceEvent::Triggered(vec![trigger])));
        assert_eq!(outbox.pop(), Some(SourceEvent::Changes(vec![change.clone()])));
        outbox.push_trigger(trigger.0, trigger.1);
        outbox.push_change(reference, change);
        outbox.push_replace(Change::Replace(ObjectKind::Namespace, Vec::new(), Vec::new()));
        assert!(matches!(outbox.pop(), Some(SourceEvent::Changes(_))));
        assert!(outbox.is_empty());
        assert_eq!(outbox.pop(), None);
    }

    #[test]
    fn it_is_full_at_its_bounds() {
        let mut outbox = Outbox::default();
        for index in 0..PENDING_CHANGES_MAX {
            assert!(!outbox.is_full());
            let (reference, change) = upsert(&index.to_string());
            outbox.push_change(reference, change);
        }
        assert!(outbox.is_full());
        outbox.pop();
        for _ in 0..PENDING_EVENTS_MAX {
            assert!(!outbox.is_full());
            outbox.push_event(SourceEvent::Connected { table: ObjectKind::Node });
        }
        assert!(outbox.is_full());
    }
}
