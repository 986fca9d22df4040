//! One step from what the kernel holds to what it must hold.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use portolan_net::{Family, MacAddress};
use serde::{Deserialize, Serialize};

use super::{Address, Forwarding, Link, LinkKind, Neighbour, PodLink, Route};
use crate::layout::ROUTE_PROTOCOL;

/// A step. As text it is the command that a person would type for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Remove a route of ours.
    RemoveRoute(Route),
    /// Remove a forwarding entry of a tunnel.
    RemoveForwarding(Forwarding),
    /// Remove a neighbour of a tunnel.
    RemoveNeighbour(Neighbour),
    /// Remove an address of ours.
    RemoveAddress(Address),
    /// Remove a pod's interface: both ends go.
    RemovePod(PodLink),
    /// Remove a link of ours.
    RemoveLink(Link),
    /// Make a link, or adopt one of that name that is the same but for what can be set.
    CreateLink(Link),
    /// Set a link's hardware address, MTU and alias, and bring it up.
    AdjustLink(Link),
    /// Set a sysctl.
    SetSysctl {
        /// Path below `/proc/sys`.
        path: String,
        /// The value.
        value: String,
    },
    /// Add an address.
    AddAddress(Address),
    /// Add or replace a neighbour of a tunnel.
    SetNeighbour(Neighbour),
    /// Add or replace a forwarding entry of a tunnel.
    SetForwarding(Forwarding),
    /// Add a route where there is none of that destination.
    AddRoute(Route),
    /// Put a route in the place of ours, or of an equal one of someone else.
    ReplaceRoute(Route),
    /// Make a pod's interface.
    CreatePod(PodLink),
    /// Set the node's end of a pod's interface: bridge, hairpin mode, MTU.
    AdjustPod(PodLink),
}

/// The order of steps: what depends on something comes after it, and goes before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Routes go first: nothing must be sent into what is being taken down.
    RemoveRoutes,
    /// Then what resolves their next hops.
    RemoveNeighbours,
    /// Then addresses.
    RemoveAddresses,
    /// Then pod interfaces and links.
    RemoveLinks,
    /// Links come first.
    CreateLinks,
    /// Then their settings.
    SetSysctls,
    /// Then addresses.
    AddAddresses,
    /// Then what resolves next hops.
    SetNeighbours,
    /// Then routes.
    SetRoutes,
    /// Then pod interfaces, which find everything ready.
    CreatePods,
}

impl Change {
    /// When it is done.
    pub fn phase(&self) -> Phase {
        match self {
            Change::RemoveRoute(_) => Phase::RemoveRoutes,
            Change::RemoveForwarding(_) | Change::RemoveNeighbour(_) => Phase::RemoveNeighbours,
            Change::RemoveAddress(_) => Phase::RemoveAddresses,
            Change::RemovePod(_) | Change::RemoveLink(_) => Phase::RemoveLinks,
            Change::CreateLink(_) | Change::AdjustLink(_) => Phase::CreateLinks,
            Change::SetSysctl { .. } => Phase::SetSysctls,
            Change::AddAddress(_) => Phase::AddAddresses,
            Change::SetNeighbour(_) | Change::SetForwarding(_) => Phase::SetNeighbours,
            Change::AddRoute(_) | Change::ReplaceRoute(_) => Phase::SetRoutes,
            Change::CreatePod(_) | Change::AdjustPod(_) => Phase::CreatePods,
        }
    }

    /// The link that must be there and ours for the step to be right.
    pub fn device(&self) -> Option<&str> {
        match self {
            Change::AddAddress(address) => Some(&address.device),
            Change::SetNeighbour(neighbour) => Some(&neighbour.device),
            Change::SetForwarding(forwarding) => Some(&forwarding.device),
            Change::AddRoute(route) | Change::ReplaceRoute(route) => Some(&route.device),
            Change::CreatePod(pod) | Change::AdjustPod(pod) => Some(&pod.bridge),
            Change::RemoveRoute(_)
            | Change::RemoveForwarding(_)
            | Change::RemoveNeighbour(_)
            | Change::RemoveAddress(_)
            | Change::RemovePod(_)
            | Change::RemoveLink(_)
            | Change::CreateLink(_)
            | Change::AdjustLink(_)
            | Change::SetSysctl { .. } => None,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::RemoveRoute(it) => write!(f, "ip {}route del {}", family(it.destination.addr()), RouteText(it)),
            Change::AddRoute(it) => write!(f, "ip {}route add {}", family(it.destination.addr()), RouteText(it)),
            Change::ReplaceRoute(it) => {
                write!(f, "ip {}route replace {}", family(it.destination.addr()), RouteText(it))
            }
            Change::RemoveForwarding(it) => write!(f, "bridge fdb del {} dev {} dst {}", it.mac, it.device, it.remote),
            Change::SetForwarding(it) => {
                write!(f, "bridge fdb replace {} dev {} dst {} self permanent", it.mac, it.device, it.remote)
            }
            Change::RemoveNeighbour(it) => {
                write!(f, "ip {}neigh del {} dev {}", family(it.address), it.address, it.device)
            }
            Change::SetNeighbour(it) => neighbour(f, it.address, it.mac, &it.device),
            Change::RemoveAddress(it) => write!(f, "ip addr del {} dev {}", it.prefix, it.device),
            Change::AddAddress(it) => address(f, &it.prefix, &it.device),
            Change::RemovePod(it) => write!(f, "ip link del {}", it.host_interface),
            Change::RemoveLink(it) => write!(f, "ip link del {}", it.name),
            Change::CreateLink(it) => {
                let kind = KindText(&it.kind);
                write!(f, "ip link add {}{} mtu {} up type {kind}", it.name, AddressText(it.mac), it.mtu)
            }
            Change::AdjustLink(it) => {
                write!(f, "ip link set {}{} mtu {} alias {} up", it.name, AddressText(it.mac), it.mtu, it.alias)
            }
            Change::SetSysctl { path, value } => write!(f, "sysctl -w {path}={value}"),
            Change::CreatePod(it) => write!(
                f,
                "ip link add {} mtu {} master {} up type veth peer {} address {} netns {}",
                it.host_interface, it.mtu, it.bridge, it.key.interface, it.mac, it.namespace_path
            ),
            Change::AdjustPod(it) => write!(
                f,
                "ip link set {} mtu {} master {} up type bridge_slave hairpin {}",
                it.host_interface,
                it.mtu,
                it.bridge,
                if it.hairpin { "on" } else { "off" }
            ),
        }
    }
}

fn neighbour(f: &mut fmt::Formatter<'_>, address: IpAddr, mac: MacAddress, device: &str) -> fmt::Result {
    write!(f, "ip {}neigh replace {address} lladdr {mac} dev {device} nud permanent", family(address))
}

fn address(f: &mut fmt::Formatter<'_>, prefix: &IpNet, device: &str) -> fmt::Result {
    let no_detection = if prefix.addr().is_ipv6() { " nodad" } else { "" };
    write!(f, "ip addr add {prefix} dev {device}{no_detection} proto {ROUTE_PROTOCOL}")
}

fn family(address: IpAddr) -> &'static str {
    match Family::of(address) {
        Family::V4 => "",
        Family::V6 => "-6 ",
    }
}

/// A link's hardware address as `ip link` is told it, where there is one.
struct AddressText(Option<MacAddress>);

impl fmt::Display for AddressText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |mac| write!(f, " address {mac}"))
    }
}

/// A route as `ip route` writes it.
pub(super) struct RouteText<'a>(pub(super) &'a Route);

impl fmt::Display for RouteText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Route { destination, device, gateway, onlink, origin: _ } = self.0;
        write!(f, "{destination}")?;
        if !gateway.is_unspecified() {
            write!(f, " via {gateway}")?;
        }
        write!(f, " dev {device} proto {ROUTE_PROTOCOL}")?;
        if *onlink { f.write_str(" onlink") } else { Ok(()) }
    }
}

/// The kind of a link and its settings as `ip -d link` writes them.
pub(super) struct KindText<'a>(pub(super) &'a LinkKind);

impl fmt::Display for KindText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            LinkKind::Bridge => f.write_str("bridge"),
            LinkKind::Vxlan { vni, port, local, underlay, gbp, learning } => {
                let learning = if *learning { "learning" } else { "nolearning" };
                let gbp = if *gbp { " gbp" } else { "" };
                write!(f, "vxlan id {vni} local {local} dev {underlay} dstport {port} {learning}{gbp}")
            }
            LinkKind::Ipip { local, remote } => {
                let kind = if local.is_ipv4() { "ipip" } else { "ip6tnl mode ip6ip6 encaplimit none" };
                match remote {
                    Some(remote) => write!(f, "{kind} remote {remote} local {local}"),
                    None => write!(f, "{kind} remote any local {local}"),
                }
            }
        }
    }
}
