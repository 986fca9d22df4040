//! The embedded driver: the suite that every driver runs, and what is its own promise: it survives
//! being closed, being killed, and refuses a second opener.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use portolan_store::conformance::{self, Harness};
use portolan_store::{
    BoxFuture, Compare, Embedded, KeyRange, Location, ManualClock, Operation, Options, RangeRequest, Store, StoreError,
    Transaction, WatchMessage, WatchRequest,
};
use proptest::prelude::*;

struct Rig {
    location: Location,
    clock: Arc<ManualClock>,
    store: Mutex<Option<Arc<Embedded>>>,
}

impl Harness for Rig {
    fn make(&self) -> BoxFuture<'_, Result<Arc<dyn Store>, StoreError>> {
        Box::pin(async move {
            *self.store.lock().unwrap() = None;
            let options = Options { clock: self.clock.clone(), ..Options::new(self.location.clone()) };
            let store = Arc::new(Embedded::open(options)?);
            *self.store.lock().unwrap() = Some(Arc::clone(&store));
            Ok(store as Arc<dyn Store>)
        })
    }

    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.clock.advance(by);
            let store = self.store.lock().unwrap().clone().unwrap();
            store.tick().await.unwrap();
        })
    }
}

async fn conform(location: Location) {
    let rig = Rig { location, clock: Arc::default(), store: Mutex::default() };
    if let Err(failure) = conformance::run(&rig).await {
        panic!("{failure}");
    }
}

#[tokio::test]
async fn the_store_in_memory_conforms() {
    conform(Location::Memory).await;
}

/// Every check opens the same file anew, so the suite also runs over what earlier checks left.
#[tokio::test]
async fn the_store_in_a_file_conforms() {
    let directory = tempfile::tempdir().unwrap();
    conform(Location::File(directory.path().join("store"))).await;
}

fn open(path: &Path) -> Result<Embedded, StoreError> {
    Embedded::open(Options::new(Location::File(path.to_owned())))
}

#[tokio::test]
async fn a_file_that_is_open_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let first = open(&path).unwrap();
    let second = open(&path);
    assert!(matches!(second, Err(StoreError::InUse { .. })), "{:?}", second.err());
    drop(first);
    open(&path).unwrap();
}

#[tokio::test]
async fn a_file_that_is_no_store_is_refused_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    std::fs::write(&path, "this is not a database, and long enough to hold a header of one".repeat(100)).unwrap();
    let error = open(&path).err().unwrap().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn history_is_bounded_without_being_asked() {
    let options = Options { history_revisions: 50, ..Options::new(Location::Memory) };
    let store = Embedded::open(options).unwrap();
    for number in 0..500 {
        store.transaction(Transaction::put("a", number.to_string())).await.unwrap();
    }
    let old = store.range(RangeRequest { revision: 100, ..RangeRequest::new(KeyRange::all()) }).await;
    assert!(matches!(old, Err(StoreError::Compacted { .. })));
    let recent = store.range(RangeRequest { revision: 470, ..RangeRequest::new(KeyRange::all()) }).await.unwrap();
    assert_eq!(recent.items.len(), 1);
}

#[tokio::test]
async fn an_idle_watch_gets_a_progress_mark() {
    let clock = Arc::new(ManualClock::default());
    let store = Embedded::open(Options { clock: clock.clone(), ..Options::new(Location::Memory) }).unwrap();
    let request = WatchRequest { progress: true, ..WatchRequest::new(KeyRange::key("a"), 0) };
    let mut watcher = store.watch(request).await.unwrap();
    let revision = store.transaction(Transaction::put("b", "1")).await.unwrap().revision;
    clock.advance(Duration::from_mins(1));
    store.tick().await.unwrap();
    assert_eq!(watcher.next().await.unwrap(), WatchMessage::Progress { revision });
}

#[tokio::test]
async fn a_watch_ends_when_the_store_closes() {
    let store = Embedded::open(Options::new(Location::Memory)).unwrap();
    let mut watcher = store.watch(WatchRequest::new(KeyRange::all(), 0)).await.unwrap();
    drop(store);
    assert!(watcher.next().await.is_err());
}

/// Steps of a random history.
#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8),
    Delete(u8),
    DeleteAll(u8, u8),
    Compact(u8),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..6u8, any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)),
        3 => (0..6u8).prop_map(Step::Delete),
        1 => (0..6u8, 0..6u8).prop_map(|(from, to)| Step::DeleteAll(from, to)),
        1 => (1..8u8).prop_map(Step::Compact),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// After any history every revision that is not compacted reads as a plain map kept beside it
    /// was, and so does the sum of what a watch replays.
    #[test]
    fn every_readable_revision_is_what_it_was(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(check_history(steps));
    }
}

type Content = BTreeMap<Vec<u8>, Vec<u8>>;

async fn check_history(steps: Vec<Step>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let mut store = open(&path).unwrap();
    let mut model = Content::new();
    let mut history = BTreeMap::from([(store.revision().await.unwrap(), model.clone())]);
    let mut compacted = 0;
    for step in steps {
        let transaction = match step {
            Step::Put(key, value) => {
                model.insert(vec![key], vec![value]);
                Transaction::put([key], [value])
            }
            Step::Delete(key) => {
                model.remove(&vec![key]);
                Transaction::delete(KeyRange::key([key]))
            }
            Step::DeleteAll(from, to) => {
                model.retain(|key, _| !(vec![from]..vec![to]).contains(key));
                Transaction::delete(KeyRange::span([from], [to]))
            }
            Step::Compact(back) => {
                let revision = store.revision().await.unwrap().saturating_sub(u64::from(back));
                if revision > compacted {
                    store.compact(revision).await.unwrap();
                    compacted = revision;
                }
                continue;
            }
            Step::Reopen => {
                drop(store);
                store = open(&path).unwrap();
                continue;
            }
        };
        let revision = store.transaction(transaction).await.unwrap().revision;
        history.insert(revision, model.clone());
    }
    let last = *history.last_key_value().unwrap().0;
    assert_eq!(store.revision().await.unwrap(), last);
    for (&revision, expected) in history.range(compacted.max(1)..) {
        assert_eq!(&content(&store, revision).await, expected, "at revision {revision}");
    }
    if let Some((&first, start)) = history.range(compacted.max(1)..).next() {
        let mut replayed = start.clone();
        let mut watcher = store.watch(WatchRequest::new(KeyRange::all(), first + 1)).await.unwrap();
        while watcher.resume_revision() <= last {
            let WatchMessage::Events { revision, events } = watcher.next().await.unwrap() else { continue };
            for event in events {
                let before = event.previous.map(|item| item.value.clone());
                assert_eq!(before.as_ref(), replayed.get(&event.current.key), "what was before, at {revision}");
                match event.kind {
                    portolan_store::EventKind::Put => {
                        replayed.insert(event.current.key.clone(), event.current.value.clone())
                    }
                    portolan_store::EventKind::Delete => replayed.remove(&event.current.key),
                };
            }
            assert_eq!(Some(&replayed), history.get(&revision));
        }
    }
}

async fn content(store: &Embedded, revision: u64) -> Content {
    let read = store.range(RangeRequest { revision, ..RangeRequest::new(KeyRange::all()) }).await.unwrap();
    read.items.iter().map(|item| (item.key.clone(), item.value.clone())).collect()
}

const CHILD_FILE: &str = "PORTOLAN_STORE_TEST_FILE";

/// The child of the kill test: writes pairs of keys, one transaction each, and says each number
/// after it was answered. Does nothing when run as a test of its own.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Some(path) = std::env::var_os(CHILD_FILE).map(PathBuf::from) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = open(&path).unwrap();
        let start = store.range(RangeRequest::new(KeyRange::prefix("left/"))).await.unwrap().count;
        for number in start.. {
            let left = format!("left/{number:08}");
            let transaction =
                Transaction::put(left.clone(), number.to_string()).when(Compare::absent(left)).then(Operation::Put {
                    key: format!("right/{number:08}").into_bytes(),
                    value: b"x".to_vec(),
                    lease: 0,
                });
            assert!(store.transaction(transaction).await.unwrap().succeeded);
            println!("\nwritten {number}");
        }
    });
}

/// What was answered is there after kill -9, whole, with nothing torn; and the store goes on.
#[test]
fn what_was_answered_survives_kill() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    for (round, wanted) in [3, 40, 7, 90, 1].into_iter().enumerate() {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_that_writes_until_it_is_killed", "--exact", "--nocapture"])
            .env(CHILD_FILE, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut written = lines.filter_map(|line| line.strip_prefix("written ")?.parse::<usize>().ok());
        let answered = written.by_ref().nth(wanted).unwrap();
        child.kill().unwrap();
        let answered = written.last().unwrap_or(answered);
        child.wait().unwrap();

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (left, right) = runtime.block_on(async {
            let store = open(&path).unwrap();
            let left = store.range(RangeRequest::new(KeyRange::prefix("left/"))).await.unwrap();
            let right = store.range(RangeRequest::new(KeyRange::prefix("right/"))).await.unwrap();
            for (number, (one, other)) in left.items.iter().zip(&right.items).enumerate() {
                assert_eq!(one.value, number.to_string().into_bytes());
                assert_eq!(one.mod_revision, other.mod_revision);
            }
            (left.count, right.count)
        });
        assert_eq!(left, right, "round {round}: a transaction was torn");
        // The write under way when the child died may be there or not; none before it may be missing.
        assert!(left > answered, "round {round}: {answered} was answered, and only {left} are there");
    }
}
