//! Where an item comes from: the object and field that caused it.
//!
//! Every item of an intent or a program carries an origin. Traces, comments in the kernel, errors
//! and metrics name it, so that a person is led from any rule back to what they wrote.

use alloc::sync::Arc;
use core::fmt;
use core::ops::Deref;

use serde::{Deserialize, Serialize};

use crate::ObjectKey;

/// The kind of object that an item comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ObjectKind {
    /// A cluster node.
    Node,
    /// A Namespace.
    Namespace,
    /// A Service.
    Service,
    /// A slice of a Service's endpoints.
    EndpointSlice,
    /// A Pod.
    Pod,
    /// A pod interface that the CNI plugin was asked for.
    Attachment,
    /// A node's subnet that is leased as Flannel does.
    Subnet,
    /// The agent's own configuration.
    Configuration,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ObjectKind::Node => "Node",
            ObjectKind::Namespace => "Namespace",
            ObjectKind::Service => "Service",
            ObjectKind::EndpointSlice => "EndpointSlice",
            ObjectKind::Pod => "Pod",
            ObjectKind::Attachment => "Attachment",
            ObjectKind::Subnet => "Subnet",
            ObjectKind::Configuration => "configuration",
        })
    }
}

/// The object, and where it helps the field of it, that caused an item.
///
/// One cause has many items: a slice of 100 endpoints is named by 100 backends, and by as many elements of
/// a map. So an origin is a pointer, and a copy of it costs eight bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Origin(Arc<Cause>);

/// What an [`Origin`] says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Cause {
    /// The kind of the object.
    pub kind: ObjectKind,
    /// Which one.
    pub key: ObjectKey,
    /// The field, as the user writes it (`spec.ports[http].nodePort`), where one alone is the cause.
    pub field: Option<Arc<str>>,
}

impl Deref for Origin {
    type Target = Cause;

    fn deref(&self) -> &Cause {
        &self.0
    }
}

impl Origin {
    /// An object as a whole.
    pub fn object(kind: ObjectKind, key: ObjectKey) -> Origin {
        Origin(Arc::new(Cause { kind, key, field: None }))
    }

    /// One field of an object.
    pub fn field(kind: ObjectKind, key: ObjectKey, field: impl Into<Arc<str>>) -> Origin {
        Origin(Arc::new(Cause { kind, key, field: Some(field.into()) }))
    }

    /// A field of the agent's configuration.
    pub fn configuration(field: &str) -> Origin {
        Origin::object(ObjectKind::Configuration, ObjectKey::cluster(field))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.key)?;
        match &self.field {
            Some(field) => write!(f, " {field}"),
            None => Ok(()),
        }
    }
}
