//! The demo: a lab from a shop's manifests, real traffic over every way that a packet can take, and
//! the tracer's account of three of them.
//!
//! Each way is asked with a real request from within its namespace. Right is only an answer of the right
//! pod that saw the right source address: a masquerade too many or too few is an error here.

mod paths;
mod run;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context as _;

use crate::client::Client;
use crate::description::Description;
use crate::status::columns;
use crate::{LabError, Layout, Result, UpOptions};

pub use paths::{Expectation, Path, Shop};
pub use run::Outcome;

/// Runs the demo. `progress` hears what is being done, and an empty text before anything goes to
/// `output`.
/// The answer is whether everything was right.
///
/// # Errors
/// If the lab does not come up or a way cannot be tried at all.
pub fn demo(options: &UpOptions, progress: &mut dyn FnMut(&str), output: &mut dyn Write) -> Result<bool> {
    let begun = Instant::now();
    let _guard = crate::up::guarded(options, progress)?;
    let result = show(options, begun, progress, output);
    if options.keep {
        return result;
    }
    progress("taking the lab down");
    let down = crate::down(&options.name);
    progress("");
    let right = result?;
    down?;
    write(output, &format!("The lab is down again; `make demo KEEP=1` leaves it up. {:.1} s\n", seconds(begun)))?;
    Ok(right)
}

fn show(options: &UpOptions, begun: Instant, progress: &mut dyn FnMut(&str), output: &mut dyn Write) -> Result<bool> {
    let layout = Layout::new(&options.name)?;
    let description = Description::load(&layout)?;
    progress("sending traffic");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    let shop = runtime.block_on(Shop::read(&Client::new(description.api(&layout)), &layout, &description))?;
    let mut outcomes = Vec::new();
    for path in shop.paths()? {
        outcomes.push(run::run(&layout, &description, path)?);
    }
    progress("");
    write(
        output,
        &format!(
            "{} nodes, {} pods, fabric {}, services {}: up after {:.1} s\n\n",
            description.topology.nodes.len(),
            shop.pods.len(),
            description.fabric,
            description.services,
            seconds(begun)
        ),
    )?;
    write(output, &table(&outcomes))?;
    let wrong = outcomes.iter().filter(|outcome| outcome.problem.is_some()).count();
    let summary = match wrong {
        0 => format!("\nAll {} ways answered right.\n\n", outcomes.len()),
        wrong => format!("\n{wrong} of {} ways did not answer right.\n\n", outcomes.len()),
    };
    write(output, &summary)?;
    progress("tracing");
    let mut right = wrong == 0;
    for (from, to) in shop.traces() {
        progress("");
        right &= trace(&description, &options.name, &from, &to, output)?;
    }
    write(output, &next_steps(&layout, &shop))?;
    Ok(right)
}

fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}

fn write(output: &mut dyn Write, text: &str) -> Result<()> {
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).context("writing the demo's results")?;
    Ok(())
}

/// One row per way.
fn table(outcomes: &[Outcome]) -> String {
    let mut rows = vec![["FROM", "TO", "ANSWERED BY", "ON", "SOURCE SEEN", "LATENCY", "OK"].map(str::to_owned)];
    for outcome in outcomes {
        let milliseconds = std::time::Duration::from_micros(outcome.latency_us).as_secs_f64() * 1000.0;
        rows.push([
            outcome.from.clone(),
            outcome.to.clone(),
            outcome.answered.clone(),
            outcome.on.clone(),
            outcome.source.clone(),
            format!("{milliseconds:.1} ms"),
            outcome.problem.as_ref().map_or_else(|| "ok".to_owned(), |problem| format!("WRONG: {problem}")),
        ]);
    }
    columns(&rows)
}

/// Runs `portolan trace`; true if the way is as predicted.
fn trace(description: &Description, lab: &str, from: &str, to: &str, output: &mut dyn Write) -> Result<bool> {
    write(output, &format!("$ portolan trace --name {lab} --live {from} {to}\n"))?;
    let traced = Command::new(&description.program)
        .args(["trace", "--name", lab, "--live", from, to])
        .stdin(Stdio::null())
        .output()
        .context("running `portolan trace`")?;
    write(output, &String::from_utf8_lossy(&traced.stdout))?;
    write(output, &String::from_utf8_lossy(&traced.stderr))?;
    write(output, "\n")?;
    Ok(traced.status.success())
}

fn next_steps(layout: &Layout, shop: &Shop) -> String {
    let name = layout.name();
    let pod = shop.pod_of("frontend", 0).map(|pod| pod.name.clone()).unwrap_or_default();
    format!(
        "How to go on, while a lab is up:\n\
         \x20 export KUBECONFIG={}\n\
         \x20 kubectl get pods -o wide\n\
         \x20 portolan lab exec --name {name} deploy/frontend -- curl -s http://cart:7070/\n\
         \x20 portolan lab exec --name {name} node/node-1 -- ip route\n\
         \x20 portolan trace --name {name} pod/{pod} svc/cart:7070\n\
         \x20 portolan lab down --name {name}\n\n",
        layout.kubeconfig().display()
    )
}

/// The error for a shop that lacks something that the demo needs.
fn lacking(what: &str) -> LabError {
    LabError::usage(format!("the demo needs {what}"), "use examples/shop.yaml and at least two nodes")
}
