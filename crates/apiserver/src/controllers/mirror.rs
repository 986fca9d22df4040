//! The objects as the controllers see them, with what changed and whom that concerns.
//!
//! Every change is noted at once for the controllers that it concerns: a pod for the Services that select
//! it, before and after the change, and for its ReplicaSet; a slice for its Service; an owner that is gone
//! for what it owned. So a pass costs what changed, whatever the number of objects. Indexes answer the
//! controllers' questions (which pods have these labels, what does this object own) at the same cost.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::endpoint_slice::{SERVICE_NAME, ZONE};
use crate::admission::Objects;
use crate::fields::{at, controller_uid, items, label, name, namespace, text, uid};
use crate::resources::table_name;

/// Namespace, empty for cluster-scoped objects, and name.
pub(super) type Key = (String, String);

/// Kind and key of one object.
pub(super) type Reference = (String, Key);

/// The objects of all kinds as the controllers see them.
#[derive(Debug, Clone, Default)]
pub struct Mirror {
    /// Objects by kind, then by namespace and name; a custom kind is named with its group, as
    /// `Service.example.com`. A kind without an entry is not known, so its objects are neither made nor
    /// missed.
    objects: BTreeMap<String, Objects>,
    work: Work,
    indexes: Indexes,
}

/// What a pass has to look at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// Everything, whatever else is noted.
    is_all: bool,
    /// Every Service: a node's zone changed.
    is_all_services: bool,
    /// Some Node changed.
    has_nodes: bool,
    services: BTreeSet<Key>,
    deployments: BTreeSet<Key>,
    replica_sets: BTreeSet<Key>,
    pods: BTreeSet<Key>,
    events: BTreeSet<Key>,
    /// Objects whose owners may be gone.
    owned: BTreeSet<Reference>,
    /// Objects that may wait for what they own to go.
    owners: BTreeSet<Reference>,
    /// Namespaces that may wait for their objects to go.
    namespaces: BTreeSet<String>,
}

/// Answers that follow from the objects.
#[derive(Debug, Clone, Default)]
struct Indexes {
    /// The names of the slices with the label of a Service.
    slices: BTreeMap<Key, BTreeSet<String>>,
    /// The Services of a namespace by the first label of their selectors.
    selecting: BTreeMap<(String, String, String), BTreeSet<String>>,
    /// The pods of a namespace by each of their labels.
    labelled: BTreeMap<(String, String, String), BTreeSet<String>>,
    /// The pods that no node has yet.
    unplaced: BTreeSet<Key>,
    /// Objects by uid; there is one, unless somebody made it up.
    uids: BTreeMap<String, BTreeSet<Reference>>,
    /// Objects by the uid of each of their owners.
    owned: BTreeMap<String, BTreeSet<Reference>>,
}

impl Mirror {
    /// An empty mirror that knows some kinds.
    pub fn new(kinds: impl IntoIterator<Item = impl Into<String>>) -> Mirror {
        let objects = kinds.into_iter().map(|kind| (kind.into(), Objects::new())).collect();
        Mirror { objects, work: Work { is_all: true, ..Work::default() }, indexes: Indexes::default() }
    }

    /// Puts an object in the place of its older self. The kind is the object's own.
    pub fn upsert(&mut self, object: Value) {
        let kind = table_name(&object);
        let key = (namespace(&object).to_owned(), name(&object).to_owned());
        // Objects whose owners are of a kind that was not known may be found to be ownerless now.
        self.work.is_all |= !self.objects.contains_key(&kind);
        let reference = (kind, key);
        let old = self.take(&reference);
        if reference.0 == "Node" {
            let zone = |node: &Value| label(node, ZONE).map(str::to_owned);
            self.work.is_all_services |= old.as_ref().and_then(zone) != zone(&object);
        }
        if let Some(old) = old.filter(|old| uid(old) != uid(&object)) {
            self.note_gone(&old);
        }
        self.indexes.put(&reference, &object);
        self.note(&reference, &object);
        self.objects.entry(reference.0).or_default().insert(reference.1, object);
    }

    /// Takes an object out.
    pub fn remove(&mut self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let reference = (kind.to_owned(), (namespace.to_owned(), name.to_owned()));
        let removed = self.take(&reference)?;
        self.work.is_all_services |= kind == "Node" && label(&removed, ZONE).is_some();
        self.note_gone(&removed);
        Some(removed)
    }

    /// Takes an object out, and notes whom it concerned.
    fn take(&mut self, reference: &Reference) -> Option<Value> {
        let old = self.objects.get_mut(&reference.0)?.remove(&reference.1)?;
        self.note(reference, &old);
        self.indexes.remove(reference, &old);
        Some(old)
    }

    /// Notes whom an object concerns as it is.
    fn note(&mut self, reference: &Reference, object: &Value) {
        let (kind, key) = reference;
        match kind.as_str() {
            "Node" => self.work.has_nodes = true,
            "Event" => drop(self.work.events.insert(key.clone())),
            "Namespace" => drop(self.work.namespaces.insert(key.1.clone())),
            "Deployment" => drop(self.work.deployments.insert(key.clone())),
            "ReplicaSet" => drop(self.work.replica_sets.insert(key.clone())),
            "Service" | "Endpoints" => drop(self.work.services.insert(key.clone())),
            "EndpointSlice" => {
                let service = service_of(object).map(|service| (key.0.clone(), service.to_owned()));
                self.work.services.extend(service);
            }
            "Pod" => {
                self.work.pods.insert(key.clone());
                for label in labels(at(object, "metadata.labels")) {
                    let services = self.indexes.selecting.get(&in_namespace(key, label)).into_iter().flatten();
                    self.work.services.extend(services.map(|service| (key.0.clone(), service.clone())));
                }
            }
            _ => {}
        }
        let owner = controller_uid(object).and_then(|owner| self.indexes.uids.get(owner));
        for (kind, key) in owner.into_iter().flatten() {
            match kind.as_str() {
                "Deployment" => drop(self.work.deployments.insert(key.clone())),
                "ReplicaSet" => drop(self.work.replica_sets.insert(key.clone())),
                _ => {}
            }
        }
        // What follows is for the garbage collector.
        self.work.owners.insert(reference.clone());
        if !key.0.is_empty() {
            self.work.namespaces.insert(key.0.clone());
        }
        let owners = items(object, "metadata.ownerReferences");
        if !owners.is_empty() {
            self.work.owned.insert(reference.clone());
        }
        for owner in owners {
            self.work.owners.extend(self.indexes.uids.get(text(owner, "uid")).into_iter().flatten().cloned());
        }
    }

    /// Notes what has lost an owner.
    fn note_gone(&mut self, owner: &Value) {
        self.work.owned.extend(self.indexes.owned.get(uid(owner)).into_iter().flatten().cloned());
    }

    /// One object.
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<&Value> {
        self.objects.get(kind)?.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// All objects of a kind.
    pub fn all(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.objects_of(kind).map(|(_, object)| object)
    }

    fn objects_of(&self, kind: &str) -> impl Iterator<Item = (&Key, &Value)> {
        self.objects.get(kind).into_iter().flatten()
    }

    /// The objects of a kind in one namespace.
    pub fn within<'a>(&'a self, kind: &str, namespace: &'a str) -> impl Iterator<Item = &'a Value> {
        let objects = self.objects.get(kind).map(|objects| objects.range((namespace.to_owned(), String::new())..));
        objects.into_iter().flatten().take_while(move |(key, _)| key.0 == namespace).map(|(_, object)| object)
    }

    /// Whether a pass has anything to look at.
    pub fn is_dirty(&self) -> bool {
        self.work != Work::default()
    }

    /// Forgets what there is to look at: the next pass looks at what comes after.
    pub fn take_dirty(&mut self) {
        self.work = Work::default();
    }

    /// Has the next pass look at everything: the first one, after a resync, and after a write that failed.
    pub fn mark_all_dirty(&mut self) {
        self.work.is_all = true;
    }
}

/// What the controllers ask.
impl Mirror {
    /// The Services to look at.
    pub(super) fn due_services(&self) -> Vec<&Value> {
        self.due("Service", &self.work.services, self.work.is_all_services)
    }

    /// The Deployments to look at.
    pub(super) fn due_deployments(&self) -> Vec<&Value> {
        self.due("Deployment", &self.work.deployments, false)
    }

    /// The ReplicaSets to look at.
    pub(super) fn due_replica_sets(&self) -> Vec<&Value> {
        self.due("ReplicaSet", &self.work.replica_sets, false)
    }

    /// The pods that changed.
    pub(super) fn due_pods(&self) -> Vec<&Value> {
        self.due("Pod", &self.work.pods, false)
    }

    /// The pods without a node to look at: a change of a node may make room for each.
    pub(super) fn due_unplaced_pods(&self) -> Vec<&Value> {
        let is_due = |key: &&Key| self.work.is_all || self.work.has_nodes || self.work.pods.contains(*key);
        let due = self.indexes.unplaced.iter().filter(is_due);
        due.filter_map(|key| self.get("Pod", &key.0, &key.1)).collect()
    }

    /// The Events to look at.
    pub(super) fn due_events(&self) -> Vec<&Value> {
        self.due("Event", &self.work.events, false)
    }

    /// Whether Nodes are to be looked at.
    pub(super) fn has_due_nodes(&self) -> bool {
        self.work.is_all || self.work.has_nodes
    }

    fn due<'a>(&'a self, kind: &str, keys: &BTreeSet<Key>, is_all: bool) -> Vec<&'a Value> {
        if is_all || self.work.is_all {
            return self.all(kind).collect();
        }
        let objects = self.objects.get(kind);
        keys.iter().filter_map(|key| objects?.get(key)).collect()
    }

    /// Objects that may have lost all their owners.
    pub(super) fn due_owned(&self) -> Vec<&Value> {
        self.due_references(&self.work.owned)
    }

    /// Objects that may wait for what they own.
    pub(super) fn due_owners(&self) -> Vec<&Value> {
        self.due_references(&self.work.owners)
    }

    fn due_references(&self, noted: &BTreeSet<Reference>) -> Vec<&Value> {
        if self.work.is_all {
            return self.objects.values().flat_map(BTreeMap::values).collect();
        }
        noted.iter().filter_map(|reference| self.referred(reference)).collect()
    }

    /// Namespaces that may wait for their objects.
    pub(super) fn due_namespaces(&self) -> Vec<&Value> {
        if self.work.is_all {
            return self.all("Namespace").collect();
        }
        self.work.namespaces.iter().filter_map(|name| self.get("Namespace", "", name)).collect()
    }

    /// The objects of every kind in a namespace.
    pub(super) fn in_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects.keys().flat_map(move |kind| self.within(kind, namespace))
    }

    /// Whether objects of a kind are known here.
    pub(super) fn knows(&self, kind: &str) -> bool {
        self.objects.contains_key(kind)
    }

    /// The objects of a kind by their keys.
    pub(super) fn table(&self, kind: &str) -> Option<&Objects> {
        self.objects.get(kind)
    }

    /// Whether an object with this uid is there.
    pub(super) fn has_uid(&self, uid: &str) -> bool {
        self.indexes.uids.contains_key(uid)
    }

    /// The objects that name an owner with this uid, by kind, namespace and name.
    pub(super) fn owned_by(&self, uid: &str) -> impl Iterator<Item = &Value> {
        let references = self.indexes.owned.get(uid).into_iter().flatten();
        references.filter_map(|reference| self.referred(reference))
    }

    fn referred(&self, (kind, key): &Reference) -> Option<&Value> {
        self.objects.get(kind)?.get(key)
    }

    /// The EndpointSlices with the label of a Service.
    pub(super) fn slices_of<'a>(&'a self, namespace: &'a str, service: &str) -> impl Iterator<Item = &'a Value> {
        let names = self.indexes.slices.get(&(namespace.to_owned(), service.to_owned())).into_iter().flatten();
        names.filter_map(move |name| self.get("EndpointSlice", namespace, name))
    }

    /// The pods of a namespace that have all these labels, by name; perhaps more, but not many.
    pub(super) fn pods_labelled<'a>(&'a self, namespace: &'a str, wanted: &Value) -> Vec<&'a Value> {
        let key = (namespace.to_owned(), String::new());
        let with = |label| self.indexes.labelled.get(&in_namespace(&key, label));
        let sets: Option<Vec<&BTreeSet<String>>> = labels(wanted).map(with).collect();
        // A label that no pod has: none has all of them.
        let Some(sets) = sets else { return Vec::new() };
        match sets.into_iter().min_by_key(|names| names.len()) {
            Some(names) => names.iter().filter_map(|name| self.get("Pod", namespace, name)).collect(),
            None => self.within("Pod", namespace).collect(),
        }
    }
}

impl Indexes {
    fn put(&mut self, reference: &Reference, object: &Value) {
        let (kind, key) = reference;
        match kind.as_str() {
            "EndpointSlice" => {
                if let Some(service) = service_of(object) {
                    self.slices.entry((key.0.clone(), service.to_owned())).or_default().insert(key.1.clone());
                }
            }
            "Service" => {
                if let Some(first) = labels(at(object, "spec.selector")).min() {
                    self.selecting.entry(in_namespace(key, first)).or_default().insert(key.1.clone());
                }
            }
            "Pod" => {
                for label in labels(at(object, "metadata.labels")) {
                    self.labelled.entry(in_namespace(key, label)).or_default().insert(key.1.clone());
                }
                if text(object, "spec.nodeName").is_empty() {
                    self.unplaced.insert(key.clone());
                }
            }
            _ => {}
        }
        self.uids.entry(uid(object).to_owned()).or_default().insert(reference.clone());
        for owner in items(object, "metadata.ownerReferences") {
            self.owned.entry(text(owner, "uid").to_owned()).or_default().insert(reference.clone());
        }
    }

    fn remove(&mut self, reference: &Reference, object: &Value) {
        let (kind, key) = reference;
        match kind.as_str() {
            "EndpointSlice" => {
                if let Some(service) = service_of(object) {
                    take_from(&mut self.slices, &(key.0.clone(), service.to_owned()), &key.1);
                }
            }
            "Service" => {
                if let Some(first) = labels(at(object, "spec.selector")).min() {
                    take_from(&mut self.selecting, &in_namespace(key, first), &key.1);
                }
            }
            "Pod" => {
                for label in labels(at(object, "metadata.labels")) {
                    take_from(&mut self.labelled, &in_namespace(key, label), &key.1);
                }
                self.unplaced.remove(key);
            }
            _ => {}
        }
        take_from(&mut self.uids, &uid(object).to_owned(), reference);
        for owner in items(object, "metadata.ownerReferences") {
            take_from(&mut self.owned, &text(owner, "uid").to_owned(), reference);
        }
    }
}

/// Takes an entry out of one of many sets, and the set with its last entry.
fn take_from<K: Ord, V: Ord>(sets: &mut BTreeMap<K, BTreeSet<V>>, key: &K, entry: &V) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(entry);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}

/// The labels of a map that are texts, as all of them should be.
fn labels(map: &Value) -> impl Iterator<Item = (&str, &str)> {
    map.as_object().into_iter().flatten().filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
}

fn in_namespace(key: &Key, (label, value): (&str, &str)) -> (String, String, String) {
    (key.0.clone(), label.to_owned(), value.to_owned())
}

/// The Service that an EndpointSlice says it belongs to.
fn service_of(object: &Value) -> Option<&str> {
    label(object, SERVICE_NAME)
}
