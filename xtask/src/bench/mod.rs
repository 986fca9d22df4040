//! `cargo xtask bench [NAME…] [--json] [--no-build]`: what the project promises in figures, measured.
//!
//! ```text
//!   lab       a whole cluster, up and answering
//!   cni       CNI ADD, side by side with Debian's `bridge` and `host-local`
//!   services  many Services in each mode, side by side with a real kube-proxy: sync, changes, connections
//!   api       Services created in the embedded API server
//!   dns       queries per second
//!   trace     one predicted trace
//! ```
//!
//! It builds what it measures with `--release`, needs root, works in network namespaces of its own, and
//! leaves nothing behind. A figure with a peer is taken in the same run as the peer's, by turns, so that a
//! busy machine slows both. It is no test: a goal that is missed is printed, and the exit code is 0.

mod agent;
mod api;
mod cni;
mod feed;
mod lab;
mod machine;
mod other;
mod report;
mod services;

use anyhow::{Context, bail};

use machine::Machine;
use report::{Report, Row};

const USAGE: &str = "usage: cargo xtask bench [--json] [--no-build] [lab | cni | services | api | dns | trace]…";

/// One benchmark.
type Bench = fn(&machine::Built) -> anyhow::Result<Vec<Row>>;

/// All of them, in the order in which they run.
const BENCHES: [(&str, Bench); 6] = [
    ("lab", lab::run),
    ("cni", cni::run),
    ("services", services::run),
    ("api", api::run),
    ("dns", other::dns),
    ("trace", other::trace),
];

/// Runs the benchmarks that are named, or all.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    if let [first, rest @ ..] = arguments
        && first == cni::INSIDE
    {
        return cni::inside(rest);
    }
    if let [first, rest @ ..] = arguments
        && first == services::INSIDE
    {
        return services::inside(rest);
    }
    let (options, names): (Vec<&String>, Vec<&String>) = arguments.iter().partition(|it| it.starts_with('-'));
    let is_known = |name: &&&String| BENCHES.iter().any(|(known, _)| known == **name);
    let has = |wanted: &str| options.iter().any(|option| *option == wanted);
    if options.iter().any(|option| !["--json", "--no-build"].contains(&option.as_str()))
        || !names.iter().all(|name| is_known(&name))
    {
        bail!(USAGE);
    }
    let built = machine::built(!has("--no-build")).context("building what is measured")?;
    let mut report = Report::new(Machine::read());
    for (name, bench) in BENCHES {
        if names.is_empty() || names.iter().any(|wanted| *wanted == name) {
            report::progress(&format!("measuring {name}"));
            match bench(&built) {
                Ok(rows) => report.rows.extend(rows),
                Err(error) => report.failed.push((name, format!("{error:#}"))),
            }
        }
    }
    report.print(has("--json"));
    if let Some((name, error)) = report.failed.first() {
        bail!("{name} could not be measured: {error}");
    }
    Ok(())
}
