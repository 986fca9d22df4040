//! Every bound of the lab, by name.

use std::time::Duration;

/// How many nodes a lab may have: each is a process and a namespace on this machine.
pub(crate) const NODES_MAX: usize = 32;

/// How many machines outside the cluster a lab may have.
pub(crate) const CLIENTS_MAX: usize = 32;

/// How many segments the nodes of the standard topology are on at most: their prefixes stay below those of load
/// balancers.
pub(crate) const UNDERLAYS_MAX: usize = 4;

/// How many segments the router joins at most.
pub(crate) const SEGMENTS_MAX: usize = 32;

/// The longest path of a socket, without its final zero (unix(7)).
pub(crate) const SOCKET_PATH_LENGTH_MAX: usize = 107;

/// The longest name of a lab: namespaces are named after it.
pub(crate) const LAB_NAME_LENGTH_MAX: usize = 24;

/// The longest name of a node or client: the router's interfaces are named after them (IFNAMSIZ - 1).
pub(crate) const MEMBER_NAME_LENGTH_MAX: usize = 15;

/// The largest manifest that is read.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 16 << 20;

/// How long the supervisor may take until the API serves, the nodes exist and the agents run.
pub(crate) const START_TIME_MAX: Duration = Duration::from_mins(1);

/// How long the supervisor may take to stop when it is asked to.
pub(crate) const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// How long `--wait` waits for pods, agents and Services.
pub(crate) const WAIT_TIME_MAX: Duration = Duration::from_mins(2);

/// How many events of a watch may wait for their reader.
pub(crate) const WATCH_QUEUE_MAX: usize = 1024;

/// The largest line of a watch, which is one object.
pub(crate) const WATCH_LINE_BYTES_MAX: usize = 8 << 20;

/// How many objects one list request asks for.
pub(crate) const LIST_PAGE: usize = 500;

/// The shortest and longest pause before something that failed is tried again.
pub(crate) const RETRY_DELAY_MIN: Duration = Duration::from_millis(20);
/// See [`RETRY_DELAY_MIN`].
pub(crate) const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);

/// The shortest pause before a container or an agent that died is started again. It doubles up to
/// [`RESTART_DELAY_MAX`].
pub(crate) const RESTART_DELAY_MIN: Duration = Duration::from_millis(100);
/// See [`RESTART_DELAY_MIN`].
pub(crate) const RESTART_DELAY_MAX: Duration = Duration::from_secs(30);

/// How many CNI plugins and container starts run at once: more only wait for each other's CPU.
pub(crate) const POD_STARTS_MAX: usize = 4;

/// How long a container may run on after SIGTERM. The real kubelet gives 30 s by default; what runs
/// in a lab has nothing to save.
pub(crate) const TERMINATION_TIME_MAX: Duration = Duration::from_millis(500);

/// How long a CNI plugin may take.
pub(crate) const CNI_TIME_MAX: Duration = Duration::from_secs(30);

/// How often a command's ports are looked at until it listens on all of them.
pub(crate) const READINESS_PERIOD: Duration = Duration::from_millis(20);

/// How many connections the echo server answers at once; more are closed, so that clients try again.
pub(crate) const ECHO_CONNECTIONS_MAX: usize = 256;

/// The longest request head, line or datagram that the echo server reads.
pub(crate) const ECHO_MESSAGE_BYTES_MAX: usize = 16 << 10;

/// How long the echo server waits for the next byte of a connection.
pub(crate) const ECHO_IDLE_TIME_MAX: Duration = Duration::from_secs(30);

/// How long one attempt of a probe may take.
pub(crate) const PROBE_TIME_MAX: Duration = Duration::from_secs(2);

/// How much of a log is shown with an error.
pub(crate) const LOG_TAIL_LINES: usize = 12;
