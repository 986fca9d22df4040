//! Families, protocols, ports and hardware addresses.

use alloc::borrow::ToOwned;
use alloc::string::{String, ToString};
use core::fmt;
use core::net::IpAddr;
use core::num::NonZeroU16;
use core::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// An IP family. Every compile step takes it as data, so dual stack is never a second code path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, in the order in which they are printed.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Family {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The family of a prefix.
    pub fn of_prefix(prefix: &IpNet) -> Family {
        Family::of(prefix.addr())
    }

    /// The length of an address in bits.
    pub fn bits(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// A transport protocol, or ICMP of either family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 9260.
    Sctp,
    /// RFC 792 for IPv4, RFC 4443 for IPv6; the family of the packet decides.
    Icmp,
}

impl Protocol {
    /// The number in the IP header (IANA "Assigned Internet Protocol Numbers").
    pub fn number(self, family: Family) -> u8 {
        match (self, family) {
            (Protocol::Tcp, _) => 6,
            (Protocol::Udp, _) => 17,
            (Protocol::Sctp, _) => 132,
            (Protocol::Icmp, Family::V4) => 1,
            (Protocol::Icmp, Family::V6) => 58,
        }
    }

    /// The protocol with this number, if we know it.
    pub fn from_number(number: u8) -> Option<Protocol> {
        match number {
            6 => Some(Protocol::Tcp),
            17 => Some(Protocol::Udp),
            132 => Some(Protocol::Sctp),
            1 | 58 => Some(Protocol::Icmp),
            _ => None,
        }
    }

    /// Whether the protocol has ports.
    pub fn has_ports(self) -> bool {
        self != Protocol::Icmp
    }

    /// The lower-case name, as `nft` and `iptables` print it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
            Protocol::Icmp => "icmp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A protocol name that is none of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a protocol that is known here: TCP, UDP, SCTP or ICMP")]
pub struct UnknownProtocol(pub String);

impl FromStr for Protocol {
    type Err = UnknownProtocol;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Protocol::Tcp),
            "udp" => Ok(Protocol::Udp),
            "sctp" => Ok(Protocol::Sctp),
            "icmp" | "icmpv6" => Ok(Protocol::Icmp),
            _ => Err(UnknownProtocol(text.to_owned())),
        }
    }
}

/// A transport port, 1 to 65535. Port 0 is never a destination, so it cannot be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Port(NonZeroU16);

/// Port 0, or a number above 65535.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a port: 1 to 65535")]
pub struct InvalidPort(pub i64);

impl Port {
    /// The port as a number.
    pub fn get(self) -> u16 {
        self.0.get()
    }
}

impl TryFrom<u16> for Port {
    type Error = InvalidPort;

    fn try_from(value: u16) -> Result<Self, Self::Error> {
        NonZeroU16::new(value).map(Port).ok_or(InvalidPort(value.into()))
    }
}

impl TryFrom<i32> for Port {
    type Error = InvalidPort;

    fn try_from(value: i32) -> Result<Self, Self::Error> {
        u16::try_from(value).map_err(|_| InvalidPort(value.into())).and_then(Port::try_from)
    }
}

impl From<Port> for u16 {
    fn from(port: Port) -> u16 {
        port.get()
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An IEEE 802 MAC address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

/// A text that is not six pairs of hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a MAC address: six pairs of hexadecimal digits with colons between")]
pub struct InvalidMacAddress(pub String);

impl MacAddress {
    /// A locally administered unicast address made of five bytes that the caller derives from
    /// something stable, so the same thing has the same address after a restart.
    pub fn local(bytes: [u8; 5]) -> MacAddress {
        MacAddress([0x02, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        write!(f, "{:02x}:{:02x}:{:02x}", bytes[0], bytes[1], bytes[2])?;
        write!(f, ":{:02x}:{:02x}:{:02x}", bytes[3], bytes[4], bytes[5])
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddress {
    type Err = InvalidMacAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidMacAddress(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(invalid)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() {
            return Err(invalid());
        }
        Ok(MacAddress(bytes))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = InvalidMacAddress;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

/// A VXLAN network identifier: 24 bits (RFC 7348 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Vni(u32);

impl Vni {
    /// Flannel's default.
    pub const ONE: Vni = Vni(1);

    /// The identifier, if it fits 24 bits.
    pub fn new(value: u32) -> Option<Vni> {
        (value < 1 << 24).then_some(Vni(value))
    }

    /// The identifier as a number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn mac_address_round_trips(bytes: [u8; 6]) {
            let mac = MacAddress(bytes);
            prop_assert_eq!(mac.to_string().parse::<MacAddress>(), Ok(mac));
        }

        #[test]
        fn mac_address_never_panics(text: String) {
            let _ = text.parse::<MacAddress>();
        }
    }

    #[test]
    fn port_zero_cannot_be_built() {
        assert_eq!(Port::try_from(0u16), Err(InvalidPort(0)));
        assert_eq!(Port::try_from(65_536i32), Err(InvalidPort(65_536)));
        assert_eq!(Port::try_from(-1i32), Err(InvalidPort(-1)));
        assert_eq!(Port::try_from(80i32).map(Port::get), Ok(80));
    }

    #[test]
    fn a_vni_has_24_bits() {
        assert!(Vni::new(1 << 24).is_none());
        assert_eq!(Vni::new(4096).map(Vni::get), Some(4096));
    }
}
