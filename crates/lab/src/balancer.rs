//! The lab's load balancer: addresses for Services of type `LoadBalancer`, and the way to them.
//!
//! ```text
//!   Services ─┐                  ┌─▶ status.loadBalancer.ingress
//!             ├─▶ decide (pure) ─┤
//!   slices ───┘                  └─▶ the router: one route per address, to one node
//! ```
//!
//! It does what MetalLB does in its layer 2 mode: one node attracts what is sent to an address and its
//! Service proxy does the rest. With `externalTrafficPolicy: Local` that is a node with ready endpoints; an
//! address that no node may have has no route. A Service with a `loadBalancerClass` is somebody else's.
//! It depends on the objects only: what a Service holds stands in its status.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context as _;
use ipnet::IpNet;
use portolan_kernel::link::Links;
use portolan_kernel::netns::Namespace;
use portolan_net::Family;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::Layout;
use crate::client::{Client, Event};
use crate::description::Description;
use crate::limits::{RETRY_DELAY_MAX, RETRY_DELAY_MIN};
use crate::topology::{Member, ROUTER, Topology, namespace};

const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";

/// How long changes gather.
const COALESCE: Duration = Duration::from_millis(5);

/// Namespace and name.
type Key = (String, String);

/// What shall be.
#[derive(Debug, Default, PartialEq, Eq)]
struct Decision {
    /// The addresses of each Service, in the order of its families.
    addresses: BTreeMap<Key, Vec<IpAddr>>,
    /// The node that gets what is sent to an address: its segment and its own address.
    routes: BTreeMap<IpAddr, (String, IpAddr)>,
    /// Services that asked for an address when there was none left.
    without: BTreeSet<Key>,
}

/// Serves load balancers as long as the lab runs.
pub(crate) async fn run(layout: Layout, description: Description) {
    let client = Client::new(description.api(&layout));
    let (mut services, mut slices) = (client.watch(SERVICES), client.watch(SLICES));
    let mut balancer = Balancer::new(client, layout, description.topology);
    let mut delay = RETRY_DELAY_MIN;
    let mut is_done = true;
    loop {
        tokio::select! {
            Some(event) = services.recv() => take(&mut balancer.services, event),
            Some(event) = slices.recv() => take(&mut balancer.slices, event),
            () = tokio::time::sleep(delay), if !is_done => delay = (delay * 2).min(RETRY_DELAY_MAX),
            else => return,
        }
        tokio::time::sleep(COALESCE).await;
        drain(&mut balancer.services, &mut services);
        drain(&mut balancer.slices, &mut slices);
        let outcome = balancer.act().await;
        is_done = outcome.is_ok();
        match outcome {
            Ok(()) => delay = RETRY_DELAY_MIN,
            Err(error) => tracing::warn!(error = format!("{error:#}"), "load balancers wait; it is tried again"),
        }
    }
}

struct Balancer {
    client: Client,
    layout: Layout,
    topology: Topology,
    services: BTreeMap<Key, Value>,
    slices: BTreeMap<Key, Value>,
    /// The routes that the router has.
    routes: BTreeMap<IpAddr, (String, IpAddr)>,
    /// The Services for which it was said that no address is left.
    without: BTreeSet<Key>,
}

impl Balancer {
    fn new(client: Client, layout: Layout, topology: Topology) -> Balancer {
        Balancer {
            client,
            layout,
            topology,
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            routes: BTreeMap::new(),
            without: BTreeSet::new(),
        }
    }

    /// Makes it so. The way comes before the address, so that an address that is shown can be reached.
    async fn act(&mut self) -> anyhow::Result<()> {
        let decision = decide(&self.services, &self.slices, &self.topology);
        for (namespace, name) in decision.without.difference(&self.without) {
            tracing::warn!(
                namespace,
                name,
                "no address is left for this load balancer: delete another, or widen loadBalancers in the topology"
            );
        }
        self.set_routes(&decision.routes)?;
        for (key, addresses) in &decision.addresses {
            let Some(service) = self.services.get(key) else { continue };
            if shown(service) != *addresses {
                self.show(key, addresses).await?;
            }
        }
        self.without = decision.without;
        Ok(())
    }

    fn set_routes(&mut self, wanted: &BTreeMap<IpAddr, (String, IpAddr)>) -> anyhow::Result<()> {
        if self.routes == *wanted {
            return Ok(());
        }
        let router = namespace::path(&self.layout.namespace(ROUTER));
        let router = Namespace::open(&router).context("opening the router's namespace")?;
        let mut links = Links::open(&router).context("opening the router's links")?;
        for (address, (segment, gateway)) in self.routes.clone() {
            if !wanted.contains_key(&address) {
                let removed = links.remove_route(&segment, IpNet::from(address), Some(gateway));
                removed.with_context(|| format!("removing the route to {address}"))?;
                self.routes.remove(&address);
            }
        }
        for (address, (segment, gateway)) in wanted {
            let held = (segment.clone(), *gateway);
            if self.routes.get(address) != Some(&held) {
                let doing = || format!("leading {address} to {gateway}");
                links.add_route(segment, IpNet::from(*address), Some(*gateway)).with_context(doing)?;
                self.routes.insert(*address, held);
            }
        }
        Ok(())
    }

    async fn show(&mut self, key: &Key, addresses: &[IpAddr]) -> anyhow::Result<()> {
        let (namespace, name) = key;
        let ingress: Vec<Value> = addresses.iter().map(|address| json!({"ip": address, "ipMode": "VIP"})).collect();
        let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
        let path = format!("/api/v1/namespaces/{namespace}/services/{name}/status");
        match self.client.merge(&path, &status).await {
            // It comes by the watch as well; until then it is known here.
            Ok(service) => drop(self.services.insert(key.clone(), service)),
            // Gone, or no load balancer any more: the watch says so.
            Err(error) if error.is(http::StatusCode::NOT_FOUND) => {}
            Err(error) if error.is(http::StatusCode::UNPROCESSABLE_ENTITY) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("writing the status of Service {namespace}/{name}"));
            }
        }
        Ok(())
    }
}

fn take(objects: &mut BTreeMap<Key, Value>, event: Event) {
    match event {
        Event::Replace(all) => *objects = all.into_iter().map(|object| (key(&object), object)).collect(),
        Event::Upsert(object) => drop(objects.insert(key(&object), object)),
        Event::Delete(object) => drop(objects.remove(&key(&object))),
    }
}

fn drain(objects: &mut BTreeMap<Key, Value>, events: &mut mpsc::Receiver<Event>) {
    while let Ok(event) = events.try_recv() {
        take(objects, event);
    }
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn items<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn key(object: &Value) -> Key {
    (text(object, "/metadata/namespace").to_owned(), text(object, "/metadata/name").to_owned())
}

/// Whether a Service waits for this load balancer.
pub(crate) fn is_balanced(service: &Value) -> bool {
    text(service, "/spec/type") == "LoadBalancer"
        && text(service, "/spec/loadBalancerClass").is_empty()
        && service.pointer("/metadata/deletionTimestamp").is_none()
}

/// The addresses in a Service's status.
pub(crate) fn shown(service: &Value) -> Vec<IpAddr> {
    items(service, "/status/loadBalancer/ingress").iter().filter_map(|it| text(it, "/ip").parse().ok()).collect()
}

/// The addresses and routes for these objects.
fn decide(services: &BTreeMap<Key, Value>, slices: &BTreeMap<Key, Value>, topology: &Topology) -> Decision {
    let mut decision = Decision::default();
    let balanced: Vec<(&Key, &Value)> = services.iter().filter(|(_, service)| is_balanced(service)).collect();
    // What is held stays, the first holder of an address being the right one; then those that have none.
    let mut taken: BTreeMap<IpAddr, &Key> = BTreeMap::new();
    for (key, service) in &balanced {
        for address in
            shown(service).into_iter().filter(|it| topology.load_balancers.iter().any(|pool| pool.contains(it)))
        {
            taken.entry(address).or_insert(*key);
        }
    }
    for (key, service) in balanced {
        let held = shown(service);
        let asked = text(service, "/spec/loadBalancerIP").parse::<IpAddr>().ok();
        let families: Vec<&str> = items(service, "/spec/ipFamilies").iter().filter_map(Value::as_str).collect();
        for pool in families.iter().flat_map(|family| pools(topology, family)) {
            let own = held.iter().copied().filter(|it| pool.contains(it) && taken.get(it) == Some(&key));
            let asked = asked.filter(|it| pool.contains(it) && !taken.contains_key(it));
            let found = own.into_iter().next().or(asked).or_else(|| free(pool, &taken));
            let Some(address) = found else {
                decision.without.insert(key.clone());
                continue;
            };
            taken.insert(address, key);
            decision.addresses.entry(key.clone()).or_default().push(address);
            if let Some(node) = attracting(key, service, slices, topology, address) {
                decision.routes.insert(address, node);
            }
        }
    }
    decision
}

/// The lowest free address of a pool. Its first one is for other things: the network itself, and any
/// router of it (RFC 4291 §2.6.1).
fn free(pool: &IpNet, taken: &BTreeMap<IpAddr, &Key>) -> Option<IpAddr> {
    pool.hosts().find(|address| *address != pool.network() && !taken.contains_key(address))
}

/// The pools of a family, by its name in the API.
fn pools<'a>(topology: &'a Topology, family: &str) -> impl Iterator<Item = &'a IpNet> {
    let family = if family == "IPv6" { Family::V6 } else { Family::V4 };
    topology.load_balancers.iter().filter(move |pool| Family::of_prefix(pool) == family)
}

/// The node that gets what is sent to an address: always the same for the same Service and nodes.
fn attracting(
    key: &Key,
    service: &Value,
    slices: &BTreeMap<Key, Value>,
    topology: &Topology,
    address: IpAddr,
) -> Option<(String, IpAddr)> {
    let is_local = text(service, "/spec/externalTrafficPolicy") == "Local";
    let ready = if is_local { ready_nodes(key, slices) } else { BTreeSet::new() };
    let rank = |node: &&Member| {
        let mut hasher = DefaultHasher::new();
        (key, &node.name).hash(&mut hasher);
        hasher.finish()
    };
    let may = |node: &&Member| !is_local || ready.contains(node.name.as_str());
    let own = |node: &Member| node.addresses.iter().copied().find(|it| Family::of(*it) == Family::of(address));
    let fit = topology.nodes.iter().filter(may).filter(|node| own(node).is_some()).min_by_key(rank)?;
    Some((fit.segment.clone(), own(fit)?))
}

/// The nodes on which a Service has ready endpoints.
fn ready_nodes<'a>(key: &Key, slices: &'a BTreeMap<Key, Value>) -> BTreeSet<&'a str> {
    let is_own = |slice: &&Value| text(slice, "/metadata/labels/kubernetes.io~1service-name") == key.1;
    let within = slices.range((key.0.clone(), String::new())..).take_while(|(it, _)| it.0 == key.0);
    let endpoints = within.map(|(_, slice)| slice).filter(is_own).flat_map(|slice| items(slice, "/endpoints"));
    let ready = endpoints.filter(|it| it.pointer("/conditions/ready").and_then(Value::as_bool) != Some(false));
    ready.map(|endpoint| text(endpoint, "/nodeName")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "every caller has a literal")]
    fn service(name: &str, spec: Value, held: &[&str]) -> (Key, Value) {
        let ingress: Vec<Value> = held.iter().map(|address| json!({"ip": address})).collect();
        let object = json!({"metadata": {"namespace": "default", "name": name}, "spec": spec,
            "status": {"loadBalancer": {"ingress": ingress}}});
        (key(&object), object)
    }

    fn balanced(families: &[&str]) -> Value {
        json!({"type": "LoadBalancer", "ipFamilies": families})
    }

    fn topology(pools: &[&str]) -> Topology {
        Topology { load_balancers: pools.iter().map(|pool| pool.parse().unwrap()).collect(), ..Topology::standard(3) }
    }

    fn addresses(decision: &Decision, name: &str) -> Vec<String> {
        let found = decision.addresses.get(&("default".to_owned(), name.to_owned()));
        found.into_iter().flatten().map(ToString::to_string).collect()
    }

    #[test]
    fn each_service_gets_an_address_of_each_of_its_families_and_keeps_it() {
        let topology = topology(&["192.168.70.0/30", "fd00:70::/126"]);
        let mut asks = balanced(&["IPv4"]);
        asks["loadBalancerIP"] = json!("192.168.70.2");
        let mut other = balanced(&["IPv4"]);
        other["loadBalancerClass"] = json!("example.com/other");
        let services = BTreeMap::from([
            service("a", balanced(&["IPv6", "IPv4"]), &[]),
            service("b", asks, &[]),
            service("c", balanced(&["IPv4"]), &["192.168.70.1"]),
            service("d", other, &[]),
            service("e", json!({"type": "NodePort", "ipFamilies": ["IPv4"]}), &[]),
        ]);
        let decision = decide(&services, &BTreeMap::new(), &topology);
        // The one that has an address keeps it, though its name comes later.
        assert_eq!(addresses(&decision, "c"), ["192.168.70.1"]);
        assert_eq!(addresses(&decision, "a")[1], "192.168.70.2");
        assert_eq!(decision.without, BTreeSet::from([("default".to_owned(), "b".to_owned())]));
        assert_eq!(decision.addresses.len(), 2);
        assert_eq!(decision.routes.len(), 3);
        let (segment, gateway) = &decision.routes[&"192.168.70.1".parse::<IpAddr>().unwrap()];
        assert!(segment == "underlay" && topology.nodes.iter().any(|node| node.addresses.contains(gateway)));
        // Once it is written down, nothing changes.
        let mut again = services;
        for (key, addresses) in &decision.addresses {
            let shown: Vec<Value> = addresses.iter().map(|it| json!({"ip": it, "ipMode": "VIP"})).collect();
            again.get_mut(key).unwrap()["status"]["loadBalancer"]["ingress"] = json!(shown);
        }
        assert_eq!(decide(&again, &BTreeMap::new(), &topology), decision);
    }

    #[test]
    fn a_local_service_is_led_to_a_node_with_ready_endpoints() {
        let topology = topology(&["192.168.70.0/24"]);
        let mut spec = balanced(&["IPv4"]);
        spec["externalTrafficPolicy"] = json!("Local");
        let services = BTreeMap::from([service("a", spec, &[])]);
        let slice = |node: &str, is_ready: bool| {
            let labels = json!({"kubernetes.io/service-name": "a"});
            let object = json!({"metadata": {"namespace": "default", "name": "a-1", "labels": labels},
                "endpoints": [{"nodeName": node, "conditions": {"ready": is_ready}}]});
            BTreeMap::from([(key(&object), object)])
        };
        for (number, node) in ["node-1", "node-2", "node-3"].into_iter().enumerate() {
            let decision = decide(&services, &slice(node, true), &topology);
            let gateway = decision.routes.values().next().unwrap().1;
            assert_eq!(gateway, topology.nodes[number].addresses[0], "{node}");
        }
        let nowhere = decide(&services, &slice("node-1", false), &topology);
        assert!(nowhere.routes.is_empty() && nowhere.addresses.len() == 1);
    }
}
