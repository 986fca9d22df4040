//! The tables that `portolan show` prints: rows for people, items for programs.

use std::collections::BTreeSet;

use portolan_intent::services::{FrontendKind, ServicesIntent};
use portolan_net::IpNet;
use portolan_state::{Problem, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A table's rows, as text and as values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// Headings.
    pub columns: Vec<String>,
    /// Rows as text.
    pub rows: Vec<Vec<String>>,
    /// Rows as values.
    pub items: Vec<Value>,
}

/// Every table, for help texts and for the error that names them.
pub const TABLES: &[&str] = &["services", "endpoints", "nodes", "pods", "attachments", "routes", "names", "problems"];

/// A row of `routes`, which the loop fills in from the netlink room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteRow {
    /// The prefix.
    pub prefix: String,
    /// The rest, as `ip route` prints it.
    pub way: String,
    /// The object that caused it; empty for routes that are not ours.
    pub origin: String,
}

/// The zone that names are shown in: what nearly every cluster calls itself.
const DEFAULT_ZONE: &str = "cluster.local";

/// What tables are made from.
pub(crate) struct Sources<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) services: &'a ServicesIntent,
    pub(crate) routes: Vec<RouteRow>,
    pub(crate) problems: Vec<Problem>,
}

/// The table of this name, or `None` if there is none.
pub(crate) fn table(name: &str, sources: &Sources<'_>) -> Option<Table> {
    let (columns, rows): (&[&str], Vec<(Vec<String>, Value)>) = match name {
        "services" => (&["NAMESPACE", "NAME", "PORT", "FRONTEND", "TYPE", "ENDPOINTS"], services(sources)),
        "endpoints" => (&["NAMESPACE", "SERVICE", "FRONTEND", "ENDPOINT", "LOCAL", "SLICE"], endpoints(sources)),
        "nodes" => (&["NAME", "ADDRESSES", "POD-PREFIXES", "BACKEND"], nodes(sources)),
        "pods" => (&["NAMESPACE", "NAME", "NODE", "ADDRESSES"], pods(sources)),
        "attachments" => (&["CONTAINER", "INTERFACE", "POD", "ADDRESSES", "HOST-INTERFACE"], attachments(sources)),
        "routes" => (&["PREFIX", "WAY", "ORIGIN"], routes(sources)),
        "names" => (&["NAME", "TYPE", "NAMESPACE", "SERVICE"], names_of(sources)),
        "problems" => (&["OBJECT", "FIELD", "REASON", "HINT"], problems(sources)),
        _ => return None,
    };
    let (rows, items) = rows.into_iter().unzip();
    Some(Table { name: name.to_owned(), columns: columns.iter().map(|it| (*it).to_owned()).collect(), rows, items })
}

fn services(sources: &Sources<'_>) -> Vec<(Vec<String>, Value)> {
    let row = |(key, frontend): (
        &portolan_intent::services::FrontendKey,
        &std::sync::Arc<portolan_intent::services::Frontend>,
    )| {
        let owner = &frontend.origin.key;
        let kind = match frontend.kind {
            FrontendKind::ClusterIp => "ClusterIP",
            FrontendKind::ExternalIp => "ExternalIP",
            FrontendKind::LoadBalancer => "LoadBalancer",
            FrontendKind::NodePort => "NodePort",
        };
        let text = vec![
            owner.namespace.to_string(),
            owner.name.to_string(),
            frontend.port_name.to_string(),
            key.to_string(),
            kind.to_owned(),
            frontend.endpoints.of(frontend.policy).len().to_string(),
        ];
        (
            text,
            json!({"namespace": owner.namespace, "name": owner.name, "port": frontend.port_name, "frontend": key, "type": kind, "endpoints": frontend.endpoints.of(frontend.policy).len()}),
        )
    };
    let mut rows: Vec<_> = sources.services.iter().map(row).collect();
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    rows
}

fn endpoints(sources: &Sources<'_>) -> Vec<(Vec<String>, Value)> {
    let mut rows = Vec::new();
    for (key, frontend) in sources.services {
        let owner = &frontend.origin.key;
        for backend in frontend.endpoints.of(frontend.policy).iter() {
            rows.push((
                vec![
                    owner.namespace.to_string(),
                    owner.name.to_string(),
                    key.to_string(),
                    backend.socket().to_string(),
                    if backend.local { "yes" } else { "no" }.to_owned(),
                    backend.origin.key.name.to_string(),
                ],
                json!({"namespace": owner.namespace, "service": owner.name, "frontend": key, "endpoint": backend.socket(), "local": backend.local, "slice": backend.origin.key.name}),
            ));
        }
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    rows
}

fn nodes(sources: &Sources<'_>) -> Vec<(Vec<String>, Value)> {
    let row = |node: &std::sync::Arc<portolan_state::Node>| {
        let backend = node.tunnel.as_ref().map(|tunnel| tunnel.backend.to_string()).unwrap_or_default();
        (vec![node.name.to_string(), joined(&node.addresses), joined(&node.pod_prefixes), backend], json!(**node))
    };
    sources.snapshot.nodes.values().map(row).collect()
}

fn pods(sources: &Sources<'_>) -> Vec<(Vec<String>, Value)> {
    let row = |pod: &std::sync::Arc<portolan_state::Pod>| {
        let node = pod.node.as_ref().map(ToString::to_string).unwrap_or_default();
        let text = vec![pod.key.namespace.to_string(), pod.key.name.to_string(), node, joined(&pod.addresses)];
        (text, json!(**pod))
    };
    sources.snapshot.pods.values().map(row).collect()
}

fn attachments(sources: &Sources<'_>) -> Vec<(Vec<String>, Value)> {
    let row = |attachment: &std::sync::Arc<portolan_state::Attachment>| {
        let text = vec![
            attachment.key.container.to_string(),
            attachment.key.interface.to_string(),
            attachment.pod.as_ref().map(ToString::to_string).unwrap_or_default(),
            joined(&attachment.addresses.iter().map(IpNet::addr).collect::<Vec<_>>()),
            attachment.host_interface.to_string(),
        ];
        (text, json!(**attachment))
    };
    sources.snapshot.attachments.values().map(row).collect()
}

fn routes(sources: &Sources<'_>) -> Vec<(Vec<String>, Value)> {
    let row = |route: &RouteRow| (vec![route.prefix.clone(), route.way.clone(), route.origin.clone()], json!(route));
    sources.routes.iter().map(row).collect()
}

fn names_of(sources: &Sources<'_>) -> Vec<(Vec<String>, Value)> {
    let row = |service: &std::sync::Arc<portolan_state::Service>| {
        let kind = match &service.service_type {
            portolan_state::ServiceType::ExternalName(_) => "CNAME",
            _ if service.headless => "endpoints",
            _ => "addresses",
        };
        let name = format!("{}.{}.svc.{}", service.key.name, service.key.namespace, DEFAULT_ZONE);
        let text = vec![name.clone(), kind.into(), service.key.namespace.to_string(), service.key.name.to_string()];
        (text, json!({"name": name, "type": kind, "namespace": service.key.namespace, "service": service.key.name}))
    };
    sources.snapshot.services.values().map(row).collect()
}

fn problems(sources: &Sources<'_>) -> Vec<(Vec<String>, Value)> {
    let row = |problem: &Problem| {
        let text = vec![
            problem.object.to_string(),
            problem.field.to_string(),
            problem.reason.to_string(),
            problem.hint.to_string(),
        ];
        (text, json!(problem))
    };
    sources.problems.iter().map(row).collect()
}

/// All problems that are known, sorted, each once.
pub(crate) fn gather(snapshot: &Snapshot, further: impl IntoIterator<Item = Problem>) -> Vec<Problem> {
    let known = snapshot.problems.values().flat_map(|problems| problems.iter().cloned());
    let unique: BTreeSet<Problem> = known.chain(further).collect();
    unique.into_iter().collect()
}

fn joined<T: ToString>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
