//! Kubernetes' objects to the cluster's tables.
//!
//! Each kind has a *view*, the fields that some intent reads, decoded leniently straight from the
//! server's answer, and a conversion of that view. A bad part (one port, one address, one endpoint)
//! is left out and reported; the object as a whole is rejected only when nothing of it can be used.
//! Nothing here fails or panics, whatever the server sends.

mod endpoint_slice;
mod namespace;
mod node;
mod pod;
mod service;
#[cfg(test)]
mod tests;
mod traffic;

use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use portolan_net::{ObjectKey, ObjectKind, Protocol};
use portolan_state::{Change, Object, ObjectRef, Problem};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use crate::lenient::{Leaf, Part, Texts, shorten};
use crate::limits::PROBLEMS_PER_OBJECT_MAX;

pub(crate) use endpoint_slice::EndpointSlices;
pub(crate) use namespace::Namespaces;
pub(crate) use node::Nodes;
pub(crate) use node::{
    ANNOTATION_BACKEND_DATA, ANNOTATION_BACKEND_TYPE, ANNOTATION_BACKEND_V6_DATA, ANNOTATION_MANAGER,
    ANNOTATION_PUBLIC_IP, ANNOTATION_PUBLIC_IPV6,
};
pub(crate) use pod::Pods;
pub(crate) use service::Services;

/// The label by which a Service, and its slices, are left to another proxy.
const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";

/// The annotation of a slice that says when the pods or the Service changed that it tells of.
const ANNOTATION_TRIGGER: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// One table: which Kubernetes kind fills it, and how.
pub(crate) trait Table: Send + Sync + 'static {
    /// The Kubernetes kind: group, version and plural come from it.
    type Kubernetes: Resource<DynamicType = ()>;
    /// The fields that are read.
    type View: DeserializeOwned + Default;
    /// The table.
    const KIND: ObjectKind;

    /// What names the object.
    fn reference(key: ObjectKey) -> ObjectRef;

    /// Takes the metadata out of a view.
    fn metadata(view: &mut Self::View) -> Metadata;

    /// The object, if there is one in it.
    fn convert(metadata: &Metadata, view: Self::View, problems: &mut Problems) -> Outcome;
}

/// What a conversion comes to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    /// An object, with the problems that were noted on the way.
    Keep(Object),
    /// An object that a label leaves to another proxy: of use for names, not for Services.
    OtherProxy(Object),
    /// Nothing for us, and nothing wrong.
    Skip,
    /// Nothing of it can be used; the first problem noted says why.
    Reject,
}

/// An object of the cluster, already converted.
pub(crate) struct Converted<T> {
    /// Name, namespace and resource version: what a watch needs. The rest is dropped.
    identity: ObjectMeta,
    /// What names it; `None` for an object without a name.
    pub(crate) reference: Option<ObjectRef>,
    /// What it is to us.
    pub(crate) outcome: Outcome,
    /// What is wrong with it.
    pub(crate) problems: Vec<Problem>,
    /// When what it tells of happened, where it says so.
    pub(crate) trigger: Option<SystemTime>,
    table: PhantomData<fn() -> T>,
}

/// The metadata that conversions read.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Metadata {
    name: Leaf<String>,
    namespace: Leaf<String>,
    resource_version: Leaf<String>,
    deletion_timestamp: Leaf<String>,
    labels: Texts,
    annotations: Texts,
}

impl Metadata {
    /// Namespace and name.
    pub(crate) fn key(&self) -> ObjectKey {
        ObjectKey::new(self.namespace.text(), self.name.text())
    }

    /// Whether it is gone once its finalizers are done.
    fn is_being_deleted(&self) -> bool {
        !self.deletion_timestamp.is_absent()
    }

    /// When what the object tells of happened; only slices say so.
    fn trigger(&self) -> Option<SystemTime> {
        let written: Timestamp = self.annotations.get(ANNOTATION_TRIGGER)?.parse().ok()?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(u64::try_from(written.as_nanosecond()).ok()?))
    }

    fn left_to_other_proxy(&self) -> bool {
        self.labels.get(LABEL_PROXY_NAME).is_some()
    }

    /// Wraps an object by whether a label leaves it to another proxy.
    fn keep(&self, object: Object) -> Outcome {
        if self.left_to_other_proxy() { Outcome::OtherProxy(object) } else { Outcome::Keep(object) }
    }
}

impl<'de, T: Table> Deserialize<'de> for Converted<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Part(mut view) = Part::<T::View>::deserialize(deserializer)?;
        let metadata = T::metadata(&mut view);
        let identity = ObjectMeta {
            name: metadata.name.get().cloned(),
            namespace: metadata.namespace.get().cloned(),
            resource_version: metadata.resource_version.get().cloned(),
            ..ObjectMeta::default()
        };
        if metadata.name.text().is_empty() {
            let (outcome, problems) = (Outcome::Skip, Vec::new());
            return Ok(Converted { identity, reference: None, outcome, problems, trigger: None, table: PhantomData });
        }
        let reference = T::reference(metadata.key());
        let mut problems = Problems::new(reference.clone());
        let outcome = T::convert(&metadata, view, &mut problems);
        let problems = problems.finish();
        let trigger = metadata.trigger();
        Ok(Converted { identity, reference: Some(reference), outcome, problems, trigger, table: PhantomData })
    }
}

impl<T> Converted<T> {
    /// What it changes, and of which object; `None` for an object without a name.
    pub(crate) fn into_change(self, keep_other_proxies: bool) -> Option<(ObjectRef, Change)> {
        let reference = self.reference?;
        let change = match self.outcome {
            Outcome::Keep(object) => Change::Upsert(object, self.problems),
            Outcome::OtherProxy(object) if keep_other_proxies => Change::Upsert(object, self.problems),
            // It may have been of use before this change.
            Outcome::OtherProxy(_) | Outcome::Skip => Change::Delete(reference.clone()),
            Outcome::Reject => match self.problems.into_iter().next() {
                Some(problem) => Change::Reject(problem),
                None => Change::Delete(reference.clone()),
            },
        };
        Some((reference, change))
    }
}

// Written out: a derive would ask for `T: Clone`.
impl<T> Clone for Converted<T> {
    fn clone(&self) -> Self {
        Converted {
            identity: self.identity.clone(),
            reference: self.reference.clone(),
            outcome: self.outcome.clone(),
            problems: self.problems.clone(),
            trigger: self.trigger,
            table: PhantomData,
        }
    }
}

impl<T> fmt::Debug for Converted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Converted")
            .field("reference", &self.reference)
            .field("outcome", &self.outcome)
            .finish_non_exhaustive()
    }
}

impl<T: Table> Resource for Converted<T> {
    type DynamicType = ();
    type Scope = <T::Kubernetes as Resource>::Scope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        T::Kubernetes::kind(&())
    }

    fn group((): &()) -> std::borrow::Cow<'_, str> {
        T::Kubernetes::group(&())
    }

    fn version((): &()) -> std::borrow::Cow<'_, str> {
        T::Kubernetes::version(&())
    }

    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        T::Kubernetes::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.identity
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.identity
    }
}

/// The problems of one object, as they are found.
pub(crate) struct Problems {
    object: ObjectRef,
    noted: Vec<Problem>,
    left_out: usize,
}

impl Problems {
    fn new(object: ObjectRef) -> Problems {
        Problems { object, noted: Vec::new(), left_out: 0 }
    }

    /// Notes that a field has no effect.
    pub(crate) fn note(&mut self, field: impl Into<Arc<str>>, reason: impl Into<Arc<str>>, hint: &str) {
        if self.noted.len() == PROBLEMS_PER_OBJECT_MAX {
            self.left_out += 1;
            return;
        }
        let (field, reason, hint) = (field.into(), reason.into(), hint.into());
        self.noted.push(Problem { object: self.object.clone(), field, reason, hint });
    }

    /// Whether there are any.
    fn any(&self) -> bool {
        !self.noted.is_empty()
    }

    fn finish(mut self) -> Vec<Problem> {
        if self.left_out > 0 {
            self.noted.push(Problem {
                object: self.object,
                field: "*".into(),
                reason: format!("{} more problems of this object are not listed", self.left_out).into(),
                hint: "correct those listed first".into(),
            });
        }
        self.noted
    }

    /// An address that packets can be sent to, or none, noted.
    ///
    /// Kubernetes forbids the same ranges for endpoints (core/v1 `EndpointAddress.ip`): an endpoint
    /// at 127.0.0.1 would let the author of a slice reach every node's local services.
    fn address(&mut self, field: &str, text: &Leaf<String>) -> Option<IpAddr> {
        let text = match text {
            Leaf::Good(text) => text,
            Leaf::Bad(written) => {
                self.note(field, format!("{written} is not an address"), "write an IPv4 or IPv6 address as text");
                return None;
            }
            Leaf::Absent => {
                self.note(field, "there is no address", "write an IPv4 or IPv6 address");
                return None;
            }
        };
        let Ok(address) = text.parse::<IpAddr>() else {
            let reason = format!("`{}` is not an address", shorten(text));
            self.note(field, reason, "write an IPv4 or IPv6 address, without a prefix length");
            return None;
        };
        if let Some(class) = unusable_class(address) {
            let reason = format!("{address} is {class}: no other node can send to it");
            self.note(field, reason, "use an address that is routed in the cluster");
            return None;
        }
        Some(address)
    }

    /// A port, or none, noted.
    fn port(&mut self, field: &str, number: &Leaf<i64>) -> Option<portolan_net::Port> {
        let written = match number {
            Leaf::Good(number) => {
                if let Some(port) = u16::try_from(*number).ok().and_then(|number| number.try_into().ok()) {
                    return Some(port);
                }
                number.to_string()
            }
            Leaf::Bad(written) => written.clone(),
            Leaf::Absent => "nothing".to_owned(),
        };
        self.note(field, format!("{written} is not a port"), "use a number from 1 to 65535");
        None
    }

    /// A transport protocol, TCP where none is named, or none, noted.
    fn protocol(&mut self, field: &str, name: &Leaf<String>) -> Option<Protocol> {
        let written = match name {
            Leaf::Absent => return Some(Protocol::Tcp),
            Leaf::Good(name) => match name.as_str() {
                "" | "TCP" => return Some(Protocol::Tcp),
                "UDP" => return Some(Protocol::Udp),
                "SCTP" => return Some(Protocol::Sctp),
                other => format!("`{}`", shorten(other)),
            },
            Leaf::Bad(written) => written.clone(),
        };
        self.note(field, format!("{written} is not a protocol"), "use TCP, UDP or SCTP");
        None
    }
}

/// Why an address can be nobody's destination on another node, if it cannot.
fn unusable_class(address: IpAddr) -> Option<&'static str> {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let mapped = matches!(address, IpAddr::V6(address) if address.to_ipv4_mapped().is_some());
    match () {
        () if address.is_unspecified() => Some("the unspecified address"),
        () if address.is_loopback() => Some("a loopback address"),
        () if address.is_multicast() => Some("a multicast address"),
        () if link_local => Some("a link-local address"),
        () if mapped => Some("an IPv4 address written as an IPv6 one"),
        () => None,
    }
}
