//! The forwarder of the `udp` fabric: a TUN device on one side, UDP sockets on the other.
//!
//! The twin of `portolan_program::udp`. The kernel has no such tunnel, so that the forwarder is what it programs: an
//! immutable routing table that is swapped while packets pass.
//!
//! ```text
//!  kernel ─▶ TUN queue ─▶ outward ─▶ sendmmsg, UDP_SEGMENT ─▶ peer
//!                         segment, checksum, table, icmp
//!  kernel ◀─ TUN queue ◀─ inward  ◀─ recvmmsg, UDP_GRO     ◀─ peer
//!                         table, coalesce
//! ```
//!
//! - [`UdpRoom`]: observe, apply, count.
//! - `outward`, `inward`: the two threads of each queue; `forwarder` starts and stops them.
//! - `checksum`, `header`, `segment`, `coalesce`, `icmp`, `vnet`, `batch`, `table`: packets as bytes, and nothing else.
//! - `tun`, `socket`, `answer`: what speaks to the kernel.

mod answer;
mod batch;
mod checksum;
mod coalesce;
mod counters;
mod forwarder;
mod header;
mod icmp;
mod inward;
mod outward;
mod room;
mod segment;
mod socket;
mod table;
#[cfg(test)]
mod tests;
mod tun;
mod vnet;

pub use counters::Counters;
pub use room::{Report, UdpRoom};
