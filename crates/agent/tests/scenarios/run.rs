//! One run of a scenario, plain or expanded, and the taking down afterwards.

use std::collections::BTreeMap;
use std::path::Path;

use portolan_net::{NodeName, ObjectKey};
use portolan_state::{AttachmentKey, ObjectRef};
use serde_json::Value;

use super::checks;
use super::cluster::{Cluster, Event, Outlook, attachment};
use super::format::{Scenario, Step, Verb};
use super::random::Random;

/// How a scenario is told otherwise than it is written. Its checks must come out the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expansion {
    /// As it is written.
    Plain,
    /// The objects of each step in reverse.
    Reversed,
    /// The objects of each step in any order.
    Shuffled(u64),
    /// A cycle after each object.
    OneByOne,
    /// All steps up to a check in one cycle.
    Squashed,
    /// Every object twice, and what it was before in between.
    Replayed(u64),
    /// Deletes of what is there, of what comes, and of what never was.
    SpuriousDeletes(u64),
    /// All agents start anew after the step of this index.
    RestartAfter(usize),
    /// All agents die at every step between hearing of it and acting.
    CrashAtEvery,
    /// The kernel refuses steps and readings at random.
    Refusals(u64),
}

/// What a run has found.
#[derive(Default)]
pub struct Found {
    /// What each check found, by the step's index.
    pub texts: BTreeMap<usize, String>,
    /// What the nodes were like at each check.
    pub outlooks: BTreeMap<usize, BTreeMap<NodeName, Outlook>>,
}

struct Run<'a> {
    scenario: &'a Scenario,
    /// Where files are that the scenario does not embed.
    directory: &'a Path,
    expansion: Expansion,
    random: Random,
    cluster: Cluster,
}

/// Runs a scenario and takes the cluster down.
pub fn run(scenario: &Scenario, directory: &Path, expansion: Expansion) -> Result<Found, String> {
    let (settings, rest) = match scenario.steps.first().map(|step| &step.verb) {
        Some(Verb::Cluster(settings)) => (settings.clone(), 1),
        _ => (super::format::Settings::default(), 0),
    };
    let seed = match expansion {
        Expansion::Shuffled(seed)
        | Expansion::Replayed(seed)
        | Expansion::SpuriousDeletes(seed)
        | Expansion::Refusals(seed) => seed,
        _ => 0,
    };
    let (cluster, random) = (Cluster::new(settings), Random::new(seed));
    let mut run = Run { scenario, directory, expansion, random, cluster };
    let mut found = Found::default();
    for (index, step) in scenario.steps.iter().enumerate().skip(rest) {
        run.step(index, step, &mut found).map_err(|error| format!("{}: `{}`: {error}", step.line, step.text))?;
    }
    run.take_down().map_err(|error| format!("taking down: {error}"))?;
    Ok(found)
}

impl Run<'_> {
    fn step(&mut self, index: usize, step: &Step, found: &mut Found) -> Result<(), String> {
        let is_squashed = self.expansion == Expansion::Squashed;
        if step.verb.is_check() {
            if is_squashed {
                self.settle()?;
            }
            if self.expansion == Expansion::Plain || !step.verb.is_about_the_way() {
                found.texts.insert(index, checks::look(&self.cluster, &step.verb)?);
                found.outlooks.insert(index, self.cluster.outlook());
            }
        } else {
            if is_squashed && step.verb.needs_settled() {
                self.settle()?;
            }
            for machine in self.cluster.machines.values_mut() {
                machine.changes = 0;
                machine.failures.clear();
            }
            self.act(&step.verb)?;
        }
        if self.expansion == Expansion::RestartAfter(index) {
            self.restart_all(true)?;
        }
        Ok(())
    }

    fn act(&mut self, verb: &Verb) -> Result<(), String> {
        match verb {
            Verb::Machine(node, prefixes) => self.cluster.add_machine(node, prefixes)?,
            Verb::Restart(node, words) => {
                self.cluster.configure(node, words)?;
                self.cluster.restart(node)?;
            }
            Verb::Foreign(node, act) => self.cluster.foreign(node, act)?,
            Verb::Refuse(node, steps) => {
                let machine =
                    self.cluster.machines.get_mut(node).ok_or_else(|| format!("there is no machine {node}"))?;
                machine.engine.port.kernel.refuse_next(*steps);
                // What is refused is what the next step does.
                return Ok(());
            }
            _ => {
                let events = self.events(verb)?;
                self.deliver(events)?;
                if self.expansion == Expansion::Squashed {
                    return Ok(());
                }
            }
        }
        self.settle()
    }

    fn settle(&mut self) -> Result<(), String> {
        self.cluster.settle()?;
        self.cluster.check()
    }

    fn events(&self, verb: &Verb) -> Result<Vec<Event>, String> {
        let mut events = Vec::new();
        match verb {
            Verb::Apply(names) => {
                for name in names {
                    for document in documents(&self.file(name)?, name)? {
                        events.push(self.cluster.put(document)?);
                    }
                }
            }
            Verb::Delete(reference) => {
                self.cluster.current(reference).ok_or_else(|| format!("there is no {reference}"))?;
                events.push(Event::Delete(reference.clone()));
            }
            Verb::Attach(pod, addresses, node) => {
                events.push(Event::Attach(node.clone(), attachment(pod, addresses)));
            }
            Verb::Detach(pod, node) => {
                events.push(Event::Detach(node.clone(), attachment(pod, &[]).key));
            }
            _ => {}
        }
        Ok(events)
    }

    fn file(&self, name: &str) -> Result<String, String> {
        if let Some(text) = self.scenario.files.get(name) {
            return Ok(text.clone());
        }
        let path = self.directory.join(name);
        std::fs::read_to_string(&path).map_err(|error| format!("{name} is neither embedded nor a file here: {error}"))
    }

    /// Tells the agents of a step's events, in the way of the expansion.
    fn deliver(&mut self, mut events: Vec<Event>) -> Result<(), String> {
        match self.expansion {
            Expansion::Reversed => events.reverse(),
            Expansion::Shuffled(_) => self.random.shuffle(&mut events),
            _ => {}
        }
        for event in events {
            match self.expansion {
                Expansion::Replayed(_) => self.replay(&event)?,
                Expansion::SpuriousDeletes(_) => self.delete_spuriously(&event)?,
                Expansion::Refusals(_) => self.make_refuse(),
                _ => {}
            }
            self.cluster.store(&event)?;
            self.cluster.tell(&event)?;
            match self.expansion {
                Expansion::OneByOne => self.settle()?,
                Expansion::Replayed(_) => self.cluster.tell(&event)?,
                Expansion::Refusals(_) if self.random.is_heads() => drop(self.cluster.cycle()),
                _ => {}
            }
        }
        if self.expansion == Expansion::CrashAtEvery {
            self.restart_all(false)?;
        }
        Ok(())
    }

    /// What is new, then what was, with cycles in between or not; the event itself comes after.
    fn replay(&mut self, event: &Event) -> Result<(), String> {
        let before = match event {
            Event::Put(reference, _) | Event::Delete(reference) => self.cluster.current(reference),
            Event::Attach(..) | Event::Detach(..) => None,
        };
        self.cluster.tell(event)?;
        self.maybe_cycle();
        if let Some(before) = before {
            self.cluster.tell(&before)?;
            self.maybe_cycle();
        }
        Ok(())
    }

    fn delete_spuriously(&mut self, event: &Event) -> Result<(), String> {
        match event {
            Event::Put(reference, _) => self.cluster.tell(&Event::Delete(reference.clone()))?,
            Event::Attach(node, attachment) => {
                self.cluster.tell(&Event::Detach(node.clone(), attachment.key.clone()))?;
            }
            Event::Delete(_) | Event::Detach(..) => self.cluster.tell(event)?,
        }
        self.maybe_cycle();
        for never in [
            ObjectRef::Service(ObjectKey::new("nobody", "never")),
            ObjectRef::EndpointSlice(ObjectKey::new("nobody", "never")),
            ObjectRef::Node("never".into()),
            ObjectRef::Attachment(AttachmentKey { container: "never".into(), interface: "eth0".into() }),
        ] {
            self.cluster.tell(&Event::Delete(never))?;
        }
        let there = self.cluster.references();
        if let Some(reference) = self.random.choose(&there)
            && let Some(again) = self.cluster.current(reference)
        {
            self.cluster.tell(&Event::Delete(reference.clone()))?;
            self.maybe_cycle();
            self.cluster.tell(&again)?;
            self.maybe_cycle();
        }
        Ok(())
    }

    fn maybe_cycle(&mut self) {
        if self.random.is_heads() {
            self.cluster.cycle();
        }
    }

    fn make_refuse(&mut self) {
        for machine in self.cluster.machines.values_mut() {
            let fates: Vec<bool> = (0..24).map(|_| self.random.below(3) == 0).collect();
            machine.engine.port.kernel.decide_next(fates);
            machine.engine.port.unreadable = (0..4).map(|_| self.random.below(4) == 0).collect();
        }
    }

    fn restart_all(&mut self, is_settled: bool) -> Result<(), String> {
        let nodes: Vec<NodeName> = self.cluster.machines.keys().cloned().collect();
        for node in nodes {
            let before = self.cluster.machines[&node].changes;
            self.cluster.restart(&node)?;
            let changes = self.cluster.machines[&node].changes - before;
            if is_settled && changes > 0 {
                return Err(format!("the agent of {node} started anew and made {changes} changes"));
            }
        }
        if is_settled { self.settle() } else { Ok(()) }
    }

    /// Deletes everything. In the end each kernel is as it was before.
    fn take_down(&mut self) -> Result<(), String> {
        if self.expansion == Expansion::Squashed {
            self.settle()?;
        }
        let mut events = self.cluster.detachments();
        let is_node = |reference: &ObjectRef| matches!(reference, ObjectRef::Node(_));
        let (nodes, others): (Vec<_>, Vec<_>) = self.cluster.references().into_iter().partition(is_node);
        events.extend(others.into_iter().map(Event::Delete));
        self.deliver(events)?;
        self.settle()?;
        // A node that is gone from the cluster goes on forwarding, so it has no say any more.
        self.deliver(nodes.into_iter().map(Event::Delete).collect())?;
        self.settle()?;
        for (node, machine) in &mut self.cluster.machines {
            machine.engine.port.kernel.decide_next([]);
            machine.engine.port.unreadable.clear();
            machine.check_clean().map_err(|error| format!("on {node}: {error}"))?;
        }
        Ok(())
    }
}

fn documents(text: &str, name: &str) -> Result<Vec<Value>, String> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| format!("{name}: {error}"))?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}
