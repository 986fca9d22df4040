//! What lies around the data plane of Services: configuration as kube-proxy has it, health, metrics,
//! connection tracking.
//!
//! - [`document`] reads a `KubeProxyConfiguration` as it is, [`options`] says what it comes to here and which
//!   of its fields have no effect; [`fields`] knows those.
//! - [`attendant`] is what the loop sees: it is told of updates and cycles, and tells the others.
//! - [`health`] is the proxy's health, [`servers`] serve it and the metrics, [`service_health`] serves the
//!   ports that load balancers ask at; [`http`] bounds them all.
//! - [`conntrack`] judges UDP flows, [`conntrack_worker`] lists and cuts them; [`sysctls`] sets the table's
//!   size and timeouts.
//! - [`metrics`] are kube-proxy's names, [`board`] holds the problems of all these.
//!
//! It promises kube-proxy's names and answers, so that load balancers, dashboards and people need not learn
//! others. It does not program a single rule: the rooms do.

mod attendant;
mod board;
mod clock;
mod conntrack;
mod conntrack_worker;
mod document;
mod duration;
mod fields;
mod health;
mod http;
mod limits;
mod metrics;
mod options;
mod servers;
mod service_health;
mod sysctls;

pub use attendant::{Attendant, Synced};
pub use board::ProblemBoard;
pub use conntrack::{Judge, Tracker};
pub use conntrack_worker::{FlowTable, NodePortPlaces, reconcile};
pub use document::Document;
pub use health::{Now, ProxyHealth};
pub use metrics::ProxyMetrics;
pub use options::{ConntrackOptions, Note, ProxyOptions};
