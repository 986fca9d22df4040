//! Which of the rooms something is said of.

/// Some of the rooms. A full reading of one is no reason for the other's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rooms {
    pub(super) netlink: bool,
    pub(super) nftables: bool,
    /// The rooms that serve Services in another mode than nftables.
    pub(super) services: bool,
    /// Those of them that are quickly read.
    pub(super) quick: bool,
}

impl Rooms {
    pub(super) const NONE: Rooms = Rooms { netlink: false, nftables: false, services: false, quick: false };
    pub(super) const ALL: Rooms = Rooms { netlink: true, nftables: true, services: true, quick: true };
}
