//! The manager over stores: the embedded one with a clock that tests move, one that can be cut off, and a
//! real etcd.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use portolan_ipam::flannel::{Attributes, Change, Claimant, Me, Subnet, TakeReason, Tunnel};
use portolan_ipam::io::flannel::{Held, InvalidMargin, LeaseError, Manager, Message, OwnProblem, Renewal, Settings};
use portolan_store::{
    BoxFuture, Clock, Embedded, KeyRange, KeyValue, LeaseId, LeaseStatus, Location, ManualClock, Operation, Options,
    RangeRequest, RangeResponse, Revision, Store, StoreError, SystemClock, Transaction, TransactionResult,
    WatchRequest, Watcher,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::etcd;

const CONFIG: &str = "/coreos.com/network/config";
const SUBNETS: &str = "/coreos.com/network/subnets/";
const HOUR: Duration = Duration::from_hours(1);
/// A message that has not come by then does not come.
const PATIENCE: Duration = Duration::from_secs(30);

fn attributes(number: u8) -> Attributes {
    Attributes::new(Some(Ipv4Addr::new(192, 168, 0, number)), None, &Tunnel::HostGateway)
}

fn me(number: u8) -> Me {
    let claimant = Claimant { node: format!("node-{number}").into(), instance: "1".into() };
    Me { claimant, attributes: attributes(number), previous: None }
}

async fn put(store: &dyn Store, key: &str, value: &str, lease: LeaseId) {
    let put = Operation::Put { key: key.into(), value: value.into(), lease };
    store.transaction(Transaction::default().then(put)).await.unwrap();
}

async fn leases(store: &dyn Store) -> Vec<Arc<KeyValue>> {
    store.range(RangeRequest::new(KeyRange::prefix(SUBNETS))).await.unwrap().items
}

async fn embedded(clock: Arc<dyn Clock>) -> Arc<Embedded> {
    let store = Arc::new(Embedded::open(Options { clock, ..Options::new(Location::Memory) }).unwrap());
    put(&*store, CONFIG, r#"{"Network":"10.5.0.0/24","SubnetLen":26,"Backend":{"Type":"host-gw"}}"#, 0).await;
    store
}

#[test]
fn margins_are_flannelds() {
    assert_eq!(Settings::default().margin, HOUR);
    assert_eq!(Settings::default().with_margin_minutes(1439).unwrap().margin, Duration::from_mins(1439));
    for wrong in [0, 1440, u64::MAX] {
        assert_eq!(Settings::default().with_margin_minutes(wrong), Err(InvalidMargin(wrong)));
    }
}

#[tokio::test]
async fn a_lease_lives_as_long_as_it_is_renewed() {
    let clock = Arc::new(ManualClock::default());
    let store = embedded(clock.clone()).await;
    let advance = async |by| {
        clock.advance(by);
        store.tick().await.unwrap();
    };
    let manager =
        |number| Manager::new(store.clone(), clock.clone(), Settings::default(), me(number), u64::from(number));
    let mut first = manager(1);
    let mut held = first.acquire().await.unwrap();
    assert_eq!((held.expires, held.take.reason), (24 * HOUR, TakeReason::Free));
    advance(23 * HOUR).await;
    assert_eq!(first.renew(&mut held).await.unwrap(), Renewal::Renewed);
    assert_eq!(held.expires, 47 * HOUR);
    advance(23 * HOUR).await;
    assert_eq!(leases(&*store).await.len(), 1);
    // Nothing was written by the renewal: nobody has to take it in.
    assert_eq!(leases(&*store).await[0].version, 1);
    advance(2 * HOUR).await;
    assert!(leases(&*store).await.is_empty());
    assert_eq!(first.renew(&mut held).await.unwrap(), Renewal::Lost);
    let again = first.acquire().await.unwrap();
    assert_eq!((again.subnet(), again.take.reason), (held.subnet(), TakeReason::Previous));
    // The next time somebody else is faster.
    advance(25 * HOUR).await;
    let mut thief = me(2);
    thief.previous = Some(again.subnet());
    let mut second = Manager::new(store.clone(), clock.clone(), Settings::default(), thief, 2);
    assert_eq!(second.acquire().await.unwrap().subnet(), again.subnet());
    assert_ne!(first.acquire().await.unwrap().subnet(), again.subnet());
    manager(3).acquire().await.unwrap();
    let LeaseError::Refused(refusal) = manager(4).acquire().await.unwrap_err() else { panic!() };
    assert!(refusal.to_string().contains("3 leases are there"), "{refusal}");
}

#[tokio::test]
async fn a_restart_keeps_the_subnet_and_leaves_no_lease_behind() {
    let clock = Arc::new(ManualClock::default());
    let store = embedded(clock.clone()).await;
    let mut subnets = Vec::new();
    let mut old: Vec<LeaseId> = Vec::new();
    for run in 0..3 {
        let mut it = me(1);
        it.claimant.instance = run.to_string().into();
        let held = Manager::new(store.clone(), clock.clone(), Settings::default(), it, run).acquire().await.unwrap();
        for lease in &old {
            let gone = store.lease_time_to_live(*lease).await;
            assert!(matches!(gone, Err(StoreError::LeaseNotFound(_))), "{gone:?}");
        }
        old.push(held.lease);
        subnets.push(held.subnet());
    }
    subnets.dedup();
    assert_eq!(subnets.len(), 1);
}

#[tokio::test]
async fn a_missing_or_broken_config_says_what_to_write() {
    let clock = Arc::new(ManualClock::default());
    let store = embedded(clock.clone()).await;
    let mut manager = Manager::new(store.clone(), clock, Settings::default(), me(1), 1);
    put(&*store, CONFIG, "{}", 0).await;
    let error = manager.acquire().await.unwrap_err().to_string();
    assert!(error.starts_with("/coreos.com/network/config: Network is missing"), "{error}");
    store.transaction(Transaction::delete(KeyRange::key(CONFIG))).await.unwrap();
    let error = manager.acquire().await.unwrap_err().to_string();
    assert!(error.contains("/coreos.com/network/config does not exist: write it"), "{error}");
}

/// A store that can be cut off.
struct Gate {
    inner: Arc<dyn Store>,
    is_cut: AtomicBool,
}

impl Gate {
    fn new(inner: Arc<dyn Store>) -> Arc<Gate> {
        Arc::new(Gate { inner, is_cut: AtomicBool::new(false) })
    }

    fn pass<'gate, T: Send + 'gate>(
        &'gate self,
        request: BoxFuture<'gate, Result<T, StoreError>>,
    ) -> BoxFuture<'gate, Result<T, StoreError>> {
        if self.is_cut.load(Ordering::SeqCst) {
            let error = StoreError::Unreachable { reason: "cut off".to_owned() };
            return Box::pin(std::future::ready(Err(error)));
        }
        request
    }
}

impl Store for Gate {
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResponse, StoreError>> {
        self.pass(self.inner.range(request))
    }

    fn transaction(&self, transaction: Transaction) -> BoxFuture<'_, Result<TransactionResult, StoreError>> {
        self.pass(self.inner.transaction(transaction))
    }

    fn lease_grant(&self, id: LeaseId, time_to_live: Duration) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        self.pass(self.inner.lease_grant(id, time_to_live))
    }

    fn lease_keep_alive(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        self.pass(self.inner.lease_keep_alive(id))
    }

    fn lease_revoke(&self, id: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.pass(self.inner.lease_revoke(id))
    }

    fn lease_time_to_live(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        self.pass(self.inner.lease_time_to_live(id))
    }

    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<Watcher, StoreError>> {
        self.pass(self.inner.watch(request))
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        self.pass(self.inner.compact(revision))
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        self.pass(self.inner.revision())
    }
}

/// A manager that runs, and what it says.
struct Running {
    messages: mpsc::Receiver<Message>,
    attributes: watch::Sender<Attributes>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Running {
    fn start(store: Arc<dyn Store>, settings: Settings, me: Me) -> Running {
        let (sender, messages) = mpsc::channel(8);
        let (attributes, changed) = watch::channel(me.attributes.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        let manager = Manager::new(store, Arc::new(SystemClock::default()), settings, me, 7);
        let shutdown = async move { drop(stopped.await) };
        let task = tokio::spawn(manager.run_until(sender, changed, shutdown));
        Running { messages, attributes, stop, task }
    }

    /// The first message that the reader looks for.
    async fn wait<T>(&mut self, mut look: impl FnMut(Message) -> Option<T>) -> T {
        let find = async {
            loop {
                let message = self.messages.recv().await.unwrap();
                if let Some(found) = look(message) {
                    return found;
                }
            }
        };
        tokio::time::timeout(PATIENCE, find).await.unwrap()
    }

    async fn held(&mut self) -> Held {
        self.wait(|message| if let Message::Held(held) = message { Some(*held) } else { None }).await
    }

    async fn own(&mut self, wanted: impl Fn(&[OwnProblem]) -> bool) -> Vec<OwnProblem> {
        self.wait(|message| match message {
            Message::Own(problems) if wanted(&problems) => Some(problems),
            _ => None,
        })
        .await
    }

    async fn changes(&mut self) -> Vec<String> {
        let text = |change: &Change| match change {
            Change::Added(lease) => format!("+{}", lease.subnet),
            Change::Changed(lease) => format!("~{}", lease.subnet),
            Change::Removed(subnet) => format!("-{subnet}"),
        };
        self.wait(|message| match message {
            Message::Leases { changes, .. } => Some(changes.iter().map(text).collect()),
            _ => None,
        })
        .await
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap();
    }
}

fn key(subnet: Subnet) -> String {
    format!("{SUBNETS}{subnet}")
}

/// What a node sees of others and of itself, over any store.
async fn lives_in_company(store: Arc<dyn Store>) {
    let gate = Gate::new(store.clone());
    let mut running = Running::start(gate.clone(), Settings::default(), me(1));
    let held = running.held().await;
    assert!(running.own(<[_]>::is_empty).await.is_empty());
    assert!(running.changes().await.is_empty(), "the first list, without one's own");
    // Another node of ours, and one of flanneld's.
    let other = Running::start(store.clone(), Settings::default(), me(2)).held().await;
    assert_eq!(running.changes().await, [format!("+{}", other.subnet())]);
    assert!(!other.subnet().overlaps(&held.subnet()));
    put(&*store, &format!("{SUBNETS}10.9.0.0-26"), &attributes(9).render(), 0).await;
    assert_eq!(running.changes().await, ["+10.9.0.0-26"]);
    put(&*store, &format!("{SUBNETS}10.9.1.0-26"), "{", 0).await;
    let problems = running.wait(|it| if let Message::Leases { problems, .. } = it { problems } else { None }).await;
    assert_eq!((problems.len(), &*problems[0].name), (1, "10.9.1.0-26"));
    // New attributes are written; a key that somebody removes, too.
    running.attributes.send_replace(attributes(77));
    let written = async |store: &dyn Store, wanted: String| {
        let mut watcher = store.watch(WatchRequest::new(KeyRange::key(key(held.subnet())), 0)).await.unwrap();
        let is_there = |item: &Arc<KeyValue>| item.value == wanted.as_bytes();
        while !store
            .range(RangeRequest::new(KeyRange::key(key(held.subnet()))))
            .await
            .unwrap()
            .items
            .iter()
            .any(is_there)
        {
            tokio::time::timeout(PATIENCE, watcher.next()).await.unwrap().unwrap();
        }
    };
    written(&*store, attributes(77).render()).await;
    store.transaction(Transaction::delete(KeyRange::key(key(held.subnet())))).await.unwrap();
    written(&*store, attributes(77).render()).await;
    // A flanneld behind the same address writes the same key: said, and not fought.
    let twin = Attributes { backend: "ipip".into(), ..attributes(77) };
    put(&*store, &key(held.subnet()), &twin.render(), 0).await;
    let problems = running.own(|problems| !problems.is_empty()).await;
    let [OwnProblem::Contested { subnet, found }] = problems.as_slice() else { panic!("{problems:?}") };
    assert_eq!((*subnet, found), (held.subnet(), &twin.render()));
    put(&*store, &key(held.subnet()), &attributes(77).render(), held.lease).await;
    running.own(<[_]>::is_empty).await;
    running.stop().await;
    // Stopping keeps the lease.
    assert!(leases(&*store).await.iter().any(|item| item.key == key(held.subnet()).into_bytes()));
}

#[tokio::test]
async fn a_node_lives_in_company_on_the_embedded_store() {
    lives_in_company(embedded(Arc::new(SystemClock::default())).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_lives_in_company_on_etcd() {
    if !etcd::is_installed() {
        return;
    }
    let server = etcd::Etcd::start(&[]);
    let store = Arc::new(portolan_store::Etcd::connect(server.config()).await.unwrap());
    put(&*store, CONFIG, r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#, 0).await;
    lives_in_company(store).await;
}

#[tokio::test]
async fn a_second_agent_of_the_same_name_makes_the_first_stop() {
    let store = embedded(Arc::new(SystemClock::default())).await;
    let mut first = Running::start(store.clone(), Settings::default(), me(1));
    let held = first.held().await;
    let mut twin = me(1);
    twin.claimant.instance = "2".into();
    let mut second = Running::start(store.clone(), Settings::default(), twin);
    assert_eq!(second.held().await.subnet(), held.subnet());
    let problems = first.own(|problems| !problems.is_empty()).await;
    assert!(matches!(&problems[..], [OwnProblem::Superseded { .. }]), "{problems:?}");
}

#[tokio::test]
async fn a_store_that_was_away_finds_everything_as_it_was() {
    let store = embedded(Arc::new(SystemClock::default())).await;
    let gate = Gate::new(store.clone());
    let settings =
        Settings { time_to_live: Duration::from_secs(6), margin: Duration::from_secs(5), ..Settings::default() };
    let mut running = Running::start(gate.clone(), settings.clone(), me(1));
    let held = running.held().await;
    // Away for longer than until the renewal, and not as long as the lease lives.
    gate.is_cut.store(true, Ordering::SeqCst);
    let problems = running.own(|problems| !problems.is_empty()).await;
    assert!(problems[0].to_string().contains("cut off"), "{problems:?}");
    gate.is_cut.store(false, Ordering::SeqCst);
    running.own(<[_]>::is_empty).await;
    assert_eq!(leases(&*store).await[0].version, 1, "renewed, not taken again");
    // Away until the lease has ended: the same subnet is taken again.
    gate.is_cut.store(true, Ordering::SeqCst);
    let mut watcher = store.watch(WatchRequest::new(KeyRange::prefix(SUBNETS), 0)).await.unwrap();
    while !leases(&*store).await.is_empty() {
        tokio::time::timeout(PATIENCE, watcher.next()).await.unwrap().unwrap();
    }
    gate.is_cut.store(false, Ordering::SeqCst);
    assert_eq!(running.held().await.subnet(), held.subnet());
    // Once more, and another node takes it meanwhile.
    gate.is_cut.store(true, Ordering::SeqCst);
    let mut watcher = store.watch(WatchRequest::new(KeyRange::prefix(SUBNETS), 0)).await.unwrap();
    while !leases(&*store).await.is_empty() {
        tokio::time::timeout(PATIENCE, watcher.next()).await.unwrap().unwrap();
    }
    put(&*store, &key(held.subnet()), &attributes(2).render(), 0).await;
    gate.is_cut.store(false, Ordering::SeqCst);
    let moved = running.held().await;
    assert_ne!(moved.subnet(), held.subnet());
    let problems = running.own(|problems| !problems.is_empty()).await;
    assert_eq!(problems, [OwnProblem::Moved { from: held.subnet(), to: moved.subnet() }]);
}

#[tokio::test]
async fn after_a_compaction_only_the_difference_is_told() {
    let store = embedded(Arc::new(SystemClock::default())).await;
    for number in 1..4 {
        put(&*store, &format!("{SUBNETS}10.9.{number}.0-26"), &attributes(number).render(), 0).await;
    }
    let inner = embedded_behind_watches(store.clone());
    let mut running = Running::start(inner.clone(), Settings::default(), me(50));
    assert_eq!(running.changes().await.len(), 3);
    inner.cut();
    running.wait(|it| matches!(it, Message::Following(Some(_))).then_some(())).await;
    store.transaction(Transaction::delete(KeyRange::key(format!("{SUBNETS}10.9.2.0-26")))).await.unwrap();
    put(&*store, &format!("{SUBNETS}10.9.4.0-26"), &attributes(4).render(), 0).await;
    store.compact(store.revision().await.unwrap()).await.unwrap();
    inner.mend();
    assert_eq!(running.changes().await, ["-10.9.2.0-26", "+10.9.4.0-26"]);
}

/// A gate whose watches end when it is cut: each goes through a task that drops it.
struct Cable {
    gate: Arc<Gate>,
    cut: watch::Sender<bool>,
}

fn embedded_behind_watches(store: Arc<dyn Store>) -> Arc<Cable> {
    Arc::new(Cable { gate: Gate::new(store), cut: watch::Sender::new(false) })
}

impl Cable {
    fn cut(&self) {
        self.gate.is_cut.store(true, Ordering::SeqCst);
        self.cut.send_replace(true);
    }

    fn mend(&self) {
        self.cut.send_replace(false);
        self.gate.is_cut.store(false, Ordering::SeqCst);
    }
}

impl Store for Cable {
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResponse, StoreError>> {
        self.gate.range(request)
    }

    fn transaction(&self, transaction: Transaction) -> BoxFuture<'_, Result<TransactionResult, StoreError>> {
        self.gate.transaction(transaction)
    }

    fn lease_grant(&self, id: LeaseId, time_to_live: Duration) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        self.gate.lease_grant(id, time_to_live)
    }

    fn lease_keep_alive(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        self.gate.lease_keep_alive(id)
    }

    fn lease_revoke(&self, id: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.gate.lease_revoke(id)
    }

    fn lease_time_to_live(&self, id: LeaseId) -> BoxFuture<'_, Result<LeaseStatus, StoreError>> {
        self.gate.lease_time_to_live(id)
    }

    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<Watcher, StoreError>> {
        Box::pin(async move {
            let start = request.start_revision;
            let mut source = self.gate.watch(request).await?;
            let (sender, watcher) = portolan_store::watch_channel(std::collections::VecDeque::new(), start);
            let mut cut = self.cut.subscribe();
            tokio::spawn(async move {
                loop {
                    tokio::select! {
                        message = source.next() => match message {
                            Ok(portolan_store::WatchMessage::Events { revision, events }) => {
                                if !sender.send_events(revision, events) {
                                    return;
                                }
                            }
                            Ok(portolan_store::WatchMessage::Progress { revision }) => sender.send_progress(revision),
                            Err(_) => return,
                        },
                        _ = cut.wait_for(|cut| *cut) => return,
                    }
                }
            });
            Ok(watcher)
        })
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        self.gate.compact(revision)
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        self.gate.revision()
    }
}
