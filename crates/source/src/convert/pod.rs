//! Pods: where they run and at which addresses.

use k8s_openapi::api::core::v1;
use portolan_net::{NodeName, ObjectKey, ObjectKind};
use portolan_state::{Object, ObjectRef, Pod};
use serde::Deserialize;

use super::{Metadata, Outcome, Problems, Table};
use crate::lenient::{Leaf, List, Part};

/// The table of pods.
pub(crate) struct Pods;

/// The few fields of a pod, out of some hundred, that are read at all.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct PodView {
    metadata: Part<Metadata>,
    spec: Part<Spec>,
    status: Part<Status>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    node_name: Leaf<String>,
    host_network: Leaf<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    phase: Leaf<String>,
    #[serde(rename = "podIP")]
    pod_ip: Leaf<String>,
    #[serde(rename = "podIPs")]
    pod_ips: List<Part<PodIp>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: Leaf<String>,
}

impl Table for Pods {
    type Kubernetes = v1::Pod;
    type View = PodView;
    const KIND: ObjectKind = ObjectKind::Pod;

    fn reference(key: ObjectKey) -> ObjectRef {
        ObjectRef::Pod(key)
    }

    fn metadata(view: &mut PodView) -> Metadata {
        std::mem::take(&mut view.metadata.0)
    }

    fn convert(metadata: &Metadata, view: PodView, problems: &mut Problems) -> Outcome {
        let PodView { spec: Part(spec), status: Part(status), .. } = view;
        // A pod that has ended keeps its addresses in its status, while another may hold them now.
        let ended = matches!(status.phase.text(), "Succeeded" | "Failed");
        let mut addresses = Vec::with_capacity(status.pod_ips.0.len());
        if !ended {
            for (index, Part(entry)) in status.pod_ips.0.iter().enumerate() {
                addresses.extend(problems.address(&format!("status.podIPs[{index}].ip"), &entry.ip));
            }
            if status.pod_ips.0.is_empty() && !status.pod_ip.text().is_empty() {
                addresses.extend(problems.address("status.podIP", &status.pod_ip));
            }
        }
        Outcome::Keep(Object::Pod(Pod {
            key: metadata.key(),
            node: spec.node_name.good().filter(|name| !name.is_empty()).map(NodeName::from),
            addresses,
            host_network: spec.host_network.good().unwrap_or(false),
        }))
    }
}
