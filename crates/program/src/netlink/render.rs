//! The text that a person knows: what `ip -d link`, `ip addr`, `ip route`, `ip neigh`, `bridge fdb` and
//! `sysctl` would print of the program, with the reason of each line behind `#`.

use std::fmt::{self, Write};

use portolan_net::Origin;

use super::change::{KindText, RouteText};
use super::{LinkKind, PodLink, Program};

/// The program as text, in a fixed order.
pub fn render(program: &Program) -> String {
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    let _ = write(program, &mut text);
    text
}

fn write(program: &Program, out: &mut String) -> fmt::Result {
    heading(out, "ip -d link", program.links.is_empty())?;
    for link in program.links.values() {
        writeln!(out, "{}: mtu {} up{}", link.name, link.mtu, reason(&link.origin))?;
        match (link.mac, &link.kind) {
            (Some(mac), _) => writeln!(out, "    link/ether {mac}")?,
            (None, LinkKind::Ipip { local, .. }) if local.is_ipv6() => writeln!(out, "    link/tunnel6 {local}")?,
            (None, LinkKind::Ipip { local, .. }) => writeln!(out, "    link/ipip {local}")?,
            (None, _) => {}
        }
        writeln!(out, "    {}", KindText(&link.kind))?;
        writeln!(out, "    alias {}", link.alias)?;
    }
    heading(out, "ip addr", program.addresses.is_empty())?;
    for address in program.addresses.values() {
        writeln!(out, "{} dev {}{}", address.prefix, address.device, reason(&address.origin))?;
    }
    heading(out, "ip route", program.routes.is_empty())?;
    for route in program.routes.values() {
        writeln!(out, "{}{}", RouteText(route), reason(&route.origin))?;
    }
    heading(out, "ip neigh", program.neighbours.is_empty())?;
    for it in program.neighbours.values() {
        writeln!(out, "{} dev {} lladdr {} PERMANENT{}", it.address, it.device, it.mac, reason(&it.origin))?;
    }
    heading(out, "bridge fdb", program.forwarding.is_empty())?;
    for it in program.forwarding.values() {
        writeln!(out, "{} dev {} dst {} self permanent{}", it.mac, it.device, it.remote, reason(&it.origin))?;
    }
    heading(out, "sysctl", program.sysctls.is_empty())?;
    for (path, sysctl) in &program.sysctls {
        writeln!(out, "{path} = {}{}", sysctl.value, reason(&sysctl.origin))?;
    }
    heading(out, "pods", program.pods.is_empty())?;
    program.pods.values().try_for_each(|pod| write_pod(pod, out))
}

fn write_pod(pod: &PodLink, out: &mut String) -> fmt::Result {
    let hairpin = if pod.hairpin { " hairpin" } else { "" };
    writeln!(out, "{}: mtu {} up master {}{hairpin}{}", pod.host_interface, pod.mtu, pod.bridge, reason(&pod.origin))?;
    writeln!(out, "    peer {} link/ether {} netns {}", pod.key.interface, pod.mac, pod.namespace_path)?;
    for address in &pod.addresses {
        writeln!(out, "    {address}")?;
    }
    for gateway in &pod.gateways {
        writeln!(out, "    default via {gateway}")?;
    }
    writeln!(out, "    alias {}", pod.alias())
}

fn heading(out: &mut String, title: &str, is_empty: bool) -> fmt::Result {
    if is_empty { Ok(()) } else { writeln!(out, "## {title}") }
}

fn reason(origin: &Origin) -> String {
    format!(" # {origin}")
}
