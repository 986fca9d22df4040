//! The chain: which plugin is asked in which order.
//!
//! It promises that a question is answered by the first plugin that knows the name, that aliases
//! are followed until there is an answer, since a stub resolver does not follow them itself, and
//! that everything is decided without waiting: what needs an upstream comes out as
//! [`Outcome::Forward`], and goes back in through [`learn`].

use std::time::Instant;

use portolan_intent::names::{DomainName, Names};
use portolan_state::Snapshot;

use crate::Settings;
use crate::limits::ALIASES_MAX;
use crate::metrics::Metrics;
use crate::plugins::{cache, forward, hosts, kubernetes};
use crate::wire::{Question, Record, Response, ResponseCode};

/// What plugins see.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The configuration.
    pub settings: &'a Settings,
    /// The cluster's names, brought up to the snapshot.
    pub names: &'a Names,
    /// The cluster's tables.
    pub snapshot: &'a Snapshot,
    /// What upstreams said.
    pub cache: &'a cache::Cache,
    /// The counters.
    pub metrics: &'a Metrics,
    /// The time.
    pub now: Instant,
    /// Randomness: which of several addresses comes first.
    pub seed: u64,
}

/// A plugin: its name, and what it says to a question.
#[derive(Debug, Clone, Copy)]
pub struct Plugin {
    /// The name, as in CoreDNS where it has one.
    pub name: &'static str,
    /// What it says.
    pub answer: fn(&Question, &Context<'_>) -> Step,
}

/// What a plugin says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The next one is asked.
    Next,
    /// This is the answer.
    Answer(Response),
    /// The name is another one's alias: that one is asked for.
    Alias(Box<Record>, DomainName),
    /// An upstream is asked.
    Forward,
    /// Nobody is asked.
    Refuse,
}

/// Every plugin, in order. The cluster's own names are answered from the tables, which are always
/// current, so the cache stands behind them and holds only what upstreams said.
pub const CHAIN: [Plugin; 4] = [hosts::PLUGIN, kubernetes::PLUGIN, cache::PLUGIN, forward::PLUGIN];

/// What becomes of a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is answered.
    Answer(Response),
    /// An upstream is asked this question, and its answer comes after these aliases.
    Forward {
        /// What to ask.
        question: Question,
        /// The aliases that lead from the client's question to this one.
        aliases: Vec<Record>,
    },
    /// Nobody may answer it here.
    Refuse,
}

/// Decides a question.
pub fn answer(question: &Question, context: &Context<'_>) -> Outcome {
    let mut question = question.clone();
    let mut aliases = Vec::new();
    while aliases.len() <= ALIASES_MAX {
        let said = CHAIN.iter().map(|plugin| (plugin.answer)(&question, context)).find(|step| *step != Step::Next);
        match said {
            Some(Step::Answer(response)) => return Outcome::Answer(after_aliases(aliases, response)),
            Some(Step::Alias(record, target)) => {
                aliases.push(*record);
                question.name = target;
            }
            Some(Step::Forward) => return Outcome::Forward { question, aliases },
            // What is known is said: the client sees where the alias leads.
            Some(Step::Refuse | Step::Next) | None if !aliases.is_empty() => {
                return Outcome::Answer(after_aliases(aliases, Response::empty(ResponseCode::NO_ERROR)));
            }
            Some(Step::Refuse | Step::Next) | None => return Outcome::Refuse,
        }
    }
    // Aliases in a circle, or in a very long row.
    Outcome::Answer(Response::empty(ResponseCode::SERVER_FAILURE))
}

/// Takes an upstream's answer: keeps it, and gives what the client is told.
pub fn learn(question: &Question, aliases: Vec<Record>, response: Response, context: &Context<'_>) -> Response {
    context.cache.insert(question, &response, context.now, context.metrics);
    after_aliases(aliases, response)
}

fn after_aliases(aliases: Vec<Record>, mut response: Response) -> Response {
    if !aliases.is_empty() {
        // The first name is the cluster's own, and it exists whatever becomes of the last.
        response.authoritative = true;
        response.authentic = false;
        response.answers.splice(0..0, aliases);
    }
    response
}
