//! Messages: a header of sixteen bytes, a fixed header of the family, attributes.

use std::net::IpAddr;

use super::{Attributes, aligned};

/// `struct nlmsghdr`.
const HEADER_LENGTH: usize = 16;

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// Writes one message. The socket gives it its sequence number when it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MessageBuilder {
    bytes: Vec<u8>,
}

impl MessageBuilder {
    /// A message of a type, with flags (`NLM_F_…`).
    pub fn new(kind: u16, flags: u16) -> MessageBuilder {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend([0; 4]);
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        MessageBuilder { bytes }
    }

    /// Appends the family's fixed header.
    pub fn header(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Appends an attribute.
    pub fn put_bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.bytes.extend(attribute_length(4 + value.len()).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Appends an attribute without a value: its presence is its meaning.
    pub fn put_flag(&mut self, kind: u16) -> &mut Self {
        self.put_bytes(kind, &[])
    }

    /// Appends one byte.
    pub fn put_u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.put_bytes(kind, &[value])
    }

    /// Appends a number in the machine's byte order.
    pub fn put_u16(&mut self, kind: u16, value: u16) -> &mut Self {
        self.put_bytes(kind, &value.to_ne_bytes())
    }

    /// Appends a number in the machine's byte order.
    pub fn put_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put_bytes(kind, &value.to_ne_bytes())
    }

    /// Appends a number in network byte order.
    pub fn put_u16_be(&mut self, kind: u16, value: u16) -> &mut Self {
        self.put_bytes(kind, &value.to_be_bytes())
    }

    /// Appends a number in network byte order.
    pub fn put_u32_be(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put_bytes(kind, &value.to_be_bytes())
    }

    /// Appends a number in network byte order.
    pub fn put_u64_be(&mut self, kind: u16, value: u64) -> &mut Self {
        self.put_bytes(kind, &value.to_be_bytes())
    }

    /// Appends text with the NUL that the kernel wants at its end.
    pub fn put_str(&mut self, kind: u16, value: &str) -> &mut Self {
        self.bytes.extend(attribute_length(5 + value.len()).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.pad();
        self
    }

    /// Appends an address: four bytes or sixteen.
    pub fn put_address(&mut self, kind: u16, address: IpAddr) -> &mut Self {
        match address {
            IpAddr::V4(address) => self.put_bytes(kind, &address.octets()),
            IpAddr::V6(address) => self.put_bytes(kind, &address.octets()),
        }
    }

    /// Appends an attribute that holds attributes.
    ///
    /// An attribute holds at most 65,535 bytes. What is longer gets that length, which the kernel
    /// refuses: a caller with long lists splits them over messages.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut MessageBuilder)) -> &mut Self {
        self.wrapped(kind | NESTED, &[], fill)
    }

    /// As [`nested`](Self::nested), for the attributes that start with a fixed header, and for those old
    /// ones that go without the flag.
    pub fn wrapped(&mut self, kind: u16, header: &[u8], fill: impl FnOnce(&mut MessageBuilder)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        self.header(header);
        fill(self);
        let length = attribute_length(self.bytes.len() - start);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// How many bytes the message has so far.
    pub fn length(&self) -> usize {
        self.bytes.len()
    }

    /// The finished message.
    pub fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(aligned(self.bytes.len()), 0);
    }
}

fn attribute_length(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}

/// Gives a finished message its sequence number and more flags.
pub(super) fn stamp(message: &mut [u8], sequence: u32, flags: u16) {
    if let Some(field) = message.get_mut(6..8) {
        let flags = u16::from_ne_bytes([field[0], field[1]]) | flags;
        field.copy_from_slice(&flags.to_ne_bytes());
    }
    if let Some(field) = message.get_mut(8..12) {
        field.copy_from_slice(&sequence.to_ne_bytes());
    }
}

/// A message that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// The type.
    pub kind: u16,
    /// Flags (`NLM_F_…`).
    pub flags: u16,
    /// The sequence number of the request that it answers; 0 for notifications.
    pub sequence: u32,
    /// The port of the socket that it is for, or of the socket that caused a notification.
    pub port: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// The family's fixed header.
    pub fn header<const LENGTH: usize>(&self) -> Option<&'a [u8; LENGTH]> {
        self.payload.first_chunk()
    }

    /// The attributes after a fixed header of that many bytes.
    pub fn attributes(&self, header_length: usize) -> Attributes<'a> {
        Attributes::new(self.payload.get(aligned(header_length)..).unwrap_or_default())
    }

    /// A copy that outlives the buffer.
    pub fn to_owned(&self) -> OwnedMessage {
        OwnedMessage { kind: self.kind, flags: self.flags, payload: self.payload.to_vec() }
    }
}

/// A message that was received, with its own bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedMessage {
    /// The type.
    pub kind: u16,
    /// Flags (`NLM_F_…`).
    pub flags: u16,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl OwnedMessage {
    /// The family's fixed header.
    pub fn header<const LENGTH: usize>(&self) -> Option<&[u8; LENGTH]> {
        self.payload.first_chunk()
    }

    /// The attributes after a fixed header of that many bytes.
    pub fn attributes(&self, header_length: usize) -> Attributes<'_> {
        Attributes::new(self.payload.get(aligned(header_length)..).unwrap_or_default())
    }
}

/// The messages in a buffer. It ends at the first one that is no message.
#[derive(Debug, Clone)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    /// Reads messages from the first byte on.
    pub fn new(bytes: &'a [u8]) -> Messages<'a> {
        Messages { rest: bytes }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let header: &[u8; HEADER_LENGTH] = self.rest.first_chunk()?;
        let word = |offset: usize| {
            u32::from_ne_bytes([header[offset], header[offset + 1], header[offset + 2], header[offset + 3]])
        };
        let length = word(0) as usize;
        let Some(payload) = self.rest.get(HEADER_LENGTH..length) else {
            self.rest = &[];
            return None;
        };
        let message = Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: word(8),
            port: word(12),
            payload,
        };
        self.rest = self.rest.get(aligned(length)..).unwrap_or_default();
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for message in Messages::new(&bytes) {
                let _ = message.attributes(16).count();
                let _ = message.header::<16>();
            }
        }

        #[test]
        fn what_is_written_is_read(
            kind: u16,
            header in proptest::collection::vec(any::<u8>(), 0..30),
            attributes in proptest::collection::vec(
                (1u16..0x3fff, proptest::collection::vec(any::<u8>(), 0..40)), 0..10),
            text in "[a-z0-9.:/]{0,40}",
        ) {
            let mut builder = MessageBuilder::new(kind, 5);
            builder.header(&header);
            for (kind, value) in &attributes {
                builder.put_bytes(*kind, value);
            }
            builder.nested(1, |nested| {
                nested.put_str(2, &text).put_u16_be(3, 0x1234).put_u32(4, 99);
            });
            let mut bytes = builder.clone().finish();
            stamp(&mut bytes, 77, 4);
            bytes.extend(builder.finish());
            let messages: Vec<Message<'_>> = Messages::new(&bytes).collect();
            prop_assert_eq!(messages.len(), 2);
            prop_assert_eq!((messages[0].kind, messages[0].flags, messages[0].sequence), (kind, 5, 77));
            prop_assert_eq!(&messages[0].payload[..header.len()], &header[..]);
            let mut read: Vec<_> = messages[1].attributes(header.len()).collect();
            let nested = read.pop().unwrap();
            let read: Vec<_> = read.iter().map(|it| (it.kind, it.value.to_vec())).collect();
            prop_assert_eq!(read, attributes);
            prop_assert_eq!(nested.nested().get(2).and_then(|it| it.text()), Some(text.as_str()));
            prop_assert_eq!(nested.nested().get(3).and_then(|it| it.u16_be()), Some(0x1234));
            prop_assert_eq!(nested.nested().get(4).and_then(|it| it.u32()), Some(99));
        }
    }

    #[test]
    fn an_attribute_that_is_too_long_cannot_be_mistaken_for_a_shorter_one() {
        let mut builder = MessageBuilder::new(1, 0);
        builder.put_bytes(1, &vec![0; 70_000]);
        let bytes = builder.finish();
        assert_eq!(&bytes[16..18], &u16::MAX.to_ne_bytes());
    }
}
