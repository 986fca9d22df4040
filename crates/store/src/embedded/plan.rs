//! Works out what a transaction does before anything is changed: pure, over the state and the
//! transactions that are ahead of it in the same commit.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::state::{Change, State, select};
use crate::check;
use crate::error::StoreError;
use crate::types::{
    Event, EventKind, KeyRange, KeyValue, LeaseId, Operation, OperationResult, Revision, Transaction, TransactionResult,
};

/// The state with changes on top that are not committed yet.
pub(super) struct Plan<'state> {
    state: &'state State,
    pending: BTreeMap<Vec<u8>, Option<Arc<KeyValue>>>,
    revision: Revision,
}

/// What a transaction would do.
pub(super) struct Planned {
    pub(super) result: TransactionResult,
    /// `None` when nothing changes.
    pub(super) change: Option<Change>,
}

impl<'state> Plan<'state> {
    pub(super) fn new(state: &'state State) -> Self {
        Self { state, pending: BTreeMap::new(), revision: state.revision }
    }

    /// Plans one transaction on top of those before it. After an error nothing of it is pending.
    pub(super) fn transaction(&mut self, transaction: &Transaction) -> Result<Planned, StoreError> {
        check::transaction(transaction)?;
        let holds = |compare: &crate::types::Compare| compare.holds(self.current(&compare.key).map(Arc::as_ref));
        let succeeded = transaction.compares.iter().all(holds);
        let operations = if succeeded { &transaction.success } else { &transaction.failure };
        let mut step = Step { plan: self, revision: self.revision + 1, events: BTreeMap::new() };
        let results = operations.iter().map(|operation| step.run(operation)).collect::<Result<Vec<_>, _>>()?;
        let events: Vec<Event> = step.events.into_values().collect();
        let mut revision = self.revision;
        let mut change = None;
        if !events.is_empty() {
            revision += 1;
            self.take(&events);
            self.revision = revision;
            change = Some(Change { revision, events });
        }
        Ok(Planned { result: TransactionResult { succeeded, revision, results }, change })
    }

    fn take(&mut self, events: &[Event]) {
        for event in events {
            let value = (event.kind == EventKind::Put).then(|| Arc::clone(&event.current));
            self.pending.insert(event.current.key.clone(), value);
        }
    }

    fn current(&self, key: &[u8]) -> Option<&Arc<KeyValue>> {
        match self.pending.get(key) {
            Some(pending) => pending.as_ref(),
            None => self.state.current(key),
        }
    }

    /// The present versions of a range, pending ones included, in key order.
    fn range(&self, range: &KeyRange) -> BTreeMap<Vec<u8>, Arc<KeyValue>> {
        let committed = self.state.versions(range, self.state.revision);
        let mut found: BTreeMap<_, _> = committed.map(|item| (item.key.clone(), Arc::clone(item))).collect();
        let pending = range.bounds().map(|bounds| self.pending.range::<[u8], _>(bounds));
        for (key, value) in pending.into_iter().flatten() {
            overlay(&mut found, key, value.as_ref());
        }
        found
    }
}

/// One transaction in the making.
struct Step<'plan, 'state> {
    plan: &'plan Plan<'state>,
    revision: Revision,
    events: BTreeMap<Vec<u8>, Event>,
}

impl Step<'_, '_> {
    fn run(&mut self, operation: &Operation) -> Result<OperationResult, StoreError> {
        match operation {
            Operation::Put { key, value, lease } => self.put(key, value, *lease),
            Operation::Delete(range) => Ok(self.delete(range)),
            Operation::Range(request) => {
                let revision = self.plan.state.readable(request.revision)?;
                if request.revision != 0 {
                    let found = self.plan.state.versions(&request.range, revision);
                    return Ok(OperationResult::Range(select(found, request, self.plan.revision)));
                }
                let found = self.range(&request.range);
                Ok(OperationResult::Range(select(found.values(), request, self.plan.revision)))
            }
        }
    }

    fn put(&mut self, key: &[u8], value: &[u8], lease: LeaseId) -> Result<OperationResult, StoreError> {
        if lease != 0 && !self.plan.state.leases.contains_key(&lease) {
            return Err(StoreError::LeaseNotFound(lease));
        }
        let previous = self.plan.current(key).cloned();
        let current = KeyValue {
            key: key.to_vec(),
            value: value.to_vec(),
            create_revision: previous.as_ref().map_or(self.revision, |previous| previous.create_revision),
            mod_revision: self.revision,
            version: previous.as_ref().map_or(0, |previous| previous.version) + 1,
            lease,
        };
        self.add(Event { kind: EventKind::Put, current: Arc::new(current), previous: previous.clone() });
        Ok(OperationResult::Put { previous })
    }

    fn delete(&mut self, range: &KeyRange) -> OperationResult {
        let deleted: Vec<_> = self.range(range).into_values().collect();
        for previous in &deleted {
            let current = KeyValue {
                key: previous.key.clone(),
                value: Vec::new(),
                create_revision: 0,
                mod_revision: self.revision,
                version: 0,
                lease: 0,
            };
            let previous = Some(Arc::clone(previous));
            self.add(Event { kind: EventKind::Delete, current: Arc::new(current), previous });
        }
        OperationResult::Delete { deleted }
    }

    /// No key has two events: that was looked at first, and a key is removed once.
    fn add(&mut self, event: Event) {
        self.events.insert(event.current.key.clone(), event);
    }

    fn range(&self, range: &KeyRange) -> BTreeMap<Vec<u8>, Arc<KeyValue>> {
        let mut found = self.plan.range(range);
        for (key, event) in self.events.iter().filter(|(key, _)| range.contains(key)) {
            let value = (event.kind == EventKind::Put).then_some(&event.current);
            overlay(&mut found, key, value);
        }
        found
    }
}

fn overlay(found: &mut BTreeMap<Vec<u8>, Arc<KeyValue>>, key: &[u8], value: Option<&Arc<KeyValue>>) {
    match value {
        Some(value) => found.insert(key.to_vec(), Arc::clone(value)),
        None => found.remove(key),
    };
}
