//! Nodes on two segments behind a router that knows no pod: plain routes on each, and what there is beyond.

use std::net::SocketAddr;

use crate::common::{CART, TestLab, until};
use crate::traffic::{Kind, Stream};

/// A lab of three nodes: the first two on one segment, the third on another.
fn lab(options: &[&str]) -> Option<TestLab> {
    let lab = TestLab::new()?;
    lab.up(CART, &[&["--nodes", "3", "--segments", "2", "--ip-family", "dual"], options].concat());
    Some(lab)
}

fn routes(lab: &TestLab, node: &str) -> String {
    lab.shell(node, "ip route show proto 144; ip -6 route show proto 144")
}

/// Whether pods of all pairs of nodes reach each other, on TCP and UDP, in both families.
fn assert_all_meet(lab: &TestLab) {
    let nodes = ["node-1", "node-2", "node-3"];
    for from in nodes {
        let pod = lab.pod_on(from, "cart");
        for other in nodes.into_iter().filter(|to| *to != from).map(|to| lab.pod_on(to, "cart")) {
            for (address, kind) in
                other.addresses.iter().flat_map(|it| [(*it, Kind::Connections), (*it, Kind::Datagrams)])
            {
                let stream = Stream::start(kind, &pod.network, SocketAddr::new(address, 7070));
                stream.await_more(3);
                drop(stream);
            }
        }
    }
    lab.assert_as_planned();
}

#[test]
fn direct_routing_spares_the_tunnel_on_the_link_and_follows_a_node_that_moves() {
    let Some(lab) = lab(&["--fabric", "vxlan", "--fabric-option", "vxlan.directRouting=true"]) else { return };
    let first = routes(&lab, "node-1");
    assert!(first.contains("via 192.168.64.12 dev eth0") && first.contains("via fd00:64::12 dev eth0"), "{first}");
    assert_eq!(first.matches("dev flannel").count(), 2, "{first}");
    let third = routes(&lab, "node-3");
    assert!(!third.contains("dev eth0") && third.matches("dev flannel").count() == 4, "{third}");
    assert_all_meet(&lab);
    // The link's prefix becomes shorter, and holds the other segment's addresses too.
    lab.shell("node-1", "ip route replace 192.168.65.0/24 dev eth0 proto static");
    until("the far node is near", || routes(&lab, "node-1").contains("via 192.168.65.13 dev eth0"));
    lab.shell("node-1", "ip route del 192.168.65.0/24 dev eth0 proto static");
    until("the far node is far again", || !routes(&lab, "node-1").contains("192.168.65.13"));
    assert_all_meet(&lab);
}

#[test]
fn host_gw_goes_beyond_its_link_by_a_tunnel() {
    let Some(lab) = lab(&["--fabric", "host-gw", "--fabric-option", "hostGw.beyond=vxlan"]) else { return };
    let first = routes(&lab, "node-1");
    assert_eq!((first.matches("dev eth0").count(), first.matches("dev flannel").count()), (2, 2), "{first}");
    assert_all_meet(&lab);
}

#[test]
fn host_gw_says_which_node_is_beyond_its_link() {
    let Some(lab) = TestLab::new() else { return };
    // What waits until all answers would wait for ever.
    let options = ["--nodes", "3", "--segments", "2", "--ip-family", "dual", "--fabric", "host-gw"];
    let done = lab.run("up", &[&["-f", &lab.manifest(CART)], &options[..]].concat());
    assert_eq!(done.code, 0, "{}", done.stderr);
    let is_there = |node| lab.pods_on(node).iter().any(|pod| pod.pod.starts_with("cart-"));
    until("the pods of the first segment are there", || is_there("node-1") && is_there("node-2"));
    until("the agent says what is wrong", || routes(&lab, "node-1").matches("dev eth0").count() == 2);
    let text = lab.ask("show", &["problems", "--node", "node-1"]).stdout;
    for word in ["node-3", "192.168.65.13", "10.42.", "hostGw.beyond"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(!text.contains("node-2"), "{text}");
    // The pods on its own link are reached all the same.
    let (pod, other) = (lab.pod_on("node-1", "cart"), lab.pod_on("node-2", "cart"));
    for address in other.addresses {
        let stream = Stream::start(Kind::Connections, &pod.network, SocketAddr::new(address, 7070));
        stream.await_more(3);
    }
}
