//! The rules: from a name to its records.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use portolan_net::{Family, ObjectKey, ObjectKind, Origin, Protocol};
use portolan_state::{Endpoint, EndpointSlice, Service, ServiceType, Snapshot};
use serde::{Deserialize, Serialize};

use super::reverse::{AddressIndex, Holder};
use super::{DomainName, Lookup, Record, RecordData, address_of};

/// The version of the specification that the rules follow: the value of `dns-version.<zone>`.
pub const SPECIFICATION_VERSION: &str = "1.1.0";

/// The most labels that a name left of the zone has: `_port._protocol.service.namespace.svc`.
const LABELS_MAX: usize = 5;

/// The weights of all SRV records of a name add up to about this, as in CoreDNS.
const WEIGHT_SUM: usize = 100;

/// The Service whose addresses `ns.dns.<zone>` has: where every distribution puts the cluster DNS.
const DNS_SERVICE: (&str, &str) = ("kube-system", "kube-dns");

/// Which names of the form `a-b-c-d.<namespace>.pod.<zone>` exist: CoreDNS's option `pods`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PodNames {
    /// None.
    Disabled,
    /// Every address, whether or not a pod has it, in a namespace that exists.
    Insecure,
    /// The addresses of pods that exist in the namespace.
    #[default]
    Verified,
}

/// The cluster's names. Cloning costs a few reference counts.
#[derive(Debug, Clone)]
pub struct Names {
    zone: DomainName,
    pods: PodNames,
    index: AddressIndex,
}

impl Names {
    /// The names of a zone (`cluster.local`), with pods verified.
    pub fn new(zone: DomainName) -> Names {
        Names { zone, pods: PodNames::default(), index: AddressIndex::default() }
    }

    /// The same with another rule for pods.
    #[must_use]
    pub fn with_pods(self, pods: PodNames) -> Names {
        Names { pods, index: AddressIndex::default(), ..self }
    }

    /// The zone.
    pub fn zone(&self) -> &DomainName {
        &self.zone
    }

    /// Brings the index of addresses up to a snapshot. The cost follows what changed since the last
    /// call; without a call, names of addresses and of verified pods are not found.
    pub fn update(&mut self, snapshot: &Snapshot) {
        self.index.update(snapshot, self.pods == PodNames::Verified);
    }

    /// The record that says who speaks for a name: the zone's, or for a name in the reverse domains
    /// its own, since of those domains we know single addresses only.
    pub fn authority(&self, snapshot: &Snapshot, name: &DomainName) -> Record {
        let apex = if name.within(&self.zone).is_some() { &self.zone } else { name };
        let data = RecordData::Authority {
            primary: self.name_server(),
            mailbox: self.zone.under(&["hostmaster"]).unwrap_or_default(),
            serial: snapshot.revision as u32,
        };
        record(apex, data, Origin::configuration("zone"))
    }

    /// What a name stands for.
    ///
    /// The cost is that of a few searches in the tables, and of the endpoints of one headless
    /// Service where the name is one's; never that of the cluster.
    pub fn lookup(&self, snapshot: &Snapshot, name: &DomainName) -> Lookup {
        let Some(labels) = name.within(&self.zone) else { return self.reverse(snapshot, name) };
        if !snapshot.is_in_sync(&[ObjectKind::Namespace, ObjectKind::Service, ObjectKind::EndpointSlice]) {
            return Lookup::NotReady;
        }
        let mut parts = [""; LABELS_MAX];
        let mut count = 0;
        for label in labels {
            // No object's name has other characters than ASCII, or as many labels.
            let (Ok(label), Some(part)) = (std::str::from_utf8(label), parts.get_mut(count)) else {
                return Lookup::NoSuchName;
            };
            (*part, count) = (label, count + 1);
        }
        match &parts[..count] {
            [] => found(vec![
                self.authority(snapshot, name),
                record(name, RecordData::NameServer(self.name_server()), Origin::configuration("zone")),
            ]),
            ["dns-version"] => {
                let data = RecordData::Text(SPECIFICATION_VERSION.to_owned());
                found(vec![record(name, data, Origin::configuration("zone"))])
            }
            ["dns" | "svc"] => found(Vec::new()),
            ["ns", "dns"] => {
                let key = ObjectKey::new(DNS_SERVICE.0, DNS_SERVICE.1);
                found(snapshot.services.get(&key).map(|service| cluster_records(name, service)).unwrap_or_default())
            }
            ["pod"] if self.pods != PodNames::Disabled => found(Vec::new()),
            [namespace, "pod"] if self.pods != PodNames::Disabled => existing_namespace(snapshot, namespace),
            [pod, namespace, "pod"] => self.pod(snapshot, name, pod, namespace),
            [namespace, "svc"] => existing_namespace(snapshot, namespace),
            [rest @ .., service, namespace, "svc"] => {
                match snapshot.services.get(&ObjectKey::new(*namespace, *service)) {
                    Some(service) => self.service(snapshot, name, service, rest),
                    None => Lookup::NoSuchName,
                }
            }
            _ => Lookup::NoSuchName,
        }
    }

    /// Specification §2.3 (ClusterIP), §2.4 (headless), §2.5 (ExternalName).
    fn service(&self, snapshot: &Snapshot, name: &DomainName, service: &Arc<Service>, rest: &[&str]) -> Lookup {
        if let ServiceType::ExternalName(target) = &service.service_type {
            let origin = Origin::field(ObjectKind::Service, service.key.clone(), "spec.externalName");
            let alias = target.parse().map(|target| record(name, RecordData::Alias(target), origin));
            return if rest.is_empty() { found(alias.into_iter().collect()) } else { Lookup::NoSuchName };
        }
        if service.headless {
            return self.headless(snapshot, name, service, rest);
        }
        match rest {
            [] => found(cluster_records(name, service)),
            [protocol] if protocol.starts_with('_') => {
                let exists = service.ports.iter().any(|port| is_named(&port.name, port.protocol, None, protocol));
                if exists { found(Vec::new()) } else { Lookup::NoSuchName }
            }
            [port, protocol] => {
                let Some(port) = service.ports.iter().find(|it| is_named(&it.name, it.protocol, Some(port), protocol))
                else {
                    return Lookup::NoSuchName;
                };
                let target = self.service_name(&service.key);
                let field = format!("spec.ports[{}]", port.name);
                let origin = Origin::field(ObjectKind::Service, service.key.clone(), field);
                let additional = cluster_records(&target, service);
                let data =
                    RecordData::Service { priority: 0, weight: WEIGHT_SUM as u16, port: port.port.get(), target };
                Lookup::Found { records: vec![record(name, data, origin)], additional }
            }
            _ => Lookup::NoSuchName,
        }
    }

    fn headless(&self, snapshot: &Snapshot, name: &DomainName, service: &Service, rest: &[&str]) -> Lookup {
        let records: Vec<Record> = match rest {
            [] => unique(ready_endpoints(snapshot, service).map(|it| endpoint_record(name, it)).collect()),
            [protocol] if protocol.starts_with('_') => {
                let exists = ready_endpoints(snapshot, service).any(|(slice, _)| {
                    slice.ports.iter().any(|port| is_named(&port.name, port.protocol, None, protocol))
                });
                return if exists { found(Vec::new()) } else { Lookup::NoSuchName };
            }
            [hostname] => {
                let of_this_name = ready_endpoints(snapshot, service)
                    .filter(|(_, endpoint)| endpoint_hostname(endpoint).as_ref() == *hostname);
                unique(of_this_name.map(|it| endpoint_record(name, it)).collect())
            }
            [port, protocol] => return self.headless_ports(snapshot, name, service, port, protocol),
            _ => Vec::new(),
        };
        // Without a ready endpoint there is no record, and so no name (specification §2.4.1).
        if records.is_empty() { Lookup::NoSuchName } else { found(records) }
    }

    /// One SRV record per endpoint and port, to the endpoint's own name (specification §2.4.2).
    fn headless_ports(
        &self,
        snapshot: &Snapshot,
        name: &DomainName,
        service: &Service,
        port: &str,
        protocol: &str,
    ) -> Lookup {
        let service_name = self.service_name(&service.key);
        let mut records = Vec::new();
        let mut additional = Vec::new();
        for (slice, endpoint) in ready_endpoints(snapshot, service) {
            let Ok(target) = service_name.under(&[&endpoint_hostname(endpoint)]) else { continue };
            for port in slice.ports.iter().filter(|it| is_named(&it.name, it.protocol, Some(port), protocol)) {
                let data =
                    RecordData::Service { priority: 0, weight: 0, port: port.port.get(), target: target.clone() };
                records.push(record(name, data, slice_origin(slice)));
                additional.push(endpoint_record(&target, (slice, endpoint)));
            }
        }
        let mut records = unique(records);
        let share = (WEIGHT_SUM / records.len().max(1)).max(1) as u16;
        for record in &mut records {
            if let RecordData::Service { weight, .. } = &mut record.data {
                *weight = share;
            }
        }
        if records.is_empty() { Lookup::NoSuchName } else { Lookup::Found { records, additional: unique(additional) } }
    }

    fn pod(&self, snapshot: &Snapshot, name: &DomainName, pod: &str, namespace: &str) -> Lookup {
        let Some(address) = dashed_address(pod) else { return Lookup::NoSuchName };
        let origin = match self.pods {
            PodNames::Disabled => None,
            PodNames::Insecure => has_namespace(snapshot, namespace).then(|| Origin::configuration("pods")),
            PodNames::Verified if !snapshot.is_in_sync(&[ObjectKind::Pod]) => return Lookup::NotReady,
            PodNames::Verified => self.index.holders(address).find_map(|holder| match holder {
                Holder::Pod(key) if *key.namespace == *namespace => {
                    let pod = snapshot.pods.get(key).filter(|pod| pod.addresses.contains(&address))?;
                    Some(Origin::field(ObjectKind::Pod, pod.key.clone(), "status.podIPs"))
                }
                _ => None,
            }),
        };
        match origin {
            Some(origin) => found(vec![record(name, RecordData::Address(address), origin)]),
            None => Lookup::NoSuchName,
        }
    }

    /// PTR of ClusterIPs (specification §2.3.3) and of headless Services' endpoints (§2.4.3).
    fn reverse(&self, snapshot: &Snapshot, name: &DomainName) -> Lookup {
        let Some(address) = address_of(name) else { return Lookup::NotOurs };
        if !snapshot.is_in_sync(&[ObjectKind::Service, ObjectKind::EndpointSlice]) {
            return Lookup::NotReady;
        }
        let mut of_services = Vec::new();
        let mut of_endpoints = Vec::new();
        for holder in self.index.holders(address) {
            match holder {
                Holder::Service(key) => {
                    let service = snapshot.services.get(key);
                    if service.is_some_and(|service| service.cluster_addresses.contains(&address)) {
                        let origin = Origin::field(ObjectKind::Service, key.clone(), "spec.clusterIPs");
                        of_services.push(record(name, RecordData::Pointer(self.service_name(key)), origin));
                    }
                }
                Holder::EndpointSlice(key) => {
                    let Some(slice) = snapshot.endpoint_slices.get(key) else { continue };
                    let Some(service) = snapshot.services.get(&slice.service).filter(|it| it.headless) else {
                        continue;
                    };
                    for endpoint in slice.endpoints.iter().filter(|it| it.address == address && is_ready(service, it)) {
                        let target = self.service_name(&service.key).under(&[&endpoint_hostname(endpoint)]);
                        let Ok(target) = target else { continue };
                        of_endpoints.push(record(name, RecordData::Pointer(target), slice_origin(slice)));
                    }
                }
                Holder::Pod(_) => {}
            }
        }
        let records = unique(if of_services.is_empty() { of_endpoints } else { of_services });
        if records.is_empty() { Lookup::NotOurs } else { found(records) }
    }

    fn service_name(&self, key: &ObjectKey) -> DomainName {
        self.zone.under(&[&key.name, &key.namespace, "svc"]).unwrap_or_default()
    }

    fn name_server(&self) -> DomainName {
        self.zone.under(&["ns", "dns"]).unwrap_or_default()
    }
}

fn record(name: &DomainName, data: RecordData, origin: Origin) -> Record {
    Record { name: name.clone(), data, origin }
}

fn cluster_records(name: &DomainName, service: &Service) -> Vec<Record> {
    let addresses = service.cluster_addresses.iter().map(|address| {
        let origin = Origin::field(ObjectKind::Service, service.key.clone(), "spec.clusterIPs");
        record(name, RecordData::Address(*address), origin)
    });
    addresses.collect()
}

fn endpoint_record(name: &DomainName, (slice, endpoint): (&EndpointSlice, &Endpoint)) -> Record {
    record(name, RecordData::Address(endpoint.address), slice_origin(slice))
}

fn found(records: Vec<Record>) -> Lookup {
    Lookup::Found { records, additional: Vec::new() }
}

fn existing_namespace(snapshot: &Snapshot, namespace: &str) -> Lookup {
    if has_namespace(snapshot, namespace) { found(Vec::new()) } else { Lookup::NoSuchName }
}

/// Whether names below the namespace's can exist: it does, or a Service of it does, since tables
/// may be listed a moment apart.
fn has_namespace(snapshot: &Snapshot, namespace: &str) -> bool {
    snapshot.namespaces.contains_key(namespace)
        || snapshot
            .services
            .range(ObjectKey::new(namespace, "")..)
            .next()
            .is_some_and(|(key, _)| *key.namespace == *namespace)
}

/// The endpoints of a headless Service that have records, with the slice that names each.
fn ready_endpoints<'a>(
    snapshot: &'a Snapshot,
    service: &'a Service,
) -> impl Iterator<Item = (&'a EndpointSlice, &'a Endpoint)> {
    snapshot.slices_of(&service.key).flat_map(move |slice| {
        let ready = slice.endpoints.iter().filter(|endpoint| is_ready(service, endpoint));
        ready.map(move |endpoint| (&**slice, endpoint))
    })
}

fn is_ready(service: &Service, endpoint: &Endpoint) -> bool {
    endpoint.ready || service.publish_not_ready
}

/// Whether a port has this protocol label (`_tcp`) and, where one is given, this port label
/// (`_http`). A port without a name has no SRV record (specification §2.3.2).
fn is_named(name: &str, protocol: Protocol, port_label: Option<&str>, protocol_label: &str) -> bool {
    !name.is_empty()
        && protocol_label.strip_prefix('_') == Some(protocol.name())
        && port_label.is_none_or(|label| label.strip_prefix('_') == Some(name))
}

/// The endpoint's hostname, else its address with dashes, as CoreDNS does.
fn endpoint_hostname(endpoint: &Endpoint) -> Arc<str> {
    match &endpoint.hostname {
        Some(hostname) if !hostname.is_empty() => hostname.to_ascii_lowercase().into(),
        _ => dashed_name(endpoint.address).into(),
    }
}

/// `10-42-0-7`, `fd00--7`. A label neither starts nor ends with a dash (RFC 1123 §2.1), so `::1`
/// is `0--1`.
fn dashed_name(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string().replace('.', "-"),
        IpAddr::V6(address) => {
            let text = address.to_string().replace([':', '.'], "-");
            let head = if text.starts_with('-') { "0" } else { "" };
            let tail = if text.ends_with('-') { "0" } else { "" };
            format!("{head}{text}{tail}")
        }
    }
}

fn dashed_address(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse::<Ipv4Addr>().ok().map(IpAddr::from);
    v4.or_else(|| label.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::from))
}

fn slice_origin(slice: &EndpointSlice) -> Origin {
    Origin::object(ObjectKind::EndpointSlice, slice.key.clone())
}

/// Sorted by family and value, each once: two slices may name one endpoint while it moves.
fn unique(mut records: Vec<Record>) -> Vec<Record> {
    let rank = |record: &Record| match &record.data {
        RecordData::Address(address) => (Some((Family::of(*address), *address)), String::new()),
        other => (None, other.to_string()),
    };
    records.sort_by_cached_key(|record| (record.name.clone(), rank(record)));
    records.dedup_by(|a, b| a.name == b.name && a.data == b.data);
    records
}
