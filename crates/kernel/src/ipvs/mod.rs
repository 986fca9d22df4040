//! Virtual servers and the dummy link in the kernel, over generic netlink and rtnetlink.
//!
//! The twin of `portolan_program::ipvs`: it observes and applies, and decides nothing.

mod room;
mod wire;

pub use room::{IpvsRoom, Report};
