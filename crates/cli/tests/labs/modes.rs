//! Services by iptables' chains as by nftables' maps, and a node that goes from one to the other under traffic.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::common::{CART, PATIENCE, TestLab, has, until, within, within_time};
use crate::traffic::{Kind, Stream};

const NODES: [&str; 2] = ["node-1", "node-2"];

/// Legacy tables are looked at every second, and the machine may be busy.
const REPAIR_TIME_MAX: Duration = Duration::from_secs(20);

/// What serves Services in a mode, as text; empty where nothing does.
fn held(lab: &TestLab, node: &str, mode: &str) -> String {
    let script = match mode {
        "nftables" => "nft list tables | grep portolan-services || true",
        _ => "{ iptables-save; ip6tables-save; } 2>/dev/null | grep ':KUBE-' || true",
    };
    lab.shell(node, script)
}

/// Has a node's agent serve Services in another mode from its next start.
fn configure(lab: &TestLab, node: &str, from: &str, to: &str) {
    let file = lab.node_directory(node).join("agent.yaml");
    let text = std::fs::read_to_string(&file).expect("the agent's configuration");
    let changed = text.replace(&format!("\"services\": \"{from}\""), &format!("\"services\": \"{to}\""));
    assert_ne!(text, changed, "{text}");
    std::fs::write(&file, changed).expect("the agent's configuration");
}

/// Says something on a connection that is open, and reads the echo.
fn talk(stream: &mut TcpStream, what: &str) {
    let message = format!("{what}\n");
    let mut answer = vec![0; message.len()];
    stream.write_all(message.as_bytes()).expect("sending");
    stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("{what}: the open connection broke: {error}"));
    assert_eq!(answer, message.as_bytes());
}

#[test]
fn a_node_changes_its_mode_under_traffic() {
    let Some(lab) = TestLab::new() else { return };
    if !has("nft", "nftables") || !has("iptables", "iptables") {
        return;
    }
    lab.up(CART, &["--nodes", "2", "--ip-family", "dual"]);
    let from = lab.pod_on("node-1", "cart");
    let mut streams = Vec::new();
    let mut open = Vec::new();
    for address in lab.service("cart") {
        let to = SocketAddr::new(address, 7070);
        // Not new flows of datagrams: a first datagram that is between two hooks when the table of the second
        // goes is lost, and nobody sends it again.
        for kind in [Kind::Datagrams, Kind::Connections] {
            streams.push(Stream::start(kind, &from.network, to));
        }
        streams.push(Stream::start(Kind::Connections, &lab.namespace("node-1"), to));
        let connected = within(&from.network, || TcpStream::connect_timeout(&to, PATIENCE)).expect("connecting");
        connected.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        open.push(connected);
    }
    let all_flow = |streams: &[Stream]| streams.iter().for_each(|stream| stream.await_more(20));
    all_flow(&streams);
    for (old, new) in [("nftables", "iptables"), ("iptables", "nftables"), ("nftables", "iptables")] {
        for node in NODES {
            configure(&lab, node, old, new);
            let killed = lab.kill_agent(node);
            lab.await_agent_after(node, killed);
            until(&format!("{node} serves by {new}"), || !held(&lab, node, new).is_empty());
            until(&format!("nothing of {old} is left on {node}"), || held(&lab, node, old).is_empty());
            all_flow(&streams);
        }
        lab.assert_as_planned();
        open.iter_mut().for_each(|stream| talk(stream, new));
    }
    // A packet that is between two hooks when the table of the second goes is sent again by its connection.
    for stream in streams {
        stream.finish_answered();
    }
}

#[test]
fn chains_that_others_flush_come_back() {
    let Some(lab) = TestLab::new() else { return };
    if !has("iptables", "iptables") {
        return;
    }
    lab.up(CART, &["--nodes", "1", "--services", "iptables"]);
    let rules = "iptables-save | grep '^-A KUBE-' | sort";
    let before = lab.shell("node-1", rules);
    assert!(before.contains("-j DNAT"), "{before}");
    let of_one = |chains: &str, harm: &str| {
        let name = format!("iptables-save -t nat | grep -o '^:{chains}-[A-Z0-9]*' | head -n 1 | tr -d :");
        format!("chain=$({name}) && test -n \"$chain\" && iptables -t nat {harm}")
    };
    let harms = [
        "iptables -t nat -F".to_owned(),
        "iptables -F KUBE-FORWARD".to_owned(),
        "nft flush ruleset".to_owned(),
        of_one("KUBE-SVC", "-F $chain"),
        of_one("KUBE-SEP", "-D $chain 1"),
        of_one("KUBE-SVC", "-I $chain -j RETURN"),
        "iptables -t nat -D OUTPUT 1".to_owned(),
    ];
    for harm in &harms {
        lab.shell("node-1", harm);
        // The cluster may still settle, so that the rules need not be those of before: they must be as planned.
        within_time(harm, REPAIR_TIME_MAX, || lab.ask("plan", &["--node", "node-1"]).code == 0);
        assert!(lab.shell("node-1", rules).contains("-j DNAT"), "{harm}");
    }
    lab.assert_as_planned();
    // What kube-proxy's metrics of this name count: the rules of its tables, built-in chains with their jumps only.
    let count = "iptables-save -t nat | grep -c '^-A'; ip6tables-save -t nat | grep -c '^-A' || true";
    let counted: f64 = lab.shell("node-1", count).lines().filter_map(|line| line.trim().parse::<f64>().ok()).sum();
    let name = "kubeproxy_sync_proxy_rules_iptables_total{table=\"nat\"}";
    assert_eq!(lab.metric("node-1", name), Some(counted));
}
