//! The driver for etcd against a real one: the suite that every driver runs, and what only a store
//! behind a network can suffer: it is killed, compacted and replaced while it is watched, it wants
//! certificates or a user, and one of its members is dead.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use portolan_store::conformance::{self, Harness};
use portolan_store::{
    BoxFuture, Compare, Etcd, EtcdConfig, EtcdCredentials, EtcdEndpoint, EtcdTls, EventKind, KeyRange, Operation,
    RangeRequest, Store, StoreError, Transaction, WatchCancelled, WatchMessage, WatchRequest, Watcher,
};

/// How long anything may take that happens on its own.
const PATIENCE: Duration = Duration::from_mins(1);

struct Rig {
    config: EtcdConfig,
}

impl Harness for Rig {
    fn make(&self) -> BoxFuture<'_, Result<Arc<dyn Store>, StoreError>> {
        Box::pin(async move { Ok(Arc::new(Etcd::connect(self.config.clone()).await?) as Arc<dyn Store>) })
    }

    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        // etcd's clock is the machine's; that a lease ended is then awaited as an event.
        Box::pin(tokio::time::sleep(by))
    }
}

async fn conform(config: EtcdConfig) {
    if let Err(failure) = conformance::run(&Rig { config }).await {
        panic!("{failure}");
    }
}

#[tokio::test]
async fn etcd_conforms() {
    if !common::is_installed() {
        return;
    }
    let etcd = common::Etcd::start(&[]);
    conform(etcd.config()).await;
}

#[tokio::test]
async fn etcd_below_a_prefix_conforms_and_leaves_others_alone() {
    if !common::is_installed() {
        return;
    }
    let etcd = common::Etcd::start(&[]);
    let whole = connect(etcd.config()).await;
    for key in ["/ours", "/ours0", "/other"] {
        put(&whole, key, "foreign").await;
    }
    let config = EtcdConfig { prefix: "/ours/".to_owned(), ..etcd.config() };
    conform(config.clone()).await;
    let below = connect(config).await;
    below.transaction(Transaction::delete(KeyRange::all())).await.unwrap();
    let left = whole.range(RangeRequest::new(KeyRange::all())).await.unwrap();
    let left: Vec<_> = left.items.iter().map(|item| String::from_utf8_lossy(&item.key).into_owned()).collect();
    assert_eq!(left, ["/other", "/ours", "/ours0"]);
}

async fn connect(config: EtcdConfig) -> Etcd {
    Etcd::connect(config).await.unwrap()
}

async fn put(store: &Etcd, key: &str, value: &str) -> u64 {
    store.transaction(Transaction::put(key, value)).await.unwrap().revision
}

/// Writes until an answer says that it was made, however often the answer is lost.
async fn put_at_last(store: &Etcd, key: &str) -> u64 {
    let written = tokio::time::timeout(PATIENCE, async {
        loop {
            match store.transaction(Transaction::put(key, "x").when(Compare::absent(key))).await {
                Ok(result) if result.succeeded => return result.revision,
                // An earlier try, whose answer was lost, made it.
                Ok(_) => {
                    return store.range(RangeRequest::new(KeyRange::key(key))).await.unwrap().items[0].mod_revision;
                }
                Err(StoreError::OutcomeUnknown { .. } | StoreError::Unreachable { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
    written.await.unwrap()
}

/// The next message that is no progress mark.
async fn next(watcher: &mut Watcher) -> Result<(u64, Vec<String>), WatchCancelled> {
    let waited = tokio::time::timeout(PATIENCE, async {
        loop {
            if let WatchMessage::Events { revision, events } = watcher.next().await? {
                let keys = events.iter().map(|event| String::from_utf8_lossy(&event.current.key).into_owned());
                return Ok((revision, keys.collect()));
            }
        }
    });
    waited.await.unwrap()
}

#[tokio::test]
async fn a_watch_survives_kill_and_loses_and_doubles_nothing() {
    if !common::is_installed() {
        return;
    }
    let mut etcd = common::Etcd::start(&[]);
    let store = connect(etcd.config()).await;
    let mut watcher = store.watch(WatchRequest::new(KeyRange::prefix("/w/"), 0)).await.unwrap();
    let mut written = Vec::new();
    for round in 0..3 {
        for number in 0..10 {
            let key = format!("/w/{round}-{number}");
            written.push((put_at_last(&store, &key).await, vec![key]));
        }
        // What is before the break was read in one round, and was not in the others.
        if round == 1 {
            for expected in &written {
                assert_eq!(&next(&mut watcher).await.unwrap(), expected);
            }
            written.clear();
        }
        etcd.kill();
        etcd.restart();
    }
    written.push((put_at_last(&store, "/w/last").await, vec!["/w/last".to_owned()]));
    for expected in &written {
        assert_eq!(&next(&mut watcher).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn compaction_during_an_outage_is_told_with_the_oldest_revision() {
    if !common::is_installed() {
        return;
    }
    let mut etcd = common::Etcd::start(&[]);
    let store = connect(etcd.config()).await;
    let mut watcher = store.watch(WatchRequest::new(KeyRange::key("/a"), 0)).await.unwrap();
    let first = put(&store, "/a", "1").await;
    assert_eq!(next(&mut watcher).await.unwrap().0, first);
    // The watch sees nothing of what follows before it is all compacted: it is behind a proxy that is
    // gone, as it were, until etcd serves where it was.
    let port = etcd.client_port;
    etcd.kill();
    etcd.client_port = free_port();
    etcd.restart();
    let elsewhere = connect(etcd.config()).await;
    for number in 0..5 {
        put(&elsewhere, "/a", &number.to_string()).await;
    }
    let compacted = elsewhere.revision().await.unwrap();
    elsewhere.compact(compacted).await.unwrap();
    etcd.kill();
    etcd.client_port = port;
    etcd.restart();
    let cancelled = next(&mut watcher).await.unwrap_err();
    assert_eq!(cancelled, WatchCancelled::Compacted { resume: first + 1, compacted });
    let mut resumed = store.watch(WatchRequest::new(KeyRange::key("/a"), compacted + 1)).await.unwrap();
    let revision = put(&store, "/a", "after").await;
    assert_eq!(next(&mut resumed).await.unwrap().0, revision);
}

/// A port that nobody listens at.
fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn a_store_that_was_replaced_ends_its_watches() {
    if !common::is_installed() {
        return;
    }
    let mut etcd = common::Etcd::start(&[]);
    let store = connect(etcd.config()).await;
    let mut watcher = store.watch(WatchRequest::new(KeyRange::key("/a"), 0)).await.unwrap();
    let mut last = 0;
    for number in 0..5 {
        last = put(&store, "/a", &number.to_string()).await;
    }
    while next(&mut watcher).await.unwrap().0 < last {}
    etcd.restart_empty();
    let cancelled = next(&mut watcher).await.unwrap_err();
    assert!(matches!(cancelled, WatchCancelled::Replaced { current: 1, .. }), "{cancelled}");
}

fn dead_endpoint() -> EtcdEndpoint {
    EtcdEndpoint { is_tls: false, authority: format!("127.0.0.1:{}", free_port()) }
}

#[tokio::test]
async fn a_dead_member_is_left_for_the_next() {
    if !common::is_installed() {
        return;
    }
    let etcd = common::Etcd::start(&[]);
    let store = connect(EtcdConfig::new(vec![dead_endpoint(), etcd.endpoint()])).await;
    let revision = put(&store, "/a", "1").await;
    assert_eq!(store.revision().await.unwrap(), revision);
}

#[tokio::test]
async fn nobody_who_answers_is_said_with_every_endpoint() {
    let dead = [dead_endpoint(), dead_endpoint()];
    let request_timeout = Duration::from_secs(1);
    let error = Etcd::connect(EtcdConfig { request_timeout, ..EtcdConfig::new(dead.to_vec()) }).await.err().unwrap();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    for endpoint in dead {
        assert!(error.to_string().contains(&endpoint.to_string()), "{error}");
    }
}

/// A write that was sent, and whose answer never came, is not repeated, and not said to have failed.
#[tokio::test]
async fn a_write_without_an_answer_is_of_unknown_outcome() {
    if !common::is_installed() {
        return;
    }
    let mut members = common::Etcd::start_three();
    let config = EtcdConfig { request_timeout: Duration::from_secs(2), ..members[0].config() };
    let store = connect(config).await;
    put(&store, "/a", "1").await;
    for member in &mut members[1..] {
        member.kill();
    }
    // One of three takes the request, and can promise nothing.
    let result = store.transaction(Transaction::put("/a", "2")).await;
    assert!(matches!(result, Err(StoreError::OutcomeUnknown { .. })), "{result:?}");
    let result = store.range(RangeRequest::new(KeyRange::key("/a"))).await;
    assert!(matches!(result, Err(StoreError::Unreachable { .. })), "{result:?}");
}

#[tokio::test]
async fn a_cluster_that_loses_a_member_goes_on() {
    if !common::is_installed() {
        return;
    }
    let mut members = common::Etcd::start_three();
    let store = connect(EtcdConfig::new(members.iter().map(common::Etcd::endpoint).collect())).await;
    let mut watcher = store.watch(WatchRequest::new(KeyRange::prefix("/w/"), 0)).await.unwrap();
    let mut written = Vec::new();
    for number in 0..20 {
        if number == 10 {
            // The one that the store talks to.
            members[0].kill();
        }
        let key = format!("/w/{number:02}");
        written.push((put_at_last(&store, &key).await, vec![key]));
    }
    for expected in &written {
        assert_eq!(&next(&mut watcher).await.unwrap(), expected);
    }
}

#[tokio::test]
async fn progress_marks_say_how_far_an_idle_watch_is() {
    if !common::is_installed() {
        return;
    }
    let etcd = common::Etcd::start(&["--experimental-watch-progress-notify-interval", "200ms"]);
    let store = connect(etcd.config()).await;
    let request = WatchRequest { progress: true, ..WatchRequest::new(KeyRange::key("/idle"), 0) };
    let mut watcher = store.watch(request).await.unwrap();
    let revision = put(&store, "/other", "1").await;
    let marked = tokio::time::timeout(PATIENCE, async {
        while watcher.resume_revision() <= revision {
            assert!(matches!(watcher.next().await.unwrap(), WatchMessage::Progress { .. }));
        }
    });
    marked.await.unwrap();
}

/// A revision of many large values comes as one message, whole, whatever etcd sends at a time.
#[tokio::test]
async fn a_large_revision_is_one_message() {
    if !common::is_installed() {
        return;
    }
    let etcd = common::Etcd::start(&["--max-request-bytes", "33554432"]);
    let store = connect(etcd.config()).await;
    let mut watcher = store.watch(WatchRequest::new(KeyRange::prefix("/l/"), 0)).await.unwrap();
    let mut transaction = Transaction::default();
    for number in 0..100 {
        let key = format!("/l/{number:03}").into_bytes();
        transaction = transaction.then(Operation::Put { key, value: vec![b'x'; 200_000], lease: 0 });
    }
    let revision = store.transaction(transaction).await.unwrap().revision;
    let (seen, keys) = next(&mut watcher).await.unwrap();
    assert_eq!((seen, keys.len()), (revision, 100));
    assert!(keys.is_sorted());
}

#[tokio::test]
async fn a_request_that_is_too_large_is_said_to_be() {
    if !common::is_installed() {
        return;
    }
    let etcd = common::Etcd::start(&[]);
    let store = connect(etcd.config()).await;
    let value = vec![b'x'; 1_000_000];
    let transaction =
        Transaction::put("/a", value.clone()).then(Operation::Put { key: b"/b".to_vec(), value, lease: 0 });
    let result = store.transaction(transaction).await;
    assert!(matches!(result, Err(StoreError::TooLarge { .. })), "{result:?}");
    assert_eq!(store.range(RangeRequest::new(KeyRange::all())).await.unwrap().count, 0);
}

#[tokio::test]
async fn a_watch_ends_with_its_store() {
    if !common::is_installed() {
        return;
    }
    let etcd = common::Etcd::start(&[]);
    let store = connect(etcd.config()).await;
    let mut watchers = Vec::new();
    for range in [KeyRange::all(), KeyRange::span("b", "a")] {
        watchers.push(store.watch(WatchRequest::new(range, 0)).await.unwrap());
    }
    drop(store);
    for mut watcher in watchers {
        assert!(matches!(next(&mut watcher).await, Err(WatchCancelled::Closed { .. })));
    }
}

/// An authority, and a certificate and key that it signed for 127.0.0.1.
fn make_certificates(directory: &Path, names: &[&str]) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(directory.join("ca.crt"), authority.self_signed(&authority_key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(authority, authority_key);
    for name in names {
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = parameters.signed_by(&key, &issuer).unwrap();
        std::fs::write(directory.join(format!("{name}.crt")), certificate.pem()).unwrap();
        std::fs::write(directory.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

#[tokio::test]
async fn certificates_let_in_who_has_them() {
    if !common::is_installed() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    make_certificates(directory.path(), &["server", "client"]);
    let path = |name: &str| directory.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    let (certificate, key, authority) = (text("server.crt"), text("server.key"), text("ca.crt"));
    let etcd = common::Etcd::start(&[
        "--cert-file",
        &certificate,
        "--key-file",
        &key,
        "--client-cert-auth",
        "--trusted-ca-file",
        &authority,
    ]);
    let identity = Some((path("client.crt"), path("client.key")));
    let tls = EtcdTls { authority: Some(path("ca.crt")), identity };
    let quick = EtcdConfig { request_timeout: Duration::from_secs(1), ..etcd.config() };
    let store = connect(EtcdConfig { tls: tls.clone(), ..etcd.config() }).await;
    let revision = put(&store, "/a", "1").await;
    assert_eq!(store.revision().await.unwrap(), revision);

    let without = EtcdTls { identity: None, ..tls.clone() };
    let error = Etcd::connect(EtcdConfig { tls: without, ..quick.clone() }).await.err().unwrap();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");

    // Whom the system trusts, and that is not this authority.
    let stranger = Etcd::connect(EtcdConfig { tls: EtcdTls { authority: None, ..tls }, ..quick.clone() });
    let error = stranger.await.err().unwrap().to_string();
    assert!(error.contains("certificate"), "{error}");

    let missing = EtcdTls { authority: Some("/nowhere/ca.crt".into()), identity: None };
    let error = Etcd::connect(EtcdConfig { tls: missing, ..quick }).await.err().unwrap();
    assert!(matches!(&error, StoreError::Configuration { reason } if reason.contains("/nowhere/ca.crt")), "{error}");
}

/// What a test says to etcd that the driver has no words for.
mod accounts {
    use http::uri::PathAndQuery;

    /// The first two fields of every message about users and roles.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Two {
        #[prost(string, tag = "1")]
        pub(super) one: String,
        #[prost(string, tag = "2")]
        pub(super) two: String,
    }

    /// `AuthRoleGrantPermissionRequest`.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Grant {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(message, optional, tag = "2")]
        pub(super) permission: Option<Permission>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Permission {
        /// 2 is READWRITE.
        #[prost(int32, tag = "1")]
        pub(super) kind: i32,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) key: Vec<u8>,
        #[prost(bytes = "vec", tag = "3")]
        pub(super) range_end: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Answer {}

    pub(super) async fn call<Q: prost::Message + 'static>(port: u16, path: &'static str, request: Q) {
        let channel = tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
        let mut grpc = tonic::client::Grpc::new(channel.connect().await.unwrap());
        grpc.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<Q, Answer>::default();
        grpc.unary(tonic::Request::new(request), PathAndQuery::from_static(path), codec).await.unwrap();
    }

    pub(super) async fn two(port: u16, path: &'static str, one: &str, two: &str) {
        call(port, path, Two { one: one.to_owned(), two: two.to_owned() }).await;
    }
}

/// Users root and me; me may read and write below /mine/.
async fn enable_accounts(port: u16) {
    use accounts::{Grant, Permission, call, two};
    two(port, "/etcdserverpb.Auth/UserAdd", "root", "secret").await;
    two(port, "/etcdserverpb.Auth/RoleAdd", "root", "").await;
    two(port, "/etcdserverpb.Auth/UserGrantRole", "root", "root").await;
    two(port, "/etcdserverpb.Auth/UserAdd", "me", "mine").await;
    two(port, "/etcdserverpb.Auth/RoleAdd", "mine", "").await;
    let permission = Permission { kind: 2, key: b"/mine/".to_vec(), range_end: b"/mine0".to_vec() };
    let grant = Grant { name: "mine".to_owned(), permission: Some(permission) };
    call(port, "/etcdserverpb.Auth/RoleGrantPermission", grant).await;
    two(port, "/etcdserverpb.Auth/UserGrantRole", "me", "mine").await;
    two(port, "/etcdserverpb.Auth/AuthEnable", "", "").await;
}

#[tokio::test]
async fn a_user_is_let_in_again_when_its_token_is_forgotten() {
    if !common::is_installed() {
        return;
    }
    let mut etcd = common::Etcd::start(&[]);
    enable_accounts(etcd.client_port).await;
    let me = |password: &str| EtcdConfig {
        credentials: Some(EtcdCredentials { user: "me".to_owned(), password: password.to_owned() }),
        prefix: "/mine".to_owned(),
        ..etcd.config()
    };
    for config in [me("wrong"), EtcdConfig { credentials: None, ..me("") }] {
        let error = Etcd::connect(config).await.err().unwrap();
        assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    }
    let config = me("mine");
    let store = connect(config.clone()).await;
    put(&store, "/a", "1").await;
    let mut watcher = store.watch(WatchRequest::new(KeyRange::key("/a"), 0)).await.unwrap();

    // etcd's simple tokens are in its memory only.
    etcd.restart();
    let revision = put_at_last(&store, "/b").await;
    assert_eq!(store.revision().await.unwrap(), revision);
    let revision = put(&store, "/a", "2").await;
    assert_eq!(next(&mut watcher).await.unwrap().0, revision);

    let outside = connect(EtcdConfig { prefix: "/mine".to_owned(), ..config.clone() }).await;
    let all = outside.range(RangeRequest::new(KeyRange::prefix("/"))).await.unwrap();
    assert_eq!(all.count, 2);
    let error = Etcd::connect(EtcdConfig { prefix: "/yours".to_owned(), ..config }).await.err().unwrap();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
}

#[tokio::test]
async fn a_lease_that_is_too_short_is_granted_longer() {
    if !common::is_installed() {
        return;
    }
    let etcd = common::Etcd::start(&[]);
    let store = connect(etcd.config()).await;
    let lease = store.lease_grant(0, Duration::from_millis(100)).await.unwrap();
    assert!(lease.granted >= Duration::from_secs(1), "{:?}", lease.granted);
    let put = Operation::Put { key: b"/a".to_vec(), value: Vec::new(), lease: lease.id };
    store.transaction(Transaction::default().then(put)).await.unwrap();
    let mut watcher = store.watch(WatchRequest::new(KeyRange::key("/a"), 0)).await.unwrap();
    let message = tokio::time::timeout(PATIENCE, watcher.next()).await.unwrap().unwrap();
    let WatchMessage::Events { events, .. } = message else { panic!("a mark came first") };
    assert_eq!((events.len(), events[0].kind), (1, EventKind::Delete));
    let gone = store.lease_keep_alive(lease.id).await;
    assert!(matches!(gone, Err(StoreError::LeaseNotFound(id)) if id == lease.id), "{gone:?}");
}
