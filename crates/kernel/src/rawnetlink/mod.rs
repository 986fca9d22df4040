//! Netlink (RFC 3549, netlink(7)) as bytes on a socket: messages, attributes, requests, dumps, batches.
//!
//! - [`Socket`] sends requests and collects the kernel's answers. It is synchronous: the kernel handles
//!   a request inside `send`, so that all answers to a batch are there when `send` returns.
//! - [`MessageBuilder`] writes a message. [`Messages`] and [`Attributes`] read them, and never panic,
//!   whatever the bytes.
//!
//! It knows no message type of any family; `netlink` and `nftables` do.

mod attribute;
mod message;
mod socket;

pub use attribute::{Attribute, Attributes};
pub use message::{Message, MessageBuilder, Messages, OwnedMessage};
pub use socket::{DumpPart, Protocol, Socket};

/// Every message and attribute starts at a multiple of four bytes (`NLMSG_ALIGNTO`, `NLA_ALIGNTO`).
const ALIGNMENT: usize = 4;

fn aligned(length: usize) -> usize {
    length.div_ceil(ALIGNMENT) * ALIGNMENT
}
