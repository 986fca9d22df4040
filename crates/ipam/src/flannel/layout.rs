//! Where things are in the store, and one consistent look at them.
//!
//! Beside Flannel's own keys each node of ours has a claim per prefix, which ends with the same lease:
//!
//! ```text
//!   <prefix>/subnets/10.5.34.0-24&fd00:0:0:34::-64    the lease, as flanneld knows it
//!   <prefix>/portolan/claims/10.5.34.0-24             {"Node":"node-1","Instance":"5d2c…"}
//!   <prefix>/portolan/claims/fd00:0:0:34::-64         {"Node":"node-1","Instance":"5d2c…"}
//! ```
//!
//! flanneld watches `<prefix>/subnets` only and never sees a claim. With them two nodes cannot take one
//! IPv4 prefix with two different IPv6 prefixes, which Flannel's keys alone would let them; and whose a
//! subnet is does not depend on its node's address.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_store::{
    KeyRange, KeyValue, LeaseId, Operation, OperationResult, RangeRequest, Revision, Transaction, TransactionResult,
};
use serde::{Deserialize, Serialize};

use super::attributes::{Attributes, AttributesError};
use super::key::{KeyError, Subnet, prefix_text};

/// flanneld's `--etcd-prefix` where it is not given.
pub const DEFAULT_PREFIX: &str = "/coreos.com/network";

/// The keys of one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    prefix: Arc<str>,
}

/// Who made a claim.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Claimant {
    /// The node's name: it stays over restarts and changes of address.
    #[serde(rename = "Node")]
    pub node: Arc<str>,
    /// Which run of the node's agent.
    #[serde(rename = "Instance")]
    pub instance: Arc<str>,
}

/// One claim in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Who made it; `None` where that cannot be read.
    pub claimant: Option<Claimant>,
    /// The revision that wrote it.
    pub revision: Revision,
    /// The lease that it ends with.
    pub lease: LeaseId,
}

/// One key below `subnets/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The last part of the key.
    pub name: Arc<str>,
    /// The subnet that the key names.
    pub subnet: Result<Subnet, KeyError>,
    /// The value.
    pub attributes: Result<Attributes, AttributesError>,
    /// The revision that created it.
    pub created: Revision,
    /// The revision that wrote it last.
    pub revision: Revision,
    /// The lease that it ends with; 0 for a reservation, which does not end.
    pub lease: LeaseId,
}

/// What the store holds, at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// The store's revision.
    pub revision: Revision,
    /// The network config's text and the revision that wrote it.
    pub config: Option<(Arc<[u8]>, Revision)>,
    /// The leases, in the order of their keys.
    pub records: Vec<Record>,
    /// The claims.
    pub claims: BTreeMap<IpNet, Claim>,
}

impl Layout {
    /// The keys below a prefix such as [`DEFAULT_PREFIX`].
    pub fn new(prefix: &str) -> Layout {
        // flanneld joins with Go's path.Join, which drops slashes at the end.
        Layout { prefix: prefix.trim_end_matches('/').into() }
    }

    /// The key of the network config.
    pub fn config(&self) -> String {
        format!("{}/config", self.prefix)
    }

    /// All leases.
    pub fn subnets(&self) -> KeyRange {
        KeyRange::prefix(format!("{}/subnets/", self.prefix))
    }

    /// The key of a lease.
    pub fn subnet(&self, subnet: &Subnet) -> String {
        format!("{}/subnets/{subnet}", self.prefix)
    }

    /// All claims.
    pub fn claims(&self) -> KeyRange {
        KeyRange::prefix(format!("{}/portolan/claims/", self.prefix))
    }

    /// The key of a claim.
    pub fn claim(&self, prefix: IpNet) -> String {
        format!("{}/portolan/claims/{}", self.prefix, prefix_text(prefix))
    }

    /// Reads everything at one revision.
    pub fn read(&self) -> Transaction {
        let ranges = [KeyRange::key(self.config()), self.subnets(), self.claims()];
        let read = |range| Operation::Range(RangeRequest::new(range));
        Transaction { success: ranges.into_iter().map(read).collect(), ..Transaction::default() }
    }

    /// The answer to [`Layout::read`].
    pub fn view(&self, answer: &TransactionResult) -> View {
        let mut view = View { revision: answer.revision, ..View::default() };
        let mut ranges = answer.results.iter().map(|result| match result {
            OperationResult::Range(range) => range.items.as_slice(),
            _ => &[],
        });
        let config = ranges.next().and_then(<[_]>::first);
        view.config = config.map(|item| (item.value.as_slice().into(), item.mod_revision));
        view.records = ranges.next().unwrap_or_default().iter().filter_map(|item| self.record(item)).collect();
        let claims = ranges.next().unwrap_or_default();
        view.claims = claims.iter().filter_map(|item| self.read_claim(item)).collect();
        view
    }

    /// Reads one key below `subnets/`; `None` for another key.
    pub fn record(&self, item: &KeyValue) -> Option<Record> {
        let name = self.record_name(&item.key)?;
        Some(Record {
            subnet: name.parse(),
            attributes: Attributes::parse(&item.value),
            created: item.create_revision,
            revision: item.mod_revision,
            lease: item.lease,
            name,
        })
    }

    /// The last part of a key below `subnets/`; `None` for another key.
    pub fn record_name(&self, key: &[u8]) -> Option<Arc<str>> {
        let range = self.subnets();
        let name = key.strip_prefix(range.start.as_slice())?;
        Some(String::from_utf8_lossy(name).into())
    }

    fn read_claim(&self, item: &KeyValue) -> Option<(IpNet, Claim)> {
        let name = item.key.strip_prefix(self.claims().start.as_slice())?;
        let (address, length) = std::str::from_utf8(name).ok()?.split_once('-')?;
        let prefix = IpNet::new(address.parse().ok()?, length.parse().ok()?).ok()?;
        let claimant = serde_json::from_slice(&item.value).ok();
        Some((prefix, Claim { claimant, revision: item.mod_revision, lease: item.lease }))
    }
}

impl Claimant {
    /// The claim's value.
    pub fn render(&self) -> String {
        super::json::compact(&serde_json::json!({ "Node": &*self.node, "Instance": &*self.instance }))
    }
}

impl Record {
    /// What the key covers, even where it is not quite one.
    pub fn covers(&self) -> Option<Subnet> {
        match &self.subnet {
            Ok(subnet) | Err(KeyError::HostBits(_, subnet)) => Some(*subnet),
            Err(KeyError::NotASubnet(_)) => None,
        }
    }
}
