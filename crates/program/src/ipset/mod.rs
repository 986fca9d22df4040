//! Sets of addresses and ports, which the chains of the IPVS mode look packets up in.
//!
//! They are kube-proxy's, name by name and type by type ([`IpSetName`](crate::layout::IpSetName)), so that the number
//! of chains and rules does not depend on the number of Services. It needs `ip_set` and its types; it owns the sets
//! of these names, and no other.
//!
//! - [`program`]: the typed program. [`compile`]: from intent, incrementally or from nothing.
//! - [`diff`]: what to change in the kernel. [`render`]: the text of `ipset save`.
//! - [`interpret`]: whether a packet is in a set.

mod compile;
mod diff;
mod interpret;
mod program;
mod render;
#[cfg(test)]
mod tests;

pub use compile::{Compiler, compile};
pub use diff::{Change, Phase, diff};
pub use interpret::{End, contains};
pub use program::{Entry, IpSet, Program, SetKey, SetKind, kind_of};
pub use render::{render, render_change, render_entry};
