//! An agent that is killed takes nothing with it, and its successor builds nothing anew.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::Value;

use crate::common::{CART, PATIENCE, TestLab, has, until, within_time};
use crate::traffic::{Kind, Stream};

const NODES: [&str; 2] = ["node-1", "node-2"];

/// How often each agent is killed.
const KILLS: usize = 3;

#[test]
fn agents_that_are_killed_lose_no_packet_and_rebuild_nothing() {
    let Some(lab) = TestLab::new() else { return };
    if !has("nft", "nftables") {
        return;
    }
    lab.up(CART, &["--nodes", "2", "--ip-family", "dual"]);
    let from = lab.pod_on("node-1", "cart");
    let other = lab.pod_on("node-2", "cart");
    let mut streams = Vec::new();
    for to in other.addresses.iter().copied().chain(lab.service("cart")) {
        let to = SocketAddr::new(to, 7070);
        for kind in [Kind::Datagrams, Kind::Flows, Kind::Connections] {
            streams.push(Stream::start(kind, &from.network, to));
        }
        streams.push(Stream::start(Kind::Flows, &lab.namespace("node-1"), to));
    }
    assert_eq!(streams.len(), 16, "two families, to a pod and to a Service");
    let all_flow = |streams: &[Stream]| streams.iter().for_each(|stream| stream.await_more(20));
    all_flow(&streams);

    for node in NODES {
        // What the kernel itself still does after a link came up is not the agent's doing.
        until("addresses are settled", || lab.shell(node, "ip -6 addr show tentative").is_empty());
    }
    let before = NODES.map(|node| Kernel::read(&lab, node));
    let monitors = NODES.map(|node| [Monitor::start(&lab, node, &RULESET), Monitor::start(&lab, node, &ROUTING)]);
    for _ in 0..KILLS {
        for node in NODES {
            let killed = lab.kill_agent(node);
            all_flow(&streams);
            lab.await_agent_after(node, killed);
        }
        lab.assert_as_planned();
    }
    all_flow(&streams);
    for (node, monitors) in NODES.iter().zip(monitors) {
        for monitor in monitors {
            assert_eq!(monitor.finish(&lab, node), Vec::<String>::new(), "{node}: changed by a restarted agent");
        }
    }
    for (node, before) in NODES.iter().zip(before) {
        assert_eq!(Kernel::read(&lab, node), before, "{node}");
    }
    streams.into_iter().for_each(Stream::finish);
}

/// Everything that a rebuild would change: handles, interface indices, routes, permanent entries.
#[derive(Debug, PartialEq)]
struct Kernel {
    ruleset: Vec<Value>,
    links: BTreeMap<String, Value>,
    others: Vec<String>,
}

impl Kernel {
    fn read(lab: &TestLab, node: &str) -> Kernel {
        let json = |script: &str| serde_json::from_str::<Value>(&lab.shell(node, script)).expect("JSON");
        let mut ruleset = json("nft -j list ruleset")["nftables"].as_array().expect("a ruleset").clone();
        ruleset.iter_mut().for_each(forget_counts);
        assert!(ruleset.iter().any(|item| item.pointer("/rule/handle").is_some()), "no handles: {ruleset:?}");
        let mut links = BTreeMap::new();
        for link in json("ip -j link show").as_array().expect("links") {
            let name = link["ifname"].as_str().expect("a name").to_owned();
            links.insert(name, serde_json::json!([link["ifindex"], link["address"], link["master"], link["mtu"]]));
        }
        let mut others = Vec::new();
        for script in [
            "ip -4 route show table all",
            "ip -6 route show table all proto 144",
            "ip neigh show nud permanent",
            "bridge fdb show dev flannel.1 | grep permanent",
        ] {
            let text = lab.shell(node, script);
            assert!(!text.is_empty(), "{script}");
            others.extend(text.lines().map(str::to_owned));
        }
        others.sort();
        Kernel { ruleset, links, others }
    }
}

/// Packets and bytes go on while an agent is away.
fn forget_counts(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("counter");
            map.values_mut().for_each(forget_counts);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_counts),
        _ => {}
    }
}

/// A program that tells what changes in the kernel, and two changes of ours that bracket the rest.
struct Watched {
    program: &'static [&'static str],
    begin: &'static str,
    end: &'static str,
    /// What both have in common, and what only the end has.
    marker: &'static str,
    last: &'static str,
}

const RULESET: Watched = Watched {
    program: &["nft", "monitor"],
    begin: "nft add table ip marker-begin && nft delete table ip marker-begin",
    end: "nft add table ip marker-end && nft delete table ip marker-end",
    marker: "marker-",
    last: "marker-end",
};

/// Not links: the kernel tells up to a second late that one has its carrier. Whether one was made anew
/// shows in its index.
const ROUTING: Watched = Watched {
    program: &["ip", "monitor", "address", "route"],
    begin: "ip route add 203.0.113.1/32 dev lo && ip route del 203.0.113.1/32 dev lo",
    end: "ip route add 203.0.113.2/32 dev lo && ip route del 203.0.113.2/32 dev lo",
    marker: "203.0.113.",
    last: "203.0.113.2 ",
};

struct Monitor {
    watched: &'static Watched,
    child: Child,
    lines: Receiver<String>,
}

impl Monitor {
    fn start(lab: &TestLab, node: &str, watched: &'static Watched) -> Monitor {
        let mut child = Command::new("nsenter")
            .arg(format!("--net={}", lab.namespace(node).display()))
            .args(watched.program)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starting a monitor");
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().expect("its output"));
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let monitor = Monitor { watched, child, lines };
        // It says nothing when it has begun to listen: it has when it tells a change.
        within_time("a monitor tells what changes", PATIENCE, || {
            lab.shell(node, watched.begin);
            monitor.lines.recv_timeout(Duration::from_millis(20)).is_ok()
        });
        monitor
    }

    /// What was changed by others than the markers.
    fn finish(self, lab: &TestLab, node: &str) -> Vec<String> {
        lab.shell(node, self.watched.end);
        let mut told = Vec::new();
        let mut ends = 0;
        // Created and deleted.
        while ends < 2 {
            let line = self.lines.recv_timeout(PATIENCE).expect("the monitor tells the last change");
            ends += usize::from(line.contains(self.watched.last));
            if !line.contains(self.watched.marker) && !line.starts_with("# new generation") {
                told.push(line);
            }
        }
        told
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
