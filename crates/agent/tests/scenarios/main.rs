//! Ring 0: every file of `scenarios/network` through source, state, intent and programs, on one engine
//! per node over kernels in memory, as it is written and in every expansion.
//!
//! `scenarios/README.md` says how scenarios are written. `UPDATE=1` writes what the checks find;
//! `SCENARIO=name` runs only that one.
#![expect(clippy::unwrap_used, reason = "the helpers are part of the test")]
#![expect(unreachable_pub, reason = "the modules of a test have no readers but this one")]

mod checks;
mod cluster;
mod format;
mod kernel;
mod random;
mod run;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use cluster::line_difference;
use format::Scenario;
use run::{Expansion, Found, run};

/// Seeds of the expansions that are random: each is another order.
const SEEDS: [u64; 3] = [1, 2, 3];

fn files() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/network");
    let mut files: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    assert!(files.len() >= 14, "the scenarios are not where they should be");
    // While working on one: its name without the ending.
    if let Some(only) = std::env::var_os("SCENARIO") {
        files.retain(|path| path.file_stem() == Some(&only));
        assert!(!files.is_empty(), "there is no scenario of that name");
    }
    files
}

fn expansions(steps: usize) -> Vec<Expansion> {
    let mut all = vec![Expansion::Reversed, Expansion::OneByOne, Expansion::Squashed, Expansion::CrashAtEvery];
    for seed in SEEDS {
        all.push(Expansion::Shuffled(seed));
        all.push(Expansion::Replayed(seed));
        all.push(Expansion::SpuriousDeletes(seed));
        all.push(Expansion::Refusals(seed));
    }
    all.extend((0..steps).map(Expansion::RestartAfter));
    all
}

#[test]
fn every_scenario_holds_in_every_expansion() {
    let files = files();
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let found = examine(file);
                    wrong.lock().unwrap().extend(found);
                }
            });
        }
    });
    let mut wrong = wrong.into_inner().unwrap();
    wrong.sort();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// What is wrong with one scenario.
fn examine(file: &Path) -> Vec<String> {
    let name = format!("scenarios/network/{}", file.file_name().unwrap().to_string_lossy());
    let text = std::fs::read_to_string(file).unwrap();
    let scenario = match Scenario::parse(&text) {
        Ok(scenario) => scenario,
        Err(error) => return vec![format!("{name}:{error}")],
    };
    let directory = file.parent().unwrap();
    let plain = match run(&scenario, directory, Expansion::Plain) {
        Ok(plain) => plain,
        Err(error) => return vec![format!("{name}:{error}")],
    };
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(file, scenario.render(&plain.texts)).unwrap();
    } else {
        let wrong = unexpected(&scenario, &plain.texts, &name);
        if !wrong.is_empty() {
            return wrong;
        }
    }
    let mut wrong = Vec::new();
    for expansion in expansions(scenario.steps.len()) {
        let error = match run(&scenario, directory, expansion) {
            Ok(expanded) => deviation(&scenario, &plain, &expanded),
            Err(error) => Some(error),
        };
        wrong.extend(error.map(|error| format!("{name}:{error} (expansion {expansion:?})")));
    }
    wrong
}

fn unexpected(scenario: &Scenario, texts: &BTreeMap<usize, String>, name: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for (index, found) in texts {
        let step = &scenario.steps[*index];
        if step.expected.trim_end() != found.trim_end() {
            let difference = line_difference(&step.expected, found);
            wrong.push(format!("{name}:{}: `{}` finds something else:\n{difference}", step.line, step.text));
        }
    }
    wrong
}

/// The first check of an expanded run that did not find what the plain run found.
fn deviation(scenario: &Scenario, plain: &Found, expanded: &Found) -> Option<String> {
    for (index, found) in &expanded.texts {
        let step = &scenario.steps[*index];
        let expected = &plain.texts[index];
        if expected != found {
            let difference = line_difference(expected, found);
            return Some(format!("{}: `{}` finds something else:\n{difference}", step.line, step.text));
        }
        for (node, outlook) in &expanded.outlooks[index] {
            if let Some(difference) = outlook.difference(&plain.outlooks[index][node]) {
                return Some(format!("{}: {node} is not the same (+ is expanded):\n{difference}", step.line));
            }
        }
    }
    None
}
