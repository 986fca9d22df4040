//! The bounds of what is kept in memory.

/// The most owners of pod addresses on one node. An IPv6 /64 has more addresses than any memory; a
/// node with this many pods does not exist.
pub const OWNERS_MAX: usize = 1 << 16;
