//! EndpointSlices of Services with selectors.
//!
//! A slice holds endpoints of one family with one list of ports, at most 100 of them. Churn is small:
//! an endpoint stays in the slice where it is, new ones go first into slices that change anyway, and a
//! slice whose content is as it should be is not written.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::{Action, Mirror, controlled_by};
use crate::fields::{
    at, canonical, condition, condition_holds, flag, format_time, generated_name, is_terminating, items, label, name,
    namespace, parse_time, remove, set, suffix, text, texts, uid,
};
use crate::selector::LabelSelector;

/// How many endpoints one slice holds (`--max-endpoints-per-slice` of kube-controller-manager).
const ENDPOINTS_PER_SLICE_MAX: usize = 100;

/// How many names are tried for a new slice; the next pass tries again.
const NAME_ATTEMPTS: u32 = 64;

pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub(super) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
pub(super) const HEADLESS: &str = "service.kubernetes.io/headless";
const MANAGER: &str = "endpointslice-controller.k8s.io";
pub(super) const ZONE: &str = "topology.kubernetes.io/zone";
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// What slices of one family and one list of ports shall hold.
pub(super) type Wanted = BTreeMap<(String, String), (Value, Vec<Value>)>;

/// Whose slices they are.
pub(super) struct Scope<'a> {
    pub(super) owner: &'a Value,
    pub(super) manager: &'static str,
    pub(super) labels: Value,
    /// When that happened which a change of the slices follows, in seconds since 1970.
    pub(super) trigger: Option<i64>,
}

pub(super) fn reconcile(view: &Mirror, services: &[&Value], actions: &mut Vec<Action>) {
    for service in services.iter().copied().filter(|service| has_selector(service) && !is_terminating(service)) {
        let mut wanted = Wanted::new();
        let mut trigger = parse_time(text(service, "metadata.creationTimestamp"));
        for (pod, ports) in selected_pods(view, service) {
            trigger = trigger.max(condition(pod, "Ready").and_then(|it| parse_time(text(it, "lastTransitionTime"))));
            for address in pod_addresses(pod) {
                let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                if !texts(service, "spec.ipFamilies").any(|it| it == family) {
                    continue;
                }
                let key = (family.to_owned(), canonical(&ports));
                let group = wanted.entry(key).or_insert_with(|| (ports.clone(), Vec::new()));
                group.1.push(endpoint(view, service, pod, address));
            }
        }
        let scope = Scope { owner: service, manager: MANAGER, labels: slice_labels(service, MANAGER), trigger };
        let families: Vec<&str> = texts(service, "spec.ipFamilies").collect();
        place(view, &scope, &families, wanted, actions);
    }
}

/// Whether the controllers look for a Service's endpoints, or somebody writes them.
pub(super) fn has_selector(service: &Value) -> bool {
    let is_set = at(service, "spec.selector").as_object().is_some_and(|selector| !selector.is_empty());
    is_set && text(service, "spec.type") != "ExternalName"
}

/// The pods that a Service selects and that can hold an address, each with its list of ports.
pub(super) fn selected_pods<'a>(view: &'a Mirror, service: &'a Value) -> Vec<(&'a Value, Value)> {
    let Ok(selector) = LabelSelector::from_object(at(service, "spec.selector")) else { return Vec::new() };
    let is_finished = |pod: &Value| matches!(text(pod, "status.phase"), "Failed" | "Succeeded");
    view.pods_labelled(namespace(service), at(service, "spec.selector"))
        .into_iter()
        .filter(|pod| selector.matches(at(pod, "metadata.labels")) && !is_finished(pod))
        .filter(|pod| !pod_addresses(pod).is_empty())
        .map(|pod| (pod, resolved_ports(service, pod)))
        .collect()
}

pub(super) fn pod_addresses(pod: &Value) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> =
        items(pod, "status.podIPs").iter().filter_map(|entry| text(entry, "ip").parse().ok()).collect();
    if let Ok(single) = text(pod, "status.podIP").parse::<IpAddr>()
        && !addresses.contains(&single)
    {
        addresses.insert(0, single);
    }
    addresses
}

/// The Service's ports as this pod offers them. A named port that the pod lacks is left out.
fn resolved_ports(service: &Value, pod: &Value) -> Value {
    let number = |port: &Value| -> Option<i64> {
        let protocol = at(port, "protocol").as_str().unwrap_or("TCP");
        match at(port, "targetPort") {
            Value::Null => at(port, "port").as_i64(),
            Value::String(wanted) => {
                let containers = items(pod, "spec.containers").iter().chain(items(pod, "spec.initContainers"));
                let mut ports = containers.flat_map(|container| items(container, "ports"));
                let is_meant = |it: &&Value| {
                    text(it, "name") == wanted && at(it, "protocol").as_str().unwrap_or("TCP") == protocol
                };
                ports.find(is_meant).and_then(|it| at(it, "containerPort").as_i64())
            }
            other => other.as_i64(),
        }
    };
    let ports = items(service, "spec.ports").iter().filter_map(|port| {
        let mut resolved = json!({
            "name": text(port, "name"),
            "port": number(port)?,
            "protocol": at(port, "protocol").as_str().unwrap_or("TCP"),
        });
        if at(port, "appProtocol").is_string() {
            set(&mut resolved, "appProtocol", at(port, "appProtocol").clone());
        }
        Some(resolved)
    });
    Value::Array(ports.collect())
}

/// The conditions of KEP-1672: `serving` is readiness, `ready` also asks that the pod stays.
fn endpoint(view: &Mirror, service: &Value, pod: &Value, address: IpAddr) -> Value {
    let publishes_all = flag(service, "spec.publishNotReadyAddresses");
    let is_serving = condition_holds(pod, "Ready");
    let terminating = is_terminating(pod);
    let mut endpoint = json!({
        "addresses": [address.to_string()],
        "conditions": {
            "ready": publishes_all || (is_serving && !terminating),
            "serving": is_serving,
            "terminating": terminating,
        },
    });
    let hostname = text(pod, "spec.hostname");
    if !hostname.is_empty() && text(pod, "spec.subdomain") == name(service) {
        set(&mut endpoint, "hostname", json!(hostname));
    }
    let node = text(pod, "spec.nodeName");
    if !node.is_empty() {
        set(&mut endpoint, "nodeName", json!(node));
        if let Some(zone) =
            view.get("Node", "", node).and_then(|node| label(node, ZONE)).filter(|zone| !zone.is_empty())
        {
            set(&mut endpoint, "zone", json!(zone));
        }
    }
    set(&mut endpoint, "targetRef", pod_reference(pod));
    if let Some(hints) = hints(text(service, "spec.trafficDistribution"), &endpoint) {
        set(&mut endpoint, "hints", hints);
    }
    endpoint
}

/// For whom an endpoint is meant, where its Service wants traffic to stay close (KEP-4444, KEP-3015): for
/// its own zone, and for its own node if that is preferred. Only ready endpoints have hints.
fn hints(distribution: &str, endpoint: &Value) -> Option<Value> {
    let is_close = matches!(distribution, "PreferClose" | "PreferSameZone" | "PreferSameNode");
    if !is_close || !flag(endpoint, "conditions.ready") {
        return None;
    }
    let mut hints = Map::new();
    if let Some(zone) = at(endpoint, "zone").as_str() {
        hints.insert("forZones".into(), json!([{"name": zone}]));
    }
    if let Some(node) = at(endpoint, "nodeName").as_str().filter(|_| distribution == "PreferSameNode") {
        hints.insert("forNodes".into(), json!([{"name": node}]));
    }
    (!hints.is_empty()).then_some(Value::Object(hints))
}

pub(super) fn pod_reference(pod: &Value) -> Value {
    json!({"kind": "Pod", "namespace": namespace(pod), "name": name(pod), "uid": uid(pod)})
}

/// The owner's labels, and those by which consumers find the slice.
pub(super) fn slice_labels(owner: &Value, manager: &str) -> Value {
    let mut labels = at(owner, "metadata.labels").as_object().cloned().unwrap_or_else(Map::new);
    labels.shift_remove(HEADLESS);
    labels.insert(SERVICE_NAME.into(), json!(name(owner)));
    labels.insert(MANAGED_BY.into(), json!(manager));
    if text(owner, "spec.clusterIP") == "None" {
        labels.insert(HEADLESS.into(), json!(""));
    }
    Value::Object(labels)
}

/// Brings the slices of one owner to what is wanted.
pub(super) fn place(
    view: &Mirror,
    scope: &Scope<'_>,
    families: &[&str],
    mut wanted: Wanted,
    actions: &mut Vec<Action>,
) {
    let is_ours = |slice: &&Value| {
        label(slice, SERVICE_NAME) == Some(name(scope.owner))
            && label(slice, MANAGED_BY) == Some(scope.manager)
            && !is_terminating(slice)
    };
    let existing: Vec<&Value> = view.slices_of(namespace(scope.owner), name(scope.owner)).filter(is_ours).collect();
    // A Service without endpoints keeps one empty slice of each family: absent is not the same as none.
    for family in families {
        if !wanted.keys().any(|key| key.0 == *family) {
            let kept = existing.iter().find(|slice| text(slice, "addressType") == *family);
            let ports = kept.map_or_else(|| json!([]), |slice| at(slice, "ports").clone());
            wanted.insert(((*family).to_owned(), canonical(&ports)), (ports, Vec::new()));
        }
    }
    let mut names = BTreeSet::new();
    let key_of = |slice: &Value| (text(slice, "addressType").to_owned(), canonical(at(slice, "ports")));
    // A slice whose ports nobody wants any more takes over a list of ports that has no slice yet: a
    // consumer then sees one change, not a moment without endpoints.
    let mut free: Vec<&Value> = existing.iter().copied().filter(|slice| !wanted.contains_key(&key_of(slice))).collect();
    for (key, (ports, endpoints)) in wanted {
        let mut slices: Vec<&Value> = existing.iter().copied().filter(|slice| key_of(slice) == key).collect();
        if slices.is_empty()
            && let Some(position) = free.iter().position(|slice| text(slice, "addressType") == key.0)
        {
            slices.push(free.remove(position));
        }
        fill(view, scope, (&key.0, &ports), endpoints, &slices, &mut names, actions);
    }
    actions.extend(free.into_iter().map(Action::delete));
}

fn fill(
    view: &Mirror,
    scope: &Scope<'_>,
    (family, ports): (&str, &Value),
    endpoints: Vec<Value>,
    slices: &[&Value],
    names: &mut BTreeSet<String>,
    actions: &mut Vec<Action>,
) {
    let mut wanted: BTreeMap<String, Value> =
        endpoints.into_iter().map(|endpoint| (canonical(at(&endpoint, "addresses")), endpoint)).collect();
    let is_empty = wanted.is_empty();
    let mut contents: Vec<(&Value, Vec<Value>)> = slices
        .iter()
        .map(|slice| {
            let kept = items(slice, "endpoints").iter();
            (*slice, kept.filter_map(|endpoint| wanted.remove(&canonical(at(endpoint, "addresses")))).collect())
        })
        .collect();
    let mut left: std::collections::VecDeque<Value> = wanted.into_values().collect();
    for is_second_pass in [false, true] {
        for (slice, content) in &mut contents {
            let is_changed = content.as_slice() != items(slice, "endpoints");
            while (is_changed || is_second_pass) && content.len() < ENDPOINTS_PER_SLICE_MAX {
                let Some(endpoint) = left.pop_front() else { break };
                content.push(endpoint);
            }
        }
    }
    let mut has_kept_empty = false;
    for (slice, content) in contents {
        if content.is_empty() && (!is_empty || has_kept_empty) {
            actions.push(Action::delete(slice));
            continue;
        }
        has_kept_empty |= content.is_empty();
        let mut updated = slice.clone();
        set(&mut updated, "endpoints", Value::Array(content));
        set(&mut updated, "ports", ports.clone());
        set(&mut updated, "metadata.labels", scope.labels.clone());
        set(&mut updated, "metadata.ownerReferences", controlled_by(scope.owner));
        if canonical(&updated) != canonical(slice) {
            let before = at(slice, "metadata.annotations").get(TRIGGER_TIME).and_then(Value::as_str);
            // A change that nothing newer explains has no time: an old one would be a wrong measurement.
            let trigger = scope.trigger.filter(|now| before.and_then(parse_time).is_none_or(|before| before < *now));
            set_trigger_time(&mut updated, trigger);
            actions.push(Action::Update(updated));
        }
    }
    let needs_placeholder = is_empty && !has_kept_empty;
    let left = left.make_contiguous();
    let chunks: Vec<&[Value]> =
        if needs_placeholder { vec![&[]] } else { left.chunks(ENDPOINTS_PER_SLICE_MAX).collect() };
    for chunk in chunks {
        let first = chunk.first().map_or(&Value::Null, |endpoint| at(endpoint, "addresses"));
        let seed = format!("{}/{family}/{}/{first}", uid(scope.owner), canonical(ports));
        let is_free = |candidate: &String| {
            !names.contains(candidate) && view.get("EndpointSlice", namespace(scope.owner), candidate).is_none()
        };
        let slice_name = (0..NAME_ATTEMPTS)
            .map(|try_number| generated_name(name(scope.owner), &suffix(&format!("{seed}/{try_number}"), 5)))
            .find(is_free);
        let Some(slice_name) = slice_name else { continue };
        names.insert(slice_name.clone());
        let mut slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": slice_name,
                "generateName": format!("{}-", name(scope.owner)),
                "namespace": namespace(scope.owner),
                "labels": scope.labels,
                "ownerReferences": controlled_by(scope.owner),
            },
            "addressType": family,
            "endpoints": chunk,
            "ports": ports,
        });
        set_trigger_time(&mut slice, scope.trigger);
        actions.push(Action::Create(slice));
    }
}

/// The annotation from which kube-proxy measures how long a change took to reach it.
fn set_trigger_time(slice: &mut Value, trigger: Option<i64>) {
    let mut annotations = at(slice, "metadata.annotations").as_object().cloned().unwrap_or_default();
    annotations.shift_remove(TRIGGER_TIME);
    if let Some(time) = trigger {
        annotations.insert(TRIGGER_TIME.into(), json!(format_time(time)));
    }
    if annotations.is_empty() {
        remove(slice, "metadata.annotations");
    } else {
        set(slice, "metadata.annotations", Value::Object(annotations));
    }
}
