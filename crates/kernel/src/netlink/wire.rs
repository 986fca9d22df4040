//! rtnetlink(7) requests as bytes. Numbers are the kernel's, from `linux/if_link.h`, `if_addr.h`,
//! `rtnetlink.h`, `neighbour.h`, `if_bridge.h`, `if_tunnel.h`, `ip6_tunnel.h` and `veth.h`.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use portolan_net::{IpNet, MacAddress};
use portolan_program::layout::ROUTE_PROTOCOL;
use portolan_program::netlink::{LinkKind, PodLink};

use crate::rawnetlink::MessageBuilder;

pub(super) const LINK_HEADER: usize = 16;
pub(super) const ADDRESS_HEADER: usize = 8;
pub(super) const ROUTE_HEADER: usize = 12;
pub(super) const NEIGHBOUR_HEADER: usize = 12;

pub(super) const IFLA_ADDRESS: u16 = 1;
pub(super) const IFLA_IFNAME: u16 = 3;
pub(super) const IFLA_MTU: u16 = 4;
pub(super) const IFLA_MASTER: u16 = 10;
pub(super) const IFLA_LINKINFO: u16 = 18;
pub(super) const IFLA_IFALIAS: u16 = 20;
const IFLA_AF_SPEC: u16 = 26;
pub(super) const IFLA_NET_NS_FD: u16 = 28;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
pub(super) const IFLA_EXT_MASK: u16 = 29;
pub(super) const INFO_KIND: u16 = 1;
pub(super) const INFO_DATA: u16 = 2;
pub(super) const INFO_SLAVE_KIND: u16 = 4;
pub(super) const INFO_SLAVE_DATA: u16 = 5;
pub(super) const VXLAN_ID: u16 = 1;
pub(super) const VXLAN_LINK: u16 = 3;
pub(super) const VXLAN_LOCAL: u16 = 4;
pub(super) const VXLAN_LEARNING: u16 = 7;
pub(super) const VXLAN_PORT: u16 = 15;
pub(super) const VXLAN_LOCAL6: u16 = 17;
pub(super) const VXLAN_GBP: u16 = 23;
pub(super) const IPTUN_LOCAL: u16 = 2;
pub(super) const IPTUN_REMOTE: u16 = 3;
const IPTUN_FLAGS: u16 = 8;
pub(super) const IPTUN_PROTO: u16 = 9;
const IPTUN_PMTUDISC: u16 = 10;
pub(super) const IPTUN_COLLECT_METADATA: u16 = 19;
/// `IP6_TNL_F_IGN_ENCAP_LIMIT`: without the option of RFC 2473 §4.1.1, which costs 8 bytes and which firewalls drop.
const IP6_TUNNEL_WITHOUT_LIMIT: u32 = 1;
pub(super) const BRIDGE_PORT_MODE: u16 = 4;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

pub(super) const IFA_ADDRESS: u16 = 1;
pub(super) const IFA_LOCAL: u16 = 2;
pub(super) const IFA_BROADCAST: u16 = 4;
pub(super) const IFA_FLAGS: u16 = 8;
pub(super) const IFA_PROTO: u16 = 11;

pub(super) const RTA_DST: u16 = 1;
pub(super) const RTA_OIF: u16 = 4;
pub(super) const RTA_GATEWAY: u16 = 5;
pub(super) const RTA_PRIORITY: u16 = 6;
pub(super) const RTA_MULTIPATH: u16 = 9;
pub(super) const RTNH_F_ONLINK: u32 = 4;
pub(super) const TABLE_MAIN: u8 = 254;
pub(super) const RTN_UNICAST: u8 = 1;
const SCOPE_LINK: u8 = 253;

pub(super) const NDA_DST: u16 = 1;
pub(super) const NDA_LLADDR: u16 = 2;
const NDA_IFINDEX: u16 = 8;
pub(super) const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 2;

pub(super) const AF_BRIDGE: u8 = 7;
const RTEXT_FILTER_SKIP_STATS: u32 = 8;

const IFF_UP: u32 = 1;
const CREATE: u16 = libc::NLM_F_CREATE as u16;
const EXCLUSIVE: u16 = libc::NLM_F_EXCL as u16;
const REPLACE: u16 = libc::NLM_F_REPLACE as u16;

/// What happens where something of the same key is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    /// It is an error.
    Refuse,
    /// It is replaced.
    Replace,
}

impl Existing {
    fn flags(self) -> u16 {
        match self {
            Existing::Refuse => CREATE | EXCLUSIVE,
            Existing::Replace => CREATE | REPLACE,
        }
    }
}

pub(super) fn family_number(address: IpAddr) -> u8 {
    if address.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

/// `struct ifinfomsg`.
fn link_header(index: u32, is_up: Option<bool>) -> [u8; LINK_HEADER] {
    let mut header = [0; LINK_HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    if let Some(is_up) = is_up {
        header[8..12].copy_from_slice(&(if is_up { IFF_UP } else { 0 }).to_ne_bytes());
        header[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    }
    header
}

fn link(kind: u16, flags: u16, index: u32, is_up: Option<bool>) -> MessageBuilder {
    let mut message = MessageBuilder::new(kind, flags);
    message.header(&link_header(index, is_up));
    message
}

pub(super) fn dump_links() -> Vec<u8> {
    let mut message = link(libc::RTM_GETLINK, 0, 0, None);
    message.put_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    message.finish()
}

/// Asks for one link.
///
/// The kernel brings a link's queue to life some time after its carrier came, and drops what is sent
/// before. It does so at once when it is asked for the link (`rtnl_getlink`, since Linux 6.8).
pub(crate) fn get_link(index: u32) -> Vec<u8> {
    let mut message = link(libc::RTM_GETLINK, 0, index, None);
    message.put_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    message.finish()
}

/// A bridge or a tunnel that is down and has no alias yet: creation cannot give one.
pub(crate) fn create_link(name: &str, kind: &LinkKind, mac: Option<MacAddress>, underlay: Option<u32>) -> Vec<u8> {
    let mut message = link(libc::RTM_NEWLINK, CREATE | EXCLUSIVE, 0, None);
    message.put_str(IFLA_IFNAME, name);
    if let Some(mac) = mac {
        message.put_bytes(IFLA_ADDRESS, &mac.0);
    }
    message.nested(IFLA_LINKINFO, |info| match kind {
        LinkKind::Bridge => {
            info.put_str(INFO_KIND, "bridge");
        }
        LinkKind::Vxlan { vni, port, local, underlay: _, gbp, learning } => {
            info.put_str(INFO_KIND, "vxlan");
            info.nested(INFO_DATA, |data| {
                data.put_u32(VXLAN_ID, vni.get());
                if let Some(index) = underlay {
                    data.put_u32(VXLAN_LINK, index);
                }
                data.put_address(if local.is_ipv4() { VXLAN_LOCAL } else { VXLAN_LOCAL6 }, *local);
                data.put_u8(VXLAN_LEARNING, u8::from(*learning));
                if *gbp {
                    data.put_flag(VXLAN_GBP);
                }
                data.put_u16_be(VXLAN_PORT, *port);
            });
        }
        LinkKind::Ipip { local, remote } => {
            info.put_str(INFO_KIND, if local.is_ipv4() { "ipip" } else { "ip6tnl" });
            info.nested(INFO_DATA, |data| {
                data.put_address(IPTUN_LOCAL, *local);
                if let Some(remote) = remote {
                    data.put_address(IPTUN_REMOTE, *remote);
                }
                // Both families: the sender of a packet that is too large is told, whoever forwards it.
                if local.is_ipv4() {
                    data.put_u8(IPTUN_PMTUDISC, 1);
                } else {
                    data.put_u8(IPTUN_PROTO, libc::IPPROTO_IPV6 as u8);
                    data.put_u32(IPTUN_FLAGS, IP6_TUNNEL_WITHOUT_LIMIT);
                }
            });
        }
    });
    message.finish()
}

/// What can be set on a link that exists.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Settings<'a> {
    pub(crate) mac: Option<MacAddress>,
    pub(crate) mtu: Option<u32>,
    pub(crate) alias: Option<&'a str>,
    pub(crate) up: Option<bool>,
    pub(crate) master: Option<u32>,
    pub(crate) hairpin: Option<bool>,
}

pub(crate) fn set_link(index: u32, settings: Settings<'_>) -> Vec<u8> {
    // RTM_SETLINK does not look at the settings of a bridge's port; RTM_NEWLINK without NLM_F_CREATE does.
    let mut message = link(libc::RTM_NEWLINK, 0, index, settings.up);
    if let Some(mac) = settings.mac {
        message.put_bytes(IFLA_ADDRESS, &mac.0);
    }
    if let Some(mtu) = settings.mtu {
        message.put_u32(IFLA_MTU, mtu);
    }
    if let Some(alias) = settings.alias {
        message.put_bytes(IFLA_IFALIAS, alias.as_bytes());
    }
    if let Some(master) = settings.master {
        message.put_u32(IFLA_MASTER, master);
    }
    if let Some(hairpin) = settings.hairpin {
        message.nested(IFLA_LINKINFO, |info| {
            info.put_str(INFO_SLAVE_KIND, "bridge");
            info.nested(INFO_SLAVE_DATA, |data| {
                data.put_u8(BRIDGE_PORT_MODE, u8::from(hairpin));
            });
        });
    }
    message.finish()
}

/// Tells a link that is down to make itself no link-local IPv6 address when it comes up.
pub(super) fn without_own_ipv6_address(index: u32) -> Vec<u8> {
    let mut message = link(libc::RTM_NEWLINK, 0, index, None);
    message.nested(IFLA_AF_SPEC, |families| {
        families.nested(libc::AF_INET6 as u16, |settings| {
            settings.put_u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE);
        });
    });
    message.finish()
}

pub(crate) fn delete_link(name: &str) -> Vec<u8> {
    let mut message = link(libc::RTM_DELLINK, 0, 0, None);
    message.put_str(IFLA_IFNAME, name);
    message.finish()
}

/// One end of a veth pair that is born in another namespace.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: Option<MacAddress>,
    pub(crate) namespace: BorrowedFd<'a>,
}

/// A veth pair whose far end is born inside its namespace. The near end is a port of `master`, and down.
///
/// Each end has one queue. The kernel would give it one for each processor that the machine may ever have,
/// each with its files under `/sys`, and use the first alone: a third of the time that the pair takes on two
/// processors, and more on more.
pub(crate) fn create_veth(name: &str, mtu: Option<u32>, master: Option<u32>, peer: Peer<'_>) -> Vec<u8> {
    let mut message = link(libc::RTM_NEWLINK, CREATE | EXCLUSIVE, 0, None);
    message.put_str(IFLA_IFNAME, name);
    one_queue(&mut message);
    if let Some(mtu) = mtu {
        message.put_u32(IFLA_MTU, mtu);
    }
    if let Some(master) = master {
        message.put_u32(IFLA_MASTER, master);
    }
    message.nested(IFLA_LINKINFO, |info| {
        info.put_str(INFO_KIND, "veth");
        info.nested(INFO_DATA, |data| {
            data.wrapped(VETH_INFO_PEER, &link_header(0, None), |end| {
                end.put_str(IFLA_IFNAME, peer.name);
                one_queue(end);
                if let Some(mac) = peer.mac {
                    end.put_bytes(IFLA_ADDRESS, &mac.0);
                }
                if let Some(mtu) = mtu {
                    end.put_u32(IFLA_MTU, mtu);
                }
                end.put_u32(IFLA_NET_NS_FD, peer.namespace.as_raw_fd().cast_unsigned());
            });
        });
    });
    message.finish()
}

fn one_queue(end: &mut MessageBuilder) {
    end.put_u32(IFLA_NUM_TX_QUEUES, 1).put_u32(IFLA_NUM_RX_QUEUES, 1);
}

/// The veth pair of a pod.
pub(super) fn create_pod(pod: &PodLink, bridge: u32, namespace: BorrowedFd<'_>) -> Vec<u8> {
    let peer = Peer { name: &pod.key.interface, mac: Some(pod.mac), namespace };
    create_veth(&pod.host_interface, Some(pod.mtu), Some(bridge), peer)
}

/// `struct ifaddrmsg` and its attributes.
fn address(kind: u16, flags: u16, index: u32, prefix: &IpNet, protocol: Option<u8>) -> Vec<u8> {
    let mut message = MessageBuilder::new(kind, flags);
    let [a, b, c, d] = index.to_ne_bytes();
    message.header(&[family_number(prefix.addr()), prefix.prefix_len(), 0, 0, a, b, c, d]);
    message.put_address(IFA_LOCAL, prefix.addr());
    message.put_address(IFA_ADDRESS, prefix.addr());
    match prefix {
        // As ip-address(8) does with `broadcast +`, and Flannel's bridge with its gateway.
        IpNet::V4(prefix) if prefix.prefix_len() < 31 => {
            message.put_address(IFA_BROADCAST, prefix.broadcast().into());
        }
        IpNet::V4(_) => {}
        // Addresses are ours to give, so nobody else has them; without detection they are usable at once.
        IpNet::V6(_) => {
            message.put_u32(IFA_FLAGS, libc::IFA_F_NODAD);
        }
    }
    if let Some(protocol) = protocol {
        message.put_u8(IFA_PROTO, protocol);
    }
    message.finish()
}

pub(crate) fn add_address(index: u32, prefix: &IpNet, is_ours: bool) -> Vec<u8> {
    address(libc::RTM_NEWADDR, CREATE | REPLACE, index, prefix, is_ours.then_some(ROUTE_PROTOCOL))
}

pub(crate) fn remove_address(index: u32, prefix: &IpNet) -> Vec<u8> {
    address(libc::RTM_DELADDR, 0, index, prefix, None)
}

/// A route as the wire has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RouteSpec {
    pub(crate) destination: IpNet,
    pub(crate) index: u32,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) onlink: bool,
    pub(crate) protocol: u8,
}

/// `struct rtmsg` and its attributes.
fn route(kind: u16, flags: u16, spec: &RouteSpec) -> Vec<u8> {
    let mut message = MessageBuilder::new(kind, flags);
    let destination = spec.destination.trunc();
    let is_on_link = spec.gateway.is_none() && destination.addr().is_ipv4();
    let scope = if is_on_link { SCOPE_LINK } else { 0 };
    let mut header = [0; ROUTE_HEADER];
    header[0] = family_number(destination.addr());
    header[1] = destination.prefix_len();
    header[4..8].copy_from_slice(&[TABLE_MAIN, spec.protocol, scope, RTN_UNICAST]);
    header[8..12].copy_from_slice(&(if spec.onlink { RTNH_F_ONLINK } else { 0 }).to_ne_bytes());
    message.header(&header);
    if destination.prefix_len() > 0 {
        message.put_address(RTA_DST, destination.addr());
    }
    if let Some(gateway) = spec.gateway {
        message.put_address(RTA_GATEWAY, gateway);
    }
    message.put_u32(RTA_OIF, spec.index);
    message.finish()
}

pub(crate) fn add_route(spec: &RouteSpec, existing: Existing) -> Vec<u8> {
    route(libc::RTM_NEWROUTE, existing.flags(), spec)
}

pub(crate) fn remove_route(spec: &RouteSpec) -> Vec<u8> {
    route(libc::RTM_DELROUTE, 0, spec)
}

/// `struct ndmsg`.
fn neighbour_header(family: u8, index: u32, state: u16, flags: u8) -> [u8; NEIGHBOUR_HEADER] {
    let mut header = [0; NEIGHBOUR_HEADER];
    header[0] = family;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&state.to_ne_bytes());
    header[10] = flags;
    header
}

pub(super) fn set_neighbour(index: u32, address: IpAddr, mac: MacAddress) -> Vec<u8> {
    let mut message = MessageBuilder::new(libc::RTM_NEWNEIGH, CREATE | REPLACE);
    message.header(&neighbour_header(family_number(address), index, NUD_PERMANENT, 0));
    message.put_address(NDA_DST, address).put_bytes(NDA_LLADDR, &mac.0);
    message.finish()
}

pub(super) fn remove_neighbour(index: u32, address: IpAddr) -> Vec<u8> {
    let mut message = MessageBuilder::new(libc::RTM_DELNEIGH, 0);
    message.header(&neighbour_header(family_number(address), index, 0, 0)).put_address(NDA_DST, address);
    message.finish()
}

pub(super) fn set_forwarding(index: u32, mac: MacAddress, remote: IpAddr) -> Vec<u8> {
    let mut message = MessageBuilder::new(libc::RTM_NEWNEIGH, CREATE | REPLACE);
    message.header(&neighbour_header(AF_BRIDGE, index, NUD_PERMANENT, NTF_SELF));
    message.put_bytes(NDA_LLADDR, &mac.0).put_address(NDA_DST, remote);
    message.finish()
}

pub(super) fn remove_forwarding(index: u32, mac: MacAddress, remote: IpAddr) -> Vec<u8> {
    let mut message = MessageBuilder::new(libc::RTM_DELNEIGH, 0);
    message.header(&neighbour_header(AF_BRIDGE, index, 0, NTF_SELF));
    message.put_bytes(NDA_LLADDR, &mac.0).put_address(NDA_DST, remote);
    message.finish()
}

pub(crate) fn dump_addresses() -> Vec<u8> {
    let mut message = MessageBuilder::new(libc::RTM_GETADDR, 0);
    message.header(&[0; ADDRESS_HEADER]);
    message.finish()
}

pub(super) fn dump_routes(family: u8) -> Vec<u8> {
    let mut header = [0; ROUTE_HEADER];
    header[0] = family;
    header[4] = TABLE_MAIN;
    let mut message = MessageBuilder::new(libc::RTM_GETROUTE, 0);
    message.header(&header);
    message.finish()
}

pub(super) fn dump_neighbours(family: u8, index: u32) -> Vec<u8> {
    let mut message = MessageBuilder::new(libc::RTM_GETNEIGH, 0);
    message.header(&neighbour_header(family, 0, 0, 0)).put_u32(NDA_IFINDEX, index);
    message.finish()
}

pub(super) fn dump_forwarding(index: u32) -> Vec<u8> {
    let mut message = MessageBuilder::new(libc::RTM_GETNEIGH, 0);
    message.header(&neighbour_header(AF_BRIDGE, index, 0, 0));
    message.finish()
}
