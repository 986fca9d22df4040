//! Makes a topology: namespaces in parallel, then the links with one `ip -batch` per namespace.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
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
                scope.spawn(move || namespace::create(&layout.namespace(member), sysctls))
            })
            .collect();
        join(threads)
    })?;
    ip(&layout.namespace(ROUTER), &router_batch(layout, topology))?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = topology
            .members()
            .map(|member| {
                let batch = member_batch(topology, member);
                scope.spawn(move || ip(&layout.namespace(&member.name), &batch))
            })
            .collect();
        join(threads)
    })
}

fn join(threads: Vec<std::thread::ScopedJoinHandle<'_, anyhow::Result<()>>>) -> anyhow::Result<()> {
    threads.into_iter().try_for_each(|thread| {
        thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread that built the topology panicked")))
    })
}

/// The router: a bridge per segment and a port per member, whose other end is the member's interface.
fn router_batch(layout: &Layout, topology: &Topology) -> String {
    let mut batch = String::from("link set lo up\n");
    let mtu = topology.mtu;
    for segment in &topology.segments {
        let name = &segment.name;
        let _ =
            writeln!(batch, "link add name {name} mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0");
        for address in &segment.router {
            let _ = writeln!(batch, "address add {address} dev {name}{}", no_detection(address));
        }
        let _ = writeln!(batch, "link set {name} up");
    }
    for member in topology.members() {
        let Member { name, segment, .. } = member;
        let namespace = layout.namespace(name);
        let _ = writeln!(
            batch,
            "link add name {name} mtu {mtu} type veth peer name {INTERFACE} mtu {mtu} netns {namespace}\n\
             link set {name} master {segment} up"
        );
    }
    batch
}

fn member_batch(topology: &Topology, member: &Member) -> String {
    let mut batch = format!("link set lo up\nlink set {INTERFACE} up\n");
    let routers = topology.segment(&member.segment).map(|segment| segment.router.as_slice()).unwrap_or_default();
    for address in &member.addresses {
        for router in routers.iter().filter(|router| router.contains(address)) {
            let own = format!("{address}/{}", router.prefix_len());
            let _ = writeln!(batch, "address add {own} dev {INTERFACE}{}", no_detection(router));
            let _ = writeln!(batch, "route add default via {} dev {INTERFACE}", router.addr());
        }
    }
    batch
}

/// Duplicate address detection takes a second, and nobody else can have these addresses.
fn no_detection(prefix: &IpNet) -> &'static str {
    match Family::of_prefix(prefix) {
        Family::V4 => "",
        Family::V6 => " nodad",
    }
}

/// Runs `ip -batch` in a namespace.
fn ip(namespace: &str, batch: &str) -> anyhow::Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", namespace, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("running `ip` (Debian package iproute2)")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(batch.as_bytes()).context("writing to `ip`")?;
    }
    let output = child.wait_with_output().context("waiting for `ip`")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`ip -batch` in namespace {namespace} failed: {}\nit was given:\n{batch}", said.trim());
    }
    Ok(())
}
