//! Virtual servers alone, without chains.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::net::IpAddr;

use portolan_kernel::ipvs::IpvsRoom;
use portolan_kernel::netns::in_namespace;
use portolan_net::{Family, Protocol};
use portolan_program::ipvs::{Compiler, IpvsSettings, Program, Scheduler, Timeouts, diff, render};
use portolan_program::sample::{Sample, Samples};

use crate::world::{
    NODE, PATIENCE, SERVERS, World, address, ask, connect, line, node_view, output, port, serve, served, service,
    socket, world,
};

fn compiler(settings: IpvsSettings) -> Compiler {
    let mut compiler = Compiler::with_settings(&node_view(), &Family::ALL, settings);
    compiler.set_node_addresses(&NODE.map(address));
    compiler
}

/// Makes the node's kernel hold the program, and asserts that it does.
fn load(world: &World, program: &Program) {
    in_namespace(&world.node, || {
        let mut room = IpvsRoom::open().expect("the room");
        let observed = room.observe().expect("observed");
        assert_eq!(room.apply(&diff(&observed, program)).failed, []);
        assert_eq!(diff(&room.observe().expect("observed"), program), [], "nothing is left to do");
    })
    .expect("in the namespace");
}

fn everything(samples: &mut Samples, compiler: &mut Compiler) {
    let mut list = Vec::new();
    for (is_v4, at, family) in [(true, "10.96.0.10:80", Family::V4), (false, "[fd96::10]:80", Family::V6)] {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            list.push(served(service(protocol, at), is_v4));
            list.push(served(Sample::node_port(family, protocol, port(30_080), "web"), is_v4));
        }
    }
    list.push(service(Protocol::Tcp, "10.96.0.11:443").affinity(600));
    list.push(service(Protocol::Tcp, "[fd96::11]:443").affinity(600));
    compiler.update_services(&samples.put(list));
}

#[test]
fn what_is_loaded_is_read_back_by_us_and_by_ipvsadm() {
    let Some(world) = world() else { return };
    for scheduler in Scheduler::ALL {
        let timeouts = Timeouts { tcp: Some(777), tcp_fin: None, udp: Some(99) };
        let mut compiler = compiler(IpvsSettings {
            scheduler: scheduler.clone(),
            strict_arp: true,
            timeouts,
            ..IpvsSettings::default()
        });
        everything(&mut Samples::default(), &mut compiler);
        load(&world, compiler.program());
        let Some(saved) = output(&world.node, &["ipvsadm", "-S", "-n"]) else { return };
        let mut saved: Vec<&str> = saved.lines().map(str::trim).collect();
        let rendered = render(compiler.program());
        let mut rendered: Vec<&str> = rendered.lines().filter(|line| !line.starts_with('#')).collect();
        // A real server belongs to the virtual one that it names: their order says nothing.
        saved.sort_unstable();
        rendered.sort_unstable();
        assert_eq!(saved, rendered, "{scheduler:?}");
    }
    let timeouts = output(&world.node, &["ipvsadm", "-L", "--timeout"]).expect("installed");
    assert!(timeouts.contains("777") && timeouts.contains("99"), "{timeouts}");
}

#[test]
fn others_virtual_servers_survive_and_ours_are_cleaned() {
    let Some(world) = world() else { return };
    let foreign = ["-A -t 203.0.113.1:80 -s rr", "-a -t 203.0.113.1:80 -r 10.9.9.9:80 -g -w 1", "-A -f 7 -s rr"];
    for command in foreign {
        let words: Vec<&str> = std::iter::once("ipvsadm").chain(command.split(' ')).collect();
        if output(&world.node, &words).is_none() {
            return;
        }
    }
    let mut compiler = compiler(IpvsSettings::default());
    everything(&mut Samples::default(), &mut compiler);
    load(&world, compiler.program());
    in_namespace(&world.node, || {
        let mut room = IpvsRoom::open().expect("the room");
        assert_eq!(room.clean(&[]).expect("observed").failed, []);
        let left = room.observe().expect("observed");
        assert!(!left.device && left.addresses.is_empty());
    })
    .expect("in the namespace");
    let saved = output(&world.node, &["ipvsadm", "-S", "-n"]).expect("installed");
    let left: BTreeSet<&str> = saved.lines().map(str::trim).collect();
    assert_eq!(left, BTreeSet::from(foreign));
}

#[test]
fn packets_reach_the_endpoints_from_everywhere() {
    let Some(world) = world() else { return };
    serve(&world);
    let mut compiler = compiler(IpvsSettings::default());
    everything(&mut Samples::default(), &mut compiler);
    load(&world, compiler.program());
    for (at, node_port, client) in
        [("10.96.0.10:80", "192.0.2.1:30080", "192.0.2.5"), ("[fd96::10]:80", "[2001:db8::1]:30080", "2001:db8::5")]
    {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for to in [at, node_port].map(socket) {
                let answers: Vec<_> = (0..2).map(|_| ask(&world.client, protocol, to)).collect();
                let servers: BTreeSet<IpAddr> = answers.iter().map(|(_, server)| *server).collect();
                assert_eq!(servers.len(), 2, "round robin at {to}: {answers:?}");
                assert!(answers.iter().all(|(from, _)| *from == address(client)), "{answers:?}");
                ask(&world.node, protocol, to);
            }
        }
    }
}

#[test]
fn a_client_keeps_its_endpoint_where_it_shall() {
    let Some(world) = world() else { return };
    serve(&world);
    let mut compiler = compiler(IpvsSettings::default());
    let list = [("10.96.0.10:80", true), ("[fd96::10]:80", false)];
    let list = list.map(|(at, is_v4)| served(service(Protocol::Tcp, at), is_v4).affinity(60));
    compiler.update_services(&Samples::default().put(list));
    load(&world, compiler.program());
    for at in ["10.96.0.10:80", "[fd96::10]:80"].map(socket) {
        let servers: BTreeSet<IpAddr> = (0..6).map(|_| ask(&world.client, Protocol::Tcp, at).1).collect();
        assert_eq!(servers.len(), 1, "{at}: {servers:?}");
    }
}

#[test]
fn a_service_without_endpoints_refuses() {
    let Some(world) = world() else { return };
    let mut compiler = compiler(IpvsSettings::default());
    compiler.update_services(&Samples::default().put([service(Protocol::Tcp, "10.96.0.10:80")]));
    load(&world, compiler.program());
    for namespace in [&world.client, &world.node] {
        let error = connect(namespace, socket("10.96.0.10:80"), PATIENCE).expect_err("nobody serves");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    }
}

#[test]
fn an_open_connection_survives_its_endpoints_removal() {
    let Some(world) = world() else { return };
    serve(&world);
    let to = socket("10.96.0.10:80");
    let mut compiler = compiler(IpvsSettings::default());
    let mut samples = Samples::default();
    compiler.update_services(&samples.put([served(service(Protocol::Tcp, "10.96.0.10:80"), true)]));
    load(&world, compiler.program());
    let (mut open, said) = connect(&world.client, to, PATIENCE).expect("a connection");
    let server = address(said.split_once(' ').expect("two words").1);
    let rest = SERVERS.map(socket).into_iter().find(|it| it.is_ipv4() && it.ip() != server).expect("another");
    let changes = compiler.update_services(&samples.put([service(Protocol::Tcp, "10.96.0.10:80").backend(rest)]));
    in_namespace(&world.node, || {
        let mut room = IpvsRoom::open().expect("the room");
        assert_eq!(room.apply(&changes).failed, []);
        let counted = room.connections(compiler.leaving()).expect("counted");
        assert_eq!(counted.iter().map(|(.., count)| *count).collect::<Vec<_>>(), [Some(1)]);
        assert_eq!(compiler.settle(&counted), []);
    })
    .expect("in the namespace");
    // The old connection goes on, new ones meet the other endpoint.
    open.write_all(b"still here\n").expect("sent");
    assert_eq!(line(&mut open).expect("an echo"), "still here");
    for _ in 0..3 {
        assert_eq!(ask(&world.client, Protocol::Tcp, to).1, rest.ip());
    }
    // Its last connection is gone: so is it.
    let gone: Vec<_> = compiler.leaving().map(|(server, real)| (server, real, Some(0))).collect();
    let changes = compiler.settle(&gone);
    assert_eq!(changes.len(), 1);
    in_namespace(&world.node, || {
        let mut room = IpvsRoom::open().expect("the room");
        assert_eq!(room.apply(&changes).failed, []);
        assert_eq!(diff(&room.observe().expect("observed"), compiler.program()), []);
    })
    .expect("in the namespace");
}
