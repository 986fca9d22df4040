//! What rtnetlink holds: ours as a [`Program`], everything else as [`Surroundings`].

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::errno::Errno;
use portolan_net::{IpNet, MacAddress, Origin, Vni};
use portolan_program::layout::{LINK_ALIAS_PREFIX, ROUTE_PROTOCOL};
use portolan_program::netlink::{
    Address, ForeignLink, ForeignRoute, Forwarding, Link, LinkKind, Neighbour, PodLink, Program, Route, Surroundings,
    Sysctl, pod_of_alias,
};

use super::wire;
use crate::error::KernelError;
use crate::rawnetlink::{Attributes, OwnedMessage, Socket};
use crate::sysctl;

/// `AF_INET` and `AF_INET6`, as headers have them.
const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];

/// What the kernel holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// What is ours.
    pub ours: Program,
    /// What is not.
    pub others: Surroundings,
}

/// A link as it was read.
#[derive(Debug, Clone, Default)]
pub(super) struct ReadLink {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: String,
    pub(super) kind: String,
    pub(super) detail: Option<LinkKind>,
    pub(super) mac: Option<MacAddress>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) master: Option<u32>,
    pub(super) hairpin: bool,
}

/// An address as it was read.
pub(super) struct ReadAddress {
    pub(super) index: u32,
    pub(super) prefix: IpNet,
    protocol: u8,
}

/// A route as it was read.
pub(super) struct ReadRoute {
    pub(super) destination: IpNet,
    pub(super) index: u32,
    pub(super) gateway: Option<IpAddr>,
    pub(super) onlink: bool,
    metric: u32,
    protocol: u8,
}

/// What the origin of things is that were read and not compiled.
pub(super) fn read_back() -> Origin {
    Origin::configuration("kernel")
}

pub(super) fn observe(socket: &mut Socket) -> Result<Observed, KernelError> {
    let links = links(socket)?;
    let names: BTreeMap<u32, &str> = links.iter().map(|link| (link.index, link.name.as_str())).collect();
    let mut observed = Observed::default();
    for link in &links {
        sort_link(link, &names, &mut observed);
    }
    for address in addresses(socket)? {
        if let Some(device) = names.get(&address.index) {
            sort_address(&address, device, &mut observed);
        }
    }
    for family in FAMILIES {
        for route in routes(socket, family)? {
            if let Some(device) = names.get(&route.index) {
                sort_route(&route, device, &mut observed);
            }
        }
    }
    let is_tunnel = |link: &&ReadLink| {
        observed.ours.links.get(&link.name).is_some_and(|link| matches!(link.kind, LinkKind::Vxlan { .. }))
    };
    let tunnels: Vec<&ReadLink> = links.iter().filter(is_tunnel).collect();
    for tunnel in tunnels {
        read_neighbours(socket, tunnel, &mut observed.ours)?;
    }
    for path in Program::sysctl_paths(observed.ours.links.keys().map(String::as_str)) {
        // One that cannot be read is one that is not there.
        if let Ok(value) = sysctl::read(&path) {
            observed.ours.sysctls.insert(path, Sysctl { value, origin: read_back() });
        }
    }
    Ok(observed)
}

fn sort_link(link: &ReadLink, names: &BTreeMap<u32, &str>, observed: &mut Observed) {
    let master = link.master.and_then(|index| names.get(&index)).copied().unwrap_or_default();
    if let Some(key) = pod_of_alias(&link.alias).filter(|_| link.kind == "veth") {
        let pod = PodLink {
            key: key.clone(),
            namespace_path: "".into(),
            host_interface: link.name.as_str().into(),
            bridge: master.to_owned(),
            hairpin: link.hairpin,
            mtu: link.mtu,
            up: link.up,
            mac: MacAddress([0; 6]),
            addresses: Vec::new(),
            gateways: Vec::new(),
            origin: read_back(),
        };
        observed.ours.pods.insert(key, pod);
        return;
    }
    if let (true, Some(kind)) = (link.alias.starts_with(LINK_ALIAS_PREFIX), &link.detail) {
        let ours = Link {
            name: link.name.clone(),
            kind: kind.clone(),
            mac: link.mac,
            mtu: link.mtu,
            alias: link.alias.clone(),
            up: link.up,
            origin: read_back(),
        };
        observed.ours.links.insert(link.name.clone(), ours);
        return;
    }
    observed.others.links.push(ForeignLink {
        name: link.name.clone(),
        kind: link.kind.clone(),
        detail: link.detail.clone(),
        mac: link.mac,
        mtu: link.mtu,
        up: link.up,
    });
}

fn sort_address(address: &ReadAddress, device: &str, observed: &mut Observed) {
    let ReadAddress { prefix, protocol, .. } = *address;
    if protocol == ROUTE_PROTOCOL {
        let ours = Address { device: device.to_owned(), prefix, origin: read_back() };
        observed.ours.addresses.insert((device.to_owned(), prefix), ours);
    } else {
        observed.others.addresses.push((device.to_owned(), prefix));
    }
}

fn sort_route(route: &ReadRoute, device: &str, observed: &mut Observed) {
    let device = device.to_owned();
    let ReadRoute { destination, gateway, onlink, metric, protocol, .. } = *route;
    if protocol == ROUTE_PROTOCOL {
        // We make none without a next hop; whoever took it away leaves a route that is still ours to mend.
        let gateway = gateway.unwrap_or_else(|| unspecified(destination.addr()));
        let ours = Route { destination, device, gateway, onlink, origin: read_back() };
        observed.ours.routes.insert(destination, ours);
    } else {
        observed.others.routes.push(ForeignRoute { destination, device, gateway, onlink, metric, protocol });
    }
}

/// The address of a family that is none.
fn unspecified(of: IpAddr) -> IpAddr {
    if of.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn read_neighbours(socket: &mut Socket, tunnel: &ReadLink, ours: &mut Program) -> Result<(), KernelError> {
    let device = &tunnel.name;
    let mut neighbours = Vec::new();
    for family in FAMILIES {
        neighbours.extend(socket.dump(wire::dump_neighbours(family, tunnel.index))?);
    }
    for (address, mac) in neighbours.iter().filter_map(|message| neighbour(message, tunnel.index)) {
        let entry = Neighbour { device: device.clone(), address, mac, origin: read_back() };
        ours.neighbours.insert((device.clone(), address), entry);
    }
    let forwarding = socket.dump(wire::dump_forwarding(tunnel.index))?;
    for (remote, mac) in forwarding.iter().filter_map(|message| neighbour(message, tunnel.index)) {
        let entry = Forwarding { device: device.clone(), mac, remote, origin: read_back() };
        ours.forwarding.insert((device.clone(), mac), entry);
    }
    Ok(())
}

/// A permanent entry of a link: address and hardware address.
fn neighbour(message: &OwnedMessage, index: u32) -> Option<(IpAddr, MacAddress)> {
    let header: &[u8; wire::NEIGHBOUR_HEADER] = message.header()?;
    let is_of_link = header[4..8] == index.to_ne_bytes();
    let is_permanent = u16::from_ne_bytes([header[8], header[9]]) & wire::NUD_PERMANENT != 0;
    let attributes = message.attributes(wire::NEIGHBOUR_HEADER);
    let address = attributes.get(wire::NDA_DST)?.address()?;
    let mac = attributes.get(wire::NDA_LLADDR)?.mac()?;
    // The kernel keeps permanent entries of its own for multicast addresses.
    (is_of_link && is_permanent && !address.is_multicast()).then_some((address, mac))
}

pub(super) fn links(socket: &mut Socket) -> Result<Vec<ReadLink>, KernelError> {
    let messages = socket.dump(wire::dump_links())?;
    let mut links: Vec<ReadLink> = messages.iter().filter_map(link).collect();
    let names: BTreeMap<u32, String> = links.iter().map(|link| (link.index, link.name.clone())).collect();
    for link in &mut links {
        // A tunnel names its underlay by index.
        if let Some(LinkKind::Vxlan { underlay, .. }) = &mut link.detail {
            *underlay = underlay.parse().ok().and_then(|index: u32| names.get(&index).cloned()).unwrap_or_default();
        }
    }
    Ok(links)
}

pub(super) fn link(message: &OwnedMessage) -> Option<ReadLink> {
    let header: &[u8; wire::LINK_HEADER] = message.header()?;
    let mut link = ReadLink {
        index: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
        up: header[8] & 1 != 0,
        ..ReadLink::default()
    };
    for attribute in message.attributes(wire::LINK_HEADER) {
        match attribute.kind {
            wire::IFLA_IFNAME => attribute.text()?.clone_into(&mut link.name),
            wire::IFLA_ADDRESS => link.mac = attribute.mac(),
            wire::IFLA_MTU => link.mtu = attribute.u32()?,
            wire::IFLA_MASTER => link.master = attribute.u32(),
            wire::IFLA_IFALIAS => attribute.text().unwrap_or_default().clone_into(&mut link.alias),
            wire::IFLA_LINKINFO => link_info(&attribute.nested(), &mut link),
            _ => {}
        }
    }
    Some(link)
}

fn link_info(info: &Attributes<'_>, link: &mut ReadLink) {
    let text = |kind| info.get(kind).and_then(|it| it.text()).unwrap_or_default();
    text(wire::INFO_KIND).clone_into(&mut link.kind);
    if text(wire::INFO_SLAVE_KIND) == "bridge" {
        let data = info.get(wire::INFO_SLAVE_DATA).map(|it| it.nested());
        link.hairpin = data.and_then(|it| it.get(wire::BRIDGE_PORT_MODE)?.u8()) == Some(1);
    }
    link.detail = match link.kind.as_str() {
        "bridge" => Some(LinkKind::Bridge),
        "vxlan" => info.get(wire::INFO_DATA).and_then(|it| vxlan(&it.nested())),
        "ipip" | "ip6tnl" => info.get(wire::INFO_DATA).and_then(|it| ipip(&it.nested())),
        _ => None,
    };
}

fn vxlan(data: &Attributes<'_>) -> Option<LinkKind> {
    let local = data.get(wire::VXLAN_LOCAL).or_else(|| data.get(wire::VXLAN_LOCAL6));
    Some(LinkKind::Vxlan {
        vni: Vni::new(data.get(wire::VXLAN_ID)?.u32()?)?,
        port: data.get(wire::VXLAN_PORT)?.u16_be()?,
        local: local.and_then(|it| it.address()).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        underlay: data.get(wire::VXLAN_LINK).and_then(|it| it.u32()).map(|index| index.to_string()).unwrap_or_default(),
        gbp: data.get(wire::VXLAN_GBP).is_some(),
        learning: data.get(wire::VXLAN_LEARNING).and_then(|it| it.u8()) == Some(1),
    })
}

/// A tunnel of IP in IP; `None` for one that gets its ends from elsewhere, or carries something else.
fn ipip(data: &Attributes<'_>) -> Option<LinkKind> {
    let address = |kind| data.get(kind).and_then(|it| it.address());
    let local = address(wire::IPTUN_LOCAL)?;
    let own_protocol = if local.is_ipv4() { libc::IPPROTO_IPIP } else { libc::IPPROTO_IPV6 };
    // 0 is any: what flanneld and ip-link(8) make.
    let protocol = data.get(wire::IPTUN_PROTO).and_then(|it| it.u8()).map_or(0, i32::from);
    let is_plain = data.get(wire::IPTUN_COLLECT_METADATA).is_none() && [0, own_protocol].contains(&protocol);
    is_plain.then(|| LinkKind::Ipip {
        local,
        remote: address(wire::IPTUN_REMOTE).filter(|remote| !remote.is_unspecified()),
    })
}

pub(super) fn addresses(socket: &mut Socket) -> Result<Vec<ReadAddress>, KernelError> {
    let messages = socket.dump(wire::dump_addresses())?;
    Ok(messages.iter().filter_map(address).collect())
}

pub(super) fn address(message: &OwnedMessage) -> Option<ReadAddress> {
    let header: &[u8; wire::ADDRESS_HEADER] = message.header()?;
    let attributes = message.attributes(wire::ADDRESS_HEADER);
    // On a point-to-point link IFA_ADDRESS is the far end; IFA_LOCAL is ours where there is one.
    let address = attributes.get(wire::IFA_LOCAL).or_else(|| attributes.get(wire::IFA_ADDRESS))?.address()?;
    Some(ReadAddress {
        index: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
        prefix: IpNet::new(address, header[1]).ok()?,
        protocol: attributes.get(wire::IFA_PROTO).and_then(|it| it.u8()).unwrap_or(0),
    })
}

pub(super) fn routes(socket: &mut Socket, family: u8) -> Result<Vec<ReadRoute>, KernelError> {
    match socket.dump(wire::dump_routes(family)) {
        Ok(messages) => Ok(messages.iter().filter_map(route).collect()),
        // The kernel makes the main table of a namespace with its first route.
        Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn route(message: &OwnedMessage) -> Option<ReadRoute> {
    /// `RTM_F_CLONED`: a cached exception of IPv6, no route.
    const CLONED: u32 = 0x200;
    /// `struct rtnexthop`: length, flags, weight, index.
    const NEXT_HOP_HEADER: usize = 8;

    let header: &[u8; wire::ROUTE_HEADER] = message.header()?;
    let mut flags = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    if header[4] != wire::TABLE_MAIN || header[7] != wire::RTN_UNICAST || flags & CLONED != 0 {
        return None;
    }
    let attributes = message.attributes(wire::ROUTE_HEADER);
    let unspecified: IpAddr =
        if i32::from(header[0]) == libc::AF_INET { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let destination = attributes.get(wire::RTA_DST).map_or(Some(unspecified), |it| it.address())?;
    let mut index = attributes.get(wire::RTA_OIF).and_then(|it| it.u32());
    let mut gateway = attributes.get(wire::RTA_GATEWAY).and_then(|it| it.address());
    if let Some(several) = attributes.get(wire::RTA_MULTIPATH) {
        let first: &[u8; NEXT_HOP_HEADER] = several.value.first_chunk()?;
        index = Some(u32::from_ne_bytes([first[4], first[5], first[6], first[7]]));
        flags = u32::from(first[2]);
        let end = usize::from(u16::from_ne_bytes([first[0], first[1]]));
        let inner = Attributes::new(several.value.get(NEXT_HOP_HEADER..end)?);
        gateway = inner.get(wire::RTA_GATEWAY).and_then(|it| it.address());
    }
    Some(ReadRoute {
        destination: IpNet::new(destination, header[1]).ok()?,
        index: index?,
        gateway,
        onlink: flags & wire::RTNH_F_ONLINK != 0,
        metric: attributes.get(wire::RTA_PRIORITY).and_then(|it| it.u32()).unwrap_or(0),
        protocol: header[5],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_message_is_read_or_refused(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let message = OwnedMessage { kind: 0, flags: 0, payload };
            let _ = (link(&message), address(&message), route(&message), neighbour(&message, 1));
        }
    }
}
