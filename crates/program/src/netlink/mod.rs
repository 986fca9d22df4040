//! Links, addresses, routes, neighbours, forwarding entries, pod interfaces and sysctls.
//!
//! ```text
//!  FabricIntent ─▶ fabric/{vxlan,ipip,…} ──┐
//!  WiringIntent ─▶ compile ────────────────┴▶ Program ─▶ diff(observed) ─▶ Vec<Change>
//!                                             ├▶ render: what `ip` and `bridge` would print
//!                                             └▶ interpret: where the kernel would send a packet
//! ```
//!
//! Needs Linux 5.18 or later (addresses with a protocol). It owns: links whose alias starts with
//! [`LINK_ALIAS_PREFIX`](crate::layout::LINK_ALIAS_PREFIX) and all that hangs on them, routes and
//! addresses with [`ROUTE_PROTOCOL`](crate::layout::ROUTE_PROTOCOL). Everything else is
//! [`Surroundings`]: read, reckoned with, and left alone.

mod change;
mod compile;
mod diff;
pub mod fabric;
mod interpret;
mod program;
mod render;
mod surroundings;

#[cfg(test)]
mod tests;

pub use change::{Change, Phase};
pub use compile::{bridge_mac, compile, compile_pods};
pub use diff::diff;
pub use interpret::{RouteDecision, Unreachable, ViaKind, route};
pub use portolan_state::AttachmentKey;
pub use program::{
    Address, Forwarding, Link, LinkKind, Neighbour, PodLink, Program, Route, Sysctl, pod_alias, pod_of_alias,
};
pub use render::render;
pub use surroundings::{ForeignLink, ForeignRoute, Surroundings};
