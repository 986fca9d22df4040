//! What this node must do, free of any mode: `state` in, intent out.
//!
//! - [`services`]: which address and port stands for which endpoints.
//! - [`fabric`]: which other nodes hold which pod prefixes, and how they are reached.
//! - [`wiring`]: the pod interfaces on this node.
//! - [`masquerade`]: which traffic leaves with the node's own address.
//! - [`names`]: what the cluster's DNS names stand for.
//!
//! Every part is a pure function of a [`Snapshot`](portolan_state::Snapshot), the node's
//! [`NodeView`] and nothing else. Parts are sorted, and equal for equal states whatever the order of
//! events. [`services`] is also computed incrementally, since it alone grows with the cluster's
//! endpoints; the result is always equal to computing it from nothing.

pub mod fabric;
pub mod masquerade;
pub mod names;
pub mod services;
pub mod wiring;

mod modes;
mod view;

pub use modes::{
    Encapsulation, FabricMode, FabricSettings, HostGwSettings, IpipSettings, Segment, ViewError, VxlanSettings,
};
pub use view::NodeView;
