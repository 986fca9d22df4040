//! What the rooms share: marks, priorities, names, numbers.
//!
//! This file is also the contract with other software on the node: whatever is named here is ours,
//! and other programs must neither use nor change it.

/// The mark bit of packets that leave with the node's own address: kube-proxy's `masqueradeBit` 14.
///
/// The bit means the same to kube-proxy, to Flannel's rules and to us, so that a packet is never
/// masqueraded twice where they meet.
pub const MASQUERADE_MARK: u32 = 0x4000;

/// The `proto` of our routes, as `ip route` prints it: how they are recognised as ours after a
/// restart. Chosen from the range that rtnetlink(7) leaves to user space and iproute2 does not name.
pub const ROUTE_PROTOCOL: u8 = 144;

/// The table that holds Services, one per family (`ip` and `ip6`).
pub const SERVICES_TABLE: &str = "portolan-services";

/// The table that holds the masquerading of pod traffic, one per family (`ip` and `ip6`).
pub const MASQUERADE_TABLE: &str = "portolan-masquerade";

/// Priority of destination NAT, as nftables' `dstnat`.
pub const PRIORITY_DESTINATION_NAT: i32 = -100;

/// Priority of source NAT, as nftables' `srcnat`.
pub const PRIORITY_SOURCE_NAT: i32 = 100;

/// Priority of filter chains, as nftables' `filter`.
pub const PRIORITY_FILTER: i32 = 0;

/// What the names of the node's ends of pod interfaces start with, as the `bridge` plugin's.
pub const POD_LINK_PREFIX: &str = "veth";

/// What the alias (`ip link … alias`) of each link that we made starts with: how links are recognised
/// as ours after a restart.
pub const LINK_ALIAS_PREFIX: &str = "portolan:";
