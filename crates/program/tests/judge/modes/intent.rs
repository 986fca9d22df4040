//! The intent: `Frontend::decide`, which all modes are compiled from.

use std::sync::Arc;

use portolan_intent::services::{Client, Decision, Frontend, FrontendKey, FrontendUpdate, ServicesIntent};

use super::Mode;
use crate::answer::{Answer, Question};
use crate::cluster::{Cluster, Follower};
use crate::specification::{self, Class};

#[derive(Default)]
pub(super) struct Intent {
    frontends: ServicesIntent,
}

impl Mode for Intent {
    fn name(&self) -> &'static str {
        "intent"
    }

    fn update(&mut self, _cluster: &Cluster, follower: &Follower, _updates: &[FrontendUpdate]) {
        self.frontends = follower.compiler.intent().clone();
    }

    fn answer(&self, cluster: &Cluster, question: &Question) -> Answer {
        let source = question.source;
        let Some(frontend) = find(cluster, &self.frontends, question) else { return Answer::Untouched };
        let client = match specification::class(cluster, question) {
            Class::Pod => Client::Pod,
            Class::Node => Client::Node,
            Class::Other => Client::Outside,
        };
        match frontend.decide(client, source) {
            Decision::Reject => Answer::Reject,
            Decision::Drop => Answer::Drop,
            Decision::Forward { backends, masquerade } => {
                Answer::Forward(backends.iter().map(|it| (it.socket(), masquerade || it.address == source)).collect())
            }
        }
    }
}

/// The frontend that a packet is for.
pub(super) fn find<'a>(
    cluster: &Cluster,
    frontends: &'a ServicesIntent,
    question: &Question,
) -> Option<&'a Arc<Frontend>> {
    let Question { destination, port, protocol, .. } = *question;
    let by_address = frontends.get(&FrontendKey::Address { address: destination, protocol, port });
    // Which addresses of the node count, and who is a pod, is for the rooms to know: the intent is told.
    let by_port = || {
        let is_answered = specification::answers_at_node_ports(cluster, destination);
        let key = FrontendKey::NodePort { family: question.family(), protocol, port };
        frontends.get(&key).filter(|_| is_answered)
    };
    by_address.or_else(by_port)
}
