//! The typed program: one tunnel, and the peers behind it.

use std::net::{IpAddr, SocketAddr};

use imbl::OrdMap;
use ipnet::IpNet;
use portolan_net::{Family, Origin, Port};
use serde::{Deserialize, Serialize};

/// What the forwarder must do, or was seen to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    /// The tunnel; without one nothing is forwarded.
    pub tunnel: Option<Tunnel>,
    /// Which prefix is behind which peer.
    pub routes: OrdMap<IpNet, Route>,
}

/// This node's end of all tunnels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// The name of the TUN device.
    pub device: String,
    /// The node's addresses on the underlay, at most one per family: datagrams come to them and leave from them.
    pub local: Vec<IpAddr>,
    /// The port, at this end and at the others'.
    pub port: Port,
    /// The largest packet that is carried, in bytes: the MTU of the device.
    pub mtu: u32,
    /// What caused it.
    pub origin: Origin,
}

impl Tunnel {
    /// The address of a family.
    pub fn local(&self, family: Family) -> Option<IpAddr> {
        self.local.iter().copied().find(|address| Family::of(*address) == family)
    }
}

/// The way to a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The address and port that datagrams for the prefix go to. Datagrams from there are accepted.
    pub peer: SocketAddr,
    /// The object that says so.
    pub origin: Origin,
}
