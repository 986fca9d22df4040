//! What the rooms share: marks, priorities, names, numbers.
//!
//! This file is also the contract with other software on the node: whatever is named here is ours,
//! and other programs must neither use nor change it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use portolan_intent::services::NodePortAddresses;
use portolan_net::Family;
use serde::{Deserialize, Serialize};

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

/// The TUN device of the `udp` fabric: what Flannel's `flannel%d` is on a node with one network.
pub const UDP_DEVICE: &str = "flannel0";

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
    (&["filter", "mangle"], "KUBE-SOURCE-RANGES-FIREWALL"),
    (&["filter"], "KUBE-IPVS-FILTER"),
    (&["filter", "mangle"], "KUBE-IPVS-OUT-FILTER"),
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

/// The sets of the IPVS mode, which its chains look packets up in. Their names are kube-proxy's, but for the last
/// two, which kube-proxy does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IpSetName {
    /// Endpoints of this node, each as its own client.
    LoopBack,
    /// Cluster addresses and ports.
    ClusterIp,
    /// External addresses and ports.
    ExternalIp,
    /// Those whose traffic stays on the node that it came to.
    ExternalIpLocal,
    /// Addresses and ports of load balancers.
    LoadBalancer,
    /// Those whose traffic stays on the node that it came to.
    LoadBalancerLocal,
    /// Those that not everyone may connect to.
    LoadBalancerFw,
    /// Addresses that may connect to them.
    LoadBalancerSourceIp,
    /// Prefixes that may connect to them.
    LoadBalancerSourceCidr,
    /// Node ports of TCP.
    NodePortTcp,
    /// Those whose traffic stays on the node that it came to.
    NodePortLocalTcp,
    /// Node ports of UDP.
    NodePortUdp,
    /// Those whose traffic stays on the node that it came to.
    NodePortLocalUdp,
    /// Node ports of SCTP, with the node's addresses.
    NodePortSctp,
    /// Those whose traffic stays on the node that it came to.
    NodePortLocalSctp,
    /// Ports where load balancers ask how this node is.
    HealthCheckNodePort,
    /// The addresses of the dummy link.
    IpvsIps,
    /// Where nobody is served, since no endpoint is of this node.
    NoLocal,
    /// Where nobody from outside is served, since no endpoint is of this node.
    NoLocalOutside,
}

impl IpSetName {
    /// All of them.
    pub const ALL: [IpSetName; 19] = [
        IpSetName::LoopBack,
        IpSetName::ClusterIp,
        IpSetName::ExternalIp,
        IpSetName::ExternalIpLocal,
        IpSetName::LoadBalancer,
        IpSetName::LoadBalancerLocal,
        IpSetName::LoadBalancerFw,
        IpSetName::LoadBalancerSourceIp,
        IpSetName::LoadBalancerSourceCidr,
        IpSetName::NodePortTcp,
        IpSetName::NodePortLocalTcp,
        IpSetName::NodePortUdp,
        IpSetName::NodePortLocalUdp,
        IpSetName::NodePortSctp,
        IpSetName::NodePortLocalSctp,
        IpSetName::HealthCheckNodePort,
        IpSetName::IpvsIps,
        IpSetName::NoLocal,
        IpSetName::NoLocalOutside,
    ];

    /// The name in the kernel. Those of IPv6 are kube-proxy's too, cut where they are too long for the kernel.
    pub fn name(self, family: Family) -> &'static str {
        let is_v4 = family == Family::V4;
        let names = match self {
            IpSetName::LoopBack => ["KUBE-LOOP-BACK", "KUBE-6-LOOP-BACK"],
            IpSetName::ClusterIp => ["KUBE-CLUSTER-IP", "KUBE-6-CLUSTER-IP"],
            IpSetName::ExternalIp => ["KUBE-EXTERNAL-IP", "KUBE-6-EXTERNAL-IP"],
            IpSetName::ExternalIpLocal => ["KUBE-EXTERNAL-IP-LOCAL", "KUBE-6-EXTERNAL-IP-LOCAL"],
            IpSetName::LoadBalancer => ["KUBE-LOAD-BALANCER", "KUBE-6-LOAD-BALANCER"],
            IpSetName::LoadBalancerLocal => ["KUBE-LOAD-BALANCER-LOCAL", "KUBE-6-LOAD-BALANCER-LOCAL"],
            IpSetName::LoadBalancerFw => ["KUBE-LOAD-BALANCER-FW", "KUBE-6-LOAD-BALANCER-FW"],
            IpSetName::LoadBalancerSourceIp => ["KUBE-LOAD-BALANCER-SOURCE-IP", "KUBE-6-LOAD-BALANCER-SOURCE-IP"],
            IpSetName::LoadBalancerSourceCidr => ["KUBE-LOAD-BALANCER-SOURCE-CIDR", "KUBE-6-LOAD-BALANCER-SOURCE-CID"],
            IpSetName::NodePortTcp => ["KUBE-NODE-PORT-TCP", "KUBE-6-NODE-PORT-TCP"],
            IpSetName::NodePortLocalTcp => ["KUBE-NODE-PORT-LOCAL-TCP", "KUBE-6-NODE-PORT-LOCAL-TCP"],
            IpSetName::NodePortUdp => ["KUBE-NODE-PORT-UDP", "KUBE-6-NODE-PORT-UDP"],
            IpSetName::NodePortLocalUdp => ["KUBE-NODE-PORT-LOCAL-UDP", "KUBE-6-NODE-PORT-LOCAL-UDP"],
            IpSetName::NodePortSctp => ["KUBE-NODE-PORT-SCTP-HASH", "KUBE-6-NODE-PORT-SCTP-HASH"],
            IpSetName::NodePortLocalSctp => ["KUBE-NODE-PORT-LOCAL-SCTP-HASH", "KUBE-6-NODE-PORT-LOCAL-SCTP-HAS"],
            IpSetName::HealthCheckNodePort => ["KUBE-HEALTH-CHECK-NODE-PORT", "KUBE-6-HEALTH-CHECK-NODE-PORT"],
            IpSetName::IpvsIps => ["KUBE-IPVS-IPS", "KUBE-6-IPVS-IPS"],
            IpSetName::NoLocal => ["KUBE-NO-LOCAL", "KUBE-6-NO-LOCAL"],
            IpSetName::NoLocalOutside => ["KUBE-NO-LOCAL-OUTSIDE", "KUBE-6-NO-LOCAL-OUTSIDE"],
        };
        if is_v4 { names[0] } else { names[1] }
    }

    /// The set of this name, and its family.
    pub fn from_name(name: &str) -> Option<(IpSetName, Family)> {
        let all = Family::ALL.into_iter().flat_map(|family| IpSetName::ALL.map(|it| (it, family)));
        all.into_iter().find(|(it, family)| it.name(*family) == name)
    }
}

/// At which of a node's addresses node ports answer: those that are asked for, without those that nobody else can
/// connect to.
pub fn node_port_addresses(addresses: &[IpAddr], which: &NodePortAddresses) -> BTreeSet<IpAddr> {
    let is_only_here = |address: IpAddr| {
        let is_link_local = match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        address.is_loopback() || is_link_local
    };
    let usable = || addresses.iter().copied().filter(|address| !is_only_here(*address));
    match which {
        NodePortAddresses::All => usable().collect(),
        NodePortAddresses::Primary => {
            let first = |family: Family| usable().find(|address| Family::of(*address) == family);
            Family::ALL.into_iter().filter_map(first).collect()
        }
        NodePortAddresses::Within(prefixes) => {
            usable().filter(|address| prefixes.iter().any(|prefix| prefix.contains(address))).collect()
        }
    }
}
