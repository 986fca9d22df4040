//! Every bound of what lies around the data plane, named.

use std::time::Duration;

/// Connections to one listener at one time; further ones wait in its queue.
pub(super) const CONNECTIONS_MAX: usize = 64;

/// How long a peer may take to send a request, or to leave its connection idle.
pub(super) const HEADER_TIMEOUT: Duration = Duration::from_secs(15);

/// How long to wait after a connection could not be accepted.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long to wait before an address in use is tried again.
pub(super) const LISTEN_RETRY: Duration = Duration::from_secs(5);

/// Health check ports that are served: the range of node ports has 2768 by default.
pub(super) const HEALTH_CHECKS_MAX: usize = 4096;

/// How long to wait after connection tracking could not be read or changed.
pub(super) const CONNTRACK_RETRY: Duration = Duration::from_secs(5);

/// Attempts at one change of connection tracking; after that its refusals only stand as a problem.
pub(super) const CONNTRACK_ATTEMPTS_MAX: u32 = 10;

/// Changes of endpoints whose programming time waits for one sync; the rest is not measured.
pub(super) const TRIGGERS_MAX: usize = 4096;
