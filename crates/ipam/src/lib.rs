//! Who owns which addresses.
//!
//! [`PodAddresses`] hands out the addresses of one node's own pod prefixes, as the `host-local`
//! plugin does on a Flannel node. Ways in which a node comes by its prefixes (leases, blocks) are
//! other modules of this crate and end in [`PodAddresses::set_prefixes`].
//!
//! The core is pure: it holds no file and reads no clock. Whoever uses it keeps the records that
//! outlive a crash, and gives them back with [`PodAddresses::adopt`].

pub mod flannel;
pub mod limits;
mod pod_addresses;

pub use pod_addresses::{AddressesProblem, AllocateError, PodAddresses};
