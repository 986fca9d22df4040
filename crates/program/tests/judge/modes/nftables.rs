//! The nftables mode.

use std::collections::BTreeSet;

use portolan_intent::masquerade::MasqueradeIntent;
use portolan_intent::services::FrontendUpdate;
use portolan_net::{Family, Origin, Packet};
use portolan_program::nftables::{Choice, Compiler, Environment, Hook as NftHook, Verdict as NftVerdict, interpret};

use super::Mode;
use super::hooks::{self, Around, Hook, Passed, Verdict};
use crate::answer::{Answer, Question};
use crate::cluster::{Cluster, Follower};
use crate::specification;

pub(super) struct Nftables {
    compiler: Compiler,
}

impl Nftables {
    pub(super) fn new(cluster: &Cluster) -> Nftables {
        let mut compiler = Compiler::new(&cluster.view(), &Family::ALL);
        // Pods' own traffic is not judged here.
        let nothing = MasqueradeIntent {
            sources: Vec::new(),
            except: Cluster::cluster_prefixes(),
            origin: Origin::configuration("masquerade"),
        };
        compiler.set_masquerade(&nothing);
        Nftables { compiler }
    }

    fn interpret(&self, hook: Hook, packet: Packet, around: &Around) -> Passed {
        let hook = match hook {
            Hook::Prerouting => NftHook::Prerouting,
            Hook::Input => NftHook::Input,
            Hook::Forward => NftHook::Forward,
            Hook::Output => NftHook::Output,
            Hook::Postrouting => NftHook::Postrouting,
        };
        let environment = Environment {
            local_addresses: around.local.clone(),
            in_interface: around.came_by.map(str::to_owned),
            out_interface: around.leaves_by.map(|(link, _)| link.to_owned()),
            out_address: around.leaves_by.map(|(_, address)| address),
            destination_translated: around.translated,
            original_destination: around.translated.then_some(around.original),
            ..Environment::default()
        };
        let choice = around.prefer.map_or(Choice::First, Choice::Prefer);
        let outcome = interpret(self.compiler.program(), packet, hook, &environment, choice);
        Passed {
            verdict: match outcome.verdict {
                NftVerdict::Accept => Verdict::Accept,
                NftVerdict::Drop => Verdict::Drop,
                NftVerdict::Reject(_) => Verdict::Reject,
            },
            packet: outcome.packet,
            possible: outcome.alternatives.iter().map(|it| it.socket).collect::<BTreeSet<_>>(),
        }
    }
}

impl Mode for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn update(&mut self, cluster: &Cluster, _follower: &Follower, updates: &[FrontendUpdate]) {
        self.compiler.set_node_addresses(&cluster.node().addresses);
        self.compiler.set_node_prefixes(&cluster.node().pod_prefixes);
        self.compiler.update_services(updates);
    }

    /// A pod that reaches itself is known by its endpoint's node.
    fn knows(&self, cluster: &Cluster) -> bool {
        cluster.slices.values().flat_map(|slice| &slice.endpoints).all(|endpoint| endpoint.node.is_some())
    }

    fn answer(&self, cluster: &Cluster, question: &Question) -> Answer {
        hooks::answer(cluster, question, &|hook, packet, around| self.interpret(hook, packet, around))
    }

    /// What no Service has at a Service's address is refused, so that a client does not wait for nothing, as with
    /// kube-proxy's mode of this name.
    fn differs(&self, cluster: &Cluster, question: &Question) -> Option<Answer> {
        specification::is_unserved_port(cluster, question).then_some(Answer::Reject)
    }
}
