//! Reading attributes: type, length, value (netlink(7), `struct nlattr`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portolan_net::MacAddress;

use super::aligned;

/// The bits of an attribute's type that are flags: nested, network byte order.
const TYPE_MASK: u16 = 0x3fff;

const HEADER_LENGTH: usize = 4;

/// One attribute of a message, or of another attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// The type, without flags.
    pub kind: u16,
    /// The value, without padding.
    pub value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// The value as one byte.
    pub fn u8(&self) -> Option<u8> {
        self.value.first().copied()
    }

    /// The value as a number in the machine's byte order.
    pub fn u16(&self) -> Option<u16> {
        self.value.first_chunk().copied().map(u16::from_ne_bytes)
    }

    /// The value as a number in the machine's byte order.
    pub fn u32(&self) -> Option<u32> {
        self.value.first_chunk().copied().map(u32::from_ne_bytes)
    }

    /// The value as a number in network byte order.
    pub fn u16_be(&self) -> Option<u16> {
        self.value.first_chunk().copied().map(u16::from_be_bytes)
    }

    /// The value as a number in network byte order.
    pub fn u32_be(&self) -> Option<u32> {
        self.value.first_chunk().copied().map(u32::from_be_bytes)
    }

    /// The value as a number in network byte order.
    pub fn u64_be(&self) -> Option<u64> {
        self.value.first_chunk().copied().map(u64::from_be_bytes)
    }

    /// The value as text, up to its first NUL.
    pub fn text(&self) -> Option<&'a str> {
        let end = self.value.iter().position(|byte| *byte == 0).unwrap_or(self.value.len());
        std::str::from_utf8(self.value.get(..end)?).ok()
    }

    /// The value as an address: four bytes or sixteen.
    pub fn address(&self) -> Option<IpAddr> {
        if let Ok(octets) = <[u8; 4]>::try_from(self.value) {
            return Some(Ipv4Addr::from(octets).into());
        }
        <[u8; 16]>::try_from(self.value).ok().map(|octets| Ipv6Addr::from(octets).into())
    }

    /// The value as a hardware address.
    pub fn mac(&self) -> Option<MacAddress> {
        <[u8; 6]>::try_from(self.value).ok().map(MacAddress)
    }

    /// The attributes inside the value.
    pub fn nested(&self) -> Attributes<'a> {
        Attributes::new(self.value)
    }
}

/// The attributes in a stretch of bytes. It ends at the first one that is no attribute.
#[derive(Debug, Clone)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// Reads attributes from the first byte on.
    pub fn new(bytes: &'a [u8]) -> Attributes<'a> {
        Attributes { rest: bytes }
    }

    /// The first attribute of a type.
    pub fn get(&self, kind: u16) -> Option<Attribute<'a>> {
        self.clone().find(|attribute| attribute.kind == kind)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let header: &[u8; HEADER_LENGTH] = self.rest.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let Some(value) = self.rest.get(HEADER_LENGTH..length) else {
            self.rest = &[];
            return None;
        };
        // The last attribute may lack its padding.
        self.rest = self.rest.get(aligned(length)..).unwrap_or_default();
        Some(Attribute { kind, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn walk(attributes: Attributes<'_>, depth: u32) -> usize {
        attributes
            .map(|attribute| {
                let _ = (attribute.u8(), attribute.u16(), attribute.u32(), attribute.u64_be(), attribute.text());
                let _ = (attribute.address(), attribute.mac(), attribute.u16_be(), attribute.u32_be());
                1 + if depth == 0 { 0 } else { walk(attribute.nested(), depth - 1) }
            })
            .sum()
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            walk(Attributes::new(&bytes), 4);
        }

        #[test]
        fn small_lengths_are_read_or_refused(bytes in proptest::collection::vec(0u8..12, 0..300)) {
            walk(Attributes::new(&bytes), 4);
        }
    }

    #[test]
    fn a_length_shorter_than_the_header_ends_the_walk() {
        assert_eq!(Attributes::new(&[0, 0, 1, 0, 8, 0, 2, 0, 1, 2, 3, 4]).count(), 0);
    }
}
