//! The tracer's answers are those of the intent, which all modes serve, and so are alike in all of them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use portolan_intent::FabricMode;
use portolan_intent::services::{Backend, Client, Decision, FrontendKey};
use portolan_net::Family;
use portolan_state::TrafficPolicy;
use portolan_trace::{Choice, End, Ingress, Stage, Trace};

use crate::nodes::{Mode, cluster, packet, trace};

/// Who asks: how the packet comes to the first node, and who that is to a Service.
fn clients(family: Family) -> [(Ingress, Client, &'static str); 4] {
    match family {
        Family::V4 => [
            (Ingress::Pod, Client::Pod, "10.42.1.5"),
            (Ingress::Network, Client::Pod, "10.42.2.8"),
            (Ingress::Node, Client::Node, "192.168.64.11"),
            (Ingress::Network, Client::Outside, "198.51.100.7"),
        ],
        Family::V6 => [
            (Ingress::Pod, Client::Pod, "fd42:0:0:1::5"),
            (Ingress::Network, Client::Pod, "fd42:0:0:2::8"),
            (Ingress::Node, Client::Node, "fd64::11"),
            (Ingress::Network, Client::Outside, "2001:db8::7"),
        ],
    }
}

fn how(trace: &Trace) -> &'static str {
    match &trace.end {
        End::Delivered { .. } => "forwarded",
        End::Refused { reason, .. } if reason.starts_with("dropped") => "dropped",
        End::Refused { reason, .. } if reason.starts_with("rejected") => "rejected",
        End::Refused { reason, .. } => panic!("{reason}"),
    }
}

#[test]
fn every_mode_goes_where_the_intent_says() {
    let mut asked = 0;
    for mode in Mode::ALL {
        let mut cluster = cluster(FabricMode::Vxlan, mode);
        let frontends = cluster.nodes[&"node-1".into()].intent.clone();
        for (key, frontend) in &frontends {
            let family = key.family();
            let destination = match (*key, family) {
                (FrontendKey::Address { address, .. }, _) => address.to_string(),
                (FrontendKey::NodePort { .. }, Family::V4) => "192.168.64.11".to_owned(),
                (FrontendKey::NodePort { .. }, Family::V6) => "fd64::11".to_owned(),
            };
            for (ingress, client, source) in clients(family) {
                // A virtual server has one list for all: the cluster's own clients have this node's endpoints too.
                let is_short = frontend.kind.is_external() && frontend.policy == TrafficPolicy::Local;
                if mode == Mode::Ipvs && is_short && client != Client::Outside && !frontend.endpoints.local.is_empty() {
                    continue;
                }
                let sent = packet(source, &destination, key.port().get());
                let what = format!("{mode:?}: {source} to {destination}:{} by {ingress:?}", key.port());
                let source: IpAddr = source.parse().unwrap();
                let (backends, masquerade) = match frontend.decide(client, source) {
                    Decision::Forward { backends, masquerade } => (backends, masquerade),
                    decision => {
                        let trace = trace(&mut cluster, "node-1", sent, ingress, Choice::First);
                        let wanted = if decision == Decision::Reject { "rejected" } else { "dropped" };
                        assert_eq!(how(&trace), wanted, "{what}: {trace:#?}");
                        continue;
                    }
                };
                let wanted: BTreeSet<SocketAddr> = backends.iter().map(Backend::socket).collect();
                for endpoint in &wanted {
                    let choice = Choice::Endpoint(*endpoint);
                    let trace = trace(&mut cluster, "node-1", sent, ingress.clone(), choice);
                    assert_eq!(how(&trace), "forwarded", "{what}: {trace:#?}");
                    let hop = trace.hops.iter().find(|hop| hop.stage == Stage::Services).unwrap();
                    assert_eq!(hop.alternatives.iter().copied().collect::<BTreeSet<_>>(), wanted, "{what}");
                    assert!(hop.origins.len() == 2, "{what}: a Service and an EndpointSlice: {:?}", hop.origins);
                    let last = trace.hops.last().unwrap();
                    let arrived = SocketAddr::new(last.after.destination, last.after.destination_port);
                    assert_eq!(arrived, *endpoint, "{what}");
                    // What is for the node itself does not leave, so nothing masquerades it.
                    let leaves = last.stage != Stage::NodeIngress;
                    let wanted = leaves && (masquerade || endpoint.ip() == source);
                    assert_eq!(last.after.source != source, wanted, "{what} at {endpoint}: {trace:#?}");
                    asked += 1;
                }
            }
        }
    }
    assert!(asked > 100, "{asked} ways");
}
