//! Many Services: the engine alone against the kernel, and a real agent behind a scripted API server.

use std::process::Command;

use anyhow::Context;
use serde_json::Value;

use super::agent;
use super::machine::{Built, output};
use super::report::{Goal, Row};

const ENDPOINTS: u32 = 10;
const CHANGES: u32 = 1000;

pub(super) fn run(built: &Built) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for services in [1000, 10_000] {
        let numbers = [services, ENDPOINTS, CHANGES].map(|number| number.to_string());
        let printed = output(Command::new(&built.scale).args(numbers))?;
        let measured: Value = serde_json::from_str(&printed)?;
        let get = |name: &str| measured[name].as_f64().with_context(|| format!("the example prints no {name}"));
        let is_large = services == 10_000;
        let mut push = |what: &str, value: f64, unit: &'static str, goal: f64| {
            let row = Row::new(format!("{services} Services × {ENDPOINTS}: {what}"), value, unit);
            rows.push(if is_large { row.goal(Goal::Below(goal)) } else { row });
        };
        push("state → kernel, cold", get("cold_ms")? / 1e3, "s", 2.0);
        push("one endpoint changed → kernel, p50", get("change_p50_ms")?, "ms", 5.0);
        push("one endpoint changed → kernel, p99", get("change_p99_ms")?, "ms", 5.0);
        push("netlink messages per change, most", get("change_messages_max")?, "", 9.0);
        push("peak memory of the engine alone", get("peak_memory_mib")?, "MiB", 100.0);
    }
    rows.extend(agent::run(built, 10_000, ENDPOINTS)?);
    Ok(rows)
}
