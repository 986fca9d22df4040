//! From the fabric's intent to the program.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use portolan_intent::fabric::FabricIntent;
use portolan_net::{Family, Origin, Port};

use super::{Program, Route, Tunnel};

/// The port that Flannel uses unless it is told otherwise.
pub const FLANNEL_PORT: u16 = 8285;

/// What the configuration says of this backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The name of the TUN device.
    pub device: String,
    /// The port of all nodes (`Backend.Port`).
    pub port: Port,
    /// MTU of the underlay link, in bytes.
    pub underlay_mtu: u32,
}

/// The program, from nothing. It costs one entry per peer's prefix.
///
/// A peer whose underlay address is of a family that this node has no address of cannot be reached, and has no route.
pub fn compile(fabric: &FabricIntent, settings: &Settings) -> Program {
    let first = |family: Family| fabric.local_addresses.iter().copied().find(|it| Family::of(*it) == family);
    let local: Vec<_> = Family::ALL.into_iter().filter_map(first).collect();
    if local.is_empty() {
        return Program::default();
    }
    let has_v6 = local.iter().any(IpAddr::is_ipv6);
    let tunnel = Tunnel {
        device: settings.device.clone(),
        port: settings.port,
        mtu: tunnel_mtu(settings.underlay_mtu, has_v6),
        origin: Origin::configuration("fabric"),
        local,
    };
    let is_reachable = |peer: SocketAddr| tunnel.local(Family::of(peer.ip())).is_some();
    let routes = fabric.peers.iter().filter_map(|(prefix, peer)| {
        let route = Route { peer: SocketAddr::new(peer.address, settings.port.get()), origin: peer.origin.clone() };
        is_reachable(route.peer).then(|| (IpNet::trunc(prefix), route))
    });
    Program { routes: routes.collect(), tunnel: Some(tunnel) }
}

/// The MTU of the tunnel: the underlay's, less an IP header and a UDP header of 8 bytes (RFC 768). IPv4's header has
/// 20 bytes, as Flannel assumes, and IPv6's 40. One device carries both, so that the larger counts.
pub fn tunnel_mtu(underlay_mtu: u32, underlay_is_ipv6_too: bool) -> u32 {
    underlay_mtu.saturating_sub(if underlay_is_ipv6_too { 48 } else { 28 })
}
