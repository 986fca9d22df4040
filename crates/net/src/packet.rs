//! A packet as the interpreters and the tracer see it: the fields that decide its way.

use alloc::string::{String, ToString};
use core::fmt;
use core::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{Family, Protocol};

/// The header fields that decide a packet's way, and the mark that rules give it on one node.
///
/// For ICMP echo, both ports hold the identifier, as in the kernel's connection tracking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// The firewall mark; it never leaves a node.
    #[serde(default)]
    pub mark: u32,
}

impl Packet {
    /// The family of the packet.
    pub fn family(&self) -> Family {
        Family::of(self.destination)
    }

    /// The packet that answers this one.
    #[must_use]
    pub fn reply(&self) -> Packet {
        Packet {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            mark: 0,
            ..*self
        }
    }

    fn end(&self, address: IpAddr, port: u16) -> String {
        if self.protocol.has_ports() { SocketAddr::new(address, port).to_string() } else { address.to_string() }
    }

    /// The source as `address:port`, or the address alone for ICMP.
    pub fn source_text(&self) -> String {
        self.end(self.source, self.source_port)
    }

    /// The destination as `address:port`, or the address alone for ICMP.
    pub fn destination_text(&self) -> String {
        self.end(self.destination, self.destination_port)
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}", self.source_text(), self.destination_text())
    }
}
