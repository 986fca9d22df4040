//! The columns of each kind, as kubectl's printers define them.

use serde_json::{Value, json};

use super::{Column, age, column, count, joined, labels_text, selector_text, wide};
use crate::fields::{at, condition, flag, is_terminating, items, label, name, number, text, texts};

type Row = fn(&Value, i64) -> Vec<Value>;

/// The columns of a kind and the function that fills them.
pub(super) fn of_kind(kind: &str) -> (&'static [Column], Row) {
    match kind {
        "Pod" => (POD, pod),
        "Service" => (SERVICE, service),
        "Node" => (NODE, node),
        "Deployment" => (DEPLOYMENT, deployment),
        "ReplicaSet" => (REPLICA_SET, replica_set),
        "Endpoints" => (ENDPOINTS, endpoints),
        "EndpointSlice" => (ENDPOINT_SLICE, endpoint_slice),
        "Namespace" => (NAMESPACE, namespace),
        "ConfigMap" => (CONFIG_MAP, config_map),
        "Secret" => (SECRET, secret),
        "ServiceAccount" => (SERVICE_ACCOUNT, service_account),
        "Ingress" => (INGRESS, ingress),
        "IngressClass" => (INGRESS_CLASS, ingress_class),
        "NetworkPolicy" => (NETWORK_POLICY, network_policy),
        "CustomResourceDefinition" => (DEFINITION, definition),
        "Lease" => (LEASE, lease),
        "Event" => (EVENT, event),
        _ => (GENERIC, generic),
    }
}

const GENERIC: &[Column] = &[column("Name"), column("Age")];

fn generic(object: &Value, now: i64) -> Vec<Value> {
    vec![json!(name(object)), json!(age::of(object, now))]
}

const POD: &[Column] = &[
    column("Name"),
    column("Ready"),
    column("Status"),
    column("Restarts"),
    column("Age"),
    wide("IP"),
    wide("Node"),
    wide("Nominated Node"),
    wide("Readiness Gates"),
];

fn pod(pod: &Value, now: i64) -> Vec<Value> {
    let total = items(pod, "spec.containers").len();
    let statuses = items(pod, "status.containerStatuses");
    let ready = statuses.iter().filter(|status| flag(status, "ready")).count();
    let restarts: i64 = statuses.iter().filter_map(|status| number(status, "restartCount")).sum();
    let last_restart =
        statuses.iter().map(|status| text(status, "lastState.terminated.finishedAt")).max().unwrap_or("");
    let restarts = if restarts > 0 && !last_restart.is_empty() {
        format!("{restarts} ({} ago)", age::since(last_restart, now))
    } else {
        restarts.to_string()
    };
    let gates = items(pod, "spec.readinessGates");
    let open = gates.iter().filter(|gate| {
        condition(pod, text(gate, "conditionType")).is_some_and(|condition| text(condition, "status") == "True")
    });
    let gates_text = if gates.is_empty() { "<none>".to_owned() } else { format!("{}/{}", open.count(), gates.len()) };
    vec![
        json!(name(pod)),
        json!(format!("{ready}/{total}")),
        json!(pod_status(pod)),
        json!(restarts),
        json!(age::of(pod, now)),
        or_none(text(pod, "status.podIP")),
        or_none(text(pod, "spec.nodeName")),
        or_none(text(pod, "status.nominatedNodeName")),
        json!(gates_text),
    ]
}

/// What a pod is doing: the phase, unless a container has something worse to tell.
fn pod_status(pod: &Value) -> String {
    if is_terminating(pod) {
        return if text(pod, "status.reason") == "NodeLost" { "Unknown".into() } else { "Terminating".into() };
    }
    let mut status = text(pod, "status.phase").to_owned();
    if !text(pod, "status.reason").is_empty() {
        text(pod, "status.reason").clone_into(&mut status);
    }
    let inits = items(pod, "status.initContainerStatuses");
    let is_done = |status: &&Value| number(status, "state.terminated.exitCode") == Some(0);
    if let Some(position) = inits.iter().position(|status| !is_done(&status) && !flag(status, "started")) {
        let init = &inits[position];
        let reason = [text(init, "state.waiting.reason"), text(init, "state.terminated.reason")];
        let reason = reason.into_iter().find(|reason| !matches!(*reason, "" | "PodInitializing"));
        return match reason {
            Some(reason) => format!("Init:{reason}"),
            None => format!("Init:{position}/{}", items(pod, "spec.initContainers").len()),
        };
    }
    let mut is_running = false;
    for container in items(pod, "status.containerStatuses").iter().rev() {
        for reason in [text(container, "state.waiting.reason"), text(container, "state.terminated.reason")] {
            if !reason.is_empty() {
                reason.clone_into(&mut status);
            }
        }
        if !at(container, "state.terminated").is_null() && text(container, "state.terminated.reason").is_empty() {
            status = format!("ExitCode:{}", number(container, "state.terminated.exitCode").unwrap_or(0));
        }
        is_running |= flag(container, "ready") && !at(container, "state.running").is_null();
    }
    if status == "Completed" && is_running {
        let is_ready = condition(pod, "Ready").is_some_and(|ready| text(ready, "status") == "True");
        status = if is_ready { "Running".into() } else { "NotReady".into() };
    }
    status
}

const SERVICE: &[Column] = &[
    column("Name"),
    column("Type"),
    column("Cluster-IP"),
    column("External-IP"),
    column("Port(s)"),
    column("Age"),
    wide("Selector"),
];

fn service(service: &Value, now: i64) -> Vec<Value> {
    let mut external: Vec<String> = texts(service, "spec.externalIPs").map(str::to_owned).collect();
    for ingress in items(service, "status.loadBalancer.ingress") {
        let address = [text(ingress, "ip"), text(ingress, "hostname")];
        external.extend(address.into_iter().find(|it| !it.is_empty()).map(str::to_owned));
    }
    let external = match text(service, "spec.type") {
        "ExternalName" => text(service, "spec.externalName").to_owned(),
        "LoadBalancer" if external.is_empty() => "<pending>".into(),
        _ => joined(&external),
    };
    let ports = items(service, "spec.ports").iter().map(|port| {
        let protocol = at(port, "protocol").as_str().unwrap_or("TCP");
        match number(port, "nodePort").filter(|node_port| *node_port > 0) {
            Some(node_port) => format!("{}:{node_port}/{protocol}", at(port, "port")),
            None => format!("{}/{protocol}", at(port, "port")),
        }
    });
    vec![
        json!(name(service)),
        json!(text(service, "spec.type")),
        or_none(text(service, "spec.clusterIP")),
        json!(external),
        json!(joined(&ports.collect::<Vec<_>>())),
        json!(age::of(service, now)),
        json!(labels_text(at(service, "spec.selector"))),
    ]
}

const NODE: &[Column] = &[
    column("Name"),
    column("Status"),
    column("Roles"),
    column("Age"),
    column("Version"),
    wide("Internal-IP"),
    wide("External-IP"),
    wide("OS-Image"),
    wide("Kernel-Version"),
    wide("Container-Runtime"),
];

fn node(node: &Value, now: i64) -> Vec<Value> {
    let mut status = match condition(node, "Ready").map(|ready| text(ready, "status")) {
        Some("True") => "Ready".to_owned(),
        Some("False") => "NotReady".to_owned(),
        _ => "Unknown".to_owned(),
    };
    if flag(node, "spec.unschedulable") {
        status.push_str(",SchedulingDisabled");
    }
    let labels = at(node, "metadata.labels").as_object().into_iter().flatten();
    let mut roles: Vec<String> =
        labels.filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/")).map(str::to_owned).collect();
    roles.extend(label(node, "kubernetes.io/role").map(str::to_owned));
    roles.sort();
    let address = |kind: &str| {
        let mut addresses = items(node, "status.addresses").iter();
        or_none(addresses.find(|address| text(address, "type") == kind).map_or("", |address| text(address, "address")))
    };
    let info = |field: &str| {
        let found = text(node, &format!("status.nodeInfo.{field}"));
        json!(if found.is_empty() { "<unknown>" } else { found })
    };
    vec![
        json!(name(node)),
        json!(status),
        json!(joined(&roles)),
        json!(age::of(node, now)),
        json!(text(node, "status.nodeInfo.kubeletVersion")),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

const DEPLOYMENT: &[Column] = &[
    column("Name"),
    column("Ready"),
    count("Up-to-date"),
    count("Available"),
    column("Age"),
    wide("Containers"),
    wide("Images"),
    wide("Selector"),
];

fn deployment(deployment: &Value, now: i64) -> Vec<Value> {
    let status = |field: &str| number(deployment, &format!("status.{field}")).unwrap_or(0);
    let wanted = number(deployment, "spec.replicas").unwrap_or(1);
    let mut cells = vec![
        json!(name(deployment)),
        json!(format!("{}/{wanted}", status("readyReplicas"))),
        json!(status("updatedReplicas")),
        json!(status("availableReplicas")),
        json!(age::of(deployment, now)),
    ];
    cells.extend(template_cells(deployment));
    cells
}

const REPLICA_SET: &[Column] = &[
    column("Name"),
    count("Desired"),
    count("Current"),
    count("Ready"),
    column("Age"),
    wide("Containers"),
    wide("Images"),
    wide("Selector"),
];

fn replica_set(set: &Value, now: i64) -> Vec<Value> {
    let mut cells = vec![
        json!(name(set)),
        json!(number(set, "spec.replicas").unwrap_or(1)),
        json!(number(set, "status.replicas").unwrap_or(0)),
        json!(number(set, "status.readyReplicas").unwrap_or(0)),
        json!(age::of(set, now)),
    ];
    cells.extend(template_cells(set));
    cells
}

fn template_cells(owner: &Value) -> [Value; 3] {
    let list = |field: &str| {
        let containers = items(owner, "spec.template.spec.containers").iter();
        containers.map(|container| text(container, field).to_owned()).collect::<Vec<_>>().join(",")
    };
    [json!(list("name")), json!(list("image")), json!(selector_text(at(owner, "spec.selector")))]
}

const ENDPOINTS: &[Column] = &[column("Name"), column("Endpoints"), column("Age")];

fn endpoints(endpoints: &Value, now: i64) -> Vec<Value> {
    let mut all = Vec::new();
    for subset in items(endpoints, "subsets") {
        let ports = items(subset, "ports");
        for address in items(subset, "addresses") {
            let ip = text(address, "ip");
            let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
            all.extend(ports.iter().map(|port| format!("{host}:{}", at(port, "port"))));
            if ports.is_empty() {
                all.push(ip.to_owned());
            }
        }
    }
    vec![json!(name(endpoints)), json!(shortened(&all)), json!(age::of(endpoints, now))]
}

/// The first three of a list and how many more there are.
fn shortened(all: &[String]) -> String {
    match all.len() {
        0..=3 => joined(all),
        count => format!("{} + {} more...", all[..3].join(","), count - 3),
    }
}

const ENDPOINT_SLICE: &[Column] =
    &[column("Name"), column("AddressType"), column("Ports"), column("Endpoints"), column("Age")];

fn endpoint_slice(slice: &Value, now: i64) -> Vec<Value> {
    let unset = |all: Vec<String>| if all.is_empty() { "<unset>".to_owned() } else { shortened(&all) };
    let ports = items(slice, "ports").iter();
    let ports = ports.map(|port| number(port, "port").map_or_else(|| "*".into(), |port| port.to_string())).collect();
    let addresses = items(slice, "endpoints").iter().flat_map(|endpoint| texts(endpoint, "addresses"));
    vec![
        json!(name(slice)),
        json!(text(slice, "addressType")),
        json!(unset(ports)),
        json!(unset(addresses.map(str::to_owned).collect())),
        json!(age::of(slice, now)),
    ]
}

const NAMESPACE: &[Column] = &[column("Name"), column("Status"), column("Age")];

fn namespace(namespace: &Value, now: i64) -> Vec<Value> {
    vec![json!(name(namespace)), json!(text(namespace, "status.phase")), json!(age::of(namespace, now))]
}

const CONFIG_MAP: &[Column] = &[column("Name"), count("Data"), column("Age")];

fn size(value: &Value) -> usize {
    value.as_object().map_or(0, serde_json::Map::len)
}

fn config_map(map: &Value, now: i64) -> Vec<Value> {
    let entries = size(at(map, "data")) + size(at(map, "binaryData"));
    vec![json!(name(map)), json!(entries), json!(age::of(map, now))]
}

const SECRET: &[Column] = &[column("Name"), column("Type"), count("Data"), column("Age")];

fn secret(secret: &Value, now: i64) -> Vec<Value> {
    vec![json!(name(secret)), json!(text(secret, "type")), json!(size(at(secret, "data"))), json!(age::of(secret, now))]
}

const SERVICE_ACCOUNT: &[Column] = &[column("Name"), count("Secrets"), column("Age")];

fn service_account(account: &Value, now: i64) -> Vec<Value> {
    vec![json!(name(account)), json!(items(account, "secrets").len()), json!(age::of(account, now))]
}

const INGRESS: &[Column] =
    &[column("Name"), column("Class"), column("Hosts"), column("Address"), column("Ports"), column("Age")];

fn ingress(ingress: &Value, now: i64) -> Vec<Value> {
    let hosts: Vec<String> = items(ingress, "spec.rules")
        .iter()
        .map(|rule| text(rule, "host").to_owned())
        .filter(|host| !host.is_empty())
        .collect();
    let addresses = items(ingress, "status.loadBalancer.ingress").iter();
    let addresses: Vec<&str> = addresses
        .filter_map(|it| [text(it, "ip"), text(it, "hostname")].into_iter().find(|address| !address.is_empty()))
        .collect();
    let ports = if items(ingress, "spec.tls").is_empty() { "80" } else { "80, 443" };
    vec![
        json!(name(ingress)),
        or_none(text(ingress, "spec.ingressClassName")),
        json!(if hosts.is_empty() { "*".to_owned() } else { shortened(&hosts) }),
        json!(addresses.join(",")),
        json!(ports),
        json!(age::of(ingress, now)),
    ]
}

const INGRESS_CLASS: &[Column] = &[column("Name"), column("Controller"), column("Parameters"), column("Age")];

fn ingress_class(class: &Value, now: i64) -> Vec<Value> {
    let parameters = at(class, "spec.parameters");
    let kind = match text(parameters, "apiGroup") {
        "" => text(parameters, "kind").to_owned(),
        group => format!("{}.{group}", text(parameters, "kind")),
    };
    let parameters =
        if parameters.is_null() { "<none>".to_owned() } else { format!("{kind}/{}", text(parameters, "name")) };
    vec![json!(name(class)), json!(text(class, "spec.controller")), json!(parameters), json!(age::of(class, now))]
}

const NETWORK_POLICY: &[Column] = &[column("Name"), column("Pod-Selector"), column("Age")];

fn network_policy(policy: &Value, now: i64) -> Vec<Value> {
    vec![json!(name(policy)), json!(selector_text(at(policy, "spec.podSelector"))), json!(age::of(policy, now))]
}

const DEFINITION: &[Column] = &[column("Name"), column("Created At")];

fn definition(definition: &Value, _now: i64) -> Vec<Value> {
    vec![json!(name(definition)), json!(text(definition, "metadata.creationTimestamp"))]
}

const LEASE: &[Column] = &[column("Name"), column("Holder"), column("Age")];

fn lease(lease: &Value, now: i64) -> Vec<Value> {
    vec![json!(name(lease)), json!(text(lease, "spec.holderIdentity")), json!(age::of(lease, now))]
}

const EVENT: &[Column] = &[
    column("Last Seen"),
    column("Type"),
    column("Reason"),
    column("Object"),
    wide("Subobject"),
    wide("Source"),
    column("Message"),
    wide("First Seen"),
    wide("Count"),
    wide("Name"),
];

fn event(event: &Value, now: i64) -> Vec<Value> {
    let first_of = |fields: &[&str]| {
        let found = fields.iter().map(|field| text(event, field)).find(|time| !time.is_empty());
        age::since(found.unwrap_or(""), now)
    };
    let object =
        format!("{}/{}", text(event, "involvedObject.kind").to_lowercase(), text(event, "involvedObject.name"));
    let source = [text(event, "source.component"), text(event, "source.host")];
    let source: Vec<&str> = source.into_iter().filter(|part| !part.is_empty()).collect();
    vec![
        json!(first_of(&["series.lastObservedTime", "lastTimestamp", "eventTime", "metadata.creationTimestamp"])),
        json!(text(event, "type")),
        json!(text(event, "reason")),
        json!(object),
        json!(text(event, "involvedObject.fieldPath")),
        json!(source.join(", ")),
        json!(text(event, "message").trim()),
        json!(first_of(&["firstTimestamp", "eventTime", "metadata.creationTimestamp"])),
        json!(number(event, "count").unwrap_or(1).to_string()),
        json!(name(event)),
    ]
}

fn or_none(text: &str) -> Value {
    json!(if text.is_empty() { "<none>" } else { text })
}
