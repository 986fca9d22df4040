//! The ways to pods on other nodes: one file per mode.

mod host_gw;
mod ipip;
mod vxlan;

use ipnet::IpNet;
use portolan_intent::fabric::{FabricIntent, Way};
use portolan_intent::{Encapsulation, NodeView};
use portolan_net::{Family, MacAddress, ObjectKey, ObjectKind, Origin};

use super::{Address, Program};

pub use ipip::ipip_device;
pub use vxlan::{device, vtep_mac};

/// Adds the links, routes, neighbours and forwarding entries that lead to other nodes' pods.
pub(super) fn compile(fabric: &FabricIntent, mtu: u32, view: &NodeView, program: &mut Program) {
    if let Some(encapsulation) = view.encapsulation() {
        compile_tunnels(encapsulation, fabric, mtu, view, program);
    }
    for (prefix, peer) in &fabric.peers {
        match peer.way {
            Way::Direct => host_gw::compile_peer(prefix, peer, view, program),
            Way::Vxlan { vtep_mac } => vxlan::compile_peer(prefix, peer, vtep_mac, view, program),
            Way::Ipip => ipip::compile_peer(prefix, peer, program),
        }
    }
}

/// One device for each family, whose address is the base of the node's pod prefix: what the node itself sends from.
///
/// They are there also while no peer needs them, since a peer may send by one what comes back without.
fn compile_tunnels(
    encapsulation: Encapsulation,
    fabric: &FabricIntent,
    mtu: u32,
    view: &NodeView,
    program: &mut Program,
) {
    for family in Family::ALL {
        // A node without an address of the family can neither send nor receive tunnelled packets of it.
        let local = fabric.local_addresses.iter().copied().find(|address| Family::of(*address) == family);
        let prefix = fabric.local_prefixes.iter().find(|prefix| Family::of_prefix(prefix) == family);
        let (Some(local), Some(prefix)) = (local, prefix) else { continue };
        let link = match encapsulation {
            Encapsulation::Vxlan => vxlan::link(local, mtu, view),
            Encapsulation::Ipip => ipip::link(local, mtu),
        };
        let origin = Origin::field(ObjectKind::Node, ObjectKey::cluster(view.node.as_str()), "spec.podCIDRs");
        let (device, prefix) = (link.name.clone(), IpNet::from(vxlan::base(prefix)));
        program.links.insert(device.clone(), link);
        program.addresses.insert((device.clone(), prefix), Address { device, prefix, origin });
    }
}

/// A locally administered hardware address from a hash of what it belongs to: the same after a restart,
/// so that what other nodes hold stays right. The hash is FNV-1a with 64 bits, of which 40 are
/// used; two of 1,000 nodes share an address with a probability below one in a million.
pub(super) fn stable_mac(parts: &[&[u8]]) -> MacAddress {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for part in parts {
        // A zero byte between the parts keeps ("ab", "c") and ("a", "bc") apart.
        for byte in part.iter().chain(&[0]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    // FNV spreads the last bytes of its input badly; names of nodes differ just there. The finisher of
    // MurmurHash3 spreads them.
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    let bytes = (hash ^ (hash >> 33)).to_be_bytes();
    MacAddress::local([bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
}
