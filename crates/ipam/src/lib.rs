//! Who owns which addresses.
//!
//! [`PodAddresses`] hands out the addresses of one node's own pod prefixes, as the `host-local`
//! plugin does on a Flannel node. Ways in which a node comes by its prefixes are other modules of this
//! crate and end in [`PodAddresses::set_prefixes`]: [`flannel`] leases them as flanneld does.
//!
//! The core is pure: it holds no file and reads no clock. Whoever uses it keeps the records that
//! outlive a crash, and gives them back with [`PodAddresses::adopt`]. [`io`] talks to a store.

pub mod flannel;
pub mod io;
pub mod limits;
mod pod_addresses;

pub use pod_addresses::{AddressesProblem, AllocateError, PodAddresses};
