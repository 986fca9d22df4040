//! Every bound of the server, in one place.

use std::time::Duration;

/// The largest UDP answer to a client without EDNS (RFC 1035 §4.2.1).
pub const UDP_PAYLOAD_PLAIN: usize = 512;

/// The largest UDP answer that we send and that we ask upstreams for: what passes unfragmented
/// nearly everywhere (DNS Flag Day 2020).
pub const UDP_PAYLOAD_MAX: usize = 1232;

/// The longest message over TCP: its length has two bytes (RFC 1035 §4.2.2).
pub const MESSAGE_LENGTH_MAX: usize = 65_535;

/// Queries that one UDP task handles before it lets others run.
pub const UDP_BATCH_MAX: usize = 64;

/// Attempts to find a port that is free for both UDP and TCP, where any port will do.
pub const BIND_ATTEMPTS_MAX: usize = 16;

/// Tasks that read one UDP socket.
pub const UDP_TASKS_PER_SOCKET: usize = 2;

/// TCP connections at one time; further ones are closed at once.
pub const TCP_CONNECTIONS_MAX: usize = 512;

/// How long a TCP connection may be silent (RFC 7766 §6.2.3 asks for seconds).
pub const TCP_IDLE: Duration = Duration::from_secs(10);

/// Queries that wait for an upstream at one time; further ones are refused, as by CoreDNS's
/// `max_concurrent 1000`.
pub const FORWARDS_MAX: usize = 1000;

/// How long one upstream has to answer once: CoreDNS's `read_timeout`.
pub const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(2);

/// How long all attempts for one query may take: the stub resolver's own timeout (resolv.conf(5)).
pub const FORWARD_DEADLINE: Duration = Duration::from_secs(5);

/// Attempts for one query, over all upstreams.
pub const FORWARD_ATTEMPTS_MAX: usize = 4;

/// Attempts for one query where there is only one upstream: a lost datagram is sent once more.
pub const FORWARD_ATTEMPTS_MIN: usize = 2;

/// Failures in a row after which an upstream is asked last: CoreDNS's `max_fails`.
pub const UPSTREAM_FAILURES_MAX: u32 = 2;

/// How long an upstream that failed is asked last.
pub const UPSTREAM_HOLD: Duration = Duration::from_secs(10);

/// Upstreams in a configuration, as in CoreDNS's `forward`.
pub const UPSTREAMS_MAX: usize = 15;

/// Answers in the cache, as CoreDNS's `success` and `denial` together.
pub const CACHE_ENTRIES_MAX: usize = 19_968;

/// The longest time that an answer with records is kept.
pub const CACHE_POSITIVE_MAX: Duration = Duration::from_hours(1);

/// The longest time that a denial is kept.
pub const CACHE_NEGATIVE_MAX: Duration = Duration::from_mins(30);

/// How long a failure of the upstreams is kept (RFC 9520 §3.2 asks for 1 s to 5 minutes).
pub const CACHE_FAILURE: Duration = Duration::from_secs(5);

/// Aliases that are followed for one question.
pub const ALIASES_MAX: usize = 8;

/// The largest time to live in a configuration: that of CoreDNS's `kubernetes`.
pub const TTL_MAX: u32 = 3600;

/// The time to live of `hosts`, as in CoreDNS.
pub const HOSTS_TTL: u32 = 3600;
