//! How long the ipvs mode takes for many Services: compiling, loading, changing one endpoint, reading back.
//!
//! `cargo xtask guest --memory 4096 -- target/debug/examples/ipvs_scale 10000 10`; without IPVS it measures the
//! compilers alone. It works in a namespace of its own.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a program for the person who runs it")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use portolan_kernel::ipset::IpsetRoom;
use portolan_kernel::ipvs::IpvsRoom;
use portolan_kernel::link::Links;
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Family, Protocol};
use portolan_program::sample::{Sample, Samples, view};
use portolan_program::{ipset, ipvs};

/// How often one endpoint is changed.
const CHANGES: u32 = 100;

fn socket(a: u32, b: u32, number: u32, port: u16) -> SocketAddr {
    let text = format!("{a}.{}.{}.{}:{port}", b + (number >> 16), number >> 8 & 255, number & 255);
    text.parse().expect("an address")
}

/// A Service with so many endpoints, the first of which is the given one.
fn service(number: u32, endpoints: u32, first: u32) -> Sample {
    let sample = Sample::cluster_ip(Protocol::Tcp, socket(10, 96, number, 80), "scale").expect("a port");
    let backends =
        std::iter::once(first).chain(1..endpoints).map(|it| socket(10, 128, number * 16 % 4_000_000 + it, 8080));
    backends.fold(sample, Sample::backend)
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter_map(|it| it.parse().ok());
    let (services, endpoints) = (arguments.next().unwrap_or(1_000u32), arguments.next().unwrap_or(10u32));
    println!("{services} Services of {endpoints} endpoints");
    let view = view(&[]).expect("a view");
    let (mut servers, mut sets) = (ipvs::Compiler::new(&view, &Family::ALL), ipset::Compiler::new(&view, &Family::ALL));
    let mut samples = Samples::default();
    let updates = samples.put((1..=services).map(|number| service(number, endpoints, 0)));
    let begin = Instant::now();
    servers.update_services(&updates);
    sets.update_services(&updates);
    println!("compile: {:?}", begin.elapsed());
    let mut compiling = Duration::ZERO;
    let mut changes = Vec::new();
    for round in 0..CHANGES {
        let update = samples.put([service(1 + round % services, endpoints, 15)]);
        let begin = Instant::now();
        changes.push((servers.update_services(&update), sets.update_services(&update)));
        compiling += begin.elapsed();
    }
    println!("compile one change: {:?}", compiling / CHANGES);
    let namespace = Namespace::create_unnamed().expect("a namespace");
    // Without any route IPVS takes every endpoint for a broadcast address.
    Links::open(&namespace).expect("links").set_up("lo").expect("up");
    in_namespace(&namespace, || {
        let mut room = match IpvsRoom::open() {
            Ok(room) => room,
            Err(error) => return println!("skipped: {error}"),
        };
        let mut set_room = IpsetRoom::open().expect("sets");
        let mut before = ipvs::Compiler::new(&view, &Family::ALL);
        before.update_services(&updates);
        let mut sets_before = ipset::Compiler::new(&view, &Family::ALL);
        sets_before.update_services(&updates);
        let begin = Instant::now();
        let report = set_room.apply(&ipset::diff(&ipset::Program::default(), sets_before.program()));
        println!("sets: {:?}, {} messages, {} failed", begin.elapsed(), report.messages, report.failed.len());
        let begin = Instant::now();
        let report = room.apply(&ipvs::diff(&ipvs::Program::default(), before.program()));
        println!("servers: {:?}, {} messages, {} failed", begin.elapsed(), report.messages, report.failed.len());
        let mut times: Vec<Duration> = Vec::new();
        for (of_servers, of_sets) in &changes {
            let begin = Instant::now();
            assert_eq!(set_room.apply(of_sets).failed, []);
            assert_eq!(room.apply(of_servers).failed, []);
            times.push(begin.elapsed());
        }
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        println!("one change: median {:?}, p99 {:?}", at(50), at(99));
        let begin = Instant::now();
        let observed = room.observe().expect("observed");
        println!("read back: {:?}, {} left to do", begin.elapsed(), ipvs::diff(&observed, servers.program()).len());
    })
    .expect("in the namespace");
}
