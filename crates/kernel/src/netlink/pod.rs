//! Pod interfaces: a veth pair whose far end is born inside the pod's namespace, and one batch there.
//!
//! It is on the path of every CNI ADD, so it costs four sends: the pair, the near end as a port, all of
//! the far end's settings, and the near end's last ones with two questions that wait until packets pass.
//! The thread that opens the sockets inside the pod works while the kernel makes the pair.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use portolan_net::{IpNet, MacAddress};
use portolan_program::layout::ROUTE_PROTOCOL;
use portolan_program::netlink::PodLink;

use super::wire::{self, Existing, RouteSpec, Settings};
use super::{Netlink, observe};
use crate::error::KernelError;
use crate::index;
use crate::netns::{Namespace, in_namespace, in_namespace_while};
use crate::rawnetlink::{Protocol, Socket};

/// Index of the loopback: the first link of every namespace.
const LOOPBACK: u32 = 1;

/// `RTNLGRP_IPV6_IFADDR`.
const IPV6_ADDRESS_GROUP: u32 = 9;

/// How long it may take the kernel to take an IPv6 address into use: usually it is below a millisecond.
const USABLE_WITHIN: Duration = Duration::from_millis(250);

/// What differs between a pod interface and what it must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// Something could not be read.
    #[error("{0}")]
    Unreadable(KernelError),
    /// The node's end is gone.
    #[error("the node has no interface {0}")]
    NoHostInterface(String),
    /// The node's end hangs on no bridge, or another one.
    #[error("{interface} is not a port of bridge {bridge}")]
    OtherBridge {
        /// The node's end.
        interface: String,
        /// The bridge that it must be a port of.
        bridge: String,
    },
    /// The pod's end is gone.
    #[error("the pod has no interface {0}")]
    NoInterface(String),
    /// The pod's end has another hardware address.
    #[error("{interface} has hardware address {is}, and needed is {wanted}")]
    OtherMac {
        /// The interface.
        interface: String,
        /// What it has.
        is: MacAddress,
        /// What it must have.
        wanted: MacAddress,
    },
    /// An interface is down.
    #[error("{0} is down")]
    Down(String),
    /// An address is missing.
    #[error("{interface} has no address {address}")]
    NoAddress {
        /// The interface.
        interface: String,
        /// The address.
        address: IpNet,
    },
    /// A default route is missing.
    #[error("no default route via {0}")]
    NoDefaultRoute(IpAddr),
}

pub(super) fn create(netlink: &mut Netlink, pod: &PodLink) -> Result<(), KernelError> {
    let bridge = netlink.index(&pod.bridge)?;
    let namespace = Namespace::open(Path::new(&*pod.namespace_path))?;
    let (inside, outside) =
        in_namespace_while(&namespace, || InPod::open(pod), || create_pair(netlink, pod, bridge, &namespace));
    // Before this the pair was not ours: what is there under its name is left alone.
    outside?;
    // The alias comes last: a pair that has it is whole, also after a crash.
    let finished = inside
        .and_then(|opened| opened)
        .and_then(|sockets| sockets.configure(pod))
        .and_then(|()| finish_port(netlink, pod, bridge));
    if finished.is_err() {
        // Half an interface is worse than none: a runtime that tries again must find a clean namespace.
        let _ = netlink.socket.request(wire::delete_link(&pod.host_interface));
    }
    finished
}

/// Makes the pair, and the near end a port that is up.
///
/// Before it comes up it is told to make itself no IPv6 address: a bridge's port is never spoken to, and
/// leaving that address's multicast groups takes the kernel some 20 ms when the pod ends.
fn create_pair(netlink: &mut Netlink, pod: &PodLink, bridge: u32, namespace: &Namespace) -> Result<(), KernelError> {
    let request = wire::create_pod(pod, bridge, namespace.fd());
    match netlink.socket.request(request.clone()) {
        Ok(()) => {}
        Err(error) if error.errno() == Some(Errno::EEXIST) => {
            make_room(netlink, pod, bridge)?;
            netlink.socket.request(request).map_err(|error| taken_or(error, pod))?;
        }
        Err(error) => return Err(error),
    }
    let port = netlink.index(&pod.host_interface)?;
    let up = Settings { up: Some(true), ..Settings::default() };
    let outcomes = netlink.socket.batch(vec![wire::without_own_ipv6_address(port), wire::set_link(port, up)]);
    // A kernel without IPv6 refuses the first, and has nothing to be spared.
    let came_up = outcomes.into_iter().nth(1).unwrap_or(Ok(()));
    if came_up.is_err() {
        let _ = netlink.socket.request(wire::delete_link(&pod.host_interface));
    }
    came_up
}

/// Sets the node's end, and waits until packets pass. Without that, one pod in twenty loses the first
/// packet that it sends, and waits a second for its neighbour's address. The port is asked for before the
/// bridge: it is what gives the bridge its carrier.
fn finish_port(netlink: &mut Netlink, pod: &PodLink, bridge: u32) -> Result<(), KernelError> {
    let port = netlink.index(&pod.host_interface)?;
    let batch = vec![set_port(port, pod), wire::get_link(port), wire::get_link(bridge)];
    netlink.socket.batch(batch).into_iter().collect()
}

/// A name is taken, on one side or the other. What a crash left behind half-made on the node's side is
/// deleted: it is a port of our bridge, or hangs nowhere, and bears our alias or none.
fn make_room(netlink: &mut Netlink, pod: &PodLink, bridge: u32) -> Result<(), KernelError> {
    let taken = || KernelError::InterfaceTaken {
        name: pod.key.interface.to_string(),
        namespace: pod.namespace_path.to_string(),
    };
    let links = observe::links(&mut netlink.socket)?;
    let there = links.iter().find(|link| *link.name == *pod.host_interface).ok_or_else(taken)?;
    let is_ours = there.alias == pod.alias() || there.alias.is_empty();
    if there.kind == "veth" && is_ours && there.master.is_none_or(|master| master == bridge) {
        return netlink.socket.request(wire::delete_link(&pod.host_interface));
    }
    let difference = format!("pod interface {} needs the name for its end on the node", pod.key);
    Err(KernelError::Foreign { name: pod.host_interface.to_string(), difference })
}

fn taken_or(error: KernelError, pod: &PodLink) -> KernelError {
    if error.errno() != Some(Errno::EEXIST) {
        return error;
    }
    KernelError::InterfaceTaken { name: pod.key.interface.to_string(), namespace: pod.namespace_path.to_string() }
}

/// Sets the node's end. It is made a port first: only then has it a port's settings.
pub(super) fn adjust(netlink: &mut Netlink, pod: &PodLink) -> Result<(), KernelError> {
    let master = Settings { master: Some(netlink.index(&pod.bridge)?), ..Settings::default() };
    let index = netlink.index(&pod.host_interface)?;
    netlink.socket.batch(vec![wire::set_link(index, master), set_port(index, pod)]).into_iter().collect()
}

/// The settings of a port of the bridge.
fn set_port(index: u32, pod: &PodLink) -> Vec<u8> {
    let alias = pod.alias();
    let settings = Settings {
        mtu: Some(pod.mtu),
        alias: Some(&alias),
        up: Some(pod.up),
        hairpin: Some(pod.hairpin),
        ..Settings::default()
    };
    wire::set_link(index, settings)
}

/// Sockets inside a pod's namespace. They belong to it, whichever thread uses them.
struct InPod {
    requests: Socket,
    /// Hears of addresses, where there is an IPv6 address to wait for.
    addresses: Option<Socket>,
}

impl InPod {
    /// Opens them in the namespace of the thread.
    fn open(pod: &PodLink) -> Result<InPod, KernelError> {
        let has_ipv6 = pod.addresses.iter().any(|address| address.addr().is_ipv6());
        let addresses = has_ipv6.then(|| Socket::open(Protocol::Route, &[IPV6_ADDRESS_GROUP])).transpose()?;
        Ok(InPod { requests: Socket::open(Protocol::Route, &[])?, addresses })
    }

    /// Everything inside the pod.
    fn configure(mut self, pod: &PodLink) -> Result<(), KernelError> {
        let index = index::of(self.requests.fd(), &pod.key.interface)?;
        let up = Settings { up: Some(true), ..Settings::default() };
        let mut addresses = pod.addresses.clone();
        let mut batch = Vec::new();
        if self.addresses.is_some() {
            // The link-local address too must be usable at once, since neighbours are asked for from it: the
            // one that the kernel makes waits for duplicates to be detected, so the same is given here.
            batch.push(wire::without_own_ipv6_address(index));
            addresses.push(link_local(pod.mac));
        }
        batch.extend([wire::set_link(LOOPBACK, up), wire::set_link(index, up)]);
        batch.extend(addresses.iter().map(|address| wire::add_address(index, address, true)));
        for gateway in &pod.gateways {
            let spec = RouteSpec {
                destination: default_route(*gateway),
                index,
                gateway: Some(*gateway),
                // A gateway outside the pod's own prefix counts as reachable on its link.
                onlink: !pod.addresses.iter().any(|prefix| prefix.contains(gateway)),
                protocol: ROUTE_PROTOCOL,
            };
            batch.push(wire::add_route(&spec, Existing::Replace));
        }
        self.requests.batch(batch).into_iter().collect::<Result<(), KernelError>>()?;
        self.addresses.map_or(Ok(()), |heard| wait_until_usable(heard, &addresses))
    }
}

/// The link-local address of a hardware address (RFC 4291, appendix A).
fn link_local(mac: MacAddress) -> IpNet {
    let [first, second, third, rest @ ..] = mac.0;
    let [fourth, fifth, sixth] = rest;
    let interface = u64::from_be_bytes([first ^ 2, second, third, 0xff, 0xfe, fourth, fifth, sixth]);
    let address = Ipv6Addr::from_bits((0xfe80_u128 << 112) | u128::from(interface));
    IpNet::new_assert(address.into(), 64)
}

/// Waits until the kernel says of each IPv6 address that it is there.
///
/// Also without duplicate address detection it takes an address into use some time after the request
/// (`addrconf_dad_work`). Until then answers to the pod's first question for a neighbour are dropped,
/// and the question is repeated after a second.
fn wait_until_usable(mut heard: Socket, addresses: &[IpNet]) -> Result<(), KernelError> {
    let mut awaited: Vec<&IpNet> = addresses.iter().filter(|address| address.addr().is_ipv6()).collect();
    let deadline = Instant::now() + USABLE_WITHIN;
    while !awaited.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Some(messages) = heard.notifications()? {
            let read = messages.iter().filter_map(|(_, message)| observe::address(message));
            for there in read {
                awaited.retain(|address| **address != there.prefix);
            }
        } else if left.is_zero() {
            // The addresses are there; what is late is their use.
            return Ok(());
        } else {
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            // An interrupted wait is a short one.
            let _ = poll(&mut [PollFd::new(heard.fd(), PollFlags::POLLIN)], timeout);
        }
    }
    Ok(())
}

fn default_route(gateway: IpAddr) -> IpNet {
    match gateway {
        IpAddr::V4(_) => IpNet::V4(portolan_net::Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(portolan_net::Ipv6Net::default()),
    }
}

pub(super) fn check(netlink: &mut Netlink, pod: &PodLink) -> Result<(), Vec<Difference>> {
    let mut found = Vec::new();
    match observe::links(&mut netlink.socket) {
        Ok(links) => check_port(&links, pod, &mut found),
        Err(error) => found.push(Difference::Unreadable(error)),
    }
    let inside = Namespace::open(Path::new(&*pod.namespace_path))
        .and_then(|namespace| in_namespace(&namespace, || check_inside(pod)).and_then(|outcome| outcome));
    match inside {
        Ok(differences) => found.extend(differences),
        Err(error) => found.push(Difference::Unreadable(error)),
    }
    if found.is_empty() { Ok(()) } else { Err(found) }
}

fn check_port(links: &[observe::ReadLink], pod: &PodLink, found: &mut Vec<Difference>) {
    let interface = pod.host_interface.to_string();
    let bridge = links.iter().find(|link| link.name == pod.bridge).map(|link| link.index);
    match links.iter().find(|link| link.name == interface) {
        None => found.push(Difference::NoHostInterface(interface)),
        Some(link) if link.master.is_none() || link.master != bridge => {
            found.push(Difference::OtherBridge { interface, bridge: pod.bridge.clone() });
        }
        Some(link) if !link.up => found.push(Difference::Down(interface)),
        Some(_) => {}
    }
}

fn check_inside(pod: &PodLink) -> Result<Vec<Difference>, KernelError> {
    let mut socket = Socket::open(Protocol::Route, &[])?;
    let interface = pod.key.interface.to_string();
    let mut found = Vec::new();
    let links = observe::links(&mut socket)?;
    let Some(link) = links.iter().find(|link| link.name == interface) else {
        return Ok(vec![Difference::NoInterface(interface)]);
    };
    if let Some(is) = link.mac.filter(|is| *is != pod.mac) {
        found.push(Difference::OtherMac { interface: interface.clone(), is, wanted: pod.mac });
    }
    if !link.up {
        found.push(Difference::Down(interface.clone()));
    }
    let addresses = observe::addresses(&mut socket)?;
    for address in &pod.addresses {
        if !addresses.iter().any(|it| it.index == link.index && it.prefix == *address) {
            found.push(Difference::NoAddress { interface: interface.clone(), address: *address });
        }
    }
    for gateway in &pod.gateways {
        let routes = observe::routes(&mut socket, wire::family_number(*gateway))?;
        let is_default = |it: &observe::ReadRoute| {
            it.destination.prefix_len() == 0 && it.gateway == Some(*gateway) && it.index == link.index
        };
        if !routes.iter().any(is_default) {
            found.push(Difference::NoDefaultRoute(*gateway));
        }
    }
    Ok(found)
}

/// Differences as one text.
pub struct Differences<'a>(pub &'a [Difference]);

impl fmt::Display for Differences<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, difference) in self.0.iter().enumerate() {
            write!(f, "{}{difference}", if position == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}
