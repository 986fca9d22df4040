//! Clusters on one machine.
//!
//! A node of a lab is a network namespace that runs the real agent; a pod is a namespace that the real
//! CNI plugin wired; routers, clients and servers outside the cluster are namespaces too. The lab is
//! the demo, the test bed and a teaching tool.
//!
//! - [`up`], [`down`], [`status`], [`exec`]: what users do.
//! - [`supervise`]: the process behind a lab. [`kubelet`]: makes pods.
//! - [`topology`]: nodes, clients and the network between them.
//! - [`manifest`]: what users want to run.
//! - [`demo`]: brings up a lab and proves every way that a packet can take.
//! - [`pause`], [`echo`], [`inside`], [`knock`], [`probe`]: small processes that run in namespaces.
//!
//! The crate starts the built binary for everything that runs in a namespace, so nothing here needs
//! unsafe code between fork and exec. It depends on the agent only through files and sockets.

pub mod client;
pub mod demo;
pub mod description;
pub mod echo;
pub mod inside;
pub mod knock;
pub mod kubelet;
pub mod manifest;
pub mod pause;
pub mod probe;
pub mod target;
pub mod topology;

mod access;
mod balancer;
mod checks;
mod clock;
mod control_plane;
mod down;
mod error;
mod execute;
mod interrupt;
mod layout;
mod limits;
mod report;
mod standing;
mod status;
mod supervise;
mod up;
mod wait;

pub use access::{agent_sockets, in_client, names};
pub use description::IpFamilies;
pub use down::down;
pub use error::{LabError, Result};
pub use execute::exec;
pub use layout::{DEFAULT_NAME, DIRECTORY_VARIABLE, Layout};
pub use status::{MemberStatus, PodStatus, Status, status};
pub use supervise::supervise;
pub use up::{FABRICS, SERVICES, UpOptions, up};
