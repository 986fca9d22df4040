//! The iptables room against the real programs and kernel, in namespaces of its own, with both backends.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a test fails by panicking and says what it skips")]

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};

use portolan_kernel::KernelError;
use portolan_kernel::iptables::{Backend, IptablesRoom};
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Family, Port, Protocol};
use portolan_program::iptables::sample::{FrontendKey, Sample, Wanted, endpoint, service_address, view};
use portolan_program::iptables::{
    Change, Match, Program, Rule, TableKey, TableName, Target, diff, parse_family, render,
};

fn port(number: u16) -> Port {
    Port::try_from(number).expect("a port")
}

fn address_key(address: IpAddr, protocol: Protocol) -> FrontendKey {
    FrontendKey::Address { address, protocol, port: port(80) }
}

fn node_port_key(family: Family, number: u16) -> FrontendKey {
    FrontendKey::NodePort { family, protocol: Protocol::Tcp, port: port(number) }
}

fn sample() -> Sample {
    Sample::new(&view().expect("a view"), &Family::ALL)
}

/// Runs in a fresh namespace with each backend, or says why it cannot.
fn with_each_backend(work: impl Fn(IptablesRoom) + Send + Sync) {
    for backend in Backend::ALL {
        in_fresh_namespace(|| match IptablesRoom::open_with(backend, &Family::ALL) {
            Ok(mut room) => match room.observe() {
                Ok(_) => work(room),
                Err(error) => println!("skipped: {error}"),
            },
            Err(error) => println!("skipped: {error}"),
        });
    }
}

fn in_fresh_namespace(work: impl FnOnce() + Send) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let namespace = Namespace::create_unnamed().expect("a namespace");
    in_namespace(&namespace, work).expect("the work ends");
}

/// Runs a program of iptables with an input; it must succeed.
fn command(name: &str, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(name)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn saved(room: &IptablesRoom) -> String {
    let text = command(&format!("iptables-{}-save", room.backend()), &[], "");
    let text = text + &command(&format!("ip6tables-{}-save", room.backend()), &[], "");
    let is_kept = |line: &&str| !line.starts_with('#');
    // Chains have numbers of packets and bytes.
    let line = |line: &str| match line.strip_prefix(':') {
        Some(_) => line.split(" [").next().unwrap_or_default().to_owned(),
        None => line.to_owned(),
    };
    text.lines().filter(is_kept).map(|it| line(it) + "\n").collect()
}

fn load(room: &mut IptablesRoom, desired: &Program) {
    let observed = room.observe().expect("observed");
    let changes = diff(&observed, desired);
    assert_eq!(room.apply(&changes).failed, [], "{}", room.backend());
    let observed = room.observe().expect("observed");
    assert_eq!(diff(&observed, desired), [], "{}: nothing is left to do", room.backend());
}

/// Services of every kind, and some more.
fn full_sample(services: u32) -> Sample {
    let mut sample = sample();
    for family in Family::ALL {
        sample.fill(family, services, 3);
        let local: SocketAddr =
            if family == Family::V4 { "10.42.1.2:8080" } else { "[fd42:0:0:1::2]:8080" }.parse().expect("a socket");
        let backends = [local, endpoint(family, 9000)];
        let sources = [if family == Family::V4 { "172.16.0.0/12" } else { "fd00:5::/32" }.parse().expect("a prefix")];
        let all = [if family == Family::V4 { "0.0.0.0/0" } else { "::/0" }.parse().expect("a prefix")];
        let address = |index: u32| service_address(family, 50_000 + index);
        for (index, protocol) in [(0, Protocol::Tcp), (1, Protocol::Udp), (2, Protocol::Sctp)] {
            let name = format!("sticky-{protocol}");
            let wanted = Wanted { name: &name, backends: &backends, affinity: true, ..Wanted::default() };
            sample.set(address_key(address(index), protocol), Some(&wanted));
            let name = format!("idle-{protocol}");
            sample.set(address_key(address(10 + index), protocol), Some(&Wanted { name: &name, ..Wanted::default() }));
        }
        let outer = Wanted { name: "outer", backends: &backends, local: true, ..Wanted::default() };
        sample.set(node_port_key(family, 30_080), Some(&outer));
        let guarded = Wanted { sources: Some(&sources), external: Some(Sample::LOAD_BALANCER), ..outer.clone() };
        sample.set(address_key(address(20), Protocol::Tcp), Some(&guarded));
        let open = Wanted { name: "open", sources: Some(&all), ..guarded };
        sample.set(address_key(address(21), Protocol::Tcp), Some(&open));
        sample.set(node_port_key(family, 30_081), Some(&Wanted { name: "idle-outer", ..Wanted::default() }));
    }
    sample.compiler().set_health_ports(&[port(32_000)].into());
    sample
}

#[test]
fn what_is_loaded_is_read_back() {
    with_each_backend(|mut room| {
        let mut sample = full_sample(150);
        let desired = sample.compiler().program().clone();
        load(&mut room, &desired);
        let text = saved(&room);
        // Our own text of a chain is the programs' own.
        let ours: Vec<String> =
            render(&desired).lines().filter(|line| line.starts_with("-A KUBE-")).map(str::to_owned).collect();
        for rule in &ours {
            assert!(text.contains(rule.as_str()), "{}: {rule}", room.backend());
        }
        assert_eq!(text.matches("\n-A KUBE-").count(), ours.len(), "and nothing else is in them");
        assert_eq!(room.clean().expect("cleaned").failed, []);
        assert!(!saved(&room).contains("KUBE-"), "{}", saved(&room));
    });
}

/// Rules as Docker, a firewall and the kubelet have them.
const FOREIGN: &str = "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\n-A PREROUTING -p tcp -m multiport --dports 80,443 -j TTL --ttl-set 12\nCOMMIT\n\
    *nat\n:DOCKER - [0:0]\n:KUBE-MARK-DROP - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
    -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n-A DOCKER -i docker0 -j RETURN\n\
    -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080:8090 -m comment --comment \"it's a \\\"test\\\"\" -j DNAT --to-destination 172.17.0.2:80-90\n\
    -A KUBE-MARK-DROP -j MARK --or-mark 0x8000\nCOMMIT\n\
    *filter\n:FORWARD DROP [0:0]\n:MINE - [0:0]\n-A INPUT -m limit --limit 5/min -j LOG --log-prefix \"in: \"\n-A INPUT -g MINE\nCOMMIT\n";

#[test]
fn rules_of_others_stay_as_they_are() {
    with_each_backend(|mut room| {
        let restore = format!("iptables-{}-restore", room.backend());
        command(&restore, &["--noflush"], FOREIGN);
        let before = saved(&room);
        let mut sample = full_sample(5);
        let desired = sample.compiler().program().clone();
        load(&mut room, &desired);
        let during = saved(&room);
        for rule in before.lines().filter(|line| line.starts_with("-A ") || line.starts_with(":FORWARD")) {
            assert!(during.contains(rule), "{}: {rule}", room.backend());
        }
        let first = during.lines().find(|line| line.starts_with("-A INPUT")).expect("there");
        assert!(first.ends_with("-j KUBE-FIREWALL"), "ours come first: {first}");
        // What is read of others is what they wrote.
        let own = command(&format!("iptables-{}-save", room.backend()), &[], "");
        let normal = |text: &str| {
            let mut lines: Vec<String> =
                text.lines().filter(|line| line.starts_with("-A ")).map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(normal(&render(&parse_family(&own, Family::V4).expect("read"))), normal(&own));
        assert_eq!(room.clean().expect("cleaned").failed, []);
        let tables = |text: &str| {
            let mut tables: Vec<String> = text.split('*').map(str::to_owned).collect();
            tables.sort();
            tables.retain(|table| table.contains("-A ") || table.contains(" - "));
            tables
        };
        assert_eq!(tables(&saved(&room)), tables(&before), "{}", room.backend());
    });
}

#[test]
fn what_others_do_to_our_chains_is_undone() {
    with_each_backend(|mut room| {
        let mut sample = full_sample(20);
        let desired = sample.compiler().program().clone();
        load(&mut room, &desired);
        assert!(!room.was_touched());
        let program = format!("iptables-{}", room.backend());
        let sabotage: [&[&str]; 6] = [
            &["-t", "nat", "-F"],
            &["-t", "filter", "-F", "FORWARD"],
            &["-t", "nat", "-A", "KUBE-MARK-MASQ", "-j", "RETURN"],
            &["-t", "nat", "-I", "PREROUTING", "-j", "KUBE-NODEPORTS"],
            &["-t", "mangle", "-X", "KUBE-PROXY-CANARY"],
            &["-t", "nat", "-N", "KUBE-SVC-STRAY"],
        ];
        for arguments in sabotage {
            command(&program, &[&["-w", "5"], arguments].concat(), "");
            assert!(room.backend() == Backend::Nft || room.was_touched(), "{arguments:?} is seen");
            let changes = diff(&room.observe().expect("observed"), &desired);
            assert!(!changes.is_empty(), "{arguments:?}");
            assert_eq!(room.apply(&changes).failed, [], "{arguments:?}");
            assert_eq!(diff(&room.observe().expect("observed"), &desired), [], "{arguments:?}");
        }
        command(&program, &["-t", "nat", "-F"], "");
        command(&program, &["-t", "nat", "-X"], "");
        load(&mut room, &desired);
    });
}

#[test]
fn changes_one_by_one_lead_where_a_fresh_load_leads() {
    with_each_backend(|mut room| {
        let mut sample = sample();
        load(&mut room, &sample.compiler().program().clone());
        // A linear congruential generator: the same steps in each run (Knuth, MMIX).
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for step in 0..40 {
            let family = if random(2) == 0 { Family::V4 } else { Family::V6 };
            let mut backends: Vec<SocketAddr> =
                (0..random(5)).map(|_| endpoint(family, u32::try_from(random(8)).expect("small"))).collect();
            if random(2) == 0 {
                let local = if family == Family::V4 { "10.42.1.2:8080" } else { "[fd42:0:0:1::2]:8080" };
                backends.push(local.parse().expect("a socket"));
            }
            let number = u32::try_from(random(3)).expect("small");
            let name = format!("service-{number}");
            let wanted = Wanted { name: &name, backends: &backends, local: random(2) == 0, ..Wanted::default() };
            let key = if random(3) == 0 {
                node_port_key(family, 30_000 + u16::try_from(number).expect("small"))
            } else {
                address_key(service_address(family, number), Protocol::Tcp)
            };
            let changes = sample.set(key, (random(5) > 0).then_some(&wanted));
            let report = room.apply(&changes);
            assert_eq!(report.failed, [], "{} step {step}", room.backend());
            assert!(report.restores <= 1, "one restore for one family");
        }
        let desired = sample.compiler().program().clone();
        assert_eq!(diff(&room.observe().expect("observed"), &desired), []);
    });
}

#[test]
fn a_rule_that_is_refused_is_named_and_the_rest_is_made() {
    with_each_backend(|mut room| {
        let table = TableKey::new(Family::V4, TableName::Nat);
        let bad = Rule::builder().when(Match::Other("-m nosuchmatch --really".into())).target(Target::Return);
        let good = Rule::builder().comment("good").target(Target::Return);
        let mut sample = full_sample(3);
        let mut changes = diff(&room.observe().expect("observed"), sample.compiler().program());
        let other = changes.len();
        changes.push(Change::FillChain(table, "KUBE-SVC-BAD".into(), [good, bad].into()));
        let report = room.apply(&changes);
        let [(position, error)] = report.failed.as_slice() else { panic!("{report:?}") };
        assert_eq!(*position, other);
        let KernelError::Iptables { at, .. } = error else { panic!("{error}") };
        assert_eq!(at.as_deref(), Some("-A KUBE-SVC-BAD -m nosuchmatch --really -j RETURN"), "{error}");
        let observed = room.observe().expect("observed");
        assert_eq!(observed.chain(table, "KUBE-SVC-BAD").expect("made").rules.len(), 1, "without that rule");
        let left = diff(&observed, sample.compiler().program());
        assert_eq!(left, [Change::DeleteChain(table, "KUBE-SVC-BAD".into())], "all else is there");
        // What was thought to be there is not: all is read and written once more.
        let stale = [Change::RemoveJump(table, "OUTPUT".into(), Rule::builder().target(Target::Return).into())];
        let report = room.apply_toward(&stale, sample.compiler().program());
        assert!(report.rewritten && report.failed.is_empty(), "{report:?}");
        assert_eq!(diff(&room.observe().expect("observed"), sample.compiler().program()), []);
    });
}

#[test]
fn the_backend_in_use_is_found_and_a_mix_is_named() {
    in_fresh_namespace(|| {
        if let Err(error) = IptablesRoom::open_with(Backend::Legacy, &Family::ALL) {
            return println!("skipped: {error}");
        }
        let open = || IptablesRoom::open(&Family::ALL).expect("the room");
        assert_eq!((open().backend(), open().mix()), (Backend::Nft, None), "nothing is in use");
        command("iptables-legacy", &["-A", "INPUT", "-j", "ACCEPT"], "");
        assert_eq!((open().backend(), open().mix()), (Backend::Legacy, None));
        command("iptables-nft", &["-A", "INPUT", "-j", "ACCEPT"], "");
        let mix = open().mix().expect("both are in use");
        assert_eq!((open().backend(), mix.legacy, mix.nft), (Backend::Legacy, 1, 1));
        assert!(mix.to_string().contains("iptables-legacy (1) and iptables-nft (1)"), "{mix}");
        command("iptables-nft", &["-t", "mangle", "-N", "KUBE-KUBELET-CANARY"], "");
        assert_eq!(open().backend(), Backend::Nft, "the kubelet's choice");
    });
}

#[test]
fn a_room_stays_in_the_namespace_in_which_it_was_opened() {
    if !nix::unistd::geteuid().is_root() {
        return println!("skipped: needs root");
    }
    let inside = Namespace::create_unnamed().expect("a namespace");
    let room = in_namespace(&inside, || IptablesRoom::open_with(Backend::Nft, &[Family::V4])).expect("the work ends");
    let mut room = match room {
        Ok(room) => room,
        Err(error) => return println!("skipped: {error}"),
    };
    let mut sample = sample();
    sample.fill(Family::V4, 1, 1);
    // From a thread that is elsewhere.
    let elsewhere = Namespace::create_unnamed().expect("a namespace");
    in_namespace(&elsewhere, || {
        let desired: Vec<Change> = diff(&Program::default(), sample.compiler().program());
        assert_eq!(room.apply(&desired).failed, []);
        assert_eq!(command("iptables-nft-save", &["-t", "nat"], "").matches("KUBE-").count(), 0);
    })
    .expect("the work ends");
    let text = in_namespace(&inside, || command("iptables-nft-save", &["-t", "nat"], "")).expect("the work ends");
    assert!(text.contains("KUBE-SERVICES"));
}
