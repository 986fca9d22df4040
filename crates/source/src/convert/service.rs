//! Services.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1;
use portolan_net::{Family, ObjectKey, ObjectKind};
use portolan_state::{Object, ObjectRef, Service, ServicePort, ServiceType};
use serde::Deserialize;

use super::traffic::{self, Status, TrafficView};
use super::{Metadata, Outcome, Problems, Table};
use crate::lenient::{Leaf, List, Part, shorten};

/// The table of Services.
pub(crate) struct Services;

/// The fields of a Service that are read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ServiceView {
    metadata: Part<Metadata>,
    spec: Part<Spec>,
    status: Part<Status>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    #[serde(rename = "type")]
    service_type: Leaf<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Leaf<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: List<Leaf<String>>,
    external_name: Leaf<String>,
    ports: List<Part<PortView>>,
    publish_not_ready_addresses: Leaf<bool>,
    #[serde(flatten)]
    traffic: TrafficView,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PortView {
    name: Leaf<String>,
    protocol: Leaf<String>,
    port: Leaf<i64>,
    node_port: Leaf<i64>,
}

impl Table for Services {
    type Kubernetes = v1::Service;
    type View = ServiceView;
    const KIND: ObjectKind = ObjectKind::Service;

    fn reference(key: ObjectKey) -> ObjectRef {
        ObjectRef::Service(key)
    }

    fn metadata(view: &mut ServiceView) -> Metadata {
        std::mem::take(&mut view.metadata.0)
    }

    fn convert(metadata: &Metadata, view: ServiceView, problems: &mut Problems) -> Outcome {
        let Part(spec) = view.spec;
        let Some(service_type) = service_type(&spec, problems) else { return Outcome::Reject };
        let named_only = matches!(service_type, ServiceType::ExternalName(_));
        let headless = !named_only && (spec.cluster_ip.text() == "None" || first(&spec.cluster_ips) == "None");
        let cluster_addresses = if named_only || headless { Vec::new() } else { cluster_addresses(&spec, problems) };
        let ports = ports(&spec.ports.0, problems);

        // A name is useful without ports; an address, or a node's port, is not.
        let written = !spec.ports.0.is_empty() || !spec.cluster_ips.0.is_empty() || !spec.cluster_ip.is_absent();
        let reachable = !cluster_addresses.is_empty() || ports.iter().any(|port| port.node_port.is_some());
        let useless = ports.is_empty() || !reachable;
        if !named_only && !headless && written && useless && problems.any() {
            return Outcome::Reject;
        }
        metadata.keep(Object::Service(Service {
            key: metadata.key(),
            service_type,
            cluster_addresses,
            headless,
            ports,
            traffic: traffic::traffic(&spec.traffic, &view.status.0, problems),
            publish_not_ready: spec.publish_not_ready_addresses.good().unwrap_or(false),
        }))
    }
}

fn first(list: &List<Leaf<String>>) -> &str {
    list.0.first().map_or("", Leaf::text)
}

fn service_type(spec: &Spec, problems: &mut Problems) -> Option<ServiceType> {
    match spec.service_type.text() {
        "" if !matches!(spec.service_type, Leaf::Bad(_)) => Some(ServiceType::ClusterIp),
        "ClusterIP" => Some(ServiceType::ClusterIp),
        "NodePort" => Some(ServiceType::NodePort),
        "LoadBalancer" => Some(ServiceType::LoadBalancer),
        "ExternalName" => {
            let name = spec.external_name.text();
            if name.is_empty() {
                let reason = "a Service of type ExternalName names nothing";
                problems.note("spec.externalName", reason, "write the DNS name that it stands for");
                return None;
            }
            Some(ServiceType::ExternalName(name.into()))
        }
        other => {
            let reason = format!("`{}` is not a type of Service", shorten(other));
            problems.note("spec.type", reason, "use ClusterIP, NodePort, LoadBalancer or ExternalName");
            None
        }
    }
}

/// At most one address per family. A Service that has none yet is about to be given one.
fn cluster_addresses(spec: &Spec, problems: &mut Problems) -> Vec<IpAddr> {
    // Servers before dual stack (1.20) know only the singular field.
    let singular = std::slice::from_ref(&spec.cluster_ip);
    let (field, written) = if spec.cluster_ips.0.is_empty() {
        ("spec.clusterIP", singular)
    } else {
        ("spec.clusterIPs", &*spec.cluster_ips.0)
    };
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (index, text) in written.iter().enumerate() {
        if matches!(text, Leaf::Absent) || text.get().is_some_and(String::is_empty) {
            continue;
        }
        let field = if field.ends_with('s') { format!("{field}[{index}]") } else { field.to_owned() };
        let Some(address) = problems.address(&field, text) else { continue };
        if addresses.iter().any(|other| Family::of(*other) == Family::of(address)) {
            let reason = format!("{address} is a second {} address", Family::of(address));
            problems.note(field, reason, "a Service has at most one cluster address per family");
            continue;
        }
        addresses.push(address);
    }
    addresses
}

fn ports(views: &[Part<PortView>], problems: &mut Problems) -> Vec<ServicePort> {
    let mut ports = Vec::with_capacity(views.len());
    let (mut numbers, mut names) = (BTreeSet::new(), BTreeSet::new());
    for (index, Part(view)) in views.iter().enumerate() {
        let name: Arc<str> = view.name.text().into();
        let at = if name.is_empty() { index.to_string() } else { name.to_string() };
        let protocol = problems.protocol(&format!("spec.ports[{at}].protocol"), &view.protocol);
        let port = problems.port(&format!("spec.ports[{at}].port"), &view.port);
        let (Some(protocol), Some(port)) = (protocol, port) else { continue };
        if !numbers.insert((protocol, port)) {
            let reason = format!("{port}/{protocol} is taken by an earlier port of this Service");
            problems.note(format!("spec.ports[{at}].port"), reason, "give each port a number of its own");
            continue;
        }
        if !names.insert(name.clone()) {
            let reason = format!("the name `{name}` is taken by an earlier port of this Service");
            problems.note(format!("spec.ports[{index}].name"), reason, "give each port a name of its own");
            continue;
        }
        // 0 is how a server writes "none".
        let has_node_port = !matches!(view.node_port, Leaf::Absent | Leaf::Good(0));
        let node_port =
            if has_node_port { problems.port(&format!("spec.ports[{at}].nodePort"), &view.node_port) } else { None };
        ports.push(ServicePort { name, protocol, port, node_port });
    }
    ports
}
