//! The nftables room against the real kernel, in namespaces of its own.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a test fails by panicking and says what it skips")]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_kernel::nftables::NftablesRoom;
use portolan_net::{Family, Port, Protocol};
use portolan_program::nftables::sample::{Sample, Traits, endpoint, service_address};
use portolan_program::nftables::{Change, Element, Key, Program, TableKey, TableName, diff, render};

/// Runs in a fresh namespace, or says why it cannot.
fn in_fresh_namespace(work: impl FnOnce(NftablesRoom) + Send) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let namespace = Namespace::create_unnamed().expect("a namespace");
    let outcome = in_namespace(&namespace, || match NftablesRoom::open() {
        Ok(room) => {
            work(room);
            None
        }
        Err(error) => Some(error),
    });
    if let Some(error) = outcome.expect("the work ends") {
        println!("skipped: {error}");
    }
}

fn has_nft() -> bool {
    let found = Command::new("nft").arg("--version").output().is_ok_and(|it| it.status.success());
    if !found {
        println!("skipped: nft is not installed");
    }
    found
}

fn nft(arguments: &[&str]) -> String {
    let output = Command::new("nft").args(arguments).output().expect("nft runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "nft {arguments:?}: {error}");
    String::from_utf8(output.stdout).expect("text")
}

fn nft_file(text: &str) {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    std::io::Write::write_all(&mut file, text.as_bytes()).expect("written");
    nft(&["-c", "-f", &file.path().display().to_string()]);
    nft(&["-f", &file.path().display().to_string()]);
}

fn port(number: u16) -> Port {
    Port::try_from(number).expect("a port")
}

fn sample() -> Sample {
    let mut sample = Sample::new(&Family::ALL);
    for family in Family::ALL {
        sample.fill(family, 5, 3);
        let local: SocketAddr =
            if family == Family::V4 { "10.42.1.2:8080" } else { "[fd42:0:0:1::2]:8080" }.parse().expect("a socket");
        let idle = service_address(family, 100);
        sample.set_address(idle, Protocol::Udp, port(53), "idle", Some(&[]));
        sample.set_node_port(family, Protocol::Tcp, port(30_080), "shop", Some(&[local, endpoint(family, 9)]));
        sample.set_node_port(family, Protocol::Udp, port(30_081), "idle", Some(&[]));
        let local_policy = Traits { is_local: true, ..Traits::default() };
        let backends = [local, endpoint(family, 9), endpoint(family, 10)];
        sample.set_node_port_with(family, port(30_443), "gate", Some(&backends), &local_policy);
        let limited = Traits { is_external: true, sources: Some(sources(family)), ..local_policy };
        sample.set_address_with(load_balancer(family), "gate", Some(&backends), &limited);
    }
    sample
}

/// As [`sample`], with Services in these families whose clients keep their endpoints, two as long as each other.
fn sample_with_affinity(families: &[Family]) -> Sample {
    let mut sample = sample();
    for family in families.iter().copied() {
        for (index, seconds) in [(200, 10_800), (201, 10_800), (202, 90)] {
            let keeping = Traits { affinity_seconds: Some(seconds), ..Traits::default() };
            let address = SocketAddr::new(service_address(family, index), 80);
            sample.set_address_with(address, "sessions", Some(&[endpoint(family, 1), endpoint(family, 2)]), &keeping);
            let local = Traits { is_local: true, ..keeping };
            let number = port(30_500 + u16::try_from(index).expect("small"));
            sample.set_node_port_with(family, number, "sessions", Some(&[endpoint(family, 1)]), &local);
        }
    }
    sample
}

fn load_balancer(family: Family) -> SocketAddr {
    if family == Family::V4 { "203.0.113.80:443" } else { "[2001:db8:80::1]:443" }.parse().expect("a socket")
}

/// Ranges of every length that matters: all, between bytes, at a byte, and one address.
fn sources(family: Family) -> Vec<ipnet::IpNet> {
    let texts = match family {
        Family::V4 => ["192.0.2.0/24", "198.51.96.0/19", "203.0.113.7/32", "64.0.0.0/2"],
        Family::V6 => ["2001:db8:1::/48", "2001:db8:2000::/35", "2001:db8:3::7/128", "8000::/1"],
    };
    texts.map(|text| text.parse().expect("a prefix")).to_vec()
}

fn load(room: &mut NftablesRoom, program: &Program) {
    let report = room.apply(&diff(program, &Program::default()));
    assert_eq!(report.failed, []);
}

/// The lines, without the order of elements: `nft` sorts slots by their first byte in memory, and writes two
/// addresses in a line.
fn lines(text: &str) -> Vec<&str> {
    fn bare(line: &str) -> &str {
        let line = line.trim();
        let line = line.strip_prefix("elements = { ").unwrap_or(line);
        line.trim_end_matches([',', '}', ' '])
    }
    let mut lines: Vec<&str> = text.lines().flat_map(|line| line.split(", ")).map(bare).collect();
    lines.sort_unstable();
    lines
}

#[test]
fn what_is_loaded_is_read_back() {
    in_fresh_namespace(|mut room| {
        let sample = sample_with_affinity(&Family::ALL);
        let desired = sample.compiler().program();
        assert_eq!(room.observe().expect("observed"), Program::default());
        load(&mut room, desired);
        let observed = room.observe().expect("observed");
        assert_eq!(render(&observed), render(desired));
        assert_eq!(diff(desired, &observed), []);
        assert_eq!(room.clean().expect("cleaned").failed, []);
        assert_eq!(room.observe().expect("observed"), Program::default());
    });
}

#[test]
fn nft_lists_what_we_render_and_loads_it_to_the_same() {
    if !has_nft() {
        return;
    }
    // `nft` 1.0.6 lists IPv6 rules that fill maps, and fails an assertion when it loads them.
    let sample = sample_with_affinity(&[Family::V4]);
    let text = render(sample.compiler().program());
    let listing = std::sync::Mutex::new(String::new());
    in_fresh_namespace(|mut room| {
        load(&mut room, sample.compiler().program());
        *listing.lock().expect("no panic") = nft(&["list", "ruleset"]);
    });
    let ours = listing.into_inner().expect("no panic");
    if ours.is_empty() {
        return;
    }
    in_fresh_namespace(|mut room| {
        nft_file(&text);
        assert_eq!(nft(&["list", "ruleset"]), ours, "loaded by nft and loaded by us list the same");
        assert_eq!(lines(&ours), lines(&text), "and that is what we render");
        assert_eq!(diff(sample.compiler().program(), &room.observe().expect("observed")), []);
        nft(&["flush", "ruleset"]);
        nft_file(&ours);
        assert_eq!(nft(&["list", "ruleset"]), ours, "what nft lists of ours, nft can load again");
    });
}

#[test]
fn nft_lists_what_keeps_clients_as_we_render_it() {
    if !has_nft() {
        return;
    }
    in_fresh_namespace(|mut room| {
        let sample = sample_with_affinity(&Family::ALL);
        load(&mut room, sample.compiler().program());
        assert_eq!(lines(&nft(&["list", "ruleset"])), lines(&render(sample.compiler().program())));
    });
}

#[test]
fn tables_of_others_stay_as_they_are() {
    if !has_nft() {
        return;
    }
    in_fresh_namespace(|mut room| {
        nft_file(
            "table inet portolan-services {\n chain x {\n type filter hook input priority 7; policy accept;\n }\n}\n\
             table ip other {\n set s {\n type ipv4_addr\n elements = { 10.0.0.1 }\n }\n}\n",
        );
        let before = nft(&["list", "ruleset"]);
        load(&mut room, sample().compiler().program());
        assert!(nft(&["list", "ruleset"]).contains(before.split("table ip other").nth(1).expect("there")));
        room.clean().expect("cleaned");
        assert_eq!(nft(&["list", "ruleset"]), before);
    });
}

#[test]
fn what_others_do_to_our_tables_is_undone() {
    if !has_nft() {
        return;
    }
    in_fresh_namespace(|mut room| {
        let sample = sample_with_affinity(&Family::ALL);
        let desired = sample.compiler().program();
        let sabotage: [&[&str]; 9] = [
            &["flush", "chain", "ip", "portolan-services", "services"],
            &["flush", "set", "ip6", "portolan-services", "restricted-ips-sources"],
            &["flush", "chain", "ip6", "portolan-services", "learn"],
            &["add", "rule", "ip", "portolan-services", "balance", "counter", "drop"],
            &["add", "set", "ip6", "portolan-services", "stray", "{ type ifname; }"],
            &["flush", "set", "ip", "portolan-masquerade", "pod-prefixes"],
            &["add", "element", "ip", "portolan-masquerade", "pod-prefixes", "{ 172.16.0.0/12 }"],
            &["delete", "table", "ip6", "portolan-masquerade"],
            &["add", "chain", "ip", "portolan-services", "x", "{ type filter hook forward priority 3; policy drop; }"],
        ];
        load(&mut room, desired);
        for command in sabotage {
            nft(command);
            let observed = room.observe().expect("observed");
            let changes = diff(desired, &observed);
            assert!(!changes.is_empty(), "{command:?} is noticed");
            assert!(changes.len() < 30, "{command:?} is mended, not reloaded: {}", changes.len());
            assert_eq!(room.apply(&changes).failed, [], "{command:?}");
            assert_eq!(diff(desired, &room.observe().expect("observed")), [], "{command:?}");
        }
    });
}

#[test]
fn changes_one_by_one_lead_where_a_fresh_load_leads() {
    in_fresh_namespace(|mut room| {
        let mut sample = Sample::new(&Family::ALL);
        load(&mut room, sample.compiler().program());
        // A linear congruential generator: the same steps in each run (Knuth, MMIX).
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for step in 0..200 {
            let family = if random(2) == 0 { Family::V4 } else { Family::V6 };
            let backends: Vec<SocketAddr> =
                (0..random(6)).map(|_| endpoint(family, u32::try_from(random(8)).expect("small"))).collect();
            let wanted = (random(5) > 0).then_some(backends.as_slice());
            let number = port(30_000 + u16::try_from(random(4)).expect("small"));
            let name = if random(2) == 0 { "cart" } else { "shop" };
            let traits = Traits {
                is_external: random(2) == 0,
                is_local: random(2) == 0,
                affinity_seconds: [None, Some(90), Some(10_800)][usize::try_from(random(3)).expect("small")],
                sources: (random(3) == 0).then(|| sources(family).into_iter().filter(|_| random(2) == 0).collect()),
            };
            let changes = if random(3) == 0 {
                sample.set_node_port_with(family, number, name, wanted, &traits)
            } else {
                let address = SocketAddr::new(service_address(family, 1), number.get());
                sample.set_address_with(address, name, wanted, &traits)
            };
            let report = room.apply(&changes);
            assert_eq!(report.failed, [], "step {step}");
            if step % 10 == 9 {
                let left = diff(sample.compiler().program(), &room.observe().expect("observed"));
                assert_eq!(left, [], "step {step}");
            }
        }
    });
}

#[test]
fn a_change_that_the_kernel_refuses_is_left_out_and_named() {
    in_fresh_namespace(|mut room| {
        let mut sample = Sample::new(&[Family::V4]);
        load(&mut room, sample.compiler().program());
        let before = sample.compiler().program().clone();
        sample.fill(Family::V4, 700, 3);
        let mut changes = diff(sample.compiler().program(), &before);
        let table = TableKey { family: Family::V4, name: TableName::Services };
        let wrong = |set: &str, key: Key| Change::PutElement {
            table,
            set: set.into(),
            key,
            element: Element::default(),
            replaces: false,
        };
        let address: IpAddr = "fd00::1".parse().expect("an address");
        changes.insert(700, wrong("endpoints", Key::FrontendSlot(address, Protocol::Tcp, port(1), 1)));
        changes.insert(1500, wrong("nowhere", Key::NodePort(Protocol::Tcp, port(1))));
        let report = room.apply(&changes);
        let failed: Vec<usize> = report.failed.iter().map(|(index, _)| *index).collect();
        assert_eq!(failed, [700, 1500], "{:?}", report.failed);
        assert_eq!(diff(sample.compiler().program(), &room.observe().expect("observed")), []);
    });
}

#[test]
fn one_change_takes_as_many_messages_whatever_the_number_of_services() {
    in_fresh_namespace(|mut room| {
        let mut counts = BTreeSet::new();
        for services in [10, 500] {
            let mut sample = Sample::new(&[Family::V4]);
            sample.fill(Family::V4, services, 10);
            room.clean().expect("cleaned");
            load(&mut room, sample.compiler().program());
            let eleven: Vec<SocketAddr> = (0..11).map(|index| endpoint(Family::V4, index)).collect();
            let address = service_address(Family::V4, 3);
            let changes = sample.set_address(address, Protocol::Tcp, port(80), "service-3", Some(&eleven));
            let report = room.apply(&changes);
            assert_eq!(report.failed, []);
            counts.insert(report.messages);
        }
        assert_eq!(counts.len(), 1, "{counts:?}");
    });
}
