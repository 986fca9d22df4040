//! `cargo xtask test`: all tests, with what was skipped said aloud.
//!
//! The test runner hides what a passing test prints, and so a test that says `skipped: …` would look as
//! if it had passed. This shows those lines, counts them apart, and ends with the totals.
//!
//! Test targets whose name starts with `guest_` need what this machine's kernel may lack. Here they say that
//! they were skipped; they run once more in a guest kernel (`cargo xtask guest`), all in one.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::guest;

/// What the names of test targets for the guest kernel start with.
const GUEST_PREFIX: &str = "guest_";

/// How long all tests in the guest may take, in seconds. Under translation they take ten times as long as here.
const GUEST_TIMEOUT_SECONDS: u64 = 900;

/// What the tests in the guest need in memory: some start a cluster of three nodes.
const GUEST_MEMORY_MIB: u32 = 4000;

/// One processor. Linux changes its own code while it runs (`text_poke_bp`), and the emulator may go on with the old
/// code on another processor: one run in ten ended in a panic at a breakpoint that nobody had set.
const GUEST_CPUS: u32 = 1;

/// What a test says that was skipped for want of the guest.
const GUEST_HINT: &str = "cargo xtask guest";

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
    /// Those of the skipped ones that only want the guest.
    for_guest: usize,
}

/// Runs all tests of the workspace; further arguments go to `cargo test`.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let mut filter = Filter::default();
    let mut stdout = std::io::stdout().lock();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["test", "--workspace", "--no-fail-fast"]).args(arguments).args(["--", "--show-output"]);
    let mut succeeded = follow(&mut cargo, &mut filter, &mut stdout).context("cargo test")?;
    let binaries = guest_binaries(arguments)?;
    match guest::missing() {
        _ if binaries.is_empty() => {}
        Some(missing) => writeln!(stdout, "skipped: tests in a guest kernel; {missing}")?,
        None => {
            writeln!(stdout, "     Running in a guest kernel: {}", binaries.join(" "))?;
            // They run here and there: here they count as skipped only if they do not run there.
            filter.totals.skipped -= std::mem::take(&mut filter.totals.for_guest);
            filter.in_guest = true;
            let mut guest = guest::command(GUEST_TIMEOUT_SECONDS, GUEST_MEMORY_MIB, GUEST_CPUS);
            let all = "status=0; for test; do \"$test\" --show-output --test-threads=1 || status=1; done; exit $status";
            guest.args(["sh", "-c", all, "sh"]).args(&binaries);
            succeeded &= follow(&mut guest, &mut filter, &mut stdout).context("the guest")?;
        }
    }
    let Totals { passed, failed, skipped, .. } = filter.totals;
    writeln!(stdout, "{passed} passed, {failed} failed, {skipped} skipped")?;
    if !succeeded {
        bail!("tests failed");
    }
    Ok(())
}

/// Runs tests and shows what the filter lets through. Whether they succeeded.
fn follow(command: &mut Command, filter: &mut Filter, stdout: &mut impl Write) -> anyhow::Result<bool> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("it could not be started")?;
    let output = child.stdout.take().context("it has no output")?;
    for line in BufReader::new(output).lines() {
        if let Some(line) = filter.take(&line?) {
            writeln!(stdout, "{line}")?;
        }
    }
    Ok(child.wait()?.success())
}

/// The test programs for the guest, as cargo built them.
fn guest_binaries(arguments: &[String]) -> anyhow::Result<Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["test", "--workspace", "--no-run", "--message-format=json", "--quiet"])
        .args(arguments)
        .stderr(Stdio::null())
        .output()
        .context("cargo test could not be started")?;
    let messages = output.stdout.split(|byte| *byte == b'\n');
    Ok(messages.filter_map(|line| guest_binary(&serde_json::from_slice(line).ok()?)).collect())
}

/// The program that one of cargo's messages tells of, if it is a test for the guest.
fn guest_binary(message: &serde_json::Value) -> Option<String> {
    let target = message.get("target")?;
    let is_test = target.get("kind")?.as_array()?.iter().any(|kind| kind == "test");
    let is_for_guest = target.get("name")?.as_str()?.starts_with(GUEST_PREFIX);
    let executable = message.get("executable")?.as_str()?;
    (is_test && is_for_guest).then(|| executable.to_owned())
}

/// Reads the runner's output line by line.
#[derive(Debug)]
struct Filter {
    part: Part,
    /// The test whose output is being read.
    test: String,
    /// Tests of this binary that said they were skipped.
    skipped: BTreeSet<String>,
    /// Those of them that want the guest.
    for_guest: BTreeSet<String>,
    /// Whether this is the guest.
    in_guest: bool,
    totals: Totals,
}

impl Default for Filter {
    fn default() -> Self {
        Filter {
            part: Part::Results,
            test: String::new(),
            skipped: BTreeSet::new(),
            for_guest: BTreeSet::new(),
            in_guest: false,
            totals: Totals::default(),
        }
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
            if !self.in_guest && line.contains(GUEST_HINT) {
                self.for_guest.insert(self.test.clone());
            }
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
        self.totals.for_guest += std::mem::take(&mut self.for_guest).len();
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
        assert_eq!(filter.totals, Totals { passed: 1, failed: 1, skipped: 1, for_guest: 0 });
    }

    #[test]
    fn what_only_wants_the_guest_is_counted_apart() {
        let output = "\
successes:

---- a stdout ----
skipped: the kernel has no IPVS; run cargo xtask guest -- a

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        let mut filter = Filter::default();
        output.lines().for_each(|line| drop(filter.take(line)));
        assert_eq!(filter.totals, Totals { passed: 0, failed: 0, skipped: 1, for_guest: 1 });
    }

    #[test]
    fn only_tests_for_the_guest_are_run_there() {
        let message = |name: &str, kind: &str| serde_json::json!({"target": {"name": name, "kind": [kind]}, "executable": format!("/target/{name}")});
        assert_eq!(guest_binary(&message("guest_ipvs", "test")).as_deref(), Some("/target/guest_ipvs"));
        assert_eq!(guest_binary(&message("nftables", "test")), None);
        assert_eq!(guest_binary(&message("guest_ipvs", "bin")), None);
        assert_eq!(guest_binary(&serde_json::json!({"reason": "build-finished"})), None);
    }
}
