//! Every bound of the agent, named.

use std::time::Duration;

/// Source events that may wait for the loop. A full queue slows the source down, never the loop.
pub(crate) const SOURCE_QUEUE: usize = 256;

/// CNI calls that may wait for the loop; further callers wait in the socket's threads.
pub(crate) const CNI_QUEUE: usize = 64;

/// Administration requests that may wait for the loop.
pub(crate) const ADMIN_QUEUE: usize = 16;

/// Source events taken into one apply cycle, so that a storm cannot hold the kernel back for ever.
pub(crate) const EVENTS_PER_CYCLE_MAX: usize = 4096;

/// Notifications of the kernel that may wait for the loop. Beyond it everything is read again.
pub(crate) const NOTIFICATION_QUEUE: usize = 1024;

/// How long the monitor's thread waits before it looks whether the loop is still there.
pub(crate) const MONITOR_WAIT_MILLISECONDS: u16 = 1000;

/// How long foreign changes of the kernel gather before the kernel is read again.
pub(crate) const REPAIR_DELAY: Duration = Duration::from_millis(50);

/// Links and chains of others' changes that are told apart while they gather.
pub(crate) const REPAIR_EVENTS_MAX: usize = 1024;

/// The first and the last delay between attempts to apply what failed; each attempt doubles it.
pub(crate) const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
/// See [`RETRY_DELAY_MIN`].
pub(crate) const RETRY_DELAY_MAX: Duration = Duration::from_secs(30);

/// Refusals of the kernel that are kept as problems of one room; of more, these are enough to see why.
pub(crate) const REFUSALS_MAX: usize = 256;

/// How often a cheap look is had at what the kernel sends no notifications of: legacy iptables tables, and
/// connections of real servers that leave.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The kernel is read again at least this often, for changes that no notification told of.
pub(crate) const RESYNC_INTERVAL: Duration = Duration::from_secs(90);

/// Every so many times what takes long to read is read too: an hour, as kube-proxy's full sync of iptables.
pub(crate) const RESYNCS_PER_FULL: u32 = 40;

/// Bytes of an administration request's body.
pub(crate) const ADMIN_BODY_MAX: usize = 1 << 20;

/// Connections to the administration socket at one time.
pub(crate) const ADMIN_CONNECTIONS_MAX: usize = 32;

/// How long a peer may take to send a request, or to leave its connection idle.
pub(crate) const HEADER_TIMEOUT: Duration = Duration::from_secs(15);

/// How long to wait after a connection could not be accepted.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long the loop may be busy before the agent counts as hung: many times a cold start's cycle.
pub(crate) const HEALTH_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a live observation may run.
pub(crate) const OBSERVATION_MAX: Duration = Duration::from_secs(30);

/// Sightings that one live observation reports.
pub(crate) const SIGHTINGS_MAX: usize = 256;
