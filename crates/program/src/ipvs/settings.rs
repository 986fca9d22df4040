//! What only this mode can be told, under the names of `KubeProxyConfiguration`'s field `ipvs`.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Scheduler, Timeouts};

/// The settings of the mode. Their defaults are kube-proxy's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpvsSettings {
    /// `scheduler`: how a real server is chosen.
    pub scheduler: Scheduler,
    /// `excludeCIDRs`: virtual servers at these addresses are others' and stay.
    pub exclude: Vec<IpNet>,
    /// `strictARP`: the node answers no ARP request for an address of `kube-ipvs0`, which load balancers that
    /// announce by ARP need.
    pub strict_arp: bool,
    /// `tcpTimeout`, `tcpFinTimeout`, `udpTimeout`; what is not given stays as it is.
    pub timeouts: Timeouts,
}
