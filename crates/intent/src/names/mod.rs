//! Names: what the cluster's DNS names stand for.
//!
//! The rules are those of "Kubernetes DNS-Based Service Discovery" 1.1.0 (kubernetes/dns,
//! `docs/specification.md`), with CoreDNS's names for pods and for endpoints without a hostname.
//!
//! [`Names`] knows the zone and keeps one index, from addresses to the objects that hold them. All
//! else is read from the snapshot at the time of the question, so an answer is never older than
//! the tables. It promises to tell a name that does not exist from one that has no records of the
//! type that is asked for, and every record names the object that caused it. It knows no wire
//! format, no time to live and no upstream: these are the DNS server's.

mod domain;
mod lookup;
mod record;
mod reverse;
#[cfg(test)]
mod tests;

pub use domain::{DomainName, InvalidDomainName};
pub use lookup::{Names, PodNames, SPECIFICATION_VERSION};
pub use record::{Lookup, Record, RecordData};
pub use reverse::{address_of, reverse_name};
