//! Flannel's leases: which node has which subnet, in the keys and values that flanneld writes and reads.
//!
//! ```text
//!   <prefix>/config                            the network           config, backend
//!   <prefix>/subnets/10.5.34.0-24              one node's subnet     key, attributes
//!   <prefix>/portolan/claims/10.5.34.0-24      whose it is           layout
//!
//!   View (one snapshot) ──▶ decide ──▶ transaction ──▶ store          acquire
//!   snapshot, events ──▶ Table ──▶ changes, problems                  table
//! ```
//!
//! All of it is pure: time and randomness are arguments, and the store is somebody else's. What talks
//! to a store is [`crate::io::flannel`]. Nothing here reads Kubernetes objects; their annotations carry
//! the same values as a lease.

mod acquire;
mod attributes;
mod backend;
mod config;
mod environment;
mod json;
mod key;
mod layout;
mod table;

pub use acquire::{Decision, Deletion, Me, Refusal, SharedAddress, Standing, Take, TakeReason, decide, stand};
pub use attributes::{Attributes, AttributesError, Tunnel, VxlanData, WireguardData};
pub use backend::{Backend, BackendKind, Extension, PresharedKey, Vxlan, Wireguard, WireguardMode};
pub use config::{ConfigError, ConfigNote, NetworkConfig, NetworkSource, ParsedConfig, Pool, parse_network_config};
pub use environment::{Environment, EnvironmentError, EnvironmentNetwork};
pub use key::{KeyError, Subnet};
pub use layout::{Claim, Claimant, DEFAULT_PREFIX, Layout, Record, View};
pub use table::{Change, Lease, LeaseProblem, Table};
