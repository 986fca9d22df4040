//! The IPVS mode: its virtual servers, its sets, and its chains, in the order in which a packet meets them.

use std::collections::{BTreeMap, BTreeSet};

use portolan_intent::services::{FrontendUpdate, ServicesIntent};
use portolan_net::{Family, Protocol};
use portolan_program::iptables::{self, Environment, SetPart, chains_for_ipvs};
use portolan_program::layout::MASQUERADE_MARK;
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
    /// The sets as the interpreter of chains has them.
    members: BTreeSet<(iptables::Name, Vec<SetPart>)>,
}

impl Ipvs {
    pub(super) fn new(cluster: &Cluster) -> Ipvs {
        Ipvs {
            servers: ipvs::Compiler::new(&cluster.view(), &Family::ALL),
            sets: ipset::Compiler::new(&cluster.view(), &Family::ALL),
            chains: iptables::Program::default(),
            frontends: ServicesIntent::new(),
            members: BTreeSet::new(),
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
        self.members = members(self.sets.program());
    }

    /// A pod that reaches itself is known by its endpoint's node.
    fn knows(&self, cluster: &Cluster) -> bool {
        cluster.slices.values().flat_map(|slice| &slice.endpoints).all(|endpoint| endpoint.node.is_some())
    }

    fn answer(&self, cluster: &Cluster, question: &Question) -> Answer {
        let own = cluster.local_addresses();
        let program = self.servers.program();
        let environment = Environment {
            in_interface: match question.from {
                From::Pod => Some(BRIDGE.to_owned()),
                From::Outside => Some(UPLINK.to_owned()),
                From::Node => None,
            },
            out_interface: Some(UPLINK.to_owned()),
            local_addresses: own.iter().chain(&program.addresses).copied().collect(),
            sets: self.members.clone(),
            ..Environment::default()
        };
        let outcome = iptables::interpret(&self.chains, &question.packet(), &environment);
        assert!(outcome.not_understood.is_empty(), "{:?}", outcome.not_understood);
        let [branch] = &outcome.branches[..] else { panic!("chains do not choose: {outcome:?}") };
        match branch.verdict {
            iptables::Verdict::Accept => {}
            iptables::Verdict::Drop => return Answer::Drop,
            iptables::Verdict::Reject => return Answer::Reject,
        }
        let masquerade = branch.masqueraded || branch.packet.mark & MASQUERADE_MARK != 0;
        let served = ipvs::interpret(program, &question.packet(), &own);
        match served.verdict {
            ipvs::Verdict::Pass => Answer::Untouched,
            ipvs::Verdict::Reject => Answer::Reject,
            ipvs::Verdict::Forward => {
                let loops = |socket: std::net::SocketAddr| {
                    let mut packet = question.packet();
                    (packet.destination, packet.destination_port) = (socket.ip(), socket.port());
                    let key = ipset::SetKey {
                        family: question.family(),
                        name: portolan_program::layout::IpSetName::LoopBack,
                    };
                    let ends = [ipset::End::Destination, ipset::End::Destination, ipset::End::Source];
                    ipset::contains(&self.sets.program().sets[&key], &packet, &ends).is_some()
                };
                let sockets = served.alternatives.iter().map(|it| it.socket);
                Answer::Forward(sockets.map(|socket| (socket, masquerade || loops(socket))).collect())
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

fn members(program: &ipset::Program) -> BTreeSet<(iptables::Name, Vec<SetPart>)> {
    let mut members = BTreeSet::new();
    for (key, set) in &program.sets {
        let name: iptables::Name = key.name.name(key.family).into();
        for entry in set.entries.keys() {
            let parts = match *entry {
                ipset::Entry::Ip(address) => vec![SetPart::Address(address)],
                ipset::Entry::IpPort(address, protocol, port) => {
                    vec![SetPart::Address(address), SetPart::Port(protocol, port.get())]
                }
                ipset::Entry::IpPortIp(address, protocol, port, second) => {
                    vec![SetPart::Address(address), SetPart::Port(protocol, port.get()), SetPart::Address(second)]
                }
                ipset::Entry::IpPortNet(address, protocol, port, prefix) => {
                    vec![SetPart::Address(address), SetPart::Port(protocol, port.get()), SetPart::Prefix(prefix)]
                }
                ipset::Entry::Port(port) => {
                    let of = |protocol| (name.clone(), vec![SetPart::Port(protocol, port.get())]);
                    members.extend([Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(of));
                    continue;
                }
            };
            members.insert((name.clone(), parts));
        }
    }
    members
}
