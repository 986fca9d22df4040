//! The judge: every mode answers like a plain specification, for random clusters and for all text scenarios.
//!
//! `specification.rs` reads the documentation a second time, from objects straight to answers. The intent and each
//! mode's program, by its interpreter, are asked the same questions. `docs/design/judge.md` says what that proves
//! and what it does not.
//!
//! `JUDGE_CLUSTERS=100000 cargo test -p portolan-program --test judge random` tries more clusters.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod answer;
mod cluster;
mod generator;
mod kube_proxy;
mod kubernetes;
mod modes;
mod scenario;
mod specification;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use portolan_net::{Family, ObjectKey, Port};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{TestCaseError, TestRunner};

use answer::Answer;
use cluster::{Cluster, Follower};
use generator::{any_cluster, questions};
use modes::Mode;

/// Random clusters in a run that says nothing else. Each is two states of a cluster.
const CLUSTERS: u32 = 1000;

/// Asks all modes about one state.
fn judge(cluster: &Cluster, modes: &[Box<dyn Mode>]) -> Result<(), String> {
    for question in questions(cluster) {
        let expected = specification::answer(cluster, &question);
        for mode in modes.iter().filter(|mode| mode.knows(cluster)) {
            let answer = mode.answer(cluster, &question);
            let wanted = mode.differs(cluster, &question).unwrap_or_else(|| expected.clone());
            if answer != wanted {
                let name = mode.name();
                return Err(format!(
                    "{question}\n  {name} says: {answer}\n  it must be: {wanted}\n\n{}{question} => {wanted}\n",
                    scenario::render(cluster)
                ));
            }
        }
    }
    Ok(())
}

fn health_checks(follower: &Follower) -> BTreeMap<ObjectKey, (Port, usize)> {
    let checks = follower.compiler.health_checks().iter();
    checks.map(|(key, check)| (key.clone(), (check.port, check.local_endpoints))).collect()
}

fn follow(states: [&Cluster; 2]) -> Result<(), String> {
    let mut follower = Follower::new(states[0].node().name.clone(), states[0].settings.clone());
    let mut modes = modes::all(states[0]);
    for cluster in states {
        let updates = follower.follow(cluster);
        for mode in &mut modes {
            mode.update(cluster, &follower, &updates);
        }
        judge(cluster, &modes)?;
        if health_checks(&follower) != specification::health_checks(cluster) {
            return Err(format!(
                "load balancers are told {:?}\n  it must be: {:?}\n\n{}",
                health_checks(&follower),
                specification::health_checks(cluster),
                scenario::render(cluster)
            ));
        }
    }
    Ok(())
}

fn clusters() -> u32 {
    std::env::var("JUDGE_CLUSTERS").ok().map_or(CLUSTERS, |text| text.parse().expect("JUDGE_CLUSTERS is a number"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: clusters(), failure_persistence: None, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_clusters_mean_the_same_in_every_mode((first, second) in any_cluster()) {
        follow([&first, &second]).map_err(TestCaseError::fail)?;
    }

    #[test]
    fn a_cluster_survives_being_written_as_a_scenario((cluster, _) in any_cluster()) {
        let text = scenario::render(&cluster);
        let read = scenario::parse(&text).map_err(TestCaseError::fail)?;
        prop_assert_eq!(read.cluster(), &cluster, "{}", text);
    }
}

/// All text scenarios.
fn scenario_files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/services");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    files
}

/// Runs every file of `scenarios/services`; `SCENARIO=name` runs one alone.
#[test]
fn scenarios_hold_in_every_mode() {
    let only = std::env::var("SCENARIO").ok();
    let mut wrong = Vec::new();
    for path in scenario_files() {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if only.as_ref().is_some_and(|only| *only != name) {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        match scenario::parse(&text) {
            Ok(scenario) if scenario.checks() == 0 => wrong.push(format!("{name}.txt: it checks nothing")),
            Ok(scenario) => wrong.extend(scenario.run().into_iter().map(|line| format!("{name}.txt: {line}"))),
            Err(why) => wrong.push(format!("{name}.txt: {why}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A judge that is asked nothing convicts nobody: among the random clusters every kind of answer is common.
#[test]
fn random_clusters_reach_every_kind_of_answer() {
    const STATES: usize = 300;
    let mut runner = TestRunner::deterministic();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..STATES {
        let (cluster, _) = any_cluster().new_tree(&mut runner).unwrap().current();
        for question in questions(&cluster) {
            let kind = match specification::answer(&cluster, &question) {
                Answer::Forward(endpoints) if endpoints.values().all(|masquerade| *masquerade) => "masquerade",
                Answer::Forward(endpoints) if endpoints.values().any(|masquerade| *masquerade) => "own endpoint",
                Answer::Forward(_) => "forward",
                Answer::Untouched => "untouched",
                Answer::Reject => "reject",
                Answer::Drop => "drop",
            };
            *counts.entry(format!("{} {kind} {}", question.from.name(), question.family())).or_default() += 1;
        }
    }
    for from in ["pod", "node", "outside"] {
        for kind in ["masquerade", "forward", "untouched", "reject", "drop"] {
            for family in Family::ALL {
                let name = format!("{from} {kind} {family}");
                let found = counts.get(&name).copied().unwrap_or_default();
                assert!(found >= 5, "{name}: {found} times, of {counts:#?}");
            }
        }
    }
    assert!(counts.get("pod own endpoint IPv4").is_some_and(|found| *found >= 5), "{counts:#?}");
}
