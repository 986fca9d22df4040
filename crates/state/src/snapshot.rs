//! The tables at one revision, and the keys that changed.

use std::collections::BTreeSet;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use portolan_net::{NodeName, ObjectKey, ObjectKind};

use crate::{Attachment, AttachmentKey, EndpointSlice, Namespace, Node, ObjectRef, Pod, Problem, Service, Subnet};

/// The tables at one revision. Cloning costs a few reference counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Counts the writes that changed something.
    pub revision: u64,
    /// Namespaces by name.
    pub namespaces: OrdMap<Arc<str>, Arc<Namespace>>,
    /// Nodes by name.
    pub nodes: OrdMap<NodeName, Arc<Node>>,
    /// Services.
    pub services: OrdMap<ObjectKey, Arc<Service>>,
    /// Slices of endpoints, by their own key.
    pub endpoint_slices: OrdMap<ObjectKey, Arc<EndpointSlice>>,
    /// Each Service with each of its slices: an index that the writer keeps. One flat set, since a set
    /// for each Service would take half a kilobyte where there is one slice.
    pub slices_by_service: OrdSet<(ObjectKey, ObjectKey)>,
    /// Pods.
    pub pods: OrdMap<ObjectKey, Arc<Pod>>,
    /// Pod interfaces on this node.
    pub attachments: OrdMap<AttachmentKey, Arc<Attachment>>,
    /// Leased subnets of other nodes, by their keys.
    pub subnets: OrdMap<Arc<str>, Arc<Subnet>>,
    /// Objects and parts of objects that have no effect, with the reason.
    pub problems: OrdMap<ObjectRef, Arc<[Problem]>>,
    /// Tables that have been listed in full at least once.
    pub in_sync: OrdSet<ObjectKind>,
}

impl Snapshot {
    /// The slices of one Service, in the order of their names.
    pub fn slices_of<'a>(&'a self, service: &ObjectKey) -> impl Iterator<Item = &'a Arc<EndpointSlice>> {
        let service = service.clone();
        // No key sorts before the one without any text.
        self.slices_by_service
            .range((service.clone(), ObjectKey::new("", ""))..)
            .take_while(move |(owner, _)| *owner == service)
            .filter_map(|(_, key)| self.endpoint_slices.get(key))
    }

    /// Whether every one of these tables has been listed in full.
    pub fn is_in_sync(&self, tables: &[ObjectKind]) -> bool {
        tables.iter().all(|table| self.in_sync.contains(table))
    }
}

/// The keys that changed between two snapshots.
///
/// Endpoint slices are reported as the Service they belong to: no intent reads a slice alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Namespaces.
    pub namespaces: BTreeSet<Arc<str>>,
    /// Nodes.
    pub nodes: BTreeSet<NodeName>,
    /// Services that changed, or whose endpoints did.
    pub services: BTreeSet<ObjectKey>,
    /// Pods.
    pub pods: BTreeSet<ObjectKey>,
    /// Pod interfaces.
    pub attachments: BTreeSet<AttachmentKey>,
    /// Leased subnets.
    pub subnets: BTreeSet<Arc<str>>,
}

impl Dirty {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.nodes.is_empty()
            && self.services.is_empty()
            && self.pods.is_empty()
            && self.attachments.is_empty()
            && self.subnets.is_empty()
    }

    /// Every key of a snapshot: what a compiler that starts from nothing is given.
    pub fn everything(snapshot: &Snapshot) -> Dirty {
        Dirty {
            namespaces: snapshot.namespaces.keys().cloned().collect(),
            nodes: snapshot.nodes.keys().cloned().collect(),
            services: snapshot
                .services
                .keys()
                .chain(snapshot.slices_by_service.iter().map(|(service, _)| service))
                .cloned()
                .collect(),
            pods: snapshot.pods.keys().cloned().collect(),
            attachments: snapshot.attachments.keys().cloned().collect(),
            subnets: snapshot.subnets.keys().cloned().collect(),
        }
    }
}
