//! `cargo xtask bench [NAME…] [--json] [--no-build]`: what the project promises in figures, measured.
//! `cargo xtask bench --plot FILE`: draws the figures of Services that a run with `--json` printed.
//!
//! ```text
//!   lab       a whole cluster, up and answering
//!   cni       CNI ADD, side by side with Debian's `bridge` and `host-local`
//!   services  many Services in each mode, side by side with a real kube-proxy: sync, changes, connections
//!   fabric    from node to node: veth, VXLAN, our `udp`, and a forwarder of one packet a call
//!   api       Services created in the embedded API server
//!   dns       queries per second
//!   trace     one predicted trace
//! ```
//!
//! `--services=N,N` and `--modes=MODE,MODE` choose among the sizes and modes of `services`, `--no-peer` leaves
//! kube-proxy out of it.
//!
//! It builds what it measures with `--release`, needs root, works in network namespaces of its own, and
//! leaves nothing behind. A figure with a peer is taken in the same run as the peer's, by turns, so that a
//! busy machine slows both. It is no test: a goal that is missed is printed, and the exit code is 0.

mod agent;
mod api;
mod cni;
mod fabric;
mod feed;
mod lab;
mod machine;
mod other;
mod plot;
mod report;
mod services;

use anyhow::{Context, bail};

use machine::Machine;
use report::{Report, Row};

const USAGE: &str = "usage: cargo xtask bench [--json] [--no-build] [--services=N,…] [--modes=MODE,…] [--no-peer] \
                     [lab | cni | services | fabric | api | dns | trace]…, or cargo xtask bench --plot FILE";

/// One benchmark.
type Bench = fn(&machine::Built, &services::Choice) -> anyhow::Result<Vec<Row>>;

/// All of them, in the order in which they run.
const BENCHES: [(&str, Bench); 7] = [
    ("lab", |built, _| lab::run(built)),
    ("cni", |built, _| cni::run(built)),
    ("services", services::run),
    ("fabric", |built, _| fabric::run(built)),
    ("api", |built, _| api::run(built)),
    ("dns", |built, _| other::dns(built)),
    ("trace", |built, _| other::trace(built)),
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
    if let [option, file] = arguments
        && option == "--plot"
    {
        return plot::run(file);
    }
    let (options, names): (Vec<&String>, Vec<&String>) = arguments.iter().partition(|it| it.starts_with('-'));
    let is_known = |name: &&&String| BENCHES.iter().any(|(known, _)| known == **name);
    let (mut as_json, mut builds, mut choice) = (false, true, services::Choice::default());
    for option in options {
        match option.split_once('=').unwrap_or((option, "")) {
            ("--json", "") => as_json = true,
            ("--no-build", "") => builds = false,
            ("--no-peer", "") => choice.has_peer = false,
            ("--services", sizes) => choice.sizes = sizes.split(',').map(str::parse).collect::<Result<_, _>>()?,
            ("--modes", modes) => choice.modes = modes.split(',').map(services::mode).collect::<anyhow::Result<_>>()?,
            _ => bail!(USAGE),
        }
    }
    if !names.iter().all(|name| is_known(&name)) {
        bail!(USAGE);
    }
    let built = machine::built(builds).context("building what is measured")?;
    let mut report = Report::new(Machine::read());
    for (name, bench) in BENCHES {
        if names.is_empty() || names.iter().any(|wanted| *wanted == name) {
            report::progress(&format!("measuring {name}"));
            match bench(&built, &choice) {
                Ok(rows) => report.rows.extend(rows),
                Err(error) => report.failed.push((name, format!("{error:#}"))),
            }
        }
    }
    report.print(as_json);
    if let Some((name, error)) = report.failed.first() {
        bail!("{name} could not be measured: {error}");
    }
    Ok(())
}
