//! Wiring: the pod interfaces on this node, and the bridge that joins them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_net::{Family, MacAddress, NodeName, ObjectKey, ObjectKind, Origin};
use portolan_state::{AttachmentKey, Snapshot};
use serde::{Deserialize, Serialize};

use crate::NodeView;

/// The pod interfaces on this node and what they hang on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WiringIntent {
    /// The pods' gateways: the first address of each pod prefix of this node, which the bridge holds.
    pub gateways: Vec<IpNet>,
    /// MTU of the pods' links, in bytes.
    pub mtu: u32,
    /// The interfaces.
    pub interfaces: BTreeMap<AttachmentKey, Arc<PodInterface>>,
}

/// One pod's interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInterface {
    /// The path of the pod's network namespace.
    pub namespace_path: Arc<str>,
    /// The interface's name inside the pod.
    pub name: Arc<str>,
    /// The name of the veth's end on the node.
    pub host_interface: Arc<str>,
    /// The hardware address of the pod's end.
    pub mac: MacAddress,
    /// The pod's addresses, with the length of the node's pod prefix.
    pub addresses: Vec<IpNet>,
    /// Default gateways, one per family of the addresses.
    pub gateways: Vec<IpAddr>,
    /// MTU in bytes.
    pub mtu: u32,
    /// The pod, or the attachment where the runtime did not name one.
    pub origin: Origin,
}

/// The address that a node's bridge holds in one of its pod prefixes: the first one, as Flannel's
/// `FLANNEL_SUBNET` and the `host-local` plugin take it.
pub fn gateway(prefix: &IpNet) -> Option<IpNet> {
    let address = prefix.trunc().hosts().nth(usize::from(Family::of_prefix(prefix) == Family::V6))?;
    IpNet::new(address, prefix.prefix_len()).ok()
}

/// The wiring that this node must have.
pub fn compile(snapshot: &Snapshot, view: &NodeView) -> WiringIntent {
    compile_some(snapshot, view, snapshot.attachments.keys())
}

/// The wiring with these interfaces alone, as far as they are there: the cost of one pod that comes or
/// goes must not follow the pods that stay.
pub fn compile_some<'a>(
    snapshot: &Snapshot,
    view: &NodeView,
    keys: impl IntoIterator<Item = &'a AttachmentKey>,
) -> WiringIntent {
    let prefixes = snapshot.nodes.get(&view.node).map(|node| node.pod_prefixes.clone()).unwrap_or_default();
    let gateways: Vec<IpNet> = prefixes.iter().filter_map(gateway).collect();
    let mtu = view.pod_mtu(underlay_has_ipv6(snapshot, &view.node));
    let interfaces = keys
        .into_iter()
        .filter_map(|key| snapshot.attachments.get_key_value(key))
        .map(|(key, attachment)| {
            let families: Vec<Family> = attachment.addresses.iter().map(Family::of_prefix).collect();
            let origin = match &attachment.pod {
                Some(pod) => Origin::object(ObjectKind::Pod, pod.clone()),
                None => Origin::object(ObjectKind::Attachment, ObjectKey::cluster(key.to_string())),
            };
            let interface = PodInterface {
                namespace_path: attachment.namespace_path.clone(),
                name: key.interface.clone(),
                host_interface: attachment.host_interface.clone(),
                mac: attachment.mac,
                addresses: attachment.addresses.clone(),
                gateways: gateways
                    .iter()
                    .filter(|gateway| families.contains(&Family::of_prefix(gateway)))
                    .map(IpNet::addr)
                    .collect(),
                mtu,
                origin,
            };
            (key.clone(), Arc::new(interface))
        })
        .collect();
    WiringIntent { gateways, mtu, interfaces }
}

/// Whether the fabric of this node may run over IPv6, which costs 20 bytes more per packet.
pub fn underlay_has_ipv6(snapshot: &Snapshot, node: &NodeName) -> bool {
    snapshot.nodes.get(node).is_some_and(|node| node.pod_prefixes.iter().any(|prefix| prefix.addr().is_ipv6()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gateway_is_the_first_address_of_the_prefix() {
        let gateway_of = |prefix: &str| gateway(&prefix.parse().unwrap()).unwrap().to_string();
        assert_eq!(gateway_of("10.42.1.0/24"), "10.42.1.1/24");
        assert_eq!(gateway_of("fd00:42:1::/64"), "fd00:42:1::1/64");
    }
}
