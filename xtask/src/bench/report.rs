//! Figures, and how they are printed.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the command's output")]

use std::time::Duration;

use serde_json::{Value, json};

use super::machine::Machine;

/// What a figure is held against.
#[derive(Debug, Clone, Copy)]
pub(super) enum Goal {
    /// It must be below.
    Below(f64),
    /// It must be above.
    Above(f64),
    /// At most this part of the peer's figure.
    OfPeer(f64),
    /// At least this part of the peer's figure.
    AtLeastOfPeer(f64),
}

/// One figure.
#[derive(Debug, Clone)]
pub(super) struct Row {
    what: String,
    unit: &'static str,
    ours: f64,
    peer: Option<f64>,
    goal: Option<Goal>,
    place: Option<Place>,
}

/// Where a figure of Services is in a plot.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Which plot.
    pub(super) figure: &'static str,
    /// Which line in it.
    pub(super) mode: &'static str,
    /// How far to the right.
    pub(super) services: u32,
}

impl Row {
    pub(super) fn new(what: impl Into<String>, ours: f64, unit: &'static str) -> Row {
        Row { what: what.into(), unit, ours, peer: None, goal: None, place: None }
    }

    pub(super) fn beside(self, peer: f64) -> Row {
        Row { peer: Some(peer), ..self }
    }

    pub(super) fn goal(self, goal: Goal) -> Row {
        Row { goal: Some(goal), ..self }
    }

    pub(super) fn at(self, place: Place) -> Row {
        Row { place: Some(place), ..self }
    }

    fn ratio(&self) -> Option<f64> {
        self.peer.filter(|peer| *peer > 0.0).map(|peer| self.ours / peer)
    }

    fn is_met(&self) -> Option<bool> {
        Some(match self.goal? {
            Goal::Below(bound) => self.ours < bound,
            Goal::Above(bound) => self.ours > bound,
            Goal::OfPeer(part) => self.ratio()? <= part,
            Goal::AtLeastOfPeer(part) => self.ratio()? >= part,
        })
    }

    fn goal_text(&self) -> String {
        match self.goal {
            None => String::new(),
            Some(Goal::Below(bound)) => format!("< {}", figure(bound)),
            Some(Goal::Above(bound)) => format!("> {}", figure(bound)),
            Some(Goal::OfPeer(part)) => format!("ratio ≤ {part}"),
            Some(Goal::AtLeastOfPeer(part)) => format!("ratio ≥ {part}"),
        }
    }

    fn cells(&self) -> [String; 7] {
        let met = self.is_met().map_or("", |met| if met { "yes" } else { "NO" });
        [
            self.what.clone(),
            figure(self.ours),
            self.peer.map(figure).unwrap_or_default(),
            self.unit.to_owned(),
            self.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
            self.goal_text(),
            met.to_owned(),
        ]
    }

    fn json(&self) -> Value {
        let mut row = json!({
            "what": self.what, "ours": self.ours, "peer": self.peer, "unit": self.unit, "ratio": self.ratio(),
            "goal": self.goal_text(), "met": self.is_met(),
        });
        if let Some(Place { figure, mode, services }) = &self.place {
            row["figure"] = json!(figure);
            row["mode"] = json!(mode);
            row["services"] = json!(services);
        }
        row
    }
}

/// All figures of one run.
#[derive(Debug)]
pub(super) struct Report {
    machine: Machine,
    pub(super) rows: Vec<Row>,
    pub(super) failed: Vec<(&'static str, String)>,
}

impl Report {
    pub(super) fn new(machine: Machine) -> Report {
        Report { machine, rows: Vec::new(), failed: Vec::new() }
    }

    pub(super) fn print(&self, as_json: bool) {
        if as_json {
            let rows: Vec<Value> = self.rows.iter().map(Row::json).collect();
            println!("{:#}", json!({"machine": self.machine.json(), "figures": rows}));
            return;
        }
        println!("{}", self.machine);
        println!();
        let head = ["what", "ours", "peer", "unit", "ratio", "goal", "met"].map(str::to_owned);
        let lines: Vec<[String; 7]> = std::iter::once(head).chain(self.rows.iter().map(Row::cells)).collect();
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        for (index, line) in lines.iter().enumerate() {
            let padded = line.iter().enumerate().map(|(column, cell)| {
                let space = " ".repeat(width(column) - cell.chars().count());
                if (1..=2).contains(&column) { format!("{space}{cell}") } else { format!("{cell}{space}") }
            });
            println!("| {} |", padded.collect::<Vec<_>>().join(" | "));
            if index == 0 {
                let rule = (0..line.len()).map(|column| "-".repeat(width(column)));
                println!("| {} |", rule.collect::<Vec<_>>().join(" | "));
            }
        }
    }
}

/// A figure with as many digits as mean something.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The middle of some times, in milliseconds.
pub(super) fn median_milliseconds(times: &[Duration]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default().as_secs_f64() * 1e3
}

/// What is going on, for whoever waits.
pub(super) fn progress(text: &str) {
    eprintln!("bench: {text}");
}
