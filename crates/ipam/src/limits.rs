//! The bounds of what is kept in memory, of what is tried, and of what is waited for.

use std::time::Duration;

/// The most owners of pod addresses on one node. An IPv6 /64 has more addresses than any memory; a
/// node with this many pods does not exist.
pub const OWNERS_MAX: usize = 1 << 16;

/// Of so many free subnets one is chosen at random, as flanneld does: few enough to keep leases together,
/// enough that nodes that start at once seldom choose the same.
pub const FREE_SUBNETS_CONSIDERED_MAX: usize = 100;

/// How long a lease lives without being renewed: flanneld's.
pub const LEASE_TIME_TO_LIVE: Duration = Duration::from_hours(24);

/// How long before its end a lease is renewed, where it is not said: flanneld's `--subnet-lease-renew-margin`.
pub const RENEW_MARGIN_DEFAULT: Duration = Duration::from_hours(1);

/// The shortest margin that flanneld takes.
pub const RENEW_MARGIN_MIN: Duration = Duration::from_mins(1);

/// The longest margin that flanneld takes: a minute less than a lease lives.
pub const RENEW_MARGIN_MAX: Duration = Duration::from_mins(1439);

/// How often a subnet is tried for when others are faster, before the error is reported and a pause made.
pub const ACQUIRE_ATTEMPTS_MAX: usize = 64;

/// Problems with leases that are listed; one row more says how many were left out.
pub const LEASE_PROBLEMS_MAX: usize = 1_000;

/// The first wait after a failure at the store.
pub const STORE_BACKOFF_FIRST: Duration = Duration::from_millis(100);

/// The longest wait after a failure at the store.
pub const STORE_BACKOFF_MAX: Duration = Duration::from_secs(10);

/// The longest that one request to the store may take before it counts as failed.
pub const STORE_REQUEST_MAX: Duration = Duration::from_secs(10);

/// Messages about leases that wait for the reader, for whoever makes the channel; more wait in the
/// store's watch.
pub const LEASE_EVENTS_MAX: usize = 64;

/// The longest that a node goes without looking at the clock: time may have passed that no timer saw.
pub const LEASE_CHECK_MAX: Duration = Duration::from_secs(30);
