//! `cargo xtask test`: all tests, with what was skipped said aloud.
//!
//! The test runner hides what a passing test prints, and so a test that says `skipped: …` would look as
//! if it had passed. This shows those lines, counts them apart, and ends with the totals.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// Which part of the runner's output a line is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Names and results: shown.
    Results,
    /// What passing tests printed: hidden, but for what was skipped.
    Successes,
}

/// What was counted so far.
#[derive(Debug, Default, PartialEq, Eq)]
struct Totals {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// Runs all tests of the workspace; further arguments go to `cargo test`.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let mut child = Command::new(env!("CARGO"))
        .args(["test", "--workspace", "--no-fail-fast"])
        .args(arguments)
        .args(["--", "--show-output"])
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo test could not be started")?;
    let output = child.stdout.take().context("cargo test has no output")?;
    let mut filter = Filter::default();
    let mut stdout = std::io::stdout().lock();
    for line in BufReader::new(output).lines() {
        if let Some(line) = filter.take(&line?) {
            writeln!(stdout, "{line}")?;
        }
    }
    let status = child.wait()?;
    let Totals { passed, failed, skipped } = filter.totals;
    writeln!(stdout, "{passed} passed, {failed} failed, {skipped} skipped")?;
    if !status.success() {
        bail!("tests failed: {status}");
    }
    Ok(())
}

/// Reads the runner's output line by line.
#[derive(Debug)]
struct Filter {
    part: Part,
    /// The test whose output is being read.
    test: String,
    /// Tests of this binary that said they were skipped.
    skipped: BTreeSet<String>,
    totals: Totals,
}

impl Default for Filter {
    fn default() -> Self {
        Filter { part: Part::Results, test: String::new(), skipped: BTreeSet::new(), totals: Totals::default() }
    }
}

impl Filter {
    /// What is shown for a line, if anything is.
    fn take(&mut self, line: &str) -> Option<String> {
        match line {
            "successes:" => self.part = Part::Successes,
            "failures:" => self.part = Part::Results,
            _ if line.starts_with("test result:") => {
                self.part = Part::Results;
                self.count(line);
            }
            _ => {}
        }
        if self.part == Part::Results {
            return Some(line.to_owned());
        }
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            name.clone_into(&mut self.test);
        }
        let is_skip = line.trim_start().starts_with("skipped:");
        if is_skip {
            self.skipped.insert(self.test.clone());
        }
        is_skip.then(|| format!("test {} ... {}", self.test, line.trim_start()))
    }

    /// `test result: ok. 3 passed; 0 failed; …`
    fn count(&mut self, line: &str) {
        let number = |word: &str| -> usize {
            let before = line.split(word).next().unwrap_or_default();
            before.split_whitespace().last().and_then(|text| text.parse().ok()).unwrap_or(0)
        };
        let skipped = self.skipped.len();
        self.skipped.clear();
        self.totals.passed += number(" passed").saturating_sub(skipped);
        self.totals.failed += number(" failed");
        self.totals.skipped += skipped + number(" ignored");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skipped_test_is_shown_and_not_counted_as_passed() {
        let output = "\
running 3 tests
test a ... ok
test b ... ok
test c ... FAILED

successes:

---- a stdout ----
noise
---- b stdout ----
skipped: nft is not installed

successes:
    a
    b

failures:

---- c stdout ----
the reason

test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        let mut filter = Filter::default();
        let shown: Vec<String> = output.lines().filter_map(|line| filter.take(line)).collect();
        assert!(shown.contains(&"test b ... skipped: nft is not installed".to_owned()), "{shown:?}");
        assert!(shown.contains(&"the reason".to_owned()));
        assert!(!shown.contains(&"noise".to_owned()));
        assert_eq!(filter.totals, Totals { passed: 1, failed: 1, skipped: 1 });
    }
}
