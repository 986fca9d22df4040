//! The typed program: sets and their entries.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use portolan_net::{Family, Origin, Port, Protocol};
use serde::{Deserialize, Serialize};

use crate::layout::IpSetName;

/// What our sets must hold, or what they were seen to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    /// The sets.
    pub sets: BTreeMap<SetKey, IpSet>,
}

/// Which set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SetKey {
    /// The family of its addresses. Sets of ports alone have one for each family too.
    pub family: Family,
    /// Which one.
    pub name: IpSetName,
}

impl fmt::Display for SetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name.name(self.family))
    }
}

/// A set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpSet {
    /// What its entries are.
    pub kind: SetKind,
    /// The entries, each with what caused it. The kernel does not hold the cause.
    pub entries: OrdMap<Entry, Option<Origin>>,
}

/// What the entries of a set are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SetKind {
    /// `hash:ip`.
    HashIp,
    /// `hash:ip,port`.
    HashIpPort,
    /// `hash:ip,port,ip`.
    HashIpPortIp,
    /// `hash:ip,port,net`.
    HashIpPortNet,
    /// `bitmap:port`, of all ports.
    BitmapPort,
    /// Something that this room does not use. It is only ever observed.
    Other(Arc<str>),
}

impl SetKind {
    /// Those that this room uses.
    pub const ALL: [SetKind; 5] =
        [SetKind::HashIp, SetKind::HashIpPort, SetKind::HashIpPortIp, SetKind::HashIpPortNet, SetKind::BitmapPort];

    /// The name, as `ipset` and the kernel have it.
    pub fn name(&self) -> &str {
        match self {
            SetKind::HashIp => "hash:ip",
            SetKind::HashIpPort => "hash:ip,port",
            SetKind::HashIpPortIp => "hash:ip,port,ip",
            SetKind::HashIpPortNet => "hash:ip,port,net",
            SetKind::BitmapPort => "bitmap:port",
            SetKind::Other(name) => name,
        }
    }

    /// The kind that the kernel calls so.
    pub fn observed(name: &str) -> SetKind {
        SetKind::ALL.into_iter().find(|it| it.name() == name).unwrap_or_else(|| SetKind::Other(name.into()))
    }
}

/// What the entries of one of our sets are.
pub fn kind_of(name: IpSetName) -> SetKind {
    match name {
        IpSetName::IpvsIps => SetKind::HashIp,
        IpSetName::LoopBack | IpSetName::LoadBalancerSourceIp => SetKind::HashIpPortIp,
        IpSetName::LoadBalancerSourceCidr => SetKind::HashIpPortNet,
        IpSetName::NodePortTcp
        | IpSetName::NodePortLocalTcp
        | IpSetName::NodePortUdp
        | IpSetName::NodePortLocalUdp
        | IpSetName::HealthCheckNodePort => SetKind::BitmapPort,
        IpSetName::ClusterIp
        | IpSetName::ExternalIp
        | IpSetName::ExternalIpLocal
        | IpSetName::LoadBalancer
        | IpSetName::LoadBalancerLocal
        | IpSetName::LoadBalancerFw
        | IpSetName::NodePortSctp
        | IpSetName::NodePortLocalSctp
        | IpSetName::NoLocal
        | IpSetName::NoLocalOutside => SetKind::HashIpPort,
    }
}

/// An entry of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Entry {
    /// An address.
    Ip(IpAddr),
    /// Address, protocol and port.
    IpPort(IpAddr, Protocol, Port),
    /// Address, protocol, port, and another address.
    IpPortIp(IpAddr, Protocol, Port, IpAddr),
    /// Address, protocol, port, and a prefix that is not empty.
    IpPortNet(IpAddr, Protocol, Port, IpNet),
    /// A port, of any protocol.
    Port(Port),
}
