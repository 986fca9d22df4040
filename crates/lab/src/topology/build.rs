//! Makes a topology over netlink: namespaces in parallel, then the router, then members in parallel.

use anyhow::Context as _;
use ipnet::IpNet;
use portolan_kernel::link::Links;
use portolan_kernel::netns::Namespace;
use portolan_net::Family;

use super::{INTERFACE, Member, ROUTER, Topology, namespace};
use crate::Layout;

/// A machine that forwards without reverse-path filtering: what a node and the router need alike.
const FORWARDING: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
];

/// Makes every namespace and link of a topology.
///
/// # Errors
/// If something of it exists already or cannot be made. What was made stays: the caller removes it
/// with [`crate::down`], as after a crash.
pub fn build(layout: &Layout, topology: &Topology) -> anyhow::Result<()> {
    namespace::prepare_directory()?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = topology
            .namespaces()
            .map(|member| {
                let outside = topology.clients.iter().any(|client| client.name == member);
                let sysctls = if outside { &[][..] } else { FORWARDING };
                scope.spawn(move || namespace::create(layout, &layout.namespace(member), sysctls))
            })
            .collect();
        join(threads)
    })?;
    build_router(layout, topology)?;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            topology.members().map(|member| scope.spawn(move || build_member(layout, topology, member))).collect();
        join(threads)
    })
}

fn join(threads: Vec<std::thread::ScopedJoinHandle<'_, anyhow::Result<()>>>) -> anyhow::Result<()> {
    threads.into_iter().try_for_each(|thread| {
        thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread that built the topology panicked")))
    })
}

/// The router: a bridge per segment and a port per member, whose other end is the member's interface.
fn build_router(layout: &Layout, topology: &Topology) -> anyhow::Result<()> {
    let mut links = links_of(layout, ROUTER)?;
    links.set_up("lo").context("setting the router's `lo` up")?;
    for segment in &topology.segments {
        let name = &segment.name;
        let doing = || format!("making segment {name}");
        links.create_bridge(name).and_then(|()| links.set_mtu(name, topology.mtu)).with_context(doing)?;
        for address in &segment.router {
            links.add_address(name, *address).with_context(doing)?;
        }
        links.set_up(name).with_context(doing)?;
    }
    for member in topology.members() {
        let Member { name, segment, .. } = member;
        let doing = || format!("connecting {name} to segment {segment}");
        let namespace = Namespace::open(&namespace::path(&layout.namespace(name))).with_context(doing)?;
        links.create_veth(name, INTERFACE, &namespace, Some(topology.mtu)).with_context(doing)?;
        links.set_master(name, segment).and_then(|()| links.set_up(name)).with_context(doing)?;
    }
    Ok(())
}

fn build_member(layout: &Layout, topology: &Topology, member: &Member) -> anyhow::Result<()> {
    let doing = || format!("giving {} its addresses", member.name);
    let mut links = links_of(layout, &member.name)?;
    links.set_up("lo").and_then(|()| links.set_mtu(INTERFACE, topology.mtu)).with_context(doing)?;
    links.set_up(INTERFACE).with_context(doing)?;
    let routers = topology.segment(&member.segment).map(|segment| segment.router.as_slice()).unwrap_or_default();
    for address in &member.addresses {
        for router in routers.iter().filter(|router| router.contains(address)) {
            let own = IpNet::new(*address, router.prefix_len()).with_context(doing)?;
            let everywhere = match Family::of(*address) {
                Family::V4 => IpNet::from(ipnet::Ipv4Net::default()),
                Family::V6 => IpNet::from(ipnet::Ipv6Net::default()),
            };
            links.add_address(INTERFACE, own).with_context(doing)?;
            links.add_route(INTERFACE, everywhere, Some(router.addr())).with_context(doing)?;
        }
    }
    // The carrier is here since the line above that brought it up; packets may pass only later.
    links.settle(INTERFACE).with_context(doing)
}

fn links_of(layout: &Layout, member: &str) -> anyhow::Result<Links> {
    let name = layout.namespace(member);
    let namespace = Namespace::open(&namespace::path(&name)).with_context(|| format!("opening namespace {name}"))?;
    Links::open(&namespace).with_context(|| format!("opening the links of namespace {name}"))
}
