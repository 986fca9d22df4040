//! The bounds of the store, in one place.

use std::time::Duration;

/// Largest key. etcd has no bound of its own; a key of ours is a path of a few names.
pub const KEY_BYTES_MAX: usize = 4 * 1024;

/// Largest value: etcd's default request limit, which is also what Kubernetes objects are held to.
pub const VALUE_BYTES_MAX: usize = 1536 * 1024;

/// Most operations in one branch of a transaction: etcd's `--max-txn-ops`.
pub const TRANSACTION_OPERATIONS_MAX: usize = 128;

/// Revisions that stay readable and watchable before the store compacts itself.
///
/// At 2 KiB per object this is 40 MiB of history; [`HISTORY_BYTES_MAX`] bounds that of larger ones.
pub const HISTORY_REVISIONS_MAX: u64 = 20_000;

/// Bytes of keys and values in that history: whoever rewrites a large object again and again gets a
/// shorter history, and not a store without room.
pub const HISTORY_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How far history may grow past [`HISTORY_REVISIONS_MAX`] before it is trimmed, so that trimming is
/// one larger step now and then, not a small one with every write.
pub const HISTORY_REVISIONS_SLACK: u64 = 2_000;

/// Messages that wait for one watcher before it is cancelled as too slow.
pub const WATCH_BUFFER_MESSAGES: usize = 4_096;

/// Watchers at a time.
pub const WATCHERS_MAX: usize = 10_000;

/// Transactions that share one commit to disk.
pub const GROUP_COMMIT_MAX: usize = 512;

/// Requests that wait for the writer; more wait at the caller.
pub const WRITER_QUEUE_MAX: usize = 1_024;

/// How often leases are checked for expiry, and idle watchers considered for a progress mark.
pub const LEASE_CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// How long a watcher that asked for progress marks goes without any message.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Leases at a time.
pub const LEASES_MAX: usize = 100_000;

/// How long a request to etcd may take, with all its retries, unless the configuration says otherwise:
/// etcd gives up a proposal after about seven seconds.
pub const ETCD_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection to a member of etcd may take.
pub const ETCD_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How often a connection to etcd is asked whether it lives, and how long it may take to say so.
pub const ETCD_KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Tries of one request, over all members.
pub const ETCD_RETRIES_MAX: usize = 64;

/// The pause after all members failed, at first; it doubles each time.
pub const ETCD_RETRY_PAUSE_MIN: Duration = Duration::from_millis(50);

/// The longest such pause.
pub const ETCD_RETRY_PAUSE_MAX: Duration = Duration::from_secs(1);

/// How often one request fetches a new token.
pub const ETCD_TOKEN_RENEWALS_MAX: usize = 2;

/// The largest answer that is taken from etcd: a range comes as one.
pub const ETCD_RESPONSE_BYTES_MAX: usize = 1024 * 1024 * 1024;

/// Messages that wait for a watcher that began in the past: what it has to catch up with comes faster
/// than it may be read. As many as an embedded store's history has.
pub const WATCH_REPLAY_MESSAGES: usize = HISTORY_REVISIONS_MAX as usize + WATCH_BUFFER_MESSAGES;
