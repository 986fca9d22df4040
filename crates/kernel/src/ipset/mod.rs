//! Sets of addresses and ports in the kernel, over nfnetlink.
//!
//! The twin of `portolan_program::ipset`: it observes and applies, and decides nothing.

mod room;
mod wire;

pub use room::{IpsetRoom, Report};
