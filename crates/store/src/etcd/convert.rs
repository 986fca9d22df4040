//! Between the store's words and etcd's messages. Pure.

use std::sync::Arc;

use super::messages::{self as wire, Request, RequestOp, Response, TargetUnion, compare_result, compare_target};
use crate::error::StoreError;
use crate::types::{
    Compare, Event, EventKind, KeyRange, KeyValue, Operation, OperationResult, RangeRequest, RangeResponse, Relation,
    Revision, Target, Transaction, TransactionResult,
};

/// An end of a range that is none.
const NO_END: [u8; 1] = [0];

/// The part of etcd's keys that is ours.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: Vec<u8>,
}

impl Keys {
    pub(super) fn below(prefix: &str) -> Self {
        Self { prefix: prefix.as_bytes().to_vec() }
    }

    pub(super) fn key(&self, key: &[u8]) -> Vec<u8> {
        [self.prefix.as_slice(), key].concat()
    }

    /// A range's `key` and `range_end`; `None` for a range that holds nothing, which etcd would take
    /// for something else.
    pub(super) fn range(&self, range: &KeyRange) -> Option<(Vec<u8>, Vec<u8>)> {
        // No key is empty, neither here nor there.
        let start =
            if self.prefix.is_empty() && range.start.is_empty() { NO_END.to_vec() } else { self.key(&range.start) };
        let end = match &range.end {
            Some(end) => Some(self.key(end)),
            None => KeyRange::prefix(self.prefix.as_slice()).end,
        };
        match end {
            Some(end) if end <= start => None,
            // One key is found faster than a range of one.
            Some(end) if end.strip_prefix(start.as_slice()) == Some(&[0]) => Some((start, Vec::new())),
            Some(end) => Some((start, end)),
            None => Some((start, NO_END.to_vec())),
        }
    }

    pub(super) fn range_request(&self, request: &RangeRequest) -> Option<wire::RangeRequest> {
        let (key, range_end) = self.range(&request.range)?;
        Some(wire::RangeRequest {
            key,
            range_end,
            limit: i64::try_from(request.limit).unwrap_or(i64::MAX),
            revision: signed(request.revision),
            keys_only: request.keys_only,
            count_only: request.count_only,
        })
    }

    pub(super) fn transaction(&self, transaction: &Transaction) -> wire::TxnRequest {
        let branch = |operations: &[Operation]| operations.iter().filter_map(|it| self.operation(it)).collect();
        wire::TxnRequest {
            compare: transaction.compares.iter().map(|compare| self.compare(compare)).collect(),
            success: branch(&transaction.success),
            failure: branch(&transaction.failure),
        }
    }

    fn compare(&self, compare: &Compare) -> wire::Compare {
        let result = match compare.relation {
            Relation::Equal => compare_result::EQUAL,
            Relation::NotEqual => compare_result::NOT_EQUAL,
            Relation::Greater => compare_result::GREATER,
            Relation::Less => compare_result::LESS,
        };
        let (target, union) = match &compare.target {
            Target::ModRevision(revision) => (compare_target::MOD, TargetUnion::ModRevision(signed(*revision))),
            Target::CreateRevision(revision) => {
                (compare_target::CREATE, TargetUnion::CreateRevision(signed(*revision)))
            }
            Target::Version(version) => (compare_target::VERSION, TargetUnion::Version(signed(*version))),
            Target::Lease(lease) => (compare_target::LEASE, TargetUnion::Lease(*lease)),
            Target::Value(value) => (compare_target::VALUE, TargetUnion::Value(value.clone())),
        };
        wire::Compare { result, target, key: self.key(&compare.key), target_union: Some(union) }
    }

    /// `None` for what concerns no key: it is not sent, and answered here.
    fn operation(&self, operation: &Operation) -> Option<RequestOp> {
        let request = match operation {
            Operation::Put { key, value, lease } => Request::Put(wire::PutRequest {
                key: self.key(key),
                value: value.clone(),
                lease: *lease,
                prev_kv: true,
            }),
            Operation::Delete(range) => {
                let (key, range_end) = self.range(range)?;
                Request::DeleteRange(wire::DeleteRangeRequest { key, range_end, prev_kv: true })
            }
            // Also where nothing is in the range: the revision may be one that cannot be read.
            Operation::Range(request) => {
                let sent = self.range_request(request).or_else(|| self.range_request(&probe(request.revision)));
                Request::Range(sent?)
            }
        };
        Some(RequestOp { request: Some(request) })
    }

    /// The answer to a transaction, one result for each step of the branch that ran.
    pub(super) fn transaction_result(
        &self,
        transaction: &Transaction,
        answer: wire::TxnResponse,
    ) -> Result<TransactionResult, StoreError> {
        let revision = revision_of(answer.header.as_ref());
        let operations = if answer.succeeded { &transaction.success } else { &transaction.failure };
        let has_changed = answer.responses.iter().any(|response| match &response.response {
            Some(Response::Put(_)) => true,
            Some(Response::DeleteRange(deleted)) => deleted.deleted > 0,
            _ => false,
        });
        // What was read was read before the transaction's own revision came to be.
        let before = if has_changed { revision.saturating_sub(1) } else { revision };
        let mut responses = answer.responses.into_iter().map(|response| response.response);
        let mut results = Vec::with_capacity(operations.len());
        for operation in operations {
            let is_sent = self.operation(operation).is_some();
            let response = if is_sent { responses.next().flatten() } else { None };
            results.push(match (operation, response) {
                (Operation::Put { .. }, Some(Response::Put(put))) => {
                    OperationResult::Put { previous: put.prev_kv.map(|item| self.item(item)) }
                }
                (Operation::Delete(_), Some(Response::DeleteRange(deleted))) => OperationResult::Delete {
                    deleted: deleted.prev_kvs.into_iter().map(|item| self.item(item)).collect(),
                },
                (Operation::Delete(_), None) if !is_sent => OperationResult::Delete { deleted: Vec::new() },
                (Operation::Range(request), Some(Response::Range(_))) if self.range(&request.range).is_none() => {
                    OperationResult::Range(nothing(before))
                }
                (Operation::Range(_), Some(Response::Range(read))) => {
                    OperationResult::Range(self.range_response(read, before))
                }
                _ => {
                    return Err(StoreError::Corrupt {
                        reason: "etcd's answer to a transaction is to another question",
                    });
                }
            });
        }
        Ok(TransactionResult { succeeded: answer.succeeded, revision, results })
    }

    pub(super) fn range_response(&self, answer: wire::RangeResponse, revision: Revision) -> RangeResponse {
        RangeResponse {
            items: answer.kvs.into_iter().map(|item| self.item(item)).collect(),
            more: answer.more,
            count: usize::try_from(answer.count).unwrap_or(0),
            revision,
        }
    }

    pub(super) fn item(&self, item: wire::KeyValue) -> Arc<KeyValue> {
        Arc::new(KeyValue {
            key: self.own_key(item.key),
            value: item.value,
            create_revision: unsigned(item.create_revision),
            mod_revision: unsigned(item.mod_revision),
            version: unsigned(item.version),
            lease: item.lease,
        })
    }

    pub(super) fn event(&self, event: wire::Event) -> Option<Event> {
        let kind = if event.kind == wire::EVENT_DELETE { EventKind::Delete } else { EventKind::Put };
        let previous = event.prev_kv.map(|item| self.item(item));
        Some(Event { kind, current: self.item(event.kv?), previous })
    }

    /// The keys of a lease that are ours, in order.
    pub(super) fn own_keys(&self, keys: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let ours = keys.into_iter().filter(|key| key.starts_with(&self.prefix));
        let mut keys: Vec<_> = ours.map(|key| self.own_key(key)).collect();
        keys.sort();
        keys
    }

    fn own_key(&self, mut key: Vec<u8>) -> Vec<u8> {
        if key.starts_with(&self.prefix) {
            key.drain(..self.prefix.len());
        }
        key
    }
}

/// A read that is only about the revision. Its key is below the prefix, as a user may read no other.
pub(super) fn probe(revision: Revision) -> RangeRequest {
    RangeRequest { count_only: true, revision, ..RangeRequest::new(KeyRange::key("/")) }
}

/// The answer to a read of a range that holds nothing.
pub(super) fn nothing(revision: Revision) -> RangeResponse {
    RangeResponse { items: Vec::new(), more: false, count: 0, revision }
}

pub(super) fn revision_of(header: Option<&wire::ResponseHeader>) -> Revision {
    header.map_or(0, |header| unsigned(header.revision))
}

/// A revision as etcd writes it. One that does not fit lies in a future that never comes.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whether etcd would find a key in a range, by the rules of its `rpc.proto`.
    fn holds(key: &[u8], (start, end): &(Vec<u8>, Vec<u8>)) -> bool {
        match end.as_slice() {
            [] => key == start,
            [0] => key >= start.as_slice(),
            end => key >= start.as_slice() && key < end,
        }
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![Just(0), Just(1), Just(b'a'), Just(0xff)], 0..4)
    }

    proptest! {
        #[test]
        fn a_range_holds_the_same_keys_in_etcd(
            prefix in prop_oneof![Just(String::new()), Just("/p".to_owned())],
            start in bytes(), end in proptest::option::of(bytes()), key in bytes(), foreign in bytes(),
        ) {
            prop_assume!(!key.is_empty() && !foreign.is_empty());
            let keys = Keys::below(&prefix);
            let range = KeyRange { start, end };
            let sent = keys.range(&range);
            let found = |key: &[u8]| sent.as_ref().is_some_and(|sent| holds(key, sent));
            prop_assert_eq!(found(&keys.key(&key)), range.contains(&key));
            prop_assert!(prefix.is_empty() || !found(&foreign), "a key outside the prefix is in the range");
            prop_assert!(sent.is_none_or(|(start, _)| !start.is_empty()), "etcd wants a key");
        }
    }
}
