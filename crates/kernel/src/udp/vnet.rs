//! The header before each packet of the TUN device (`struct virtio_net_hdr`, virtio 1.3 §5.1.6): how a packet of up
//! to 64 kB is to be divided, and whether its checksum is still to be completed.

/// Its length without the number of buffers, which TUN does not use.
pub(super) const LENGTH: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_TCP_V4: u8 = 1;
const GSO_TCP_V6: u8 = 4;
const GSO_UDP: u8 = 5;
/// The first segment has CWR (RFC 3168 §6.1.2).
const GSO_ECN: u8 = 0x80;

/// What is to be divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Tcp,
    Udp,
}

/// A read header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct VnetHeader {
    /// Where the checksummed part begins, and where in it the checksum is, if it is to be completed.
    pub(super) checksum: Option<(usize, usize)>,
    /// How to divide, and how many bytes of payload each part has.
    pub(super) segments: Option<(Kind, usize)>,
}

impl VnetHeader {
    /// Reads one. `None` if it asks for something that we did not offer.
    pub(super) fn decode(bytes: &[u8; LENGTH]) -> Option<VnetHeader> {
        let [flags, gso, _, _, size_low, size_high, start_low, start_high, offset_low, offset_high] = *bytes;
        let number = |low, high| usize::from(u16::from_ne_bytes([low, high]));
        let kind = match gso & !GSO_ECN {
            0 => None,
            GSO_TCP_V4 | GSO_TCP_V6 => Some(Kind::Tcp),
            GSO_UDP => Some(Kind::Udp),
            _ => return None,
        };
        let size = number(size_low, size_high);
        if kind.is_some() && size == 0 {
            return None;
        }
        let needs = flags & NEEDS_CHECKSUM != 0;
        Some(VnetHeader {
            checksum: needs.then(|| (number(start_low, start_high), number(offset_low, offset_high))),
            segments: kind.map(|kind| (kind, size)),
        })
    }

    /// The header of a packet that is to be divided again: `transport` is where its transport header begins, `header`
    /// where its payload does.
    pub(super) fn encode(kind: Kind, is_v6: bool, transport: usize, header: usize, size: usize) -> [u8; LENGTH] {
        let (gso, offset) = match (kind, is_v6) {
            (Kind::Tcp, false) => (GSO_TCP_V4, 16u16),
            (Kind::Tcp, true) => (GSO_TCP_V6, 16),
            (Kind::Udp, _) => (GSO_UDP, 6),
        };
        let mut bytes = [0; LENGTH];
        bytes[0] = NEEDS_CHECKSUM;
        bytes[1] = gso;
        bytes[2..4].copy_from_slice(&(header as u16).to_ne_bytes());
        bytes[4..6].copy_from_slice(&(size as u16).to_ne_bytes());
        bytes[6..8].copy_from_slice(&(transport as u16).to_ne_bytes());
        bytes[8..10].copy_from_slice(&offset.to_ne_bytes());
        bytes
    }
}

/// The header of a packet that is whole and has its checksum.
pub(super) const PLAIN: [u8; LENGTH] = [0; LENGTH];
