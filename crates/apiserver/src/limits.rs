//! The bounds of the API server, in one place.

use std::time::Duration;

/// Connections at a time, over both listeners.
pub const CONNECTIONS_MAX: usize = 4_096;

/// Largest request body: what kube-apiserver takes.
pub const REQUEST_BYTES_MAX: usize = 3 * 1024 * 1024;

/// Longest wait for the next request, so that silent connections do not pile up. Longer than clients
/// keep an idle connection, so that a request does not meet one that is just being closed.
pub const HEADER_WAIT_MAX: Duration = Duration::from_mins(3);

/// Longest TLS handshake.
pub const HANDSHAKE_WAIT_MAX: Duration = Duration::from_secs(10);

/// Longest time that a watch stays open; clients resume where it ended.
pub const WATCH_DURATION_MAX: Duration = Duration::from_hours(1);

/// How often a patch is tried again when another write came between.
pub const CONFLICT_RETRIES_MAX: usize = 20;

/// Keys that one page of a list reads from the store at a time while it filters.
pub const LIST_CHUNK_KEYS: usize = 500;

/// Most entries that a list returns when the client names no limit.
pub const LIST_ITEMS_MAX: usize = 200_000;

/// How often a taken generated name is replaced by another.
pub const NAME_RETRIES_MAX: usize = 8;

/// How long the controllers wait after a change for others to come along.
pub const CONTROLLER_COALESCE: Duration = Duration::from_millis(3);

/// The longest that they wait so, when there is much to look at.
pub const CONTROLLER_COALESCE_MAX: Duration = Duration::from_millis(500);

/// How often the controllers look without being told, for what depends on time.
pub const CONTROLLER_RESYNC: Duration = Duration::from_secs(30);

/// Rounds of the controllers that follow each other at once, before others get a turn.
pub const CONTROLLER_ROUNDS_MAX: usize = 64;

/// How long the controllers of a server that died are missed, where several servers share a store.
pub const LEADER_LEASE: Duration = Duration::from_secs(10);

/// How much earlier than its lease ends a leader stops that could not prolong it: clocks differ, and so
/// does when the two hear of time.
pub const LEADER_MARGIN: Duration = Duration::from_secs(2);

/// How long a server that stops tries to say so to the others.
pub const RESIGN_WAIT_MAX: Duration = Duration::from_secs(2);

/// How long giving out addresses waits for what others gave out to arrive, before it reads all anew.
pub const ALLOCATION_WAIT_MAX: Duration = Duration::from_secs(1);

/// How old history in an etcd may get: kube-apiserver's `--etcd-compaction-interval`.
pub const COMPACTION_INTERVAL: Duration = Duration::from_mins(5);
