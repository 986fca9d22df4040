//! Kubernetes' defaults and validation, as far as the network depends on them.
//!
//! `admit` is pure: it looks at the object, the one it replaces, and what else the cluster holds. It
//! fills in what Kubernetes fills in (ports, families, addresses) and answers with every fault that
//! it finds, in the words and with the field paths of kube-apiserver. When it fails, the object may
//! already carry defaults; the caller drops it.
//!
//! ```text
//!   mod.rs       metadata, dispatch, causes        names.rs      RFC 1123, labels
//!   service.rs   Service                           allocate.rs   ClusterIPs, NodePorts, podCIDRs
//!   traffic.rs   Service: affinity, policies, load balancers
//!   workload.rs  Pod, ReplicaSet, Deployment       network.rs    Endpoints, slices, Ingress, policies
//!   cluster.rs   Namespace, Node, CRD
//! ```

mod allocate;
mod cluster;
mod names;
mod network;
mod service;
mod traffic;
mod workload;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde_json::Value;

use crate::fields::{at, items, name, text};

pub use allocate::{Holders, node_prefixes};
pub(crate) use allocate::{overlaps, takes_more};
pub use names::{is_dns_label, is_dns_subdomain, is_label_key, is_label_value};

/// Objects of one kind by namespace (empty for cluster-scoped ones) and name.
pub type Objects = BTreeMap<(String, String), Value>;

/// How long each node's share of the cluster's prefixes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodePrefixLengths {
    /// For IPv4 prefixes.
    pub ipv4: u8,
    /// For IPv6 prefixes.
    pub ipv6: u8,
}

impl NodePrefixLengths {
    /// The length of a node's part of a prefix.
    pub(crate) fn of(self, prefix: &IpNet) -> u8 {
        if prefix.addr().is_ipv4() { self.ipv4 } else { self.ipv6 }
    }
}

impl Default for NodePrefixLengths {
    /// kube-controller-manager's defaults.
    fn default() -> Self {
        NodePrefixLengths { ipv4: 24, ipv6: 64 }
    }
}

/// What admission needs to know about the rest of the cluster.
#[derive(Debug, Clone)]
pub struct ClusterView<'a> {
    /// What the Services hold.
    pub holders: &'a Holders,
    /// All Nodes.
    pub nodes: &'a Objects,
    /// The ranges of ClusterIPs; the family of the first is the default one.
    pub service_prefixes: &'a [IpNet],
    /// The ports that NodePort Services may take.
    pub node_port_range: RangeInclusive<u16>,
    /// The ranges of pod addresses.
    pub cluster_prefixes: &'a [IpNet],
    /// The lengths of the nodes' podCIDRs.
    pub node_prefix_lengths: NodePrefixLengths,
}

/// The reason of a cause, as `metav1.CauseType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CauseReason {
    /// The value is of the wrong form or out of range.
    Invalid,
    /// A value is missing.
    Required,
    /// The value is none of those that are supported.
    NotSupported,
    /// The value is taken.
    Duplicate,
    /// The field may not be set here, or not be changed.
    Forbidden,
}

impl CauseReason {
    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            CauseReason::Invalid => "FieldValueInvalid",
            CauseReason::Required => "FieldValueRequired",
            CauseReason::NotSupported => "FieldValueNotSupported",
            CauseReason::Duplicate => "FieldValueDuplicate",
            CauseReason::Forbidden => "FieldValueForbidden",
        }
    }
}

impl fmt::Display for CauseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One fault of an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Cause {
    /// The path of the field, as `spec.ports[0].port`.
    pub field: String,
    /// What kind of fault it is.
    pub reason: CauseReason,
    /// What is wrong and what would be right, without the field.
    pub message: String,
}

/// Collects faults.
#[derive(Debug, Default)]
struct Causes(Vec<Cause>);

impl Causes {
    fn push(&mut self, field: impl Into<String>, reason: CauseReason, message: String) {
        self.0.push(Cause { field: field.into(), reason, message });
    }

    fn invalid(&mut self, field: impl Into<String>, value: &Value, why: &str) {
        self.push(field, CauseReason::Invalid, format!("Invalid value: {value}: {why}"));
    }

    fn required(&mut self, field: impl Into<String>, why: &str) {
        self.push(field, CauseReason::Required, format!("Required value: {why}").trim_end_matches(": ").to_owned());
    }

    fn duplicate(&mut self, field: impl Into<String>, value: &Value, why: &str) {
        let why = if why.is_empty() { String::new() } else { format!(": {why}") };
        self.push(field, CauseReason::Duplicate, format!("Duplicate value: {value}{why}"));
    }

    fn forbidden(&mut self, field: impl Into<String>, why: &str) {
        self.push(field, CauseReason::Forbidden, format!("Forbidden: {why}"));
    }

    /// Reports a value that is none of the supported ones. Null is left to whoever requires it.
    fn one_of(&mut self, field: impl Into<String>, value: &Value, supported: &[&str]) {
        if !value.is_null() && !value.as_str().is_some_and(|text| supported.contains(&text)) {
            let supported: Vec<String> = supported.iter().map(|text| format!("{text:?}")).collect();
            let message = format!("Unsupported value: {value}: supported values: {}", supported.join(", "));
            self.push(field, CauseReason::NotSupported, message);
        }
    }

    /// Reports a port number out of range, or a name that is none.
    fn port(&mut self, field: impl Into<String>, value: &Value, may_be_name: bool) {
        match value {
            Value::String(text) if may_be_name => {
                if !names::is_port_name(text) {
                    self.invalid(field, value, names::PORT_NAME_FORM);
                }
            }
            _ if value.as_i64().is_some_and(|port| (1..=65535).contains(&port)) => {}
            _ => self.invalid(field, value, "must be between 1 and 65535, inclusive"),
        }
    }

    fn immutable(&mut self, field: &str, old: &Value, new: &Value) {
        if at(old, field) != at(new, field) {
            self.invalid(field, at(new, field), "field is immutable");
        }
    }
}

/// Defaults and checks an object that is about to be written.
///
/// `old` is the object that it replaces. `kind` is the name of the kind, as `Service`; a kind that is
/// not known here has its metadata checked only.
pub fn admit(kind: &str, old: Option<&Value>, new: &mut Value, cluster: &ClusterView<'_>) -> Result<(), Vec<Cause>> {
    let mut causes = Causes::default();
    check_metadata(kind, old, new, &mut causes);
    match kind {
        "Service" => service::admit(old, new, cluster, &mut causes),
        "Pod" => workload::pod(old, new, &mut causes),
        "ReplicaSet" => workload::replica_set(old, new, &mut causes),
        "Deployment" => workload::deployment(old, new, &mut causes),
        "Endpoints" => network::endpoints(new, &mut causes),
        "EndpointSlice" => network::endpoint_slice(old, new, &mut causes),
        "Ingress" => network::ingress(new, &mut causes),
        "NetworkPolicy" => network::network_policy(new, &mut causes),
        "Namespace" => cluster::namespace(old, new),
        "Node" => cluster::node(old, new, cluster, &mut causes),
        "CustomResourceDefinition" => cluster::custom_resource_definition(old, new, &mut causes),
        "Secret" => crate::fields::set_default(new, "type", "Opaque"),
        _ => {}
    }
    if causes.0.is_empty() { Ok(()) } else { Err(causes.0) }
}

fn check_metadata(kind: &str, old: Option<&Value>, new: &Value, causes: &mut Causes) {
    let object_name = name(new);
    if object_name.is_empty() {
        causes.required("metadata.name", "name or generateName is required");
    } else {
        let (is_good, form) = match kind {
            "Namespace" => (is_dns_label(object_name), names::LABEL_FORM),
            // Services are DNS-1035 labels: their names become environment variables and host names.
            "Service" => (names::is_dns_1035_label(object_name), names::LABEL_1035_FORM),
            _ => (is_dns_subdomain(object_name), names::SUBDOMAIN_FORM),
        };
        if !is_good {
            causes.invalid("metadata.name", at(new, "metadata.name"), form);
        }
    }
    let namespace = text(new, "metadata.namespace");
    if !namespace.is_empty() && !is_dns_label(namespace) {
        causes.invalid("metadata.namespace", at(new, "metadata.namespace"), names::LABEL_FORM);
    }
    check_labels("metadata.labels", at(new, "metadata.labels"), causes);
    if let Some(annotations) = at(new, "metadata.annotations").as_object() {
        for (key, value) in annotations {
            if !is_label_key(&key.to_ascii_lowercase()) {
                causes.invalid("metadata.annotations", &Value::from(key.as_str()), names::KEY_FORM);
            }
            if !value.is_string() {
                causes.invalid("metadata.annotations", value, "an annotation is a text; put it in quotes");
            }
        }
    }
    for (index, owner) in items(new, "metadata.ownerReferences").iter().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if text(owner, field).is_empty() {
                causes.required(format!("metadata.ownerReferences[{index}].{field}"), "must not be empty");
            }
        }
    }
    if let Some(old) = old {
        for field in ["metadata.name", "metadata.namespace", "metadata.uid"] {
            if !at(new, field).is_null() {
                causes.immutable(field, old, new);
            }
        }
    }
}

/// Checks a map of labels.
fn check_labels(field: &str, labels: &Value, causes: &mut Causes) {
    match labels {
        Value::Null => {}
        Value::Object(map) => {
            for (key, value) in map {
                if !is_label_key(key) {
                    causes.invalid(field, &Value::from(key.as_str()), names::KEY_FORM);
                }
                if !value.as_str().is_some_and(is_label_value) {
                    causes.invalid(field, value, names::VALUE_FORM);
                }
            }
        }
        other => causes.invalid(field, other, "labels are a map of texts"),
    }
}

#[cfg(test)]
mod tests;
