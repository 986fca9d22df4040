//! The standard topology, and what a topology may not be.

use super::*;

#[test]
fn the_standard_topology_has_the_documented_addresses() {
    let topology = Topology::standard(3);
    assert_eq!(topology.check(), Ok(()));
    let shown: Vec<String> = topology
        .members()
        .map(|member| format!("{} {} {}", member.name, member.addresses[0], member.addresses[1]))
        .collect();
    assert_eq!(
        shown,
        [
            "node-1 192.168.64.11 fd00:64::11",
            "node-2 192.168.64.12 fd00:64::12",
            "node-3 192.168.64.13 fd00:64::13",
            "client-1 192.168.99.2 fd00:99::2",
            "server-1 192.168.99.3 fd00:99::3",
        ]
    );
}

#[test]
fn nodes_are_on_as_many_segments_as_are_asked_for() {
    let shown = |nodes, underlays| -> Vec<String> {
        let topology = Topology::segmented(nodes, underlays);
        assert_eq!(topology.check(), Ok(()));
        topology.nodes.iter().map(|node| format!("{} {}", node.segment, node.addresses[0])).collect()
    };
    assert_eq!(shown(3, 2), ["underlay 192.168.64.11", "underlay 192.168.64.12", "underlay-2 192.168.65.13"]);
    assert_eq!(shown(2, 2), ["underlay 192.168.64.11", "underlay-2 192.168.65.12"]);
    assert_eq!(shown(1, 2), ["underlay 192.168.64.11"]);
    assert_eq!(shown(5, 3).last().unwrap(), "underlay-3 192.168.66.15");
    assert_eq!(Topology::segmented(3, 1), Topology::standard(3));
    assert_eq!(Topology::segmented(NODES_MAX, UNDERLAYS_MAX).check(), Ok(()));
}

#[test]
fn the_largest_standard_topology_is_valid() {
    assert_eq!(Topology::standard(NODES_MAX).check(), Ok(()));
    assert!(Topology::standard(NODES_MAX + 1).check().is_err());
    assert!(Topology::standard(0).check().is_err());
}

fn refused(change: impl FnOnce(&mut Topology)) -> String {
    let mut topology = Topology::standard(2);
    change(&mut topology);
    topology.check().expect_err("the topology was taken")
}

#[test]
fn what_does_not_fit_together_is_named() {
    assert_eq!(
        refused(|it| it.nodes[1].addresses = it.nodes[0].addresses.clone()),
        "node-2: 192.168.64.11 is taken by another machine"
    );
    assert_eq!(refused(|it| it.nodes[1].name = "node-1".into()), "the name `node-1` is given twice");
    assert_eq!(refused(|it| it.nodes[0].segment = "moon".into()), "node-1: there is no segment `moon`");
    assert_eq!(
        refused(|it| it.nodes[0].addresses = vec!["10.0.0.1".parse().unwrap()]),
        "node-1: 10.0.0.1 is not within segment `underlay`"
    );
    assert_eq!(
        refused(|it| it.load_balancers[0] = "192.168.64.128/25".parse().unwrap()),
        "loadBalancers: 192.168.64.128/25 overlaps with 192.168.64.1/24 of segment `underlay`"
    );
    assert!(refused(|it| it.load_balancers.push("192.168.70.64/26".parse().unwrap())).ends_with("192.168.70.0/24"));
    assert!(refused(|it| it.nodes[0].zone = Some("-a".into())).starts_with("node-1: zone `-a` is no label's value"));
    assert!(refused(|it| it.mtu = 900).starts_with("mtu: 900"));
    assert!(refused(|it| it.nodes[0].name = "lo".into()).starts_with("`lo` is not a name"));
    assert!(refused(|it| it.nodes[0].name = "-x".into()).starts_with("`-x` is not a name"));
    assert_eq!(
        refused(|it| it.segments[1].router[0] = "192.168.0.1/16".parse().unwrap()),
        "segment `outside`: router 192.168.0.1/16 overlaps with 192.168.64.1/24 of `underlay`"
    );
}

#[test]
fn a_topology_file_that_does_not_parse_says_where() {
    let error = Topology::parse("rack.yaml", "segments: []\nnodes: []\nmoons: 3\n").unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().starts_with("rack.yaml: "), "{error}");
}

#[test]
fn a_topology_file_round_trips() {
    let text = serde_json::to_string(&Topology::standard(2)).unwrap();
    assert_eq!(Topology::parse("x", &text).unwrap(), Topology::standard(2));
}
