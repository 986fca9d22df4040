//! Measures the nftables room: 10,000 Services with 10 endpoints each, loaded, read back, changed.
//!
//! `cargo run --release -p portolan-kernel --example nftables_scale [SERVICES [ENDPOINTS]]`, as root. It
//! works in a network namespace of its own and prints figures.

#![expect(clippy::print_stdout, reason = "its output is the measurement")]

use std::error::Error;
use std::time::{Duration, Instant};

use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_kernel::nftables::NftablesRoom;
use portolan_net::{Family, Port, Protocol};
use portolan_program::nftables::sample::{PORT, Sample, endpoint, service_address};
use portolan_program::nftables::{Change, Element, Program, diff};

/// Changes that are measured one by one.
const ROUNDS: u32 = 1000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let services: u32 = arguments.next().map_or(Ok(10_000), |text| text.parse())?;
    let endpoints: u32 = arguments.next().map_or(Ok(10), |text| text.parse())?;
    let namespace = Namespace::create_unnamed()?;
    in_namespace(&namespace, || measure(services, endpoints).map_err(|error| error.to_string()))??;
    Ok(())
}

fn measure(services: u32, endpoints: u32) -> Result<(), Box<dyn Error>> {
    println!("{services} Services with {endpoints} endpoints each");
    let open = Instant::now();
    let mut room = NftablesRoom::open()?;
    println!("open and probe        {:>10.3} ms", milliseconds(open.elapsed()));

    let start = Instant::now();
    let mut sample = Sample::new(&[Family::V4]);
    sample.fill(Family::V4, services, endpoints);
    println!("compile               {:>10.3} ms", milliseconds(start.elapsed()));

    let start = Instant::now();
    let changes = diff(sample.compiler().program(), &Program::default());
    println!("diff with nothing     {:>10.3} ms  {} changes", milliseconds(start.elapsed()), changes.len());

    let start = Instant::now();
    let report = room.apply(&changes);
    println!("load                  {:>10.3} ms  {} messages", milliseconds(start.elapsed()), report.messages);
    if let Some((_, error)) = report.failed.first() {
        return Err(error.clone().into());
    }

    let start = Instant::now();
    let observed = room.observe()?;
    println!("observe               {:>10.3} ms", milliseconds(start.elapsed()));
    let start = Instant::now();
    let left = diff(sample.compiler().program(), &observed);
    println!("diff with observed    {:>10.3} ms  {} changes", milliseconds(start.elapsed()), left.len());

    println!("numbers of endpoints up to 16 have their rule; others get it with their first Service:");
    one_by_one(&mut room, &mut sample, services, endpoints)?;
    let more: Vec<_> = (0..=endpoints).map(|it| endpoint(Family::V4, it)).collect();
    let other = service_address(Family::V4, services);
    room.apply(&sample.set_address(other, Protocol::Tcp, Port::try_from(PORT)?, "other", Some(&more)));
    println!("another Service has as many:");
    one_by_one(&mut room, &mut sample, services, endpoints)?;
    println!("peak memory           {:>10} KiB", peak_memory());

    let start = Instant::now();
    let bare: Vec<Change> = changes.iter().cloned().map(without_comment).collect();
    println!("(strip comments       {:>10.3} ms)", milliseconds(start.elapsed()));
    room.clean()?;
    let start = Instant::now();
    room.apply(&changes);
    println!("load again            {:>10.3} ms", milliseconds(start.elapsed()));
    room.clean()?;
    let start = Instant::now();
    room.apply(&bare);
    println!("load without comments {:>10.3} ms", milliseconds(start.elapsed()));
    Ok(())
}

/// One endpoint appears at one Service, and goes away again.
fn one_by_one(
    room: &mut NftablesRoom,
    sample: &mut Sample,
    services: u32,
    endpoints: u32,
) -> Result<(), Box<dyn Error>> {
    let port = Port::try_from(PORT)?;
    let mut compile = Vec::new();
    let mut apply = Vec::new();
    let mut messages = (usize::MAX, 0);
    for round in 0..ROUNDS {
        let service = (round / 2).wrapping_mul(7919) % services;
        let extra = round % 2 == 0;
        let first = service * endpoints;
        let backends: Vec<_> = (0..endpoints + u32::from(extra)).map(|it| endpoint(Family::V4, first + it)).collect();
        let address = service_address(Family::V4, service);
        let name = format!("service-{service}");
        let start = Instant::now();
        let changes = sample.set_address(address, Protocol::Tcp, port, &name, Some(&backends));
        compile.push(start.elapsed());
        let start = Instant::now();
        let report = room.apply(&changes);
        apply.push(start.elapsed());
        messages = (messages.0.min(report.messages), messages.1.max(report.messages));
        if let Some((_, error)) = report.failed.first() {
            return Err(error.clone().into());
        }
    }
    print_spread("one endpoint: compile", &mut compile);
    print_spread("one endpoint: apply", &mut apply);
    println!("one endpoint: {} to {} messages", messages.0, messages.1);
    Ok(())
}

fn without_comment(change: Change) -> Change {
    match change {
        Change::PutElement { table, set, key, element, replaces } => {
            Change::PutElement { table, set, key, element: Element { comment: None, ..element }, replaces }
        }
        other => other,
    }
}

fn print_spread(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or_default();
    println!("{what:<22}{:>9.3} ms  p99 {:.3} ms", milliseconds(at(50)), milliseconds(at(99)));
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).unwrap_or("unknown").to_owned()
}
