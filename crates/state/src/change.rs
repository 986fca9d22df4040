//! What sources say: changes of single objects, and whole lists.

use std::fmt;
use std::sync::Arc;

use portolan_net::{NodeName, ObjectKey, ObjectKind};
use serde::{Deserialize, Serialize};

use crate::{Attachment, AttachmentKey, EndpointSlice, Namespace, Node, Pod, Service, Subnet};

/// An object of any table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Object {
    /// A namespace.
    Namespace(Namespace),
    /// A node.
    Node(Node),
    /// A Service.
    Service(Service),
    /// A slice of endpoints.
    EndpointSlice(EndpointSlice),
    /// A pod.
    Pod(Pod),
    /// A pod interface on this node.
    Attachment(Attachment),
    /// Another node's leased subnet.
    Subnet(Subnet),
}

/// Which object, in which table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ObjectRef {
    /// A namespace by name.
    Namespace(Arc<str>),
    /// A node by name.
    Node(NodeName),
    /// A Service.
    Service(ObjectKey),
    /// A slice of endpoints.
    EndpointSlice(ObjectKey),
    /// A pod.
    Pod(ObjectKey),
    /// A pod interface on this node.
    Attachment(AttachmentKey),
    /// A leased subnet by its key.
    Subnet(Arc<str>),
}

impl ObjectRef {
    /// The table.
    pub fn kind(&self) -> ObjectKind {
        match self {
            ObjectRef::Namespace(_) => ObjectKind::Namespace,
            ObjectRef::Node(_) => ObjectKind::Node,
            ObjectRef::Service(_) => ObjectKind::Service,
            ObjectRef::EndpointSlice(_) => ObjectKind::EndpointSlice,
            ObjectRef::Pod(_) => ObjectKind::Pod,
            ObjectRef::Attachment(_) => ObjectKind::Attachment,
            ObjectRef::Subnet(_) => ObjectKind::Subnet,
        }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind())?;
        match self {
            ObjectRef::Namespace(name) | ObjectRef::Subnet(name) => f.write_str(name),
            ObjectRef::Node(name) => name.fmt(f),
            ObjectRef::Service(key) | ObjectRef::EndpointSlice(key) | ObjectRef::Pod(key) => key.fmt(f),
            ObjectRef::Attachment(key) => key.fmt(f),
        }
    }
}

impl Object {
    /// What names this object.
    pub fn reference(&self) -> ObjectRef {
        match self {
            Object::Namespace(namespace) => ObjectRef::Namespace(namespace.name.clone()),
            Object::Node(node) => ObjectRef::Node(node.name.clone()),
            Object::Service(service) => ObjectRef::Service(service.key.clone()),
            Object::EndpointSlice(slice) => ObjectRef::EndpointSlice(slice.key.clone()),
            Object::Pod(pod) => ObjectRef::Pod(pod.key.clone()),
            Object::Attachment(attachment) => ObjectRef::Attachment(attachment.key.clone()),
            Object::Subnet(subnet) => ObjectRef::Subnet(subnet.key.clone()),
        }
    }
}

/// Why an object, or a part of one, has no effect: a row that the user can list.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// The object.
    pub object: ObjectRef,
    /// The field that is wrong, as the user writes it.
    pub field: Arc<str>,
    /// What is wrong with it.
    pub reason: Arc<str>,
    /// What the user can do.
    pub hint: Arc<str>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {} ({})", self.object, self.field, self.reason, self.hint)
    }
}

/// What a source says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// The object is now so. Its problems, if parts of it were left out, replace earlier ones.
    Upsert(Object, Vec<Problem>),
    /// The object is gone. Deleting what is not there is legal.
    Delete(ObjectRef),
    /// The object as a whole is invalid, and so absent, for this reason.
    Reject(Problem),
    /// The whole table, after a list: what is not in it is gone. The table is in sync from now on.
    Replace(ObjectKind, Vec<(Object, Vec<Problem>)>, Vec<Problem>),
}
