//! A store in memory with the trait's semantics: revisions, transactions, leases. Pure, and small enough
//! to be run a hundred thousand times.

use std::collections::BTreeMap;
use std::sync::Arc;

use portolan_store::{
    Compare, Event, EventKind, KeyRange, KeyValue, LeaseId, Operation, OperationResult, RangeRequest, RangeResponse,
    Relation, Revision, Target, Transaction, TransactionResult,
};

#[derive(Debug, Default, Clone)]
pub(crate) struct Model {
    pub(crate) revision: Revision,
    pub(crate) keys: BTreeMap<Vec<u8>, Arc<KeyValue>>,
    leases: BTreeMap<LeaseId, u64>,
    granted: LeaseId,
}

impl Model {
    pub(crate) fn grant(&mut self, now: u64, time_to_live: u64) -> LeaseId {
        self.granted += 1;
        self.leases.insert(self.granted, now + time_to_live);
        self.granted
    }

    pub(crate) fn keep_alive(&mut self, lease: LeaseId, now: u64, time_to_live: u64) -> bool {
        self.leases.get_mut(&lease).map(|end| *end = now + time_to_live).is_some()
    }

    pub(crate) fn revoke(&mut self, lease: LeaseId) {
        if self.leases.remove(&lease).is_some() && self.keys.values().any(|item| item.lease == lease) {
            self.revision += 1;
            self.keys.retain(|_, item| item.lease != lease);
        }
    }

    /// Ends the leases whose time is over. A store may be late with it.
    pub(crate) fn expire(&mut self, now: u64) {
        let over: Vec<LeaseId> = self.leases.iter().filter(|(_, end)| **end <= now).map(|(id, _)| *id).collect();
        over.into_iter().for_each(|lease| self.revoke(lease));
    }

    /// `None` where a lease does not exist: nothing of the transaction happens.
    pub(crate) fn run(&mut self, transaction: &Transaction) -> Option<TransactionResult> {
        let succeeded = transaction.compares.iter().all(|compare| self.holds(compare));
        let operations = if succeeded { &transaction.success } else { &transaction.failure };
        let has_leases = operations.iter().all(|operation| match operation {
            Operation::Put { lease, .. } => *lease == 0 || self.leases.contains_key(lease),
            _ => true,
        });
        if !has_leases {
            return None;
        }
        let writes = operations.iter().any(|operation| !matches!(operation, Operation::Range(_)));
        let revision = self.revision + u64::from(writes);
        let results = operations.iter().map(|operation| self.step(operation, revision)).collect();
        self.revision = revision;
        Some(TransactionResult { succeeded, revision, results })
    }

    fn step(&mut self, operation: &Operation, revision: Revision) -> OperationResult {
        match operation {
            Operation::Put { key, value, lease } => {
                let previous = self.keys.get(key).cloned();
                let item = KeyValue {
                    key: key.clone(),
                    value: value.clone(),
                    create_revision: previous.as_ref().map_or(revision, |it| it.create_revision),
                    mod_revision: revision,
                    version: previous.as_ref().map_or(0, |it| it.version) + 1,
                    lease: *lease,
                };
                self.keys.insert(key.clone(), Arc::new(item));
                OperationResult::Put { previous }
            }
            Operation::Delete(range) => {
                self.keys.retain(|key, _| !range.contains(key));
                OperationResult::Delete { deleted: Vec::new() }
            }
            Operation::Range(RangeRequest { range, .. }) => OperationResult::Range(self.range(range)),
        }
    }

    pub(crate) fn range(&self, range: &KeyRange) -> RangeResponse {
        let found = self.keys.range(range.start.clone()..).take_while(|(key, _)| range.contains(key));
        let items: Vec<_> = found.map(|(_, item)| Arc::clone(item)).collect();
        RangeResponse { count: items.len(), items, more: false, revision: self.revision }
    }

    fn holds(&self, compare: &Compare) -> bool {
        assert_eq!(compare.relation, Relation::Equal);
        let item = self.keys.get(&compare.key);
        match compare.target {
            Target::ModRevision(wanted) => item.map_or(0, |item| item.mod_revision) == wanted,
            Target::CreateRevision(wanted) => item.map_or(0, |item| item.create_revision) == wanted,
            _ => panic!("a comparison that leases do not need"),
        }
    }

    pub(crate) fn put(&mut self, key: &str, value: &str, lease: LeaseId) {
        let put = Operation::Put { key: key.into(), value: value.into(), lease };
        assert!(self.run(&Transaction::default().then(put)).is_some(), "the lease {lease} is there");
    }

    pub(crate) fn delete(&mut self, key: &str) {
        let _ = self.run(&Transaction::delete(KeyRange::key(key)));
    }

    /// The events between an older content and this one, as one revision.
    pub(crate) fn events_since(&self, older: &Model) -> Vec<Event> {
        let keys: std::collections::BTreeSet<_> = self.keys.keys().chain(older.keys.keys()).collect();
        let changed = keys.into_iter().filter(|key| self.keys.get(*key) != older.keys.get(*key));
        let gone = |key: &Vec<u8>| KeyValue {
            key: key.clone(),
            value: Vec::new(),
            create_revision: 0,
            mod_revision: self.revision,
            version: 0,
            lease: 0,
        };
        let event = |key: &Vec<u8>| {
            let kind = if self.keys.contains_key(key) { EventKind::Put } else { EventKind::Delete };
            let current = self.keys.get(key).cloned().unwrap_or_else(|| Arc::new(gone(key)));
            Event { kind, current, previous: None }
        };
        changed.map(event).collect()
    }
}
