//! Measures the iptables room: Services with their endpoints, loaded, read back, changed, with both backends.
//!
//! `cargo run --release -p portolan-kernel --example iptables_scale [SERVICES [ENDPOINTS [BACKEND]]]`, as root. It
//! works in network namespaces of its own and prints figures. An empty restore is what the backend takes at least.

#![expect(clippy::print_stdout, reason = "its output is the measurement")]

use std::error::Error;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use portolan_kernel::iptables::{Backend, IptablesRoom};
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Family, Port, Protocol};
use portolan_program::iptables::diff;
use portolan_program::iptables::sample::{FrontendKey, PORT, Sample, Wanted, endpoint, service_address, view};

/// Changes that are measured one by one.
const ROUNDS: u32 = 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let services: u32 = arguments.next().map_or(Ok(1000), |text| text.parse())?;
    let endpoints: u32 = arguments.next().map_or(Ok(10), |text| text.parse())?;
    let wanted = arguments.next();
    for backend in Backend::ALL {
        if wanted.as_deref().is_none_or(|name| name == backend.name()) {
            let namespace = Namespace::create_unnamed()?;
            in_namespace(&namespace, || measure(backend, services, endpoints).map_err(|error| error.to_string()))??;
        }
    }
    Ok(())
}

fn measure(backend: Backend, services: u32, endpoints: u32) -> Result<(), Box<dyn Error>> {
    println!("{backend}: {services} Services with {endpoints} endpoints each");
    let families = [Family::V4];
    let mut room = IptablesRoom::open_with(backend, &families)?;
    let start = Instant::now();
    let mut sample = Sample::new(&view().ok_or("no view")?, &families);
    sample.fill(Family::V4, services, endpoints);
    let desired = sample.compiler().program().clone();
    print_time("compile", start.elapsed(), &format!("{} rules", desired.rule_count()));
    println!("memory after compile  {:>10} KiB", status("VmRSS:"));

    let start = Instant::now();
    let changes = diff(&room.observe()?, &desired);
    print_time("diff with nothing", start.elapsed(), &format!("{} changes", changes.len()));
    let start = Instant::now();
    let report = room.apply(&changes);
    print_time("load", start.elapsed(), &format!("{} restores", report.restores));
    if let Some((_, error)) = report.failed.first() {
        return Err(error.clone().into());
    }
    drop(changes);
    drop(desired);
    println!("memory after load     {:>10} KiB", status("VmRSS:"));
    one_by_one(backend, &mut room, &mut sample, services, endpoints)?;

    let start = Instant::now();
    let observed = room.observe()?;
    print_time("observe", start.elapsed(), "");
    let start = Instant::now();
    let left = diff(&observed, sample.compiler().program());
    print_time("diff with observed", start.elapsed(), &format!("{} changes", left.len()));
    println!("peak memory           {:>10} KiB", status("VmHWM:"));
    Ok(())
}

/// One endpoint, and one Service, appears and goes away again.
fn one_by_one(
    backend: Backend,
    room: &mut IptablesRoom,
    sample: &mut Sample,
    services: u32,
    endpoints: u32,
) -> Result<(), Box<dyn Error>> {
    let (mut compile, mut apply, mut dispatch, mut empty) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let port = Port::try_from(PORT)?;
    for round in 0..ROUNDS {
        let service = (round / 2).wrapping_mul(7919) % services;
        let first = service * endpoints;
        let extra = u32::from(round % 2 == 0);
        let backends: Vec<_> = (0..endpoints + extra).map(|it| endpoint(Family::V4, first + it)).collect();
        let key = FrontendKey::Address { address: service_address(Family::V4, service), protocol: Protocol::Tcp, port };
        let name = format!("service-{service}");
        let start = Instant::now();
        let changes = sample.set(key, Some(&Wanted { name: &name, backends: &backends, ..Wanted::default() }));
        compile.push(start.elapsed());
        let start = Instant::now();
        if let Some((_, error)) = room.apply(&changes).failed.first() {
            return Err(error.clone().into());
        }
        apply.push(start.elapsed());
        // A Service that comes and goes changes the chain that all share.
        let address = service_address(Family::V4, services + 1);
        let key = FrontendKey::Address { address, protocol: Protocol::Tcp, port };
        let wanted = Wanted { name: "new", backends: &backends, ..Wanted::default() };
        let changes = sample.set(key, (extra == 1).then_some(&wanted));
        let start = Instant::now();
        if let Some((_, error)) = room.apply(&changes).failed.first() {
            return Err(error.clone().into());
        }
        dispatch.push(start.elapsed());
        empty.push(empty_restore(backend)?);
    }
    print_spread("one endpoint: compile", &mut compile);
    print_spread("one endpoint: apply", &mut apply);
    print_spread("one Service: apply", &mut dispatch);
    print_spread("an empty restore", &mut empty);
    Ok(())
}

/// The time of a restore that changes nothing but one empty chain.
fn empty_restore(backend: Backend) -> Result<Duration, Box<dyn Error>> {
    let start = Instant::now();
    let mut child = Command::new(format!("iptables-{backend}-restore"))
        .args(["-w", "5", "--noflush"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(b"*nat\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n")?;
    }
    child.wait()?;
    Ok(start.elapsed())
}

fn print_time(what: &str, time: Duration, more: &str) {
    println!("{what:<22}{:>10.3} ms  {more}", time.as_secs_f64() * 1e3);
}

fn print_spread(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |part: usize| times.get((times.len() * part / 100).min(times.len().saturating_sub(1))).copied();
    let milliseconds = |part| at(part).unwrap_or_default().as_secs_f64() * 1e3;
    println!("{what:<22}{:>10.3} ms  p90 {:.3} ms", milliseconds(50), milliseconds(90));
}

fn status(field: &str) -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    line.split_whitespace().nth(1).unwrap_or("unknown").to_owned()
}
