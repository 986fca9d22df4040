//! The IPVS mode: its virtual servers, its sets, and its chains, in the order in which a packet meets them.

use std::collections::BTreeMap;

use portolan_intent::services::{FrontendUpdate, ServicesIntent};
use portolan_net::Family;
use portolan_program::iptables::{self, chains_for_ipvs};
use portolan_program::ipvs_mode::{Environment, Programs, Verdict, interpret};
use portolan_program::{ipset, ipvs};
use portolan_state::TrafficPolicy;

use super::{Mode, intent};
use crate::answer::{Answer, From, Question};
use crate::cluster::{BRIDGE, Cluster, Follower, UPLINK};
use crate::specification::{Class, class};

pub(super) struct Ipvs {
    servers: ipvs::Compiler,
    sets: ipset::Compiler,
    chains: iptables::Program,
    frontends: ServicesIntent,
}

impl Ipvs {
    pub(super) fn new(cluster: &Cluster) -> Ipvs {
        Ipvs {
            servers: ipvs::Compiler::new(&cluster.view(), &Family::ALL),
            sets: ipset::Compiler::new(&cluster.view(), &Family::ALL),
            chains: iptables::Program::default(),
            frontends: ServicesIntent::new(),
        }
    }
}

impl Mode for Ipvs {
    fn name(&self) -> &'static str {
        "ipvs"
    }

    fn update(&mut self, cluster: &Cluster, follower: &Follower, updates: &[FrontendUpdate]) {
        let own: Vec<_> = cluster.local_addresses();
        self.servers.set_node_addresses(&own);
        self.sets.set_node_addresses(&own);
        self.sets.set_health_ports(&follower.health_ports());
        self.servers.update_services(updates);
        self.sets.update_services(updates);
        // What leaves has no connections here.
        let gone: Vec<_> = self.servers.leaving().map(|(server, real)| (server, real, None)).collect();
        self.servers.settle(&gone);
        self.chains = chains_for_ipvs(&cluster.view(), &Family::ALL, &cluster.node().pod_prefixes);
        self.frontends = follower.compiler.intent().clone();
    }

    /// A pod that reaches itself is known by its endpoint's node.
    fn knows(&self, cluster: &Cluster) -> bool {
        cluster.slices.values().flat_map(|slice| &slice.endpoints).all(|endpoint| endpoint.node.is_some())
    }

    fn answer(&self, cluster: &Cluster, question: &Question) -> Answer {
        let programs = Programs { chains: &self.chains, sets: self.sets.program(), servers: self.servers.program() };
        let environment = Environment {
            in_interface: match question.from {
                From::Pod => Some(BRIDGE),
                From::Outside => Some(UPLINK),
                From::Node => None,
            },
            out_interface: Some(UPLINK),
            own_addresses: &cluster.local_addresses(),
        };
        let outcome = interpret(&programs, &question.packet(), &environment);
        assert!(outcome.not_understood.is_empty(), "{:?}", outcome.not_understood);
        match outcome.verdict {
            Verdict::Pass { .. } => Answer::Untouched,
            Verdict::Refused(refusal) if refusal.is_told() => Answer::Reject,
            Verdict::Refused(_) => Answer::Drop,
            Verdict::Forward { ways, .. } => {
                assert!(ways.iter().all(|way| way.refusal.is_none()), "{ways:?}");
                Answer::Forward(ways.iter().map(|way| (way.endpoint, way.masqueraded)).collect())
            }
        }
    }

    /// Two things are so on purpose, as with kube-proxy: what no Service has at a Service's address is refused, and
    /// a virtual server has one list of endpoints for all clients, so that the cluster's own clients get this node's
    /// at external addresses with the policy `Local`.
    fn differs(&self, cluster: &Cluster, question: &Question) -> Option<Answer> {
        let Some(frontend) = intent::find(cluster, &self.frontends, question) else {
            let is_service = self.servers.program().addresses.contains(&question.destination);
            return is_service.then_some(Answer::Reject);
        };
        let class = class(cluster, question);
        let local = &frontend.endpoints.local;
        let is_short = frontend.kind.is_external() && frontend.policy == TrafficPolicy::Local && class != Class::Other;
        if !is_short || local.is_empty() || !frontend.admits(question.source) {
            return None;
        }
        let of = |socket: std::net::SocketAddr| (socket, class == Class::Node || socket.ip() == question.source);
        Some(Answer::Forward(local.iter().map(|it| of(it.socket())).collect::<BTreeMap<_, _>>()))
    }
}
