//! The two drivers give the same answers: random histories run against both, step by step.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

#[expect(dead_code, reason = "one member is enough here")]
mod common;

use std::sync::Arc;

use portolan_store::{
    Compare, Embedded, Etcd, EtcdConfig, Event, KeyRange, KeyValue, Location, Operation, OperationResult, Options,
    RangeRequest, RangeResponse, Relation, Store, StoreError, Target, Transaction, WatchMessage, WatchRequest,
};
use proptest::prelude::*;

/// Revisions in a step are counted back from the present, as the stores began at different ones.
#[derive(Debug, Clone)]
enum Step {
    Transaction { compares: Vec<(u8, Relation, u8, Property)>, success: Vec<Part>, failure: Vec<Part> },
    Range(Reading),
    Compact(u8),
    Watch(u8, u8, u8),
}

#[derive(Debug, Clone, Copy)]
enum Property {
    Modified,
    Created,
    Version,
    Value,
}

#[derive(Debug, Clone)]
enum Part {
    Put(u8, u8),
    Delete(u8, u8),
    Range(Reading),
}

#[derive(Debug, Clone)]
struct Reading {
    from: u8,
    to: Option<u8>,
    back: Option<u8>,
    limit: usize,
    keys_only: bool,
    count_only: bool,
}

const KEYS: u8 = 6;

fn reading() -> impl Strategy<Value = Reading> {
    let back = proptest::option::of(0..6u8);
    (0..KEYS, proptest::option::of(0..KEYS), back, 0..3usize, any::<bool>(), any::<bool>()).prop_map(
        |(from, to, back, limit, keys_only, count_only)| Reading { from, to, back, limit, keys_only, count_only },
    )
}

fn part() -> impl Strategy<Value = Part> {
    prop_oneof![
        3 => (0..KEYS, any::<u8>()).prop_map(|(key, value)| Part::Put(key, value)),
        2 => (0..KEYS, 0..KEYS).prop_map(|(from, to)| Part::Delete(from, to)),
        1 => reading().prop_map(Part::Range),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let relation =
        prop_oneof![Just(Relation::Equal), Just(Relation::NotEqual), Just(Relation::Greater), Just(Relation::Less)];
    let property =
        prop_oneof![Just(Property::Modified), Just(Property::Created), Just(Property::Version), Just(Property::Value)];
    let compares = proptest::collection::vec((0..KEYS, relation, 0..4u8, property), 0..2);
    let branch = || proptest::collection::vec(part(), 0..4);
    let step = prop_oneof![
        8 => (compares, branch(), branch())
            .prop_map(|(compares, success, failure)| Step::Transaction { compares, success, failure }),
        3 => reading().prop_map(Step::Range),
        1 => (0..5u8).prop_map(Step::Compact),
        2 => (0..KEYS, 0..KEYS, 0..6u8).prop_map(|(from, to, back)| Step::Watch(from, to, back)),
    ];
    proptest::collection::vec(step, 1..20)
}

/// A store, and the revision that counts as the first.
struct Side<'store> {
    store: &'store dyn Store,
    base: u64,
}

fn key(number: u8) -> Vec<u8> {
    vec![b'/', b'a' + number]
}

fn span(from: u8, to: Option<u8>) -> KeyRange {
    match to {
        Some(to) if to == from => KeyRange::key(key(from)),
        Some(to) => KeyRange::span(key(from), key(to)),
        None => KeyRange { start: key(from), end: None },
    }
}

/// What may be compared: errors by their kind, revisions from the base.
type Answer = Result<String, &'static str>;

impl Side<'_> {
    async fn back(&self, back: u8) -> u64 {
        self.store.revision().await.unwrap().saturating_sub(u64::from(back)).max(self.base)
    }

    async fn range(&self, reading: &Reading) -> RangeRequest {
        let revision = match reading.back {
            // One that is to come.
            Some(0) => self.back(0).await + 1,
            Some(back) => self.back(back).await,
            None => 0,
        };
        RangeRequest {
            revision,
            limit: reading.limit,
            keys_only: reading.keys_only,
            count_only: reading.count_only,
            ..RangeRequest::new(span(reading.from, reading.to))
        }
    }

    async fn operations(&self, parts: &[Part]) -> Vec<Operation> {
        let mut operations = Vec::new();
        for part in parts {
            operations.push(match part {
                Part::Put(number, value) => Operation::Put { key: key(*number), value: vec![*value], lease: 0 },
                Part::Delete(from, to) => Operation::Delete(span(*from, Some(*to))),
                Part::Range(reading) => Operation::Range(self.range(reading).await),
            });
        }
        operations
    }

    async fn run(&self, step: &Step) -> Answer {
        match step {
            Step::Transaction { compares, success, failure } => {
                let mut transaction = Transaction {
                    compares: Vec::new(),
                    success: self.operations(success).await,
                    failure: self.operations(failure).await,
                };
                for (number, relation, given, property) in compares {
                    let target = match property {
                        Property::Modified => Target::ModRevision(self.back(*given).await),
                        Property::Created => Target::CreateRevision(self.back(*given).await),
                        Property::Version => Target::Version(u64::from(*given)),
                        Property::Value => Target::Value(vec![*given * 60]),
                    };
                    transaction = transaction.when(Compare { key: key(*number), relation: *relation, target });
                }
                let done = self.store.transaction(transaction).await.map_err(|error| kind(&error))?;
                let results: Vec<String> = done.results.iter().map(|result| self.result(result)).collect();
                Ok(format!("{} {} {results:?}", done.succeeded, self.relative(done.revision)))
            }
            Step::Range(reading) => {
                let request = self.range(reading).await;
                let read = self.store.range(request).await.map_err(|error| kind(&error))?;
                Ok(self.read(&read))
            }
            Step::Compact(back) => {
                let revision = self.back(*back).await;
                // What is before this history is not the same in both.
                if revision == self.base {
                    return Ok(String::new());
                }
                self.store.compact(revision).await.map_err(|error| kind(&error))?;
                Ok(String::new())
            }
            Step::Watch(from, to, back) => self.watch(span(*from, Some(*to)), *back).await,
        }
    }

    /// All that a watch from some revisions ago brings, up to a change that ends it.
    async fn watch(&self, range: KeyRange, back: u8) -> Answer {
        let start = self.back(back).await + 1;
        let is_empty = range.end.as_ref().is_some_and(|end| *end <= range.start);
        let watcher = self.store.watch(WatchRequest::new(range.clone(), start)).await;
        let mut watcher = watcher.map_err(|error| kind(&error))?;
        if is_empty {
            return Ok(String::new());
        }
        let last = self.store.transaction(Transaction::put(range.start, "end")).await.unwrap().revision;
        let mut seen = Vec::new();
        while watcher.resume_revision() <= last {
            if let WatchMessage::Events { revision, events } = watcher.next().await.unwrap() {
                seen.push((self.relative(revision), events.iter().map(|event| self.event(event)).collect::<Vec<_>>()));
            }
        }
        Ok(format!("{seen:?}"))
    }

    fn relative(&self, revision: u64) -> u64 {
        revision - self.base
    }

    fn item(&self, item: &Arc<KeyValue>) -> String {
        let created = item.create_revision.saturating_sub(self.base);
        let modified = self.relative(item.mod_revision);
        format!("{:?}={:?} {created} {modified} {}", item.key, item.value, item.version)
    }

    fn items(&self, items: &[Arc<KeyValue>]) -> Vec<String> {
        items.iter().map(|item| self.item(item)).collect()
    }

    fn event(&self, event: &Event) -> String {
        let previous = event.previous.as_ref().map(|item| self.item(item));
        format!("{:?} {} before {previous:?}", event.kind, self.item(&event.current))
    }

    fn read(&self, read: &RangeResponse) -> String {
        format!("{:?} {} {} {}", self.items(&read.items), read.more, read.count, self.relative(read.revision))
    }

    fn result(&self, result: &OperationResult) -> String {
        match result {
            OperationResult::Put { previous } => format!("{:?}", previous.as_ref().map(|item| self.item(item))),
            OperationResult::Delete { deleted } => format!("{:?}", self.items(deleted)),
            OperationResult::Range(read) => self.read(read),
        }
    }
}

fn kind(error: &StoreError) -> &'static str {
    match error {
        StoreError::Compacted { .. } => "compacted",
        StoreError::FutureRevision { .. } => "future",
        StoreError::DuplicateKey { .. } => "duplicate key",
        other => panic!("{other}"),
    }
}

async fn compare(etcd: &Etcd, steps: &[Step]) {
    etcd.transaction(Transaction::delete(KeyRange::all())).await.unwrap();
    // A change that both have, so that both begin at a revision that can be read.
    etcd.transaction(Transaction::put("/before", "")).await.unwrap();
    let embedded = Embedded::open(Options::new(Location::Memory)).unwrap();
    embedded.transaction(Transaction::put("/before", "")).await.unwrap();
    let left = Side { base: embedded.revision().await.unwrap(), store: &embedded };
    let right = Side { base: etcd.revision().await.unwrap(), store: etcd };
    for (number, step) in steps.iter().enumerate() {
        let (left, right) = (left.run(step).await, right.run(step).await);
        assert_eq!(left, right, "step {number}: {step:?} (left: embedded, right: etcd)");
    }
}

#[test]
fn the_drivers_give_the_same_answers() {
    if !common::is_installed() {
        return;
    }
    let member = common::Etcd::start(&[]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let config = EtcdConfig { prefix: "/drivers".to_owned(), ..member.config() };
    let etcd = runtime.block_on(Etcd::connect(config)).unwrap();
    let config = ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(steps in steps())| runtime.block_on(compare(&etcd, &steps)));
}
