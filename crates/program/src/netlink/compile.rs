//! From intent to program.

use std::collections::BTreeMap;
use std::sync::Arc;

use portolan_intent::NodeView;
use portolan_intent::fabric::FabricIntent;
use portolan_intent::wiring::{PodInterface, WiringIntent};
use portolan_net::{Family, MacAddress, NodeName, ObjectKey, ObjectKind, Origin};
use portolan_state::AttachmentKey;

use super::fabric;
use super::{Address, Link, LinkKind, PodLink, Program, Sysctl};
use crate::layout::LINK_ALIAS_PREFIX;

/// What this node's links, addresses, routes and neighbours must be.
pub fn compile(fabric: &FabricIntent, wiring: &WiringIntent, view: &NodeView) -> Program {
    let mut program = Program::default();
    compile_bridge(wiring, view, &mut program);
    fabric::compile(fabric, wiring.mtu, view, &mut program);
    compile_sysctls(wiring, view, &mut program);
    program.pods = compile_pods(wiring, view);
    program
}

/// Lets node ports answer at 127.0.0.1.
const ROUTE_LOCALNET: &str = "net/ipv4/conf/all/route_localnet";

/// The part of the program that the wiring's interfaces alone decide.
pub fn compile_pods(wiring: &WiringIntent, view: &NodeView) -> BTreeMap<AttachmentKey, PodLink> {
    let link = |(key, interface): (&AttachmentKey, &Arc<PodInterface>)| {
        let link = PodLink {
            key: key.clone(),
            namespace_path: interface.namespace_path.clone(),
            host_interface: interface.host_interface.clone(),
            bridge: view.bridge.clone(),
            hairpin: true,
            mtu: interface.mtu,
            up: true,
            mac: interface.mac,
            addresses: interface.addresses.clone(),
            gateways: interface.gateways.clone(),
            origin: interface.origin.clone(),
        };
        (key.clone(), link)
    };
    wiring.interfaces.iter().map(link).collect()
}

/// A node without a pod prefix has no pods, and needs no bridge.
fn compile_bridge(wiring: &WiringIntent, view: &NodeView, program: &mut Program) {
    if wiring.gateways.is_empty() {
        return;
    }
    let origin = Origin::field(ObjectKind::Node, ObjectKey::cluster(view.node.as_str()), "spec.podCIDRs");
    let bridge = Link {
        name: view.bridge.clone(),
        kind: LinkKind::Bridge,
        mac: Some(bridge_mac(&view.node, &view.bridge)),
        mtu: wiring.mtu,
        alias: format!("{LINK_ALIAS_PREFIX}bridge"),
        up: true,
        origin: Origin::configuration("bridge"),
    };
    program.links.insert(bridge.name.clone(), bridge);
    for gateway in &wiring.gateways {
        let address = Address { device: view.bridge.clone(), prefix: *gateway, origin: origin.clone() };
        program.addresses.insert((view.bridge.clone(), *gateway), address);
    }
}

fn compile_sysctls(wiring: &WiringIntent, view: &NodeView, program: &mut Program) {
    let has = |family| wiring.gateways.iter().any(|gateway| Family::of_prefix(gateway) == family);
    let mut set = |path: String, value: &str| {
        program.sysctls.insert(path, Sysctl { value: value.into(), origin: Origin::configuration("bridge") });
    };
    // Without the bridge's own hooks, a reply between two pods of one bridge passes connection tracking
    // by, and the address of the Service that was called is not put back.
    if has(Family::V4) {
        set("net/ipv4/ip_forward".into(), "1");
        set("net/bridge/bridge-nf-call-iptables".into(), "1");
        if view.proxy.localhost_node_ports {
            // Without it a packet to 127.0.0.1 may not leave for an endpoint (kube-proxy's `localhostNodePorts`).
            set(ROUTE_LOCALNET.into(), "1");
        }
    }
    if has(Family::V6) {
        set("net/ipv6/conf/all/forwarding".into(), "1");
        set("net/bridge/bridge-nf-call-ip6tables".into(), "1");
        // Duplicate address detection (RFC 4862 §5.4) would keep the bridge from asking for its pods'
        // hardware addresses during its first second. Addresses are ours to give; they are not doubled.
        set(accept_dad(&view.bridge), "0");
    }
}

/// The sysctl that turns duplicate address detection off for a link.
fn accept_dad(device: &str) -> String {
    format!("net/ipv6/conf/{device}/accept_dad")
}

impl Program {
    /// The sysctls that a program may have: what `observe` reads back.
    pub fn sysctl_paths<'a>(devices: impl IntoIterator<Item = &'a str>) -> Vec<String> {
        let fixed = [
            "net/ipv4/ip_forward",
            "net/ipv6/conf/all/forwarding",
            "net/bridge/bridge-nf-call-iptables",
            "net/bridge/bridge-nf-call-ip6tables",
            ROUTE_LOCALNET,
        ];
        fixed.into_iter().map(str::to_owned).chain(devices.into_iter().map(accept_dad)).collect()
    }
}

/// The hardware address of a node's bridge. Left to itself a bridge takes the lowest one of its ports,
/// and changes it under its pods' feet when a pod comes or goes.
pub fn bridge_mac(node: &NodeName, bridge: &str) -> MacAddress {
    fabric::stable_mac(&[b"bridge", node.as_str().as_bytes(), bridge.as_bytes()])
}
