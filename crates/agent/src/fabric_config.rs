//! The part of the agent's configuration that is the fabric's: one section for each mode that has something to set.
//!
//! ```yaml
//! fabric: host-gw
//! hostGw: {beyond: vxlan}
//! vxlan: {vni: 1, port: 8472, directRouting: true}
//! ```
//!
//! The fields are Flannel's, in this file's spelling; Flannel's own spelling is taken, too. The keys `vni` and
//! `vxlanPort` beside the sections say the same as `vxlan.vni` and `vxlan.port`.

use portolan_intent::{Encapsulation, FabricSettings, HostGwSettings, IpipSettings, VxlanSettings};
use portolan_net::Vni;
use serde::Deserialize;

/// What is not said of `vxlan` is Flannel's default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VxlanConfig {
    /// The network identifier.
    #[serde(alias = "VNI")]
    pub vni: Option<u32>,
    /// The UDP port of all nodes.
    #[serde(alias = "Port")]
    pub port: Option<u16>,
    /// Whether packets carry the mark of a group-based policy.
    #[serde(alias = "GBP")]
    pub gbp: bool,
    /// Whether the tunnel learns from the packets that come.
    #[serde(alias = "Learning")]
    pub learning: bool,
    /// Whether nodes on this node's own link have plain routes.
    #[serde(alias = "DirectRouting")]
    pub direct_routing: bool,
    /// The MTU of the way between nodes in bytes; by default the underlay's link has it.
    #[serde(alias = "MTU")]
    pub mtu: Option<u32>,
}

/// What is set for `ipip`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IpipConfig {
    /// Whether nodes on this node's own link have plain routes.
    #[serde(alias = "DirectRouting")]
    pub direct_routing: bool,
}

/// What is set for `host-gw`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HostGwConfig {
    /// How nodes beyond this node's own link are reached: `vxlan` or `ipip`.
    pub beyond: Option<Encapsulation>,
}

/// A field of these sections that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct FabricConfigError {
    /// The field.
    pub field: &'static str,
    /// What is wrong and what to do.
    pub reason: String,
}

/// The smallest MTU that leaves IPv6 its 1280 bytes (RFC 8200 §5) inside the largest header.
const MTU_MIN: u32 = 1350;

/// The largest packet of IP.
const MTU_MAX: u32 = 65_535;

/// What the sections and the two keys beside them come to.
pub(crate) fn settings(
    vxlan: &VxlanConfig,
    ipip: &IpipConfig,
    host_gw: &HostGwConfig,
    vni: Option<u32>,
    port: Option<u16>,
) -> Result<FabricSettings, FabricConfigError> {
    let defaults = VxlanSettings::default();
    let one = |field, there: Option<u32>, here: Option<u32>| match (there, here) {
        (Some(there), Some(here)) if there != here => {
            let reason = format!("{here}, and the section vxlan says {there}: let both say the same, or leave one out");
            Err(FabricConfigError { field, reason })
        }
        (there, here) => Ok(there.or(here)),
    };
    let number = one("vni", vxlan.vni, vni)?.unwrap_or_else(|| defaults.vni.get());
    let vni = Vni::new(number).ok_or_else(|| FabricConfigError {
        field: "vni",
        reason: format!("{number} does not fit 24 bits: use 1 to 16777215"),
    })?;
    let port = one("vxlanPort", vxlan.port.map(u32::from), port.map(u32::from))?;
    let port = port.and_then(|port| u16::try_from(port).ok()).unwrap_or(defaults.port);
    if port == 0 {
        let reason = "0 is no port: use 1 to 65535, or leave it out".into();
        return Err(FabricConfigError { field: "vxlan.port", reason });
    }
    if let Some(mtu) = vxlan.mtu.filter(|mtu| !(MTU_MIN..=MTU_MAX).contains(mtu)) {
        let reason = format!("{mtu} is not between {MTU_MIN} and {MTU_MAX}: give the MTU of the way between nodes");
        return Err(FabricConfigError { field: "vxlan.mtu", reason });
    }
    let VxlanConfig { gbp, learning, direct_routing, mtu, .. } = *vxlan;
    Ok(FabricSettings {
        vxlan: VxlanSettings { vni, port, gbp, learning, direct_routing, mtu },
        ipip: IpipSettings { direct_routing: ipip.direct_routing },
        host_gw: HostGwSettings { beyond: host_gw.beyond },
    })
}
