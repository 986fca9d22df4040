//! Flannel's `udp` backend: bare IP packets in UDP, forwarded by this process through a TUN device.
//!
//! The wire format is Flannel's to the letter, which is none at all: the payload of a datagram to port 8285 is an IP
//! packet. What Flannel's forwarder lacks is here: IPv6 inside and outside, ICMP answers where a packet cannot go on,
//! a check of who sends, and speed.
//!
//! The kernel minimum is TUN (`CONFIG_TUN`). Segmentation offloads of TUN and of UDP sockets (Linux 4.18, 5.0 and 6.2)
//! are used where they are. It owns the forwarder and the existence of the TUN device; the device's MTU, addresses and
//! routes belong to the room `netlink`.
//!
//! - [`program`]: the typed program. [`compile`]: from intent.
//! - [`diff`]: what to change in the forwarder. [`render`]: text for people.
//! - [`interpret`]: what becomes of a packet, and of a datagram.

mod compile;
mod diff;
mod interpret;
mod program;
mod render;
#[cfg(test)]
mod tests;

pub use compile::{FLANNEL_PORT, Settings, compile, tunnel_mtu};
pub use diff::{Change, diff};
pub use interpret::{Answer, DropReason, Inward, Outward, inward, outward};
pub use program::{Program, Route, Tunnel};
pub use render::{render, render_change};
