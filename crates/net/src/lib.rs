//! The vocabulary that every other crate speaks: addresses, ports, marks, names, origins, packets.
//!
//! It promises plain values without behaviour of their own: nothing here reads a clock, a file or a
//! socket. Addresses are always dual-family; four bytes alone appear only where a wire format has
//! only four. It does not know Kubernetes, the kernel, or any mode.

#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod address;
mod frame;
mod name;
mod origin;
mod packet;

pub use address::{Family, InvalidMacAddress, InvalidPort, MacAddress, Port, Protocol, UnknownProtocol, Vni};
pub use frame::{Frame, FrameError, parse_ethernet, parse_ip};
pub use ipnet::{IpNet, Ipv4Net, Ipv6Net};
pub use name::{NodeName, ObjectKey};
pub use origin::{Cause, ObjectKind, Origin};
pub use packet::Packet;
