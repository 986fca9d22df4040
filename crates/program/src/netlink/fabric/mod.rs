//! The ways to pods on other nodes: one file per mode.

mod host_gw;
mod vxlan;

use portolan_intent::fabric::FabricIntent;
use portolan_intent::{FabricMode, NodeView};
use portolan_net::MacAddress;

use super::Program;

pub use vxlan::{device, vtep_mac};

/// Adds the links, routes, neighbours and forwarding entries that lead to other nodes' pods.
pub(super) fn compile(fabric: &FabricIntent, mtu: u32, view: &NodeView, program: &mut Program) {
    match view.fabric {
        FabricMode::Vxlan => vxlan::compile(fabric, mtu, view, program),
        FabricMode::HostGw => host_gw::compile(fabric, view, program),
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
