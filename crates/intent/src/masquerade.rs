//! Masquerade: traffic of this node's pods to outside the cluster leaves with the node's address,
//! so that hosts which know nothing of pod prefixes can answer.

use ipnet::IpNet;
use portolan_net::Origin;
use portolan_state::Snapshot;
use serde::{Deserialize, Serialize};

use crate::NodeView;

/// Which traffic leaves with the node's own address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasqueradeIntent {
    /// Sources: this node's pod prefixes. Empty where masquerading is off.
    pub sources: Vec<IpNet>,
    /// Destinations that pods reach under their own address: the cluster's pod prefixes.
    pub except: Vec<IpNet>,
    /// Why.
    pub origin: Origin,
}

/// What this node must masquerade.
pub fn compile(snapshot: &Snapshot, view: &NodeView) -> MasqueradeIntent {
    let node = snapshot.nodes.get(&view.node).filter(|_| view.masquerade);
    MasqueradeIntent {
        sources: node.map(|node| node.pod_prefixes.clone()).unwrap_or_default(),
        except: view.cluster_prefixes.clone(),
        origin: Origin::configuration("masquerade"),
    }
}
