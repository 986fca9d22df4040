//! The iptables mode, and the rules of whoever else wrote them by iptables.

use std::collections::{BTreeMap, BTreeSet};

use portolan_intent::services::FrontendUpdate;
use portolan_net::Family;
use portolan_program::iptables::{Compiler, Environment, Program, Verdict, interpret};

use super::Mode;
use crate::answer::{Answer, From, Question};
use crate::cluster::{BRIDGE, Cluster, Follower, UPLINK};

pub(super) struct Iptables {
    compiler: Compiler,
}

impl Iptables {
    pub(super) fn new(cluster: &Cluster) -> Iptables {
        Iptables { compiler: Compiler::new(&cluster.view(), &Family::ALL) }
    }
}

impl Mode for Iptables {
    fn name(&self) -> &'static str {
        "iptables"
    }

    fn update(&mut self, cluster: &Cluster, follower: &Follower, updates: &[FrontendUpdate]) {
        self.compiler.set_node_addresses(&cluster.node().addresses);
        self.compiler.set_node_prefixes(&cluster.node().pod_prefixes);
        self.compiler.set_health_ports(&follower.health_ports());
        self.compiler.update_services(updates);
    }

    fn answer(&self, cluster: &Cluster, question: &Question) -> Answer {
        answer(self.compiler.program(), cluster, question).0
    }
}

/// What rules answer, and those of them that were met and not understood.
pub(crate) fn answer(program: &Program, cluster: &Cluster, question: &Question) -> (Answer, BTreeSet<String>) {
    let environment = Environment {
        in_interface: match question.from {
            From::Pod => Some(BRIDGE.to_owned()),
            From::Outside => Some(UPLINK.to_owned()),
            From::Node => None,
        },
        out_interface: Some(UPLINK.to_owned()),
        local_addresses: cluster.local_addresses(),
        ..Environment::default()
    };
    let outcome = interpret(program, &question.packet(), &environment);
    let unknown = outcome.not_understood.iter().map(|it| it.rule.clone()).collect();
    let mut endpoints = BTreeMap::new();
    let mut untouched = false;
    for branch in &outcome.branches {
        match (branch.verdict, branch.backend) {
            (Verdict::Reject, _) => return (Answer::Reject, unknown),
            (Verdict::Drop, _) => return (Answer::Drop, unknown),
            (Verdict::Accept, Some(endpoint)) => {
                endpoints.insert(endpoint, branch.masqueraded);
            }
            (Verdict::Accept, None) => untouched = true,
        }
    }
    if untouched { (Answer::Untouched, unknown) } else { (Answer::Forward(endpoints), unknown) }
}
