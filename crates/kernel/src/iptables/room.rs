//! Observe and apply.

use std::collections::BTreeSet;

use portolan_net::Family;
use portolan_program::iptables::{Change, Program, Reader, TableName, diff, render_restore, split};

use super::backend::{Backend, Mix, Programs, detect};
use super::command::{run, run_lines};
use super::entries::{TableSize, table_size};
use crate::error::KernelError;
use crate::netns::Namespace;

/// How long a program waits for the lock that all of iptables' programs take, in seconds.
const LOCK_WAIT: &str = "5";

/// The chains in one restore of the nft backend, whose time grows with their square: with fewer, the starts of programs
/// take as much (`portolan_program::iptables::split`). The legacy backend copies its whole table for each restore, so that
/// there all is in one.
const NFT_CHAINS_MAX: usize = 500;

/// How often a restore is tried again without what it refused.
const ROUNDS_MAX: usize = 8;

/// The longest part of a message that is passed on.
const MESSAGE_LENGTH_MAX: usize = 400;

/// iptables in one network namespace: that of the thread that opened it.
#[derive(Debug)]
pub struct IptablesRoom {
    programs: Programs,
    mix: Option<Mix>,
    families: Vec<Family>,
    namespace: Namespace,
    /// What the tables looked like after the last change of ours.
    sizes: Vec<TableSize>,
}

/// What became of changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How many times `iptables-restore` ran.
    pub restores: usize,
    /// The changes that were not made as a whole, by their position, and why. All others were made.
    pub failed: Vec<(usize, KernelError)>,
    /// Whether all was read and compared again, since a first attempt did not succeed as a whole.
    pub rewritten: bool,
}

impl IptablesRoom {
    /// Opens the room in the network namespace of the calling thread, with the backend that is in use there.
    ///
    /// # Errors
    ///
    /// If iptables is not installed, or its programs cannot be run.
    pub fn open(families: &[Family]) -> Result<IptablesRoom, KernelError> {
        let namespace = Namespace::current()?;
        let (programs, mix) = detect(&namespace)?;
        Ok(IptablesRoom { programs, mix, families: families.to_vec(), namespace, sizes: Vec::new() })
    }

    /// Opens the room with a backend, whatever is in use.
    ///
    /// # Errors
    ///
    /// If this backend is not installed.
    pub fn open_with(backend: Backend, families: &[Family]) -> Result<IptablesRoom, KernelError> {
        let program = match backend {
            Backend::Legacy => "iptables-legacy-restore",
            Backend::Nft => "iptables-nft-restore",
        };
        let missing = KernelError::MissingProgram { program, package: "iptables", doing: "serve Services by iptables" };
        let programs = Programs::of(backend).ok_or(missing)?;
        let namespace = Namespace::current()?;
        Ok(IptablesRoom { programs, mix: None, families: families.to_vec(), namespace, sizes: Vec::new() })
    }

    /// The backend.
    pub fn backend(&self) -> Backend {
        self.programs.backend
    }

    /// Whether the node had rules in both backends when the room was opened.
    pub fn mix(&self) -> Option<Mix> {
        self.mix
    }

    /// Looks again whether the node has rules in both backends.
    pub fn look_for_mix(&mut self) -> Result<Option<Mix>, KernelError> {
        self.mix = detect(&self.namespace)?.1;
        Ok(self.mix)
    }

    /// Reads all tables of the room's families, rules of others too.
    pub fn observe(&mut self) -> Result<Program, KernelError> {
        self.observe_by(Reader::new)
    }

    /// As [`IptablesRoom::observe`]. Chains that are as expected refer to the rules of `expected`: a node that holds
    /// what it should is read in little memory.
    pub fn observe_beside(&mut self, expected: &Program) -> Result<Program, KernelError> {
        self.observe_by(|family| Reader::beside(family, expected))
    }

    fn observe_by<'a>(&mut self, reader: impl Fn(Family) -> Reader<'a>) -> Result<Program, KernelError> {
        let mut program = Program::default();
        for family in self.families.iter().copied() {
            program.tables.extend(self.observe_family(family, reader(family))?.tables);
        }
        self.sizes = self.table_sizes();
        Ok(program)
    }

    fn observe_family(&self, family: Family, mut reader: Reader<'_>) -> Result<Program, KernelError> {
        let program = self.programs.save(family);
        let (mut incompatible, mut not_read) = (None, None);
        let ending = run_lines(program, &self.namespace, |line| {
            // A table that `nft` has put into a shape that iptables cannot show; changing it could harm somebody.
            if incompatible.is_none() && line.starts_with("# Table") && line.contains("incompatible") {
                incompatible = Some(line.trim_start_matches("# ").to_owned());
            }
            if not_read.is_none() {
                not_read = reader.line(line).err();
            }
        })?;
        let failed =
            |message: String| KernelError::Iptables { program: program.display().to_string(), at: None, message };
        match (ending.success, incompatible, not_read) {
            (false, ..) => Err(failed(shortened(&ending.stderr))),
            (true, Some(line), _) => Err(failed(line)),
            (true, None, Some(error)) => Err(failed(error.to_string())),
            (true, None, None) => Ok(reader.finish()),
        }
    }

    /// Makes changes: one restore per family, or a few where the backend cannot take so many. A rule that is refused
    /// is left out and its change reported; all else is made.
    pub fn apply(&mut self, changes: &[Change]) -> Report {
        let mut report = Report::default();
        for family in self.families.clone() {
            let mine = || changes.iter().filter(|change| change.table().family == family);
            let chains_max = if self.backend() == Backend::Nft { NFT_CHAINS_MAX } else { usize::MAX };
            for batch in split(mine(), chains_max) {
                let text = render_restore(batch.iter().copied(), family);
                let refusals = self.restore(family, &text, &mut report.restores);
                for refusal in refusals {
                    let concerns = |change: &Change| {
                        change.table().family == family
                            && change.table().name == refusal.table
                            && refusal.chain.as_ref().is_none_or(|chain| change.chain() == chain.as_str())
                    };
                    let is_made = |change: &Change| batch.iter().any(|it| std::ptr::eq(*it, change));
                    let positions =
                        changes.iter().enumerate().filter(|(_, change)| concerns(change) && is_made(change));
                    report.failed.extend(positions.map(|(position, _)| (position, refusal.error.clone())));
                }
            }
        }
        report.failed.sort_by_key(|(position, _)| *position);
        report.failed.dedup_by_key(|(position, _)| *position);
        self.sizes = self.table_sizes();
        report
    }

    /// Makes changes that lead to `desired`. If any of them fails, all is read, compared and written once more: what
    /// the tables were thought to hold may be what was wrong. Then the failures are of the second attempt, and their
    /// positions are those in the difference that it was made of.
    pub fn apply_toward(&mut self, changes: &[Change], desired: &Program) -> Report {
        let first = self.apply(changes);
        if first.failed.is_empty() {
            return first;
        }
        let Ok(observed) = self.observe_beside(desired) else { return first };
        let second = self.apply(&diff(&observed, desired));
        Report { restores: first.restores + second.restores, failed: second.failed, rewritten: true }
    }

    /// Deletes all that is ours.
    pub fn clean(&mut self) -> Result<Report, KernelError> {
        let observed = self.observe()?;
        Ok(self.apply(&diff(&observed, &Program::default())))
    }

    /// Whether somebody changed the tables since the last change or observation of ours, as far as the kernel tells
    /// it cheaply: by the numbers and sizes of rules in the legacy backend. The nft backend tells of every change by
    /// notification (`monitor`), and is never asked.
    pub fn was_touched(&self) -> bool {
        self.backend() == Backend::Legacy && self.sizes != self.table_sizes()
    }

    fn table_sizes(&self) -> Vec<TableSize> {
        if self.backend() != Backend::Legacy {
            return Vec::new();
        }
        let each = |family: &Family| TableName::OURS.map(|table| table_size(*family, table.as_str(), &self.namespace));
        self.families.iter().flat_map(each).collect()
    }

    /// Runs one restore until what is left of it succeeds.
    fn restore(&self, family: Family, text: &str, runs: &mut usize) -> Vec<Refusal> {
        let program = self.programs.restore(family);
        let name = program.display().to_string();
        let mut lines: Vec<&str> = Vec::new();
        let mut refusals = Vec::new();
        let mut input = std::borrow::Cow::Borrowed(text);
        for round in 1.. {
            *runs += 1;
            let arguments = ["-w", LOCK_WAIT, "--noflush", "--counters"];
            let message = match run(program, &arguments, &input, &self.namespace) {
                Ok(output) if output.success => return refusals,
                Ok(output) => shortened(&output.stderr),
                Err(error) => {
                    refusals.extend(tables_of(&input).into_iter().map(|table| Refusal::whole(table, error.clone())));
                    return refusals;
                }
            };
            // A long text is only taken apart where something is wrong with it.
            if round == 1 {
                lines = text.lines().collect();
            }
            let at = line_of(&message).filter(|number| (1..=lines.len()).contains(number));
            // Without a place, nothing was made; with one, all tables before it were.
            let start = at.map_or(0, |number| table_start(&lines, number - 1));
            lines.drain(..start);
            let table = lines.first().and_then(|line| TableName::from_name(line.trim_start_matches('*')));
            let Some(table) = table else { return refusals };
            let error = |line: Option<&str>| KernelError::Iptables {
                program: name.clone(),
                at: line.map(str::to_owned),
                message: message.clone(),
            };
            let place = at.map(|number| number - 1 - start);
            let rule = place.and_then(|place| lines.get(place)).copied();
            match (place, rule.and_then(chain_of)) {
                // One rule is to blame: the table goes without it.
                (Some(place), Some(chain)) if round < ROUNDS_MAX => {
                    refusals.push(Refusal { table, chain: Some(chain.to_owned()), error: error(rule) });
                    lines.remove(place);
                }
                // Nobody knows which: the other tables go without this one.
                _ => {
                    refusals.push(Refusal::whole(table, error(None)));
                    let end = lines.iter().position(|line| *line == "COMMIT").map_or(lines.len(), |end| end + 1);
                    lines.drain(..end);
                }
            }
            if lines.is_empty() {
                break;
            }
            input = (lines.join("\n") + "\n").into();
        }
        refusals
    }
}

/// What was refused.
#[derive(Debug)]
struct Refusal {
    table: TableName,
    /// The chain of the rule; the whole table where there is none.
    chain: Option<String>,
    error: KernelError,
}

impl Refusal {
    fn whole(table: TableName, error: KernelError) -> Refusal {
        Refusal { table, chain: None, error }
    }
}

fn tables_of(text: &str) -> BTreeSet<TableName> {
    text.lines().filter_map(|line| line.strip_prefix('*')).filter_map(TableName::from_name).collect()
}

/// Where the table begins that holds a line.
fn table_start(lines: &[&str], position: usize) -> usize {
    let before = lines.get(..=position).unwrap_or(lines);
    before.iter().rposition(|line| line.starts_with('*')).unwrap_or(0)
}

/// The chain that a line of a rule or of a chain's end is about. Lines that make chains are never to blame alone.
fn chain_of(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    matches!(words.next()?, "-A" | "-I" | "-D" | "-X").then(|| words.next()).flatten()
}

/// The line that a message names: `Error occurred at line: 7`, `line 7 failed`, `line 7: RULE_APPEND failed`.
fn line_of(message: &str) -> Option<usize> {
    message.match_indices("line").find_map(|(position, word)| {
        let rest = message.get(position + word.len()..)?.trim_start_matches([':', ' ']);
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    })
}

/// A message on one line, without the advice to read the manual and warnings of the other backend.
fn shortened(message: &str) -> String {
    let is_said = |line: &&str| !line.is_empty() && !line.starts_with("Try `") && !line.starts_with("# Warning");
    let text = message.lines().map(str::trim).filter(is_said).collect::<Vec<_>>().join("; ");
    text.chars().take(MESSAGE_LENGTH_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_lead_to_their_lines() {
        for (message, line) in [
            (
                "iptables-restore v1.8.9 (legacy): Couldn't load target `A2'\n\nError occurred at line: 11\nTry `x'",
                Some(11),
            ),
            ("iptables-restore: line 4 failed", Some(4)),
            (
                "iptables-nft-restore v1.8.9 (nf_tables): \nline 5: CHAIN_USER_DEL failed (Device busy): chain X",
                Some(5),
            ),
            ("Another app is currently holding the xtables lock.", None),
        ] {
            assert_eq!(line_of(&shortened(message)), line, "{message}");
        }
        let lines = ["*filter", ":A - [0:0]", "COMMIT", "*nat", "-A A -j B", "COMMIT"];
        assert_eq!(table_start(&lines, 4), 3);
        assert_eq!(table_start(&lines, 1), 0);
        assert_eq!(chain_of("-A A -j B"), Some("A"));
        assert_eq!(chain_of("COMMIT"), None);
    }
}
