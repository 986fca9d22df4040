//! The kernel in memory behaves as the real one, as far as programs can tell.

use portolan_program::netlink::{Change, ForeignRoute, Program, Surroundings, diff};

use super::sample::{add_peer, node, pod, prefix};
use crate::FakeKernel;
use crate::KernelError;
use crate::netns::Namespace;

fn steps(kernel: &FakeKernel, desired: &Program) -> Vec<Change> {
    let observed = kernel.observe_netlink();
    diff(desired, &observed.ours, &observed.others)
}

#[test]
fn it_converges_whichever_step_it_refuses() {
    let mut desired = node(11, &[12, 13]);
    let pod = pod(11, 7, &Namespace::current().unwrap());
    desired.pods.insert(pod.key.clone(), pod);
    let count = steps(&FakeKernel::default(), &desired).len();
    for refused in 0..=count {
        let mut kernel = FakeKernel::default();
        kernel.refuse_next(refused);
        let report = kernel.apply_netlink(&steps(&kernel, &desired));
        assert_eq!(report.failed.is_empty(), refused == 0);
        let report = kernel.apply_netlink(&steps(&kernel, &desired));
        assert_eq!(report.failed, []);
        assert_eq!(steps(&kernel, &desired), []);
        assert_eq!(kernel.apply_netlink(&[]).messages, 0);
    }
}

#[test]
fn it_takes_what_hangs_on_a_link_with_the_link() {
    let mut kernel = FakeKernel::default();
    let desired = node(11, &[12]);
    kernel.apply_netlink(&steps(&kernel, &desired));
    let tunnel = desired.links["flannel.1"].clone();
    kernel.apply_netlink(&[Change::RemoveLink(tunnel)]);
    // The link, its address, and the peer's route, neighbour and forwarding entry.
    assert_eq!(steps(&kernel, &desired).len(), 5);
    kernel.apply_netlink(&steps(&kernel, &Program::default()));
    let left = kernel.observe_netlink().ours;
    assert_eq!(Program { sysctls: left.sysctls.clone(), ..Program::default() }, left);
}

#[test]
fn it_lets_nobody_replace_a_route_of_someone_else() {
    let foreign = ForeignRoute {
        destination: prefix("10.42.13.0/24"),
        device: "eth0".into(),
        gateway: Some("192.168.64.99".parse().unwrap()),
        onlink: false,
        metric: 0,
        protocol: 4,
    };
    let mut kernel = FakeKernel::new(Surroundings { routes: vec![foreign], ..Surroundings::default() });
    let mut desired = node(11, &[12]);
    add_peer(&mut desired, 13, portolan_net::Family::V4);
    let report = kernel.apply_netlink(&steps(&kernel, &desired));
    assert_eq!(report.failed.len(), 1, "{report:?}");
    assert!(matches!(report.failed[0].1, KernelError::RouteTaken { .. }));
}

#[test]
fn its_tables_refuse_what_refers_to_nothing() {
    use portolan_program::nftables::{self, Key, sample};
    let mut sample = sample::Sample::new(&portolan_net::Family::ALL);
    sample.fill(portolan_net::Family::V4, 3, 2);
    let desired = sample.compiler().program().clone();
    let mut kernel = FakeKernel::default();
    let changes = nftables::diff(&desired, &kernel.observe_nftables());
    assert_eq!(kernel.apply_nftables(&changes).failed, []);
    assert_eq!(nftables::diff(&desired, &kernel.observe_nftables()), []);
    let put =
        changes.iter().find(|change| matches!(change, nftables::Change::PutElement { key: Key::Frontend(..), .. }));
    let nftables::Change::PutElement { table, set, key, .. } = put.unwrap().clone() else { unreachable!() };
    let absent = nftables::Change::RemoveElement { table, set: set.clone(), key };
    let used = nftables::Change::DeleteSet(table, set);
    let report = kernel.apply_nftables(&[absent.clone(), absent, used]);
    let failed: Vec<usize> = report.failed.iter().map(|(index, _)| *index).collect();
    assert_eq!(failed, [1, 2], "{report:?}");
}
