//! Waits until a lab answers: pods ready, agents in sync, Services answering from every node.
//!
//! Pods and slices are watched, not polled. That a Service answers is only known by asking, so the
//! last step connects to each from each node, in the kernel's own time.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use tokio::time::Instant;

use crate::client::{Client, Event};
use crate::description::Description;
use crate::inside::Entry;
use crate::limits::WAIT_TIME_MAX;
use crate::status::is_ready;
use crate::topology::namespace;
use crate::up::tail;
use crate::{LabError, Layout, Result, balancer};

/// How often an agent's health is asked for until it is in sync.
const HEALTH_PERIOD: Duration = Duration::from_millis(10);

/// How many things that are missing are named in an error.
const MISSING_SHOWN_MAX: usize = 8;

/// Waits until everything that the lab's objects ask for is there.
///
/// # Errors
/// With what is missing and why, when [`WAIT_TIME_MAX`] is over.
pub(crate) fn wait(layout: &Layout, description: &Description, progress: &mut dyn FnMut(&str)) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    runtime.block_on(async {
        let until = Instant::now() + WAIT_TIME_MAX;
        let client = Client::new(description.api(layout));
        progress("waiting for pods");
        wait_for_objects(&client, layout, until).await?;
        progress("waiting for agents");
        for node in &description.topology.nodes {
            wait_for_agent(layout, &node.name, until).await?;
        }
        progress("waiting for Services");
        wait_for_services(&client, layout, description, until).await
    })
}

/// The objects that decide, by their paths.
#[derive(Debug, Default)]
struct Seen {
    tables: [BTreeMap<String, Value>; 4],
}

const COLLECTIONS: [&str; 4] =
    ["/api/v1/pods", "/apis/apps/v1/deployments", "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices"];

async fn wait_for_objects(client: &Client, layout: &Layout, until: Instant) -> Result<()> {
    let mut seen = Seen::default();
    let mut in_sync = [false; 4];
    let mut watches = COLLECTIONS.map(|collection| client.watch(collection));
    let [pods, deployments, services, slices] = &mut watches;
    loop {
        if in_sync == [true; 4] && seen.missing().is_empty() {
            return Ok(());
        }
        let event = tokio::select! {
            event = pods.recv() => (0, event),
            event = deployments.recv() => (1, event),
            event = services.recv() => (2, event),
            event = slices.recv() => (3, event),
            () = tokio::time::sleep_until(until) => return Err(not_ready(client, layout, &seen).await),
        };
        if let (index, Some(event)) = event {
            in_sync[index] |= matches!(event, Event::Replace(_));
            seen.apply(index, event);
        }
    }
}

fn key(object: &Value) -> String {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    format!("{}/{}", text("/metadata/namespace"), text("/metadata/name"))
}

fn namespace_of(key: &str) -> &str {
    key.split_once('/').map_or("", |(namespace, _)| namespace)
}

fn matches(labels: Option<&Value>, selector: Option<&Value>) -> bool {
    let Some(selector) = selector.and_then(Value::as_object) else { return false };
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

impl Seen {
    fn apply(&mut self, index: usize, event: Event) {
        let table = &mut self.tables[index];
        match event {
            Event::Replace(objects) => *table = objects.into_iter().map(|object| (key(&object), object)).collect(),
            Event::Upsert(object) => drop(table.insert(key(&object), object)),
            Event::Delete(object) => drop(table.remove(&key(&object))),
        }
    }

    /// What is not as it shall be, in words.
    fn missing(&self) -> Vec<String> {
        let [pods, deployments, services, slices] = &self.tables;
        let mut missing = Vec::new();
        for (name, pod) in pods.iter().filter(|(_, pod)| !is_finished(pod)) {
            if !is_ready(pod) {
                missing.push(format!("pod {name} is not ready"));
            }
        }
        for (name, deployment) in deployments {
            let wanted = deployment.pointer("/spec/replicas").and_then(Value::as_u64).unwrap_or(1);
            let selector = deployment.pointer("/spec/selector/matchLabels");
            let there = matching(pods, namespace_of(name), selector).count() as u64;
            if there < wanted {
                missing.push(format!("deployment {name} has {there} of {wanted} pods"));
            }
        }
        for (name, service) in services {
            let wanted = matching(pods, namespace_of(name), service.pointer("/spec/selector"))
                .filter(|pod| is_ready(pod))
                .count();
            let there = ready_endpoints(slices, name);
            if there < wanted {
                missing.push(format!("service {name} has {there} of {wanted} endpoints"));
            }
            if balancer::is_balanced(service) && balancer::shown(service).is_empty() {
                missing.push(format!("service {name} has no address of a load balancer"));
            }
        }
        missing
    }
}

fn is_finished(pod: &Value) -> bool {
    matches!(pod.pointer("/status/phase").and_then(Value::as_str), Some("Succeeded" | "Failed"))
}

fn matching<'a>(
    pods: &'a BTreeMap<String, Value>,
    namespace: &'a str,
    selector: Option<&'a Value>,
) -> impl Iterator<Item = &'a Value> {
    pods.iter()
        .filter(move |(name, _)| namespace_of(name) == namespace)
        .map(|(_, pod)| pod)
        .filter(move |pod| matches(pod.pointer("/metadata/labels"), selector))
}

/// How many different pods stand in the ready endpoints of a Service: a dual-stack Service has each twice.
fn ready_endpoints(slices: &BTreeMap<String, Value>, service: &str) -> usize {
    let mut targets: Vec<&Value> = slices
        .iter()
        .filter(|(name, slice)| {
            let label = slice.pointer("/metadata/labels/kubernetes.io~1service-name").and_then(Value::as_str);
            label.is_some_and(|label| format!("{}/{label}", namespace_of(name)) == service)
        })
        .filter_map(|(_, slice)| slice.get("endpoints")?.as_array())
        .flatten()
        .filter(|endpoint| endpoint.pointer("/conditions/ready").and_then(Value::as_bool) != Some(false))
        .filter_map(|endpoint| endpoint.pointer("/targetRef/name").or_else(|| endpoint.pointer("/addresses/0")))
        .collect();
    targets.sort_by_key(ToString::to_string);
    targets.dedup();
    targets.len()
}

async fn not_ready(client: &Client, layout: &Layout, seen: &Seen) -> LabError {
    let missing = seen.missing();
    let mut hint: Vec<String> = missing.iter().skip(1).take(MISSING_SHOWN_MAX).cloned().collect();
    if let Ok(events) = client.list("/api/v1/events").await {
        let text = |event: &Value, pointer: &str| {
            event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let told = events.iter().rev().take(MISSING_SHOWN_MAX);
        hint.extend(
            told.map(|event| format!("event: {}: {}", text(event, "/involvedObject/name"), text(event, "/message"))),
        );
    }
    hint.push(format!("the logs are in {}; --keep leaves them", layout.directory().display()));
    let what = missing.first().cloned().unwrap_or_else(|| "the API does not answer".to_owned());
    LabError::negative(format!("after {} s {what}", WAIT_TIME_MAX.as_secs()), hint.join("\n"))
}

/// Asks an agent for its health over its socket until the answer is 200.
async fn wait_for_agent(layout: &Layout, node: &str, until: Instant) -> Result<()> {
    let agent = Client::new(layout.node(node).join("agent.sock"));
    loop {
        let error = match agent.is_success("/readyz").await {
            Ok(true) => return Ok(()),
            Ok(false) => "it is not in sync".to_owned(),
            Err(error) => error.to_string(),
        };
        if Instant::now() > until {
            let log = tail(&layout.node(node).join("agent.log"));
            return Err(LabError::negative(format!("the agent of {node} is not ready: {error}"), log));
        }
        tokio::time::sleep(HEALTH_PERIOD).await;
    }
}

/// The TCP addresses of every Service that has endpoints.
async fn service_addresses(client: &Client) -> Result<Vec<(String, SocketAddr)>> {
    let mut slices = Seen::default();
    let objects = client.list(COLLECTIONS[3]).await.context("listing endpoints")?;
    slices.apply(3, Event::Replace(objects));
    let mut addresses = Vec::new();
    for service in client.list(COLLECTIONS[2]).await.context("listing Services")? {
        let name = key(&service);
        if ready_endpoints(&slices.tables[3], &name) == 0 {
            continue;
        }
        let clusters = service.pointer("/spec/clusterIPs").and_then(Value::as_array).cloned().unwrap_or_default();
        let ports = service.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
        for address in clusters.iter().filter_map(|it| it.as_str()?.parse().ok()) {
            let tcp = |port: &&Value| port.get("protocol").and_then(Value::as_str).unwrap_or("TCP") == "TCP";
            let numbers = ports.iter().filter(tcp).filter_map(|port| u16::try_from(port.get("port")?.as_u64()?).ok());
            addresses.extend(numbers.map(|port| (name.clone(), SocketAddr::new(address, port))));
        }
    }
    Ok(addresses)
}

async fn wait_for_services(client: &Client, layout: &Layout, description: &Description, until: Instant) -> Result<()> {
    let addresses = service_addresses(client).await?;
    if addresses.is_empty() {
        return Ok(());
    }
    let seconds = until.saturating_duration_since(Instant::now()).as_secs().max(1);
    let mut children = Vec::new();
    for node in &description.topology.nodes {
        let entry = Entry::network(namespace::path(&layout.namespace(&node.name)));
        let mut child = tokio::process::Command::new(&description.program);
        child.args(["lab", "knock"]).args(entry.arguments()).arg("--seconds").arg(seconds.to_string());
        child.args(addresses.iter().map(|(_, address)| OsString::from(address.to_string())));
        child.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        children.push((node, child.spawn().context("starting a connection test")?));
    }
    for (node, child) in children {
        let output = child.wait_with_output().await.context("waiting for a connection test")?;
        if output.status.success() {
            continue;
        }
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let names: Vec<&str> = addresses
            .iter()
            .filter(|(_, address)| said.split_whitespace().any(|word| word == address.to_string()))
            .map(|(name, _)| name.as_str())
            .collect();
        return Err(LabError::negative(
            format!("from {} these Services do not answer: {} ({said})", node.name, names.join(", ")),
            tail(&layout.node(&node.name).join("agent.log")),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, ready: &str) -> Value {
        json!({
            "metadata": {"namespace": "default", "name": name, "labels": {"app": "cart"}},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        })
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut seen = Seen::default();
        seen.apply(0, Event::Replace(vec![pod("cart-1", "True"), pod("cart-2", "False")]));
        let selector = json!({"app": "cart"});
        seen.apply(
            1,
            Event::Upsert(json!({
                "metadata": {"namespace": "default", "name": "cart"},
                "spec": {"replicas": 3, "selector": {"matchLabels": selector}},
            })),
        );
        seen.apply(
            2,
            Event::Upsert(
                json!({"metadata": {"namespace": "default", "name": "cart"}, "spec": {"selector": selector}}),
            ),
        );
        assert_eq!(
            seen.missing(),
            [
                "pod default/cart-2 is not ready",
                "deployment default/cart has 2 of 3 pods",
                "service default/cart has 0 of 1 endpoints",
            ]
        );
        seen.apply(0, Event::Replace(["1", "2", "3"].map(|name| pod(name, "True")).to_vec()));
        seen.apply(
            3,
            Event::Upsert(json!({
                "metadata": {"namespace": "default", "name": "cart-x", "labels": {"kubernetes.io/service-name": "cart"}},
                "endpoints": [
                    {"addresses": ["10.0.0.1"], "targetRef": {"name": "1"}},
                    {"addresses": ["10.0.0.2"], "targetRef": {"name": "2"}},
                    {"addresses": ["10.0.0.3"], "targetRef": {"name": "3"}, "conditions": {"ready": true}},
                ],
            })),
        );
        assert_eq!(seen.missing(), Vec::<String>::new());
    }
}
