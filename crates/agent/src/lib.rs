//! The long-running roles, each one loop: the node's agent, and the cluster's DNS server.
//!
//! - [`node`]: keeps one node's kernel as the cluster wants it, and answers CNI calls.
//! - [`dns`]: the cluster's tables to the DNS server.
//! - [`attachments`], [`cni_socket`]: the records of pod interfaces, and the plugin's way in.
//! - [`client`], [`api`], [`table`]: what the command line asks an agent, and how.
//! - [`config`], [`fabric_config`]: one YAML file per role.
//! - [`proxy`]: what lies around the data plane of Services, as kube-proxy has it.
//!
//! Effects start here: tasks, threads, sockets and time. What is decided, is decided in pure crates.

pub mod api;
pub mod attachments;
pub mod client;
pub mod cni_socket;
pub mod config;
pub mod dns;
pub mod fabric_config;
pub mod metrics;
pub mod node;
pub mod probe;
pub mod proxy;
pub mod table;

mod admin_socket;
mod dns_administration;
mod limits;
mod publish;

pub use admin_socket::SocketError;
pub use config::AgentConfig;
