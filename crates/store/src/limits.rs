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
