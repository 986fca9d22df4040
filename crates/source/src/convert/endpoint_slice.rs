//! Slices of endpoints (discovery.k8s.io/v1).

use std::sync::Arc;

use k8s_openapi::api::discovery::v1;
use portolan_net::{Family, NodeName, ObjectKey, ObjectKind};
use portolan_state::{Endpoint, EndpointHints, EndpointPort, EndpointSlice, Object, ObjectRef};
use serde::Deserialize;

use super::{Metadata, Outcome, Problems, Table};
use crate::lenient::{Leaf, List, Part, shorten};

const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Set by the controller on the slices of a Service that has no cluster address.
const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";

/// The table of endpoint slices.
pub(crate) struct EndpointSlices;

/// The fields of a slice that are read.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct SliceView {
    metadata: Part<Metadata>,
    address_type: Leaf<String>,
    ports: List<Part<PortView>>,
    endpoints: List<Part<EndpointView>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PortView {
    name: Leaf<String>,
    protocol: Leaf<String>,
    port: Leaf<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct EndpointView {
    addresses: List<Leaf<String>>,
    conditions: Part<Conditions>,
    node_name: Leaf<String>,
    hostname: Leaf<String>,
    hints: Part<Hints>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Hints {
    for_nodes: List<Part<Hint>>,
    for_zones: List<Part<Hint>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Hint {
    name: Leaf<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Conditions {
    ready: Leaf<bool>,
    serving: Leaf<bool>,
    terminating: Leaf<bool>,
}

impl Table for EndpointSlices {
    type Kubernetes = v1::EndpointSlice;
    type View = SliceView;
    const KIND: ObjectKind = ObjectKind::EndpointSlice;

    fn reference(key: ObjectKey) -> ObjectRef {
        ObjectRef::EndpointSlice(key)
    }

    fn metadata(view: &mut SliceView) -> Metadata {
        std::mem::take(&mut view.metadata.0)
    }

    fn convert(metadata: &Metadata, view: SliceView, problems: &mut Problems) -> Outcome {
        let family = match view.address_type.text() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            // Names are for whoever resolves them; there is nothing to send packets to.
            "FQDN" => return Outcome::Skip,
            other => {
                let reason = format!("`{}` is not an address type", shorten(other));
                problems.note("addressType", reason, "use IPv4 or IPv6");
                return Outcome::Reject;
            }
        };
        let Some(service) = metadata.labels.get(LABEL_SERVICE_NAME).filter(|name| !name.is_empty()) else {
            problems.note(
                format!("metadata.labels[{LABEL_SERVICE_NAME}]"),
                "the slice does not say whose endpoints it holds",
                "set the label to the name of a Service in the slice's namespace",
            );
            return Outcome::Reject;
        };
        let key = metadata.key();
        let service = ObjectKey { namespace: key.namespace.clone(), name: service.into() };
        let ports = ports(&view.ports.0, problems);
        // Sized at once: a table holds 100,000 endpoints, and slack of half a vector each is megabytes.
        let mut endpoints = Vec::with_capacity(view.endpoints.0.len());
        for (index, Part(view)) in view.endpoints.0.into_iter().enumerate() {
            endpoints.extend(endpoint(index, view, family, problems));
        }
        let headless = metadata.labels.get(LABEL_HEADLESS).is_some();
        metadata.keep(Object::EndpointSlice(EndpointSlice { key, service, family, ports, endpoints, headless }))
    }
}

fn ports(views: &[Part<PortView>], problems: &mut Problems) -> Vec<EndpointPort> {
    let mut ports = Vec::with_capacity(views.len());
    for (index, Part(view)) in views.iter().enumerate() {
        // No number stands for all ports: there is no one port to send to.
        if view.port.is_absent() {
            continue;
        }
        let name = view.name.text();
        let at = if name.is_empty() { index.to_string() } else { name.to_owned() };
        let protocol = problems.protocol(&format!("ports[{at}].protocol"), &view.protocol);
        let port = problems.port(&format!("ports[{at}].port"), &view.port);
        if let (Some(protocol), Some(port)) = (protocol, port) {
            ports.push(EndpointPort { name: name.into(), protocol, port });
        }
    }
    ports
}

fn endpoint(index: usize, view: EndpointView, family: Family, problems: &mut Problems) -> Option<Endpoint> {
    let field = format!("endpoints[{index}].addresses[0]");
    // Readers are told to use the first address only (discovery/v1 `Endpoint.addresses`).
    let address = problems.address(&field, view.addresses.0.first().unwrap_or(&Leaf::Absent))?;
    if Family::of(address) != family {
        let reason = format!("{address} is not {family}, which the slice's addressType says");
        problems.note(field, reason, "put the endpoint into a slice of its own family");
        return None;
    }
    let Part(conditions) = view.conditions;
    let ready = conditions.ready.good().unwrap_or(true);
    Some(Endpoint {
        address,
        ready,
        serving: conditions.serving.good().unwrap_or(ready),
        terminating: conditions.terminating.good().unwrap_or(false),
        node: some_text(view.node_name).map(|name| NodeName::from(&*name)),
        hostname: some_text(view.hostname),
        hints: hints(&view.hints.0),
    })
}

/// Most endpoints have none.
fn hints(view: &Hints) -> Option<Box<EndpointHints>> {
    let names = |list: &List<Part<Hint>>| -> Vec<Arc<str>> {
        list.0.iter().map(|hint| hint.0.name.text()).filter(|name| !name.is_empty()).map(Arc::from).collect()
    };
    let nodes: Vec<NodeName> = names(&view.for_nodes).iter().map(|name| NodeName::from(&**name)).collect();
    let zones = names(&view.for_zones);
    (!nodes.is_empty() || !zones.is_empty()).then(|| Box::new(EndpointHints { nodes, zones }))
}

fn some_text(leaf: Leaf<String>) -> Option<Arc<str>> {
    leaf.good().filter(|text| !text.is_empty()).map(Arc::from)
}
