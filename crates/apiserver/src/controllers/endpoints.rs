//! The older `Endpoints` objects: made for Services with selectors, because `kubectl` shows them, and
//! mirrored to EndpointSlices where somebody wrote them by hand for a Service without a selector.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::endpoint_slice::{
    HEADLESS, Scope, Wanted, has_selector, place, pod_addresses, pod_reference, selected_pods, slice_labels,
};
use super::{Action, Mirror, controlled_by};
use crate::fields::{
    at, canonical, condition_holds, controller_uid, flag, is_terminating, items, label, name, namespace, set, text,
};

/// How many addresses one object holds; more are left out and the annotation says so.
const ADDRESSES_MAX: usize = 1000;
const MIRROR: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";

pub(super) fn reconcile(view: &Mirror, services: &[&Value], actions: &mut Vec<Action>) {
    for service in services.iter().copied().filter(|service| !is_terminating(service)) {
        if has_selector(service) {
            write(view, service, actions);
        } else if text(service, "spec.type") != "ExternalName"
            && let Some(endpoints) = view.get("Endpoints", namespace(service), name(service))
            && label(endpoints, SKIP_MIRROR) != Some("true")
        {
            mirror(view, endpoints, actions);
        }
    }
}

#[derive(Default)]
struct Subset {
    ports: Value,
    ready: BTreeMap<IpAddr, Value>,
    not_ready: BTreeMap<IpAddr, Value>,
}

fn write(view: &Mirror, service: &Value, actions: &mut Vec<Action>) {
    let primary = items(service, "spec.ipFamilies").first().and_then(Value::as_str).unwrap_or("IPv4");
    let publishes_all = flag(service, "spec.publishNotReadyAddresses");
    let mut subsets: BTreeMap<String, Subset> = BTreeMap::new();
    let mut count = 0;
    for (pod, ports) in selected_pods(view, service) {
        let Some(address) = pod_addresses(pod).into_iter().find(|it| it.is_ipv4() == (primary == "IPv4")) else {
            continue;
        };
        if is_terminating(pod) && !publishes_all {
            continue;
        }
        count += 1;
        if count > ADDRESSES_MAX {
            break;
        }
        let mut entry = json!({"ip": address.to_string()});
        let hostname = text(pod, "spec.hostname");
        if !hostname.is_empty() && text(pod, "spec.subdomain") == name(service) {
            set(&mut entry, "hostname", json!(hostname));
        }
        if !text(pod, "spec.nodeName").is_empty() {
            set(&mut entry, "nodeName", json!(text(pod, "spec.nodeName")));
        }
        set(&mut entry, "targetRef", pod_reference(pod));
        let subset = subsets.entry(canonical(&ports)).or_default();
        subset.ports = ports;
        let is_ready = publishes_all || condition_holds(pod, "Ready");
        if is_ready { &mut subset.ready } else { &mut subset.not_ready }.insert(address, entry);
    }
    let subsets: Vec<Value> = subsets.into_values().map(render).collect();
    let existing = view.get("Endpoints", namespace(service), name(service));
    let mut updated = existing.cloned().unwrap_or_else(|| {
        json!({
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": {"name": name(service), "namespace": namespace(service), "ownerReferences": controlled_by(service)},
        })
    });
    let mut labels = at(service, "metadata.labels").clone();
    if !labels.is_object() {
        labels = json!({});
    }
    labels["endpoints.kubernetes.io/managed-by"] = json!("endpoint-controller");
    if text(service, "spec.clusterIP") == "None" {
        labels[HEADLESS] = json!("");
    }
    set(&mut updated, "metadata.labels", labels);
    if controller_uid(&updated).is_some() {
        // The Service may have been made anew.
        set(&mut updated, "metadata.ownerReferences", controlled_by(service));
    }
    if count > ADDRESSES_MAX {
        set(&mut updated, "metadata.annotations", json!({OVER_CAPACITY: "truncated"}));
    }
    if !(subsets.is_empty() && items(&updated, "subsets").is_empty()) {
        set(&mut updated, "subsets", Value::Array(subsets));
    }
    match existing {
        None => actions.push(Action::Create(updated)),
        Some(existing) if canonical(existing) != canonical(&updated) => actions.push(Action::Update(updated)),
        Some(_) => {}
    }
}

fn render(subset: Subset) -> Value {
    let mut rendered = json!({});
    for (field, addresses) in [("addresses", subset.ready), ("notReadyAddresses", subset.not_ready)] {
        if !addresses.is_empty() {
            set(&mut rendered, field, addresses.into_values().collect());
        }
    }
    let mut ports = subset.ports;
    for port in ports.as_array_mut().into_iter().flatten() {
        // The older API leaves an empty name out.
        if text(port, "name").is_empty() {
            crate::fields::remove(port, "name");
        }
    }
    if ports.as_array().is_some_and(|ports| !ports.is_empty()) {
        set(&mut rendered, "ports", ports);
    }
    rendered
}

fn mirror(view: &Mirror, endpoints: &Value, actions: &mut Vec<Action>) {
    let mut wanted = Wanted::new();
    for subset in items(endpoints, "subsets") {
        let ports = items(subset, "ports").iter().map(|port| {
            let mut mirrored = json!({"name": text(port, "name"), "port": at(port, "port"), "protocol": "TCP"});
            for field in ["protocol", "appProtocol"] {
                if at(port, field).is_string() {
                    set(&mut mirrored, field, at(port, field).clone());
                }
            }
            mirrored
        });
        let ports: Value = ports.collect();
        for (list, is_ready) in [("addresses", true), ("notReadyAddresses", false)] {
            for address in items(subset, list).iter().take(ADDRESSES_MAX) {
                let Ok(parsed) = text(address, "ip").parse::<IpAddr>() else { continue };
                let family = if parsed.is_ipv4() { "IPv4" } else { "IPv6" };
                let mut endpoint = json!({"addresses": [parsed.to_string()], "conditions": {"ready": is_ready}});
                for field in ["hostname", "nodeName", "targetRef"] {
                    if !at(address, field).is_null() {
                        set(&mut endpoint, field, at(address, field).clone());
                    }
                }
                let group = wanted.entry((family.to_owned(), canonical(&ports)));
                group.or_insert_with(|| (ports.clone(), Vec::new())).1.push(endpoint);
            }
        }
    }
    let scope = Scope { owner: endpoints, manager: MIRROR, labels: slice_labels(endpoints, MIRROR), trigger: None };
    place(view, &scope, &[], wanted, actions);
}
