//! A node's own lease and those of the others, over any [`Store`](portolan_store::Store).
//!
//! ```text
//!   Manager ─ acquire, renew ─┬─▶ hold: own lease, own key watched ──┐
//!                             │                                      ├─▶ Message ─▶ bounded channel
//!                             └─▶ follow: list, watch ─▶ Table ──────┘
//! ```
//!
//! While the store cannot be reached nothing changes but a problem that says so: the lease is renewed when
//! it is back, or taken again. Stopping keeps the lease, so that a restart finds its subnet.

mod backoff;
mod follow;
mod hold;
mod manager;

use std::sync::Arc;
use std::time::Duration;

use portolan_store::{LeaseId, StoreError};

pub use self::manager::Manager;
use crate::flannel::{
    Attributes, Change, Claimant, ConfigError, DEFAULT_PREFIX, LeaseProblem, ParsedConfig, Refusal, SharedAddress,
    Subnet, Take,
};
use crate::limits::{LEASE_TIME_TO_LIVE, RENEW_MARGIN_DEFAULT, RENEW_MARGIN_MAX, RENEW_MARGIN_MIN};

/// Where the leases are and how long they live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// flanneld's `--etcd-prefix`.
    pub prefix: String,
    /// How long a lease lives without being renewed.
    pub time_to_live: Duration,
    /// How long before its end it is renewed.
    pub margin: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { prefix: DEFAULT_PREFIX.to_owned(), time_to_live: LEASE_TIME_TO_LIVE, margin: RENEW_MARGIN_DEFAULT }
    }
}

/// A margin that flanneld would not take either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a renew margin of {0} minutes does not work: use 1 to 1439 (a lease lives 1440)")]
pub struct InvalidMargin(pub u64);

impl Settings {
    /// The same with another margin, as flanneld's `--subnet-lease-renew-margin` has it.
    pub fn with_margin_minutes(self, minutes: u64) -> Result<Settings, InvalidMargin> {
        // Beyond any lease, whatever the number.
        let margin = Duration::from_secs(minutes.saturating_mul(60));
        let is_allowed = (RENEW_MARGIN_MIN..=RENEW_MARGIN_MAX).contains(&margin);
        if is_allowed { Ok(Settings { margin, ..self }) } else { Err(InvalidMargin(minutes)) }
    }
}

/// A subnet that this node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The subnet and how it was taken.
    pub take: Take,
    /// The lease.
    pub lease: LeaseId,
    /// When the lease could end, by the manager's clock: counted from before it was asked for.
    pub expires: Duration,
    /// The network config that it was taken by.
    pub config: Arc<ParsedConfig>,
}

impl Held {
    /// The subnet.
    pub fn subnet(&self) -> Subnet {
        self.take.subnet
    }
}

/// Why there is no lease, or why it was not renewed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LeaseError {
    /// The store refused or cannot be reached.
    #[error("the store of the leases: {0}")]
    Store(#[from] StoreError),
    /// The store does not answer.
    #[error("the store of the leases has not answered for {0:?}: is it up, and can it be reached?")]
    Silent(Duration),
    /// The network config cannot be used.
    #[error("{key}: {error}")]
    Config {
        /// Its key.
        key: String,
        /// What is wrong with it.
        error: ConfigError,
    },
    /// No subnet can be had.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Others were faster each time.
    #[error("no subnet was won in {0} attempts: other nodes were faster each time; it is tried again")]
    Contended(usize),
}

/// How a renewal went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Renewal {
    /// The lease lives on.
    Renewed,
    /// The lease has ended, or its claims are another's: it must be acquired anew.
    Lost,
    /// A newer run of the same node has taken over.
    Superseded(Claimant),
    /// The lease lives on, but somebody else writes the same key.
    Contested(Option<Box<Attributes>>),
}

/// What is wrong with this node's own lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OwnProblem {
    /// No lease yet, or no renewal: tried again.
    #[error("{0}")]
    Unavailable(String),
    /// Another node has the same public address.
    #[error(transparent)]
    Shared(SharedAddress),
    /// Somebody else writes this node's key.
    #[error(
        "the lease {subnet} was overwritten by a network daemon that makes no claims: a flanneld on this node, or on \
         another one with the same public address; stop it, or give each node an address of its own. It now says {found}"
    )]
    Contested {
        /// The subnet.
        subnet: Subnet,
        /// What the other wrote.
        found: String,
    },
    /// Another subnet after the own one was lost.
    #[error(
        "the lease {from} ended while the store could not be reached, and the subnet is no longer free; this node now \
         has {to}: delete the pods with addresses of {from} so that they are made anew"
    )]
    Moved {
        /// The subnet before.
        from: Subnet,
        /// The subnet now.
        to: Subnet,
    },
    /// Another run of the same node.
    #[error(
        "another agent that calls itself {node} has taken the lease {subnet} over: this one leaves it alone. Stop one \
         of the two, or give each node a name of its own"
    )]
    Superseded {
        /// The node's name.
        node: Arc<str>,
        /// The subnet.
        subnet: Subnet,
    },
    /// The network config no longer has the subnet.
    #[error("{subnet} does not fit the network config any more: restart the agent to take a subnet that does")]
    Misfit {
        /// The subnet.
        subnet: Subnet,
    },
}

/// What the reader of a running [`Manager`] is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// This node has this subnet now.
    Held(Box<Held>),
    /// What is wrong with the own lease: the whole list, empty when all is well.
    Own(Vec<OwnProblem>),
    /// Leases of other nodes. After the first of these the reader knows all of them.
    Leases {
        /// What is different.
        changes: Vec<Change>,
        /// What cannot be used, the whole list; `None` while that is as it was.
        problems: Option<Vec<LeaseProblem>>,
    },
    /// The leases of others cannot be followed, and why; `None` when they can again.
    Following(Option<String>),
}
