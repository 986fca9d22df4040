//! A real kube-proxy is asked the same: its own rules, read by the iptables room, answer like the specification.
//!
//! The scenarios' objects are given to kube-proxy 1.20.2 in a network namespace of its own, by a scripted API. What
//! it writes is taken by `iptables-save`, parsed, and interpreted. What 1.20 does not know is left out, by name:
//! [`lacks`]. The names of the chains of a Service are the same as those of our own program.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use portolan_intent::services::{DetectLocal, NodePortAddresses, ProxySettings};
use portolan_net::{Family, ObjectKey, Port, Protocol};
use portolan_program::iptables::{Compiler, Program, parse_family};
use portolan_state::{
    Endpoint, EndpointPort, EndpointSlice, Service, ServicePort, ServiceTraffic, ServiceType, TrafficPolicy,
};

use crate::answer::{Answer, From, Question};
use crate::cluster::{Cluster, Follower};
use crate::generator::address;
use crate::modes::iptables_answer;
use crate::scenario::{Check, parse};
use crate::{kubernetes, scenario_files};

#[path = "../../../../xtask/src/kube_proxy/place.rs"]
mod place;
#[path = "../../../../xtask/src/kube_proxy/process.rs"]
mod process;

use process::{Api, KubeProxy, NODES, SERVICES, SLICES};

/// Set where the test runs itself again, inside namespaces of its own.
const INSIDE: &str = "JUDGE_INSIDE_OF_NAMESPACES";

const PATIENCE: Duration = Duration::from_mins(1);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(30);

/// What must be on the machine besides kube-proxy.
const PROGRAMS: [&str; 6] = ["iptables-save", "ip6tables-save", "ip", "unshare", "setpriv", "conntrack"];

#[test]
fn a_real_kube_proxy_answers_alike() {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    if let Err(missing) = ready() {
        return skip(&missing);
    }
    // The namespaces go with the processes in them, also when those are killed.
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "kube_proxy::a_real_kube_proxy_answers_alike", "--nocapture"])
        .env(INSIDE, "1")
        .status();
    assert!(status.unwrap().success(), "see above");
}

#[expect(clippy::print_stdout, reason = "what is skipped is said")]
fn skip(missing: &str) {
    println!("skipped: {missing}");
}

fn ready() -> Result<PathBuf, String> {
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n");
    if !is_root {
        return Err("network namespaces need root".to_owned());
    }
    for program in PROGRAMS {
        let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
        if !found.is_ok_and(|output| output.status.success()) {
            return Err(format!("there is no program {program}"));
        }
    }
    process::find()
}

fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-e", "-c", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// One state of one scenario.
struct Stage {
    name: String,
    cluster: Cluster,
    questions: Vec<(Question, Answer)>,
}

fn inside() {
    let binary = ready().unwrap();
    let directory = std::env::temp_dir().join(format!("judge-kube-proxy-{}", std::process::id()));
    shell(
        "ip link set lo up; ip link add eth0 type veth peer name eth1; ip link set eth0 up; ip link set eth1 up
         ip link add cni0 type bridge; ip link set cni0 up; ip address add 10.42.1.1/24 dev cni0
         for address in 192.168.64.11/24 192.168.65.11/24 2001:db8::11/64; do ip address add $address dev eth0; done
         sysctl -q -w net.ipv4.ip_forward=1; iptables -P FORWARD ACCEPT
         # What a kubelet of that time brings, and kube-proxy's rules jump to.
         for program in iptables ip6tables; do
             $program -t nat -N KUBE-MARK-DROP; $program -t nat -A KUBE-MARK-DROP -j MARK --or-mark 0x8000
             for table_and_chain in 'filter INPUT' 'mangle FORWARD' 'filter OUTPUT'; do
                 set -- $table_and_chain; $program -t $1 -A $2 -m mark --mark 0x8000/0x8000 -j DROP
             done
         done",
    );
    let mut tally = Tally::default();
    for (number, stage) in (1u16..).zip(stages()) {
        if stage.questions.iter().any(|(question, _)| lacks(&stage.cluster, question).is_none()) {
            judge_stage(&binary, &directory, number, &stage, &mut tally);
        } else {
            judge_answers(&stage, &Program::default(), &mut tally);
        }
    }
    let _ = std::fs::remove_dir_all(&directory);
    tally.report();
}

/// All states of all scenarios that this kube-proxy can be told of.
fn stages() -> Vec<Stage> {
    let mut found = Vec::new();
    for path in scenario_files() {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let scenario = parse(&std::fs::read_to_string(&path).unwrap()).unwrap();
        for (cluster, checks) in scenario.stages() {
            let questions = checks.filter_map(|check| match check {
                Check::Answer(question, answer, _) => Some((*question, answer.clone())),
                _ => None,
            });
            found.push(Stage { name: name.clone(), cluster: cluster.clone(), questions: questions.collect() });
        }
    }
    found
}

/// The settings as fields of its configuration; those that it does not know are left out, as are their questions.
fn configuration(settings: &ProxySettings) -> String {
    let mode = match &settings.detect_local {
        DetectLocal::NodePrefixes => "NodeCIDR",
        _ => "ClusterCIDR",
    };
    let prefixes = match &settings.detect_local {
        DetectLocal::Nothing => String::new(),
        _ => Cluster::cluster_prefixes().iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
    };
    let addresses = match &settings.node_port_addresses {
        NodePortAddresses::Within(prefixes) => prefixes.iter().map(|it| format!("\"{it}\"")).collect::<Vec<_>>(),
        NodePortAddresses::All | NodePortAddresses::Primary => Vec::new(),
    };
    format!(
        "mode: iptables\nbindAddress: 192.168.64.11\nclusterCIDR: \"{prefixes}\"\ndetectLocalMode: {mode}\nnodePortAddresses: [{}]\n\
         featureGates: {{IPv6DualStack: true}}\n\
         iptables: {{masqueradeAll: {}, minSyncPeriod: 0s, syncPeriod: 10s}}\n",
        addresses.join(", "),
        settings.masquerade_all
    )
}

/// Starts kube-proxy with the objects of one state, in place of the one that was there before.
fn judge_stage(binary: &Path, directory: &Path, number: u16, stage: &Stage, tally: &mut Tally) {
    let api = Api::start().unwrap();
    for ((table, name), object) in objects(&stage.cluster) {
        api.put(table, &name, &object);
    }
    let marker = Marker::new(number);
    for ((table, name), object) in marker.objects() {
        api.put(table, &name, &object);
    }
    let node = stage.cluster.node().name.as_str();
    let mut proxy = KubeProxy::start(binary, &api, directory, node, &configuration(&stage.cluster.settings)).unwrap();
    let rules = marker.wait(&mut proxy, directory);
    judge_answers(stage, &rules, tally);
    judge_chains(stage, &rules, tally);
}

fn objects(cluster: &Cluster) -> BTreeMap<(&'static str, String), String> {
    let nodes = cluster.nodes.iter().map(|it| ((NODES, it.name.to_string()), kubernetes::node(it).to_string()));
    let services = cluster.services.values();
    let services = services.map(|it| ((SERVICES, kubernetes::name(&it.key)), kubernetes::service(it).to_string()));
    // An API server that is asked for slices without the label leaves the others out.
    let slices = cluster.slices.values().filter(|slice| !slice.headless);
    let slices = slices.map(|it| ((SLICES, kubernetes::name(&it.key)), kubernetes::slice(it).to_string()));
    nodes.chain(services).chain(slices).collect()
}

/// A Service that tells by its port that the rules are those of this state.
struct Marker {
    number: u16,
}

impl Marker {
    fn new(number: u16) -> Marker {
        Marker { number: 20_000 + number }
    }

    fn objects(&self) -> BTreeMap<(&'static str, String), String> {
        let key = ObjectKey::new("judge", "marker");
        let port = Port::try_from(self.number).unwrap();
        let service = Service {
            key: key.clone(),
            service_type: ServiceType::ClusterIp,
            cluster_addresses: vec![address("10.96.255.254"), address("fd96::fffe")],
            headless: false,
            ports: vec![ServicePort { name: "".into(), protocol: Protocol::Tcp, port, node_port: None }],
            publish_not_ready: false,
            traffic: ServiceTraffic::default(),
        };
        let slice = |family: Family, text: &str| EndpointSlice {
            key: ObjectKey::new("judge", format!("marker-{family}")),
            service: key.clone(),
            family,
            ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port }],
            endpoints: vec![Endpoint {
                address: address(text),
                ready: true,
                serving: true,
                terminating: false,
                node: None,
                hostname: None,
                hints: None,
            }],
            headless: false,
        };
        let slices = [slice(Family::V4, "10.42.255.254"), slice(Family::V6, "fd42::fffe")];
        let slices = slices.iter().map(|it| ((SLICES, kubernetes::name(&it.key)), kubernetes::slice(it).to_string()));
        let service = ((SERVICES, kubernetes::name(&key)), kubernetes::service(&service).to_string());
        slices.chain([service]).collect()
    }

    /// Waits until the rules of both families have it, and returns them.
    fn wait(&self, proxy: &mut KubeProxy, directory: &Path) -> Program {
        let end = Instant::now() + PATIENCE;
        loop {
            let (v4, v6) = (shell("iptables-save"), shell("ip6tables-save"));
            let has = |text: &str| {
                text.contains(&format!("--dport {} ", self.number)) && text.contains(&format!(":{}\n", self.number))
            };
            if has(&v4) && has(&v6) {
                // True of every packet that is not bridged, and no bridge of this node asks iptables.
                let [v4, v6] = [v4, v6].map(|text| text.replace("-m physdev ! --physdev-is-in ", ""));
                let mut program = parse_family(&v4, Family::V4).unwrap();
                program.tables.extend(parse_family(&v6, Family::V6).unwrap().tables);
                return program;
            }
            proxy.check(directory).unwrap();
            assert!(Instant::now() < end, "kube-proxy did not write the marker {}\n{v4}\n{v6}", self.number);
            std::thread::sleep(LOOK_AGAIN_AFTER);
        }
    }
}

/// What was compared, and what was left out for which reason.
#[derive(Default)]
struct Tally {
    equal: usize,
    chains: usize,
    left_out: BTreeMap<&'static str, usize>,
    wrong: Vec<String>,
}

impl Tally {
    #[expect(clippy::print_stdout, reason = "what is left out is said")]
    fn report(&self) {
        println!("{} answers and {} chains of kube-proxy are the same", self.equal, self.chains);
        for (why, count) in &self.left_out {
            println!("{count} answers left out: {why}");
        }
        assert!(self.wrong.is_empty(), "{}", self.wrong.join("\n"));
        assert!(self.equal >= ANSWERS_MIN && self.chains >= CHAINS_MIN, "too little was compared");
    }
}

/// So many answers and chains are compared at least: scenarios that become fewer are noticed.
const ANSWERS_MIN: usize = 90;
const CHAINS_MIN: usize = 50;

fn judge_answers(stage: &Stage, rules: &Program, tally: &mut Tally) {
    for (question, expected) in &stage.questions {
        if let Some(why) = lacks(&stage.cluster, question) {
            *tally.left_out.entry(why).or_default() += 1;
            continue;
        }
        let (found, _) = iptables_answer(rules, &stage.cluster, question);
        if found == *expected {
            tally.equal += 1;
        } else {
            tally.wrong.push(format!("{}: {question}: kube-proxy says {found}, and must say {expected}", stage.name));
        }
    }
}

/// The chains of Service ports and of endpoints have the same names in our program, for what 1.20 knows.
fn judge_chains(stage: &Stage, rules: &Program, tally: &mut Tally) {
    let cluster = &stage.cluster;
    if cluster.services.values().any(|service| service_lacks(cluster, service).is_some()) {
        return;
    }
    let mut follower = Follower::new(cluster.node().name.clone(), cluster.settings.clone());
    let mut compiler = Compiler::new(&cluster.view(), &Family::ALL);
    compiler.set_node_addresses(&cluster.node().addresses);
    compiler.update_services(&follower.follow(cluster));
    let theirs = chains(rules);
    for chain in chains(compiler.program()) {
        if theirs.contains(&chain) {
            tally.chains += 1;
        } else {
            tally.wrong.push(format!("{}: kube-proxy has no chain {chain}, among {theirs:?}", stage.name));
        }
    }
}

fn chains(program: &Program) -> BTreeSet<String> {
    let chains = program.tables.values().flat_map(|table| table.chains.keys());
    let is_of_service = |name: &String| ["KUBE-SVC-", "KUBE-SEP-", "KUBE-FW-"].iter().any(|it| name.starts_with(it));
    chains.map(ToString::to_string).filter(is_of_service).collect()
}

/// Why kube-proxy 1.20 cannot be asked this.
fn lacks(cluster: &Cluster, question: &Question) -> Option<&'static str> {
    let settings = &cluster.settings;
    match &settings.detect_local {
        DetectLocal::Bridge(_) => return Some("detectLocalMode BridgeInterface (1.24)"),
        DetectLocal::InterfacePrefix(_) => return Some("detectLocalMode InterfaceNamePrefix (1.24)"),
        _ => {}
    }
    if settings.node_port_addresses == NodePortAddresses::Primary {
        return Some("nodePortAddresses primary (1.27)");
    }
    if question.destination.is_loopback() {
        return Some("localhostNodePorts cannot be switched off (1.26)");
    }
    let services: Vec<&Service> =
        cluster.services.values().filter(|service| is_about(cluster, service, question)).collect();
    if services.len() > 1 {
        return Some("Services that want the same: whichever was heard of last");
    }
    let is_external = |service: &&Service| service.traffic.external_addresses.contains(&question.destination);
    let is_own = cluster.local_addresses().contains(&question.destination);
    if question.from == From::Node && !is_own && services.iter().any(is_external) {
        return Some("external IPs for the node itself (1.21)");
    }
    services.into_iter().find_map(|service| service_lacks(cluster, service))
}

fn is_about(cluster: &Cluster, service: &Service, question: &Question) -> bool {
    let traffic = &service.traffic;
    let mut addresses =
        service.cluster_addresses.iter().chain(&traffic.external_addresses).chain(&traffic.load_balancer_addresses);
    addresses.any(|address| *address == question.destination)
        || service.ports.iter().any(|port| port.node_port == Some(question.port))
            && cluster.local_addresses().contains(&question.destination)
}

fn service_lacks(cluster: &Cluster, service: &Service) -> Option<&'static str> {
    let traffic = &service.traffic;
    let endpoints: Vec<&Endpoint> = cluster
        .slices
        .values()
        .filter(|slice| slice.service == service.key)
        .flat_map(|slice| &slice.endpoints)
        .collect();
    if traffic.internal_policy == TrafficPolicy::Local {
        return Some("internalTrafficPolicy (1.22)");
    }
    if endpoints.iter().any(|endpoint| endpoint.hints.is_some()) {
        return Some("hints (1.23)");
    }
    if endpoints.iter().any(|endpoint| !endpoint.ready && endpoint.serving && endpoint.terminating) {
        return Some("endpoints that drain (1.22)");
    }
    if service.publish_not_ready && endpoints.iter().any(|endpoint| !endpoint.ready) {
        return Some("publishNotReadyAddresses is the slice controller's business");
    }
    if !traffic.external_addresses.is_empty() && !cluster.settings.external_ips {
        return Some("externalIPs cannot be switched off");
    }
    let mut at_ports: BTreeMap<IpAddr, BTreeSet<Port>> = BTreeMap::new();
    for slice in cluster.slices.values().filter(|slice| slice.service == service.key) {
        for endpoint in &slice.endpoints {
            at_ports.entry(endpoint.address).or_default().extend(slice.ports.iter().map(|port| port.port));
        }
    }
    if service.ports.len() == 1 && at_ports.values().any(|ports| ports.len() > 1) {
        return Some("an address at two ports counts once");
    }
    let cannot_be_said = traffic.load_balancer_sources.as_ref().is_some_and(|ranges| {
        let has = |is_v4: bool| ranges.iter().any(|range| range.addr().is_ipv4() == is_v4);
        service.cluster_addresses.iter().any(|address| !has(address.is_ipv4()))
    });
    cannot_be_said.then_some("source ranges of which none is of the family admit everyone")
}
