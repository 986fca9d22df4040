//! Scenarios as text: a cluster that a person reads, and what must become of packets. The form is described in
//! `scenarios/services/README.md`.

mod read;
mod write;

use std::net::SocketAddr;

use portolan_net::ObjectKey;

use crate::answer::{Answer, Question};
use crate::cluster::{Cluster, Follower};
use crate::modes::{self, Mode};
use crate::specification;

pub(crate) use read::parse;
pub(crate) use write::render;

/// A cluster through its states, and what is checked in each.
#[derive(Debug)]
pub(crate) struct Scenario {
    stages: Vec<Stage>,
}

/// One state.
#[derive(Debug)]
struct Stage {
    cluster: Cluster,
    checks: Vec<(usize, Check)>,
}

/// What must be so.
#[derive(Debug)]
pub(crate) enum Check {
    /// What becomes of the first packet of a connection; which modes answer otherwise, and what.
    Answer(Question, Answer, Vec<(String, Answer)>),
    /// Whether an open flow of UDP stays at its endpoint.
    Flow(Question, SocketAddr, bool),
    /// What a load balancer is told: a port, and a number of endpoints.
    Health(ObjectKey, Option<(u16, usize)>),
    /// How long a client keeps its endpoint, in seconds.
    Affinity(Question, Option<u32>),
}

impl Scenario {
    /// The cluster in the end.
    pub(crate) fn cluster(&self) -> &Cluster {
        &self.stages.last().expect("a scenario has a cluster").cluster
    }

    /// Goes through all states, and returns every line that does not hold.
    pub(crate) fn run(&self) -> Vec<String> {
        let first = &self.stages[0].cluster;
        let mut follower = Follower::new(first.node().name.clone(), first.settings.clone());
        let mut modes = modes::all(first);
        let mut wrong = Vec::new();
        for stage in &self.stages {
            let updates = follower.follow(&stage.cluster);
            for mode in &mut modes {
                mode.update(&stage.cluster, &follower, &updates);
            }
            for (line, check) in &stage.checks {
                let complaints = examine(&stage.cluster, &follower, &modes, check);
                wrong.extend(complaints.into_iter().map(|complaint| format!("line {line}: {complaint}")));
            }
        }
        wrong
    }

    /// The states with what is checked in each.
    pub(crate) fn stages(&self) -> impl Iterator<Item = (&Cluster, impl Iterator<Item = &Check>)> {
        self.stages.iter().map(|stage| (&stage.cluster, stage.checks.iter().map(|(_, check)| check)))
    }

    /// How many lines look at something.
    pub(crate) fn checks(&self) -> usize {
        self.stages.iter().map(|stage| stage.checks.len()).sum()
    }
}

fn examine(cluster: &Cluster, follower: &Follower, modes: &[Box<dyn Mode>], check: &Check) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut compare = |who: &str, found: String, wanted: String| {
        if found != wanted {
            wrong.push(format!("{who}: it is {found}, and must be {wanted}"));
        }
    };
    match check {
        Check::Answer(question, wanted, exceptions) => {
            compare("specification", specification::answer(cluster, question).to_string(), wanted.to_string());
            for mode in modes.iter().filter(|mode| mode.knows(cluster)) {
                let excepted = exceptions.iter().find(|(name, _)| name == mode.name()).map(|(_, answer)| answer);
                compare(
                    mode.name(),
                    mode.answer(cluster, question).to_string(),
                    excepted.unwrap_or(wanted).to_string(),
                );
                let known = mode.differs(cluster, question);
                let text = |answer: Option<&Answer>| answer.map_or("no exception".to_owned(), ToString::to_string);
                compare(mode.name(), text(known.as_ref()), text(excepted));
            }
        }
        Check::Flow(question, endpoint, kept) => {
            let text = |kept: bool| if kept { "kept" } else { "cut" }.to_owned();
            let by_rule = specification::keeps_flow(cluster, question, *endpoint).unwrap_or(true);
            compare("specification", text(by_rule), text(*kept));
            compare("intent", text(modes::keeps_flow(cluster, follower, question, *endpoint)), text(*kept));
        }
        Check::Health(service, wanted) => {
            let by_rule = specification::health_checks(cluster).get(service).map(|(port, count)| (port.get(), *count));
            compare("specification", format!("{by_rule:?}"), format!("{wanted:?}"));
            let checks = follower.compiler.health_checks();
            let by_intent = checks.get(service).map(|check| (check.port.get(), check.local_endpoints));
            compare("intent", format!("{by_intent:?}"), format!("{wanted:?}"));
        }
        Check::Affinity(question, wanted) => {
            compare(
                "specification",
                format!("{:?}", specification::affinity(cluster, question)),
                format!("{wanted:?}"),
            );
            compare("intent", format!("{:?}", modes::affinity(cluster, follower, question)), format!("{wanted:?}"));
        }
    }
    wrong
}
