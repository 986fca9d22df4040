//! The DNS server's rate, and the time of a trace.

use std::process::Command;
use std::time::Instant;

use anyhow::Context;

use super::lab::Lab;
use super::machine::{Built, output};
use super::report::{Row, median_milliseconds};

const TRACES: usize = 20;

pub(super) fn dns(built: &Built) -> anyhow::Result<Vec<Row>> {
    let mut rates = Vec::new();
    for _ in 0..3 {
        let printed = output(&mut Command::new(&built.flood))?;
        let rate = printed.split(": ").nth(1).and_then(|rest| rest.split(' ').next());
        rates.push(rate.and_then(|rate| rate.parse::<f64>().ok()).context("the example prints no rate")?);
    }
    rates.sort_by(f64::total_cmp);
    let median = rates.get(rates.len() / 2).copied().unwrap_or(0.0);
    Ok(vec![Row::new("DNS over UDP: A of a ClusterIP among 10,000, client on the same machine", median, "/s")])
}

pub(super) fn trace(built: &Built) -> anyhow::Result<Vec<Row>> {
    let shop = built.root.join("examples/shop.yaml");
    let (_lab, _) = Lab::up(&built.portolan, "bench-trace", Some(&shop), &["--nodes", "3"])?;
    let mut times = Vec::new();
    for _ in 0..TRACES {
        let begin = Instant::now();
        let target = ["node/node-1", "svc/kube-system/kube-dns:53", "--protocol", "udp", "--name", "bench-trace"];
        output(Command::new(&built.portolan).arg("trace").args(target))?;
        times.push(begin.elapsed());
    }
    Ok(vec![Row::new("one predicted trace, the whole command", median_milliseconds(&times), "ms")])
}
