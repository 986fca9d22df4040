//! Every way that a packet can take, for each fabric and family: the demo's own list, so that there is one.

use crate::common::TestLab;

/// The manifests of the demo.
pub(crate) const SHOP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/shop.yaml");

fn every_path_answers_right(fabric: &str, family: &str, paths: usize) {
    let Some(lab) = TestLab::new() else { return };
    let done = lab.run("demo", &["-f", SHOP, "--fabric", fabric, "--ip-family", family]);
    assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
    assert!(done.stdout.contains(&format!("All {paths} ways answered right.")), "{}", done.stdout);
    assert_eq!(done.stdout.matches("live: the packet went as predicted").count(), 3, "{}", done.stdout);
    lab.assert_gone();
}

#[test]
fn vxlan_ipv4() {
    every_path_answers_right("vxlan", "ipv4", 16);
}

#[test]
fn vxlan_dual() {
    every_path_answers_right("vxlan", "dual", 28);
}

#[test]
fn vxlan_ipv6() {
    every_path_answers_right("vxlan", "ipv6", 16);
}

#[test]
fn host_gw_ipv4() {
    every_path_answers_right("host-gw", "ipv4", 16);
}

#[test]
fn host_gw_ipv6() {
    every_path_answers_right("host-gw", "ipv6", 16);
}
