//! What a lookup says: records, each with its origin.

use std::fmt;
use std::net::IpAddr;

use portolan_net::Origin;

use super::DomainName;

/// What is known of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// The name belongs to neither the zone nor an address that we know.
    NotOurs,
    /// The tables that decide have not been listed in full yet: nothing can be said.
    NotReady,
    /// The name does not exist (RFC 8020: nor does any name below it).
    NoSuchName,
    /// The name exists.
    Found {
        /// Its records of every type. Empty: it exists only because names below it do.
        records: Vec<Record>,
        /// Addresses of names that the records point to.
        additional: Vec<Record>,
    },
}

/// A record, free of class and time to live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The name that it belongs to.
    pub name: DomainName,
    /// Type and value.
    pub data: RecordData,
    /// The object that caused it.
    pub origin: Origin,
}

/// The type and the value of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordData {
    /// A (RFC 1035 §3.4.1) or AAAA (RFC 3596 §2.1).
    Address(IpAddr),
    /// CNAME.
    Alias(DomainName),
    /// SRV (RFC 2782).
    Service {
        /// Lower comes first.
        priority: u16,
        /// The share among those of one priority.
        weight: u16,
        /// The port at the target.
        port: u16,
        /// The host.
        target: DomainName,
    },
    /// PTR.
    Pointer(DomainName),
    /// TXT, one string.
    Text(String),
    /// NS.
    NameServer(DomainName),
    /// SOA: who speaks for the zone, and its serial number. The timers are the server's.
    Authority {
        /// The primary name server.
        primary: DomainName,
        /// The mailbox of the person in charge.
        mailbox: DomainName,
        /// Counts the changes of the zone.
        serial: u32,
    },
}

impl fmt::Display for RecordData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecordData::Address(IpAddr::V4(address)) => write!(f, "A {address}"),
            RecordData::Address(IpAddr::V6(address)) => write!(f, "AAAA {address}"),
            RecordData::Alias(name) => write!(f, "CNAME {name}"),
            RecordData::Service { priority, weight, port, target } => {
                write!(f, "SRV {priority} {weight} {port} {target}")
            }
            RecordData::Pointer(name) => write!(f, "PTR {name}"),
            RecordData::Text(text) => write!(f, "TXT \"{text}\""),
            RecordData::NameServer(name) => write!(f, "NS {name}"),
            RecordData::Authority { primary, mailbox, serial } => write!(f, "SOA {primary} {mailbox} {serial}"),
        }
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.data)
    }
}
