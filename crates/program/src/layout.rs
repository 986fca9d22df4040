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

/// The chains of kube-proxy's names that we make: the tables that hold each, and its name. They are ours on a
/// node where we serve, also those that a kube-proxy left there.
pub const IPTABLES_CHAINS: [(&[&str], &str); 15] = [
    (&["filter", "nat"], "KUBE-SERVICES"),
    (&["filter", "nat"], "KUBE-NODEPORTS"),
    (&["filter"], "KUBE-EXTERNAL-SERVICES"),
    (&["filter"], "KUBE-FORWARD"),
    (&["filter"], "KUBE-PROXY-FIREWALL"),
    (&["nat"], "KUBE-POSTROUTING"),
    (&["nat"], "KUBE-MARK-MASQ"),
    (&["filter", "nat", "mangle"], "KUBE-PROXY-CANARY"),
    // The kubelet has it too; where it holds what is not ours, it stays.
    (&["filter"], "KUBE-FIREWALL"),
    // The IPVS mode's.
    (&["nat"], "KUBE-LOAD-BALANCER"),
    (&["filter", "nat"], "KUBE-NODE-PORT"),
    (&["nat"], "KUBE-FIREWALL"),
    (&["filter"], "KUBE-SOURCE-RANGES-FIREWALL"),
    (&["filter"], "KUBE-IPVS-FILTER"),
    (&["filter"], "KUBE-IPVS-OUT-FILTER"),
];

/// What the names of chains of single Services and endpoints start with, all in the table `nat`. `KUBE-XLB-` is
/// what kube-proxy had before 1.24 where it has `KUBE-EXT-` and `KUBE-SVL-` now.
pub const IPTABLES_CHAIN_PREFIXES: [&str; 6] =
    ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-XLB-"];

/// Whether a chain of iptables is ours, by the names of its table and itself.
pub fn is_our_chain(table: &str, chain: &str) -> bool {
    IPTABLES_CHAINS.iter().any(|(tables, name)| *name == chain && tables.contains(&table))
        || table == "nat" && IPTABLES_CHAIN_PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}
