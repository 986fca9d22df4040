//! Every bound of this crate, in one place.

use std::time::Duration;

/// Objects per page of a list. A page is in memory as text and as objects at once, so this bounds
/// the peak: 250 slices of 100 endpoints are about 5 MB of JSON.
pub const PAGE_SIZE: u32 = 250;

/// Changes of one table that wait for the receiver. Changes of the same object are merged; when
/// this many objects wait, the watch is not read any further, and the server waits too.
pub const PENDING_CHANGES_MAX: usize = 1024;

/// Messages of one table that wait for the receiver, beside the changes.
pub const PENDING_EVENTS_MAX: usize = 4;

/// Times of changes of slices that wait with them; of more, these are enough to know how long it takes.
pub const PENDING_TRIGGERS_MAX: usize = 1024;

/// Problems that one object is listed with; one row more says how many were left out.
pub const PROBLEMS_PER_OBJECT_MAX: usize = 20;

/// Node names that are shared between endpoints. Beyond it a name is just not shared: a cluster
/// has fewer nodes than this (Kubernetes is specified to 5,000).
pub const SHARED_NAMES_MAX: usize = 16_384;

/// The longest that a server may be silent while it lists.
pub const LIST_SILENCE_MAX: Duration = Duration::from_mins(1);

/// The first wait after a failure.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(100);

/// The longest wait after a failure.
pub const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// How often a write to the cluster is tried before its error is returned.
pub const WRITE_ATTEMPTS_MAX: u32 = 6;
