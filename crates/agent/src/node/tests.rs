//! The engine and the CNI verbs against a kernel in memory that refuses what it is told to refuse.

use std::collections::BTreeMap;
use std::sync::Arc;

use portolan_cni::{Command, NetworkConfiguration, Parameters, Request, Response};
use portolan_kernel::netlink::Observed;
use portolan_kernel::{FakeKernel, KernelError};
use portolan_net::ObjectKind;
use portolan_program::netlink::{Change as Step, ForeignLink, ForeignRoute, Surroundings};
use portolan_program::{netlink, nftables};
use portolan_state::{Attachment, AttachmentKey, Change, Node, Object, ObjectRef};

use super::engine::{Engine, Waiting};
use super::port::{Applied, KernelPort};
use super::verbs;
use crate::attachments::AttachmentBook;
use crate::config::AgentConfig;
use crate::metrics::Metrics;

/// What the fake kernel refuses.
type Refuse = fn(&Step) -> Option<KernelError>;

#[derive(Default)]
struct Port {
    kernel: FakeKernel,
    tables: nftables::Program,
    refuse: Option<Refuse>,
    is_unreadable: bool,
    readings: BTreeMap<&'static str, usize>,
}

impl KernelPort for Port {
    fn observe_netlink(&mut self) -> Result<Observed, KernelError> {
        *self.readings.entry("netlink").or_default() += 1;
        if self.is_unreadable { Err(KernelError::Overrun) } else { Ok(self.kernel.observe_netlink()) }
    }

    fn apply_netlink(&mut self, changes: &[Step]) -> Applied<Step> {
        let refuse = self.refuse.unwrap_or(|_| None);
        let (mut failed, mut rest) = (Vec::new(), Vec::new());
        for change in changes {
            match refuse(change) {
                Some(error) => failed.push((change.clone(), error)),
                None => rest.push(change.clone()),
            }
        }
        let report = self.kernel.apply_netlink(&rest);
        failed.extend(report.failed);
        Applied { failed, messages: report.messages }
    }

    fn check_pod(&mut self, _pod: &netlink::PodLink) -> Vec<String> {
        Vec::new()
    }

    fn observe_nftables(&mut self) -> Result<nftables::Program, KernelError> {
        *self.readings.entry("nftables").or_default() += 1;
        Ok(self.tables.clone())
    }

    fn apply_nftables(&mut self, changes: &[nftables::Change]) -> Applied<nftables::Change> {
        changes.iter().for_each(|change| self.tables.apply(change));
        Applied { failed: Vec::new(), messages: changes.len() }
    }
}

fn node(name: &str, address: &str, prefix: &str) -> Node {
    Node {
        name: name.into(),
        addresses: vec![address.parse().unwrap()],
        pod_prefixes: vec![prefix.parse().unwrap()],
        tunnel: None,
        zone: None,
        leaving: false,
    }
}

fn engine() -> Engine<Port> {
    let config: AgentConfig =
        serde_saphyr::from_str("node: node-1\nkubernetes: {}\nfabric: host-gw\nclusterPrefixes: [10.42.0.0/16]\n")
            .unwrap();
    let others = Surroundings {
        addresses: vec![("eth0".into(), "192.168.64.11/24".parse().unwrap())],
        links: vec![ForeignLink {
            name: "eth0".into(),
            kind: String::new(),
            detail: None,
            mac: None,
            mtu: 1500,
            up: true,
        }],
        // As the kernel makes it of the address.
        routes: vec![ForeignRoute {
            destination: "192.168.64.0/24".parse().unwrap(),
            device: "eth0".into(),
            gateway: None,
            onlink: false,
            metric: 0,
            protocol: 2,
        }],
    };
    Engine::new(config, Port { kernel: FakeKernel::new(others), ..Port::default() }, Arc::new(Metrics::new()))
}

fn list_tables(engine: &mut Engine<Port>) {
    let nodes = vec![(Object::Node(node("node-1", "192.168.64.11", "10.42.0.0/24")), Vec::new())];
    engine.write(Change::Replace(ObjectKind::Node, nodes, Vec::new()));
    engine.write(Change::Replace(ObjectKind::Service, Vec::new(), Vec::new()));
    engine.write(Change::Replace(ObjectKind::EndpointSlice, Vec::new(), Vec::new()));
}

/// An engine whose kernel is as it should be.
fn settled() -> Engine<Port> {
    let mut engine = engine();
    list_tables(&mut engine);
    let outcome = engine.cycle();
    assert!(outcome.ran && outcome.failures.is_empty(), "{outcome:?}");
    engine.port.readings.clear();
    engine
}

fn key(container: &str) -> AttachmentKey {
    AttachmentKey { container: container.into(), interface: "eth0".into() }
}

fn attachment(container: &str, number: u8) -> Attachment {
    Attachment {
        key: key(container),
        namespace_path: format!("/run/netns/{container}").into(),
        pod: None,
        addresses: vec![format!("10.42.0.{number}/24").parse().unwrap()],
        host_interface: format!("veth0000000{number}").into(),
        mac: portolan_net::MacAddress([2, 0, 0, 0, 0, number]),
    }
}

fn request(command: Command, container: &str) -> Request {
    Request {
        parameters: Parameters {
            command,
            container: container.to_owned(),
            namespace_path: format!("/run/netns/{container}"),
            interface: "eth0".to_owned(),
            pod: None,
            mac: None,
        },
        configuration: NetworkConfiguration { name: "pods".to_owned(), ..NetworkConfiguration::default() },
    }
}

fn code(response: &Response) -> Option<u32> {
    match response {
        Response::Failed(error) => Some(error.code.number()),
        Response::Done | Response::Added(_) => None,
    }
}

fn upsert_node(engine: &mut Engine<Port>, node: Node) {
    engine.write(Change::Upsert(Object::Node(node), Vec::new()));
}

fn gone(step: &Step) -> Option<KernelError> {
    matches!(step, Step::CreatePod(_))
        .then(|| KernelError::NoNamespace { path: "/run/netns/gone".into(), errno: portolan_kernel::Errno::ENOENT })
}

fn taken(step: &Step) -> Option<KernelError> {
    match step {
        Step::AddRoute(route) => {
            Some(KernelError::RouteTaken { destination: route.destination, wanted: String::new() })
        }
        _ => None,
    }
}

fn busy(step: &Step) -> Option<KernelError> {
    matches!(step, Step::RemovePod(_)).then_some(KernelError::ThreadLost)
}

#[test]
fn a_pod_whose_namespace_is_gone_is_a_problem_and_no_burden() {
    let mut engine = settled();
    engine.port.refuse = Some(gone);
    engine.write(Change::Upsert(Object::Attachment(attachment("gone", 2)), Vec::new()));
    let outcome = engine.cycle();
    assert_eq!(outcome.failed_pods.len(), 1);
    assert!(engine.take_news() && !engine.wants_retry());
    let problems = engine.problems();
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].object, ObjectRef::Attachment(key("gone")));
    assert!(problems[0].hint.contains("GC"), "{}", problems[0]);
    assert_eq!(engine.problem_count(), 1);
    // Others go on without reading the kernel, and each reading tries once more, without news.
    upsert_node(&mut engine, node("node-2", "192.168.64.12", "10.42.1.0/24"));
    assert!(engine.cycle().failures.is_empty());
    assert_eq!(engine.port.readings, BTreeMap::new());
    engine.request_resync();
    assert_eq!(engine.cycle().failed_pods.len(), 1);
    assert!(!engine.take_news() && !engine.wants_retry());
    assert_eq!(engine.problem_count(), 1);
    // The problem goes with the attachment.
    engine.write(Change::Delete(ObjectRef::Attachment(key("gone"))));
    engine.cycle();
    assert_eq!(engine.problems(), []);
}

#[test]
fn what_is_refused_is_tried_again_when_it_is_time_and_does_not_hold_up_others() {
    let mut engine = settled();
    engine.port.refuse = Some(taken);
    upsert_node(&mut engine, node("node-2", "192.168.64.12", "10.42.1.0/24"));
    engine.cycle();
    assert!(engine.wants_retry() && engine.take_news() && !engine.take_news());
    assert!(engine.problems()[0].to_string().contains("10.42.1.0/24"), "{:?}", engine.problems());
    engine.write(Change::Upsert(Object::Attachment(attachment("a", 2)), Vec::new()));
    assert!(engine.cycle().failures.is_empty());
    assert!(engine.port.kernel.observe_netlink().ours.pods.contains_key(&key("a")));
    assert_eq!(engine.port.readings, BTreeMap::new(), "an ADD pays for another item's failure");
    engine.retry();
    assert_eq!(engine.cycle().failures.len(), 1);
    assert!(engine.wants_retry() && !engine.take_news());
    engine.port.refuse = None;
    engine.retry();
    assert!(engine.cycle().failures.is_empty());
    assert!(!engine.wants_retry());
    assert_eq!(engine.problems(), []);
    assert!(engine.port.kernel.observe_netlink().ours.routes.contains_key(&"10.42.1.0/24".parse().unwrap()));
}

#[test]
fn what_others_break_is_mended() {
    let mut engine = settled();
    engine.port.kernel.netlink_mut().0.links.clear();
    engine.noticed(&portolan_kernel::monitor::Event::Link("cni0".into()));
    assert!(engine.cycle().changes > 0);
    assert!(engine.port.kernel.observe_netlink().ours.links.contains_key("cni0"));
}

#[test]
fn a_kernel_that_cannot_be_read_is_tried_again() {
    let mut engine = settled();
    engine.port.is_unreadable = true;
    engine.request_resync();
    assert!(!engine.cycle().ran);
    assert!(matches!(engine.waiting(), Some(Waiting::Kernel(_))) && engine.wants_retry());
    engine.port.is_unreadable = false;
    assert!(engine.cycle().ran);
    assert!(!engine.wants_retry());
}

#[test]
fn add_is_not_answered_before_the_interface_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let (mut book, _) = AttachmentBook::load(directory.path()).unwrap();
    let mut engine = settled();
    // The kernel becomes unreadable between the last cycle and the call.
    engine.port.is_unreadable = true;
    engine.request_resync();
    let response = verbs::answer_call(&mut engine, &mut book, &request(Command::Add, "a"));
    assert!(code(&response).is_some(), "{response:?}");
    engine.port.is_unreadable = false;
    engine.cycle();
    let response = verbs::answer_call(&mut engine, &mut book, &request(Command::Add, "a"));
    assert!(matches!(response, Response::Added(_)), "{response:?}");
    // Someone deletes the interface; the runtime, which lost the answer, asks again.
    engine.port.kernel.netlink_mut().0.pods.clear();
    let response = verbs::answer_call(&mut engine, &mut book, &request(Command::Add, "a"));
    assert!(matches!(response, Response::Added(_)), "{response:?}");
    assert!(engine.port.kernel.observe_netlink().ours.pods.contains_key(&key("a")));
}

#[test]
fn an_interface_that_stays_keeps_its_address_until_it_goes() {
    let directory = tempfile::tempdir().unwrap();
    let (mut book, _) = AttachmentBook::load(directory.path()).unwrap();
    let mut engine = settled();
    verbs::answer_call(&mut engine, &mut book, &request(Command::Add, "a"));
    engine.port.refuse = Some(busy);
    for _ in 0..2 {
        let response = verbs::answer_call(&mut engine, &mut book, &request(Command::Del, "a"));
        assert_eq!(code(&response), Some(103), "{response:?}");
        assert!(book.get(&key("a")).is_some());
    }
    engine.port.refuse = None;
    let response = verbs::answer_call(&mut engine, &mut book, &request(Command::Del, "a"));
    assert_eq!(response, Response::Done);
    assert!(book.get(&key("a")).is_none());
    assert_eq!(engine.port.kernel.observe_netlink().ours.pods, BTreeMap::new());
}

#[test]
fn before_in_sync_a_pod_can_end_but_not_begin() {
    let directory = tempfile::tempdir().unwrap();
    let (mut book, _) = AttachmentBook::load(directory.path()).unwrap();
    let mut before = settled();
    for container in ["a", "b"] {
        verbs::answer_call(&mut before, &mut book, &request(Command::Add, container));
    }
    // The agent starts again, and the API server is away.
    let mut engine = engine();
    engine.port.kernel = before.port.kernel;
    verbs::announce(&mut engine, &book);
    engine.cycle();
    let held = engine.port.kernel.observe_netlink().ours;
    assert_eq!(code(&verbs::answer_call(&mut engine, &mut book, &request(Command::Add, "c"))), Some(11));
    assert_eq!(engine.port.kernel.observe_netlink().ours, held);
    let response = verbs::answer_call(&mut engine, &mut book, &request(Command::Del, "a"));
    assert_eq!(response, Response::Done);
    let now = engine.port.kernel.observe_netlink().ours;
    assert_eq!(now.pods.keys().collect::<Vec<_>>(), [&key("b")]);
    assert_eq!((&now.links, &now.addresses, &now.routes), (&held.links, &held.addresses, &held.routes));
    assert!(book.get(&key("a")).is_none());
    // In sync again, the rest is adopted as it is.
    list_tables(&mut engine);
    engine.cycle();
    assert_eq!(engine.port.kernel.observe_netlink().ours.pods.keys().collect::<Vec<_>>(), [&key("b")]);
}
