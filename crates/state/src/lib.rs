//! The cluster's tables: what the cluster is, as far as the network cares.
//!
//! - [`Writer`] is the one place that changes them. Sources hand it [`Change`]s and promise only
//!   eventual convergence: duplicates, stale replays and spurious deletes are legal.
//! - [`Snapshot`] is immutable and cheap to clone; it carries a revision.
//! - [`Dirty`] is the change feed: which keys changed since the last snapshot was taken.
//! - An invalid object becomes absent, with a [`Problem`] that the user can list.
//!
//! It reads no clock, file or socket, and knows nothing of Kubernetes' types.

mod change;
mod object;
mod order;
mod snapshot;
mod writer;

pub use change::{Change, Object, ObjectRef, Problem};
pub use object::{
    AffinityTimeout, Attachment, AttachmentKey, Endpoint, EndpointHints, EndpointPort, EndpointSlice, IpVersion,
    Namespace, Node, NodeTunnel, Pod, Service, ServicePort, ServiceTraffic, ServiceType, Subnet, TrafficPolicy,
};
pub use order::by_halves;
pub use snapshot::{Dirty, Snapshot};
pub use writer::Writer;
