//! Nodes: addresses, pod prefixes, zone, and the end of the fabric in Flannel's annotations.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1;
use portolan_net::{Family, MacAddress, NodeName, ObjectKey, ObjectKind, Vni};
use portolan_state::{Node, NodeTunnel, Object, ObjectRef};
use serde::Deserialize;

use super::{Metadata, Outcome, Problems, Table};
use crate::lenient::{Leaf, List, Part, shorten};

const LABEL_ZONE: &str = "topology.kubernetes.io/zone";

/// What the cluster autoscaler puts on a node that it is about to take away (KEP-3836).
const TAINT_LEAVING: &str = "ToBeDeletedByClusterAutoscaler";

/// The fabric's kind.
pub(crate) const ANNOTATION_BACKEND_TYPE: &str = "flannel.alpha.coreos.com/backend-type";
/// Identifier and hardware address of the IPv4 tunnel device, as JSON.
pub(crate) const ANNOTATION_BACKEND_DATA: &str = "flannel.alpha.coreos.com/backend-data";
/// Identifier and hardware address of the IPv6 tunnel device, as JSON.
pub(crate) const ANNOTATION_BACKEND_V6_DATA: &str = "flannel.alpha.coreos.com/backend-v6-data";
/// Where other nodes send to, over IPv4.
pub(crate) const ANNOTATION_PUBLIC_IP: &str = "flannel.alpha.coreos.com/public-ip";
/// Where other nodes send to, over IPv6.
pub(crate) const ANNOTATION_PUBLIC_IPV6: &str = "flannel.alpha.coreos.com/public-ipv6";
/// Says that the pod prefix comes from the Node object.
pub(crate) const ANNOTATION_MANAGER: &str = "flannel.alpha.coreos.com/kube-subnet-manager";

/// The table of nodes.
pub(crate) struct Nodes;

/// The fields of a node that are read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NodeView {
    metadata: Part<Metadata>,
    spec: Part<Spec>,
    status: Part<Status>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Spec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Leaf<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: List<Leaf<String>>,
    taints: List<Part<Taint>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Taint {
    key: Leaf<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    addresses: List<Part<NodeAddress>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct NodeAddress {
    #[serde(rename = "type")]
    address_type: Leaf<String>,
    address: Leaf<String>,
}

/// `backend-data` of Flannel's vxlan backend.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BackendData {
    #[serde(rename = "VNI")]
    vni: Leaf<i64>,
    #[serde(rename = "VtepMAC")]
    vtep_mac: Leaf<String>,
}

impl Table for Nodes {
    type Kubernetes = v1::Node;
    type View = NodeView;
    const KIND: ObjectKind = ObjectKind::Node;

    fn reference(key: ObjectKey) -> ObjectRef {
        ObjectRef::Node(NodeName::from(&*key.name))
    }

    fn metadata(view: &mut NodeView) -> Metadata {
        std::mem::take(&mut view.metadata.0)
    }

    fn convert(metadata: &Metadata, view: NodeView, problems: &mut Problems) -> Outcome {
        let NodeView { spec: Part(spec), status: Part(status), .. } = view;
        let mut addresses = Vec::new();
        for (index, Part(entry)) in status.addresses.0.iter().enumerate() {
            if entry.address_type.text() == "InternalIP" {
                addresses.extend(problems.address(&format!("status.addresses[{index}].address"), &entry.address));
            }
        }
        Outcome::Keep(Object::Node(Node {
            name: NodeName::from(&*metadata.key().name),
            addresses,
            pod_prefixes: pod_prefixes(&spec, problems),
            tunnel: tunnel(metadata, problems),
            leaving: metadata.is_being_deleted() || spec.taints.0.iter().any(|it| it.0.key.text() == TAINT_LEAVING),
            zone: metadata.labels.get(LABEL_ZONE).filter(|zone| !zone.is_empty()).map(Into::into),
        }))
    }
}

/// At most one prefix per family. A node that has none yet is about to be given one.
fn pod_prefixes(spec: &Spec, problems: &mut Problems) -> Vec<IpNet> {
    let mut prefixes: Vec<IpNet> = Vec::new();
    let written: Vec<(String, &Leaf<String>)> = if spec.pod_cidrs.0.is_empty() {
        vec![("spec.podCIDR".to_owned(), &spec.pod_cidr)]
    } else {
        spec.pod_cidrs.0.iter().enumerate().map(|(index, it)| (format!("spec.podCIDRs[{index}]"), it)).collect()
    };
    for (field, leaf) in written {
        let text = match leaf {
            Leaf::Absent => continue,
            Leaf::Good(text) if text.is_empty() => continue,
            Leaf::Good(text) | Leaf::Bad(text) => text,
        };
        let Ok(prefix) = text.parse::<IpNet>() else {
            let reason = format!("`{}` is not a prefix", shorten(text));
            problems.note(field, reason, "write an address and a length, such as 10.42.1.0/24");
            continue;
        };
        let family = Family::of_prefix(&prefix);
        if prefixes.iter().any(|other| Family::of_prefix(other) == family) {
            let reason = format!("{prefix} is a second {family} prefix");
            problems.note(field, reason, "a node has at most one pod prefix per family");
            continue;
        }
        // Bits beyond the length say nothing.
        prefixes.push(prefix.trunc());
    }
    prefixes
}

fn tunnel(metadata: &Metadata, problems: &mut Problems) -> Option<NodeTunnel> {
    let backend = metadata.annotations.get(ANNOTATION_BACKEND_TYPE).filter(|backend| !backend.is_empty())?;
    let mut public_addresses = Vec::new();
    for (annotation, family) in [(ANNOTATION_PUBLIC_IP, Family::V4), (ANNOTATION_PUBLIC_IPV6, Family::V6)] {
        public_addresses.extend(public_address(metadata, annotation, family, problems));
    }
    let (vni_v4, vtep_mac_v4) = backend_data(metadata, ANNOTATION_BACKEND_DATA, problems);
    let (vni_v6, vtep_mac_v6) = backend_data(metadata, ANNOTATION_BACKEND_V6_DATA, problems);
    Some(NodeTunnel { backend: backend.into(), public_addresses, vni: vni_v4.or(vni_v6), vtep_mac_v4, vtep_mac_v6 })
}

/// `…-overwrite` is what an operator sets for a node behind an address translator; it wins.
fn public_address(metadata: &Metadata, name: &str, family: Family, problems: &mut Problems) -> Option<IpAddr> {
    let overwrite = format!("{name}-overwrite");
    let (name, text) = [overwrite.as_str(), name]
        .into_iter()
        .find_map(|name| metadata.annotations.get(name).filter(|text| !text.is_empty()).map(|text| (name, text)))?;
    let field = format!("metadata.annotations[{name}]");
    let address = problems.address(&field, &Leaf::Good(text.to_owned()))?;
    if Family::of(address) != family {
        problems.note(field, format!("{address} is not {family}"), "each family has an annotation of its own");
        return None;
    }
    Some(address)
}

fn backend_data(metadata: &Metadata, name: &str, problems: &mut Problems) -> (Option<Vni>, Option<MacAddress>) {
    // Backends without data of their own write "null" or nothing.
    let Some(text) = metadata.annotations.get(name).filter(|text| !matches!(text.trim(), "" | "null")) else {
        return (None, None);
    };
    let field = format!("metadata.annotations[{name}]");
    let hint = "the node's agent writes this annotation: remove it, and the agent writes it anew";
    let data: BackendData = match serde_json::from_str(text) {
        Ok(Part(data)) => data,
        Err(error) => {
            problems.note(field, format!("`{}` is not JSON: {error}", shorten(text)), hint);
            return (None, None);
        }
    };
    let vni = match &data.vni {
        Leaf::Absent => None,
        Leaf::Good(number) => u32::try_from(*number).ok().and_then(Vni::new),
        Leaf::Bad(_) => None,
    };
    if vni.is_none() && !data.vni.is_absent() {
        problems.note(format!("{field}.VNI"), "the network identifier does not fit 24 bits", hint);
    }
    let mac = data.vtep_mac.get().and_then(|text| text.parse::<MacAddress>().ok());
    if mac.is_none() && !data.vtep_mac.is_absent() {
        let reason = "the hardware address is not six pairs of hexadecimal digits";
        problems.note(format!("{field}.VtepMAC"), reason, hint);
    }
    (vni, mac.filter(|mac| is_unicast(*mac, &field, hint, problems)))
}

/// A frame sent to a group address would not reach the node alone.
fn is_unicast(mac: MacAddress, field: &str, hint: &str, problems: &mut Problems) -> bool {
    let unicast = mac.0[0] & 1 == 0 && mac.0 != [0; 6];
    if !unicast {
        problems.note(format!("{field}.VtepMAC"), format!("{mac} is not the address of one device"), hint);
    }
    unicast
}
