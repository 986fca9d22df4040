//! The one place that changes the tables, and keeps their cross-references right.

use std::collections::BTreeSet;
use std::sync::Arc;

use imbl::OrdMap;
use portolan_net::{NodeName, ObjectKey, ObjectKind};

use crate::order::by_halves;
use crate::{Change, Dirty, EndpointSlice, Object, ObjectRef, Problem, Snapshot};

/// Applies changes to the current snapshot and records which keys they touched.
#[derive(Debug, Default)]
pub struct Writer {
    current: Snapshot,
    dirty: Dirty,
}

impl Writer {
    /// Empty tables, none of them in sync.
    pub fn new() -> Writer {
        Writer::default()
    }

    /// Applies one change. A change that says what is already so touches nothing.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Upsert(object, problems) => self.upsert(object, problems),
            Change::Delete(reference) => self.delete(&reference),
            Change::Reject(problem) => self.reject(problem),
            Change::Replace(kind, objects, rejected) => self.replace(kind, objects, rejected),
        }
    }

    /// The tables as they are now, without taking the change feed.
    pub fn snapshot(&self) -> &Snapshot {
        &self.current
    }

    /// The tables as they are now, and the keys that changed since the last call.
    pub fn take(&mut self) -> (Snapshot, Dirty) {
        (self.current.clone(), std::mem::take(&mut self.dirty))
    }

    fn upsert(&mut self, object: Object, problems: Vec<Problem>) {
        self.note(object.reference(), problems);
        let current = &mut self.current;
        let changed = match object {
            Object::Namespace(it) => insert(&mut current.namespaces, it.name.clone(), it, &mut self.dirty.namespaces),
            Object::Node(it) => insert(&mut current.nodes, it.name.clone(), it, &mut self.dirty.nodes),
            Object::Service(it) => insert(&mut current.services, it.key.clone(), it, &mut self.dirty.services),
            Object::Pod(it) => insert(&mut current.pods, it.key.clone(), it, &mut self.dirty.pods),
            Object::Attachment(it) => insert(&mut current.attachments, it.key.clone(), it, &mut self.dirty.attachments),
            Object::Subnet(it) => insert(&mut current.subnets, it.key.clone(), it, &mut self.dirty.subnets),
            Object::EndpointSlice(mut slice) => {
                if current.endpoint_slices.get(&slice.key).is_some_and(|old| **old == slice) {
                    return;
                }
                share_names(&mut slice, current);
                // A slice may move to another Service: both have other endpoints then.
                self.unlink_slice(&slice.key);
                let current = &mut self.current;
                current.slices_by_service.insert((slice.service.clone(), slice.key.clone()));
                self.dirty.services.insert(slice.service.clone());
                current.endpoint_slices.insert(slice.key.clone(), Arc::new(slice));
                true
            }
        };
        self.current.revision += u64::from(changed);
    }

    fn delete(&mut self, reference: &ObjectRef) {
        self.note(reference.clone(), Vec::new());
        self.take_out(reference);
    }

    fn take_out(&mut self, reference: &ObjectRef) {
        let current = &mut self.current;
        let changed = match reference {
            ObjectRef::Namespace(name) => remove(&mut current.namespaces, name, &mut self.dirty.namespaces),
            ObjectRef::Node(name) => remove(&mut current.nodes, name, &mut self.dirty.nodes),
            ObjectRef::Service(key) => remove(&mut current.services, key, &mut self.dirty.services),
            ObjectRef::Pod(key) => remove(&mut current.pods, key, &mut self.dirty.pods),
            ObjectRef::Attachment(key) => remove(&mut current.attachments, key, &mut self.dirty.attachments),
            ObjectRef::Subnet(key) => remove(&mut current.subnets, key, &mut self.dirty.subnets),
            ObjectRef::EndpointSlice(key) => self.unlink_slice(key),
        };
        self.current.revision += u64::from(changed);
    }

    fn reject(&mut self, problem: Problem) {
        self.take_out(&problem.object);
        self.note(problem.object.clone(), vec![problem]);
    }

    fn replace(&mut self, kind: ObjectKind, objects: Vec<(Object, Vec<Problem>)>, rejected: Vec<Problem>) {
        let named: BTreeSet<ObjectRef> = objects.iter().map(|(object, _)| object.reference()).collect();
        let gone: Vec<ObjectRef> =
            self.references(kind).into_iter().filter(|reference| !named.contains(reference)).collect();
        for reference in gone {
            self.delete(&reference);
        }
        if named.len() == objects.len() {
            by_halves(objects).for_each(|(object, problems)| self.upsert(object, problems));
        } else {
            // Of two that have one name, the last counts.
            objects.into_iter().for_each(|(object, problems)| self.upsert(object, problems));
        }
        for problem in rejected {
            self.reject(problem);
        }
        if self.current.in_sync.insert(kind).is_none() {
            self.current.revision += 1;
        }
    }

    /// Every object of a table, and every absent one that has a problem.
    fn references(&self, kind: ObjectKind) -> BTreeSet<ObjectRef> {
        let current = &self.current;
        let mut references: BTreeSet<ObjectRef> =
            current.problems.keys().filter(|reference| reference.kind() == kind).cloned().collect();
        match kind {
            ObjectKind::Namespace => references.extend(current.namespaces.keys().cloned().map(ObjectRef::Namespace)),
            ObjectKind::Node => references.extend(current.nodes.keys().cloned().map(ObjectRef::Node)),
            ObjectKind::Service => references.extend(current.services.keys().cloned().map(ObjectRef::Service)),
            ObjectKind::EndpointSlice => {
                references.extend(current.endpoint_slices.keys().cloned().map(ObjectRef::EndpointSlice));
            }
            ObjectKind::Pod => references.extend(current.pods.keys().cloned().map(ObjectRef::Pod)),
            ObjectKind::Attachment => {
                references.extend(current.attachments.keys().cloned().map(ObjectRef::Attachment));
            }
            ObjectKind::Subnet => references.extend(current.subnets.keys().cloned().map(ObjectRef::Subnet)),
            ObjectKind::Configuration => {}
        }
        references
    }

    fn unlink_slice(&mut self, key: &ObjectKey) -> bool {
        let Some(old) = self.current.endpoint_slices.remove(key) else { return false };
        self.current.slices_by_service.remove(&(old.service.clone(), key.clone()));
        self.dirty.services.insert(old.service.clone());
        true
    }

    fn note(&mut self, reference: ObjectRef, problems: Vec<Problem>) {
        let known = self.current.problems.get(&reference);
        if problems.is_empty() {
            if known.is_some() {
                self.current.problems.remove(&reference);
                self.current.revision += 1;
            }
        } else if known.is_none_or(|known| **known != *problems) {
            self.current.problems.insert(reference, problems.into());
            self.current.revision += 1;
        }
    }
}

fn insert<K, V>(table: &mut OrdMap<K, Arc<V>>, key: K, value: V, dirty: &mut BTreeSet<K>) -> bool
where
    K: Ord + Clone,
    V: PartialEq,
{
    if table.get(&key).is_some_and(|old| **old == value) {
        return false;
    }
    dirty.insert(key.clone());
    table.insert(key, Arc::new(value));
    true
}

fn remove<K, V>(table: &mut OrdMap<K, Arc<V>>, key: &K, dirty: &mut BTreeSet<K>) -> bool
where
    K: Ord + Clone,
{
    let removed = table.remove(key).is_some();
    if removed {
        dirty.insert(key.clone());
    }
    removed
}

/// A hundred thousand endpoints stand on a few thousand nodes: they share the names that the nodes have, or that the
/// endpoint before them has. And a slice shares its Service's.
fn share_names(slice: &mut EndpointSlice, current: &Snapshot) {
    if let Some(service) = current.services.get(&slice.service) {
        slice.service = service.key.clone();
    }
    if slice.key.namespace == slice.service.namespace {
        slice.key.namespace = slice.service.namespace.clone();
    }
    let mut before: Option<NodeName> = None;
    for name in slice.endpoints.iter_mut().filter_map(|endpoint| endpoint.node.as_mut()) {
        if let Some(before) = before.as_ref().filter(|before| *before == name) {
            *name = before.clone();
        } else if let Some(node) = current.nodes.get(name) {
            *name = node.name.clone();
        }
        before = Some(name.clone());
    }
}

#[cfg(test)]
mod tests;
