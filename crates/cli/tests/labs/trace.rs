//! The tracer against real packets.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use serde_json::Value;

use crate::common::{CART, Done, PATIENCE, TestLab, has, until, within};
use crate::paths::SHOP;
use crate::traffic::retransmitted;

/// FROM, TO and protocol of a row of the demo's table that can be traced: an address or a Service's name.
fn traceable(row: &str) -> Option<[String; 3]> {
    let cells: Vec<&str> = row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
    let (from, to) = (cells.first()?, cells.get(1)?);
    let is_row = ["pod/", "node/", "client/"].iter().any(|kind| from.starts_with(kind)) && cells.last()? == &"ok";
    // Within a pod no packet is seen, and names of pods and machines outside are the resolver's matter.
    let elsewhere = ["its other container", "headless", "outside "].iter().any(|what| to.starts_with(what));
    if !is_row || elsewhere {
        return None;
    }
    let (to, protocol) = match to.strip_suffix(" (UDP)") {
        Some(to) => (to, "udp"),
        None => (*to, "tcp"),
    };
    let place = to.rsplit(' ').next()?;
    let is_address = place.parse::<SocketAddr>().is_ok();
    let place = if is_address { place.to_owned() } else { format!("http://{place}/") };
    Some([(*from).to_owned(), place, protocol.to_owned()])
}

fn trace(lab: &TestLab, from: &str, to: &str, more: &[&str]) -> Done {
    let mut arguments = vec![from, to, "-o", "json"];
    arguments.extend(more);
    lab.ask("trace", &arguments)
}

#[test]
fn every_way_of_the_demo_is_as_predicted() {
    let Some(lab) = TestLab::new() else { return };
    let demo = lab.run("demo", &["-f", SHOP, "--ip-family", "dual", "--keep"]);
    assert_eq!(demo.code, 0, "{}{}", demo.stdout, demo.stderr);
    let ways: Vec<[String; 3]> = demo.stdout.lines().filter_map(traceable).collect();
    assert_eq!(ways.len(), 24, "{}", demo.stdout);
    for [from, to, protocol] in &ways {
        let done = lab.ask("trace", &[from, to, "--live", "--protocol", protocol]);
        assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
        assert!(done.stdout.contains("live: the packet went as predicted"), "{}", done.stdout);
        assert!(done.stdout.contains("live: answered after"), "{}", done.stdout);
    }
}

#[test]
fn a_difference_is_shown_and_named() {
    let Some(lab) = TestLab::new() else { return };
    if !has("nft", "nftables") {
        return;
    }
    lab.up(CART, &["--nodes", "2"]);
    let (from, to) = (lab.pod_on("node-1", "cart"), lab.pod_on("node-2", "cart"));
    let sender = format!("pod/{}", from.pod);
    let target = format!("{}:7070", to.addresses[0]);
    let live = || lab.ask("trace", &[&sender, &target, "--live"]);
    let before = live();
    assert_eq!(before.code, 0, "{}{}", before.stdout, before.stderr);

    let forward = "nft add table ip other && nft add chain ip other c '{ type filter hook forward priority 10; }'";
    lab.shell("node-1", &format!("{forward} && nft add rule ip other c tcp dport 7070 drop"));
    let dropped = live();
    assert_eq!(dropped.code, 1, "{}{}", dropped.stdout, dropped.stderr);
    let named = dropped.stdout.lines().find(|line| line.contains("difference on node-1: predicted "));
    let named = named.unwrap_or_else(|| panic!("no difference is named: {}", dropped.stdout));
    assert!(named.contains(&format!("{target} out, seen ")) && named.contains("in on cni0"), "{named}");
    assert!(dropped.stdout.contains("difference on node-2: "), "{}", dropped.stdout);
    assert!(dropped.stdout.contains("difference on the sender: "), "{}", dropped.stdout);

    let elsewhere = from.addresses[0];
    let prerouting = "nft add chain ip other d '{ type nat hook prerouting priority -150; }'";
    lab.shell(
        "node-2",
        &format!(
            "nft add table ip other && {prerouting} && nft add rule ip other d tcp dport 7070 dnat to {elsewhere}:7071"
        ),
    );
    lab.shell("node-1", "nft delete table ip other");
    let turned = live();
    assert_eq!(turned.code, 1, "{}{}", turned.stdout, turned.stderr);
    assert!(turned.stdout.contains("difference on node-2"), "{}", turned.stdout);
    assert!(turned.stdout.contains(":7071"), "{}", turned.stdout);

    lab.shell("node-2", "nft delete table ip other");
    let after = live();
    assert_eq!(after.code, 0, "{}{}", after.stdout, after.stderr);
}

#[test]
fn a_service_without_endpoints_is_refused_as_predicted() {
    let Some(lab) = TestLab::new() else { return };
    let idle = "
---
apiVersion: v1
kind: Service
metadata: {name: idle}
spec: {type: NodePort, ipFamilyPolicy: PreferDualStack, selector: {app: nobody}, ports: [{port: 80, nodePort: 30500}]}
";
    lab.up(&format!("{CART}{idle}"), &["--nodes", "2", "--ip-family", "dual"]);
    let pod = lab.pod_on("node-1", "cart");
    let sender = format!("pod/{}", pod.pod);
    for family in ["", "-6"] {
        let more: Vec<&str> = ["--live", family].into_iter().filter(|word| !word.is_empty()).collect();
        let traced = trace(&lab, &sender, "svc/idle:80", &more);
        assert_eq!(traced.code, 1, "{}{}", traced.stdout, traced.stderr);
        let report: Value = serde_json::from_str(&traced.stdout).expect("JSON");
        assert_eq!(report.get("differences"), None, "{report}");
        assert!(report["predicted"]["end"].to_string().contains("endpoint"), "{report}");
        assert!(report["live"]["answer"].to_string().contains("efused"), "{report}");
    }
    for address in lab.service("idle") {
        for network in [pod.network.clone(), lab.namespace("node-2")] {
            refused_at_once(&network, SocketAddr::new(address, 80));
        }
    }
    refused_at_once(&lab.namespace("client-1"), "192.168.64.12:30500".parse().unwrap());

    // An endpoint that comes is used, one that goes is refused again.
    let scale = |replicas: &str| {
        let done = lab.kubectl(&["scale", "deployment", "cart", "--replicas", replicas], "");
        assert_eq!(done.code, 0, "{}", done.stderr);
    };
    if !has("kubectl", "kubernetes-client") {
        return;
    }
    let answers = || trace(&lab, "node/node-1", "svc/cart:7070", &[]).code == 0;
    assert!(answers());
    scale("0");
    // Pods that end are used as long as there are no others (KEP-1669), until they are gone.
    until("the Service has no endpoints", || {
        lab.table("endpoints", "node-1").iter().all(|row| row["service"] != "cart")
    });
    assert!(!answers());
    refused_at_once(&lab.namespace("node-1"), SocketAddr::new(lab.service("cart")[0], 7070));
    scale("2");
    until("the Service answers", answers);
}

fn refused_at_once(network: &Path, to: SocketAddr) {
    within(network, || {
        let before = retransmitted();
        let error = TcpStream::connect_timeout(&to, PATIENCE).expect_err("nobody is there");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to}: {error}");
        // At once: the first segment was answered, and none was sent again.
        assert_eq!(retransmitted(), before, "{to}");
    });
}
