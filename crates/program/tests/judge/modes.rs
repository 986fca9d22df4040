//! What stands before the judge: the intent, and every mode's program by its interpreter.
//!
//! A mode is added by an implementation of [`Mode`] and a line in [`all`]. Where a mode answers otherwise than the
//! specification on purpose, [`Mode::differs`] says so, and is tested like everything else.

mod hooks;
mod intent;
mod iptables;
mod ipvs;
mod nftables;

use std::net::SocketAddr;

use portolan_intent::services::FrontendUpdate;
use portolan_state::AffinityTimeout;

use crate::answer::{Answer, Question};
use crate::cluster::{Cluster, Follower};

pub(crate) use iptables::answer as iptables_answer;

/// One that answers.
pub(crate) trait Mode {
    /// Its name, for messages.
    fn name(&self) -> &'static str;

    /// Follows a cluster to its next state, given what changed of the intent.
    fn update(&mut self, cluster: &Cluster, follower: &Follower, updates: &[FrontendUpdate]);

    /// What it does with the first packet of a connection.
    fn answer(&self, cluster: &Cluster, question: &Question) -> Answer;

    /// Whether it is made for such a cluster at all.
    fn knows(&self, _cluster: &Cluster) -> bool {
        true
    }

    /// What it answers instead of the specification, where that is meant so.
    fn differs(&self, _cluster: &Cluster, _question: &Question) -> Option<Answer> {
        None
    }
}

/// All of them, for a cluster of which they have seen nothing yet.
pub(crate) fn all(cluster: &Cluster) -> Vec<Box<dyn Mode>> {
    vec![
        Box::new(intent::Intent::default()),
        Box::new(iptables::Iptables::new(cluster)),
        Box::new(ipvs::Ipvs::new(cluster)),
        Box::new(nftables::Nftables::new(cluster)),
    ]
}

/// Whether the intent lets a flow of UDP go on at an endpoint. What is no Service's is not cut.
pub(crate) fn keeps_flow(cluster: &Cluster, follower: &Follower, question: &Question, endpoint: SocketAddr) -> bool {
    let frontend = intent::find(cluster, follower.compiler.intent(), question);
    frontend.is_none_or(|frontend| frontend.endpoints.serving.iter().any(|it| it.socket() == endpoint))
}

/// How long the intent keeps a client at its endpoint, in seconds.
pub(crate) fn affinity(cluster: &Cluster, follower: &Follower, question: &Question) -> Option<u32> {
    let frontend = intent::find(cluster, follower.compiler.intent(), question)?;
    frontend.affinity.map(AffinityTimeout::seconds)
}
