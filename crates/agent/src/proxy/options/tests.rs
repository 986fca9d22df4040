//! Configurations as people have them, and what they come to.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// The file that `kubeadm init` puts into the ConfigMap `kube-proxy`.
const KUBEADM: &str = "
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: \"\"
  burst: 0
  contentType: \"\"
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: \"\"
  interfaceNamePrefix: \"\"
detectLocalMode: \"\"
enableProfiling: false
healthzBindAddress: \"\"
hostnameOverride: \"\"
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: \"\"
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: \"0\"
    text:
      infoBufferSize: \"0\"
  verbosity: 0
metricsBindAddress: \"\"
mode: \"\"
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: \"\"
showHiddenMetricsForVersion: \"\"
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: \"\"
  rootHnsEndpointName: \"\"
  sourceVip: \"\"
";

fn load(text: &str, own: &serde_json::Value, services: Option<ServicesMode>) -> Result<ProxyOptions, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.conf");
    std::fs::write(&path, text).unwrap();
    let document = Document::load(&path, Path::new("agent.yaml")).and_then(|mut document| {
        document.overlay(own);
        ProxyOptions::of(document, services)
    });
    document.map_err(|error| error.to_string().replace(&directory.path().display().to_string(), ""))
}

/// A file with these lines.
fn file(lines: &str) -> String {
    format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{lines}\n")
}

fn read(lines: &str) -> ProxyOptions {
    load(&file(lines), &json!({}), None).unwrap()
}

#[test]
fn the_file_of_kubeadm_has_kube_proxys_defaults() {
    let options = load(KUBEADM, &json!({}), None).unwrap();
    assert_eq!(options.mode, Some(ServicesMode::Iptables));
    assert_eq!(options.healthz_address, Some("0.0.0.0:10256".parse().unwrap()));
    assert_eq!(options.metrics_address, Some("127.0.0.1:10249".parse().unwrap()));
    assert_eq!(options.cluster_prefixes.len(), 2);
    assert_eq!(options.kubeconfig, Some("/var/lib/kube-proxy/kubeconfig.conf".into()));
    assert!(options.settings.localhost_node_ports);
    assert_eq!(options.settings.node_port_addresses, NodePortAddresses::All);
    let conntrack = &options.conntrack;
    assert_eq!((conntrack.max_per_core, conntrack.min), (Some(32_768), 131_072));
    assert_eq!(conntrack.tcp_established_timeout, Some(Duration::from_hours(24)));
    assert_eq!(conntrack.tcp_close_wait_timeout, Some(Duration::from_hours(1)));
    assert_eq!((options.sync_period, options.masquerade_bit), (SYNC_PERIOD, 14));
    let fields: Vec<&str> = options.notes.iter().map(|note| note.field.as_str()).collect();
    assert_eq!(fields, ["mode"], "an empty field is as good as none");
}

#[test]
fn each_mode_reads_its_own_section() {
    let text = "iptables: {masqueradeAll: true, syncPeriod: 10s}\nnftables: {masqueradeAll: false, syncPeriod: 20s}\nipvs: {syncPeriod: 40s}";
    let of = |mode: &str| {
        let options = read(&format!("mode: {mode}\n{text}"));
        (options.settings.masquerade_all, options.sync_period.as_secs())
    };
    assert_eq!(of("iptables"), (true, 10));
    assert_eq!(of("ipvs"), (true, 40));
    assert_eq!(of("nftables"), (false, 20));
}

#[test]
fn node_ports_answer_where_the_list_says() {
    let of = |lines: &str| {
        let settings = read(lines).settings;
        (settings.node_port_addresses, settings.localhost_node_ports)
    };
    let within = |prefixes: &[&str]| NodePortAddresses::Within(prefixes.iter().map(|it| it.parse().unwrap()).collect());
    assert_eq!(of("mode: nftables"), (NodePortAddresses::Primary, false));
    assert_eq!(of("mode: ipvs"), (NodePortAddresses::All, false));
    assert_eq!(of("mode: iptables\nnodePortAddresses: [primary]"), (NodePortAddresses::Primary, false));
    assert_eq!(of("mode: iptables\nnodePortAddresses: [primary, localhost]"), (NodePortAddresses::Primary, true));
    assert_eq!(of("mode: iptables\nnodePortAddresses: [localhost]"), (within(&[]), true));
    assert_eq!(of("mode: iptables\nnodePortAddresses: [192.0.2.9/24]"), (within(&["192.0.2.0/24"]), false));
    assert_eq!(of("mode: iptables\nnodePortAddresses: [127.0.0.0/8]"), (within(&["127.0.0.0/8"]), true));
    assert_eq!(of("mode: iptables\niptables: {localhostNodePorts: false}"), (NodePortAddresses::All, false));
    assert_eq!(of("mode: nftables\nnodePortAddresses: [all]"), (NodePortAddresses::All, false));
    assert!(
        read("mode: nftables\nnodePortAddresses: [localhost]").notes[0].reason.contains("`localhost` has no effect")
    );
    assert!(read("mode: ipvs\nnodePortAddresses: [primary, 10.0.0.0/8]").notes[0].reason.contains("`primary`"));
}

#[test]
fn pods_are_told_as_the_mode_says() {
    let of = |lines: &str| read(&format!("mode: nftables\n{lines}")).settings.detect_local;
    assert_eq!(of("detectLocalMode: ClusterCIDR"), DetectLocal::ClusterPrefixes);
    assert_eq!(of("detectLocalMode: NodeCIDR"), DetectLocal::NodePrefixes);
    let bridge = "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}";
    assert_eq!(of(bridge), DetectLocal::Bridge("cni0".to_owned()));
    let prefix = "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}";
    assert_eq!(of(prefix), DetectLocal::InterfacePrefix("veth".to_owned()));
}

#[test]
fn the_agents_own_file_is_right_where_both_speak() {
    let text = file("mode: ipvs\nhealthzBindAddress: 0.0.0.0:1\niptables: {masqueradeAll: true}\nbindAddress: '::'");
    let own = json!({"healthzBindAddress": "[::1]:2", "conntrack": {"maxPerCore": 0, "tcpBeLiberal": true}, "externalIPs": true});
    let options = load(&text, &own, Some(ServicesMode::Nftables)).unwrap();
    assert_eq!(options.mode, None, "`services` decides");
    assert_eq!(options.healthz_address, Some("[::1]:2".parse().unwrap()));
    assert_eq!(options.metrics_address, Some("[::1]:10249".parse().unwrap()));
    assert!(options.settings.external_ips && !options.settings.masquerade_all);
    assert_eq!(options.conntrack.max_per_core, None);
    assert!(options.conntrack.tcp_be_liberal && options.settings.tcp_be_liberal);
    let error = load(&file("mode: ipvs"), &json!({"scheduler": "rr"}), None).unwrap_err();
    assert!(error.contains("agent.yaml: proxy.scheduler: it is no field"), "{error}");
}

#[test]
fn ipvs_is_read_whole() {
    let options = read(
        "mode: ipvs\nipvs: {scheduler: wlc, excludeCIDRs: [192.0.2.0/24], strictARP: true, tcpTimeout: 15m, udpTimeout: 0s}",
    );
    let expected = IpvsSettings {
        scheduler: Scheduler::WeightedLeastConnection,
        exclude: vec!["192.0.2.0/24".parse().unwrap()],
        strict_arp: true,
        timeouts: Timeouts { tcp: Some(900), tcp_fin: None, udp: None },
    };
    assert_eq!(options.ipvs, expected);
}

#[test]
fn fields_without_effect_are_named() {
    let options = read(
        "mode: nftables\nfeatureGates: {A: true}\noomScoreAdj: -500\nwinkernel: {enableDSR: true}\nmodus: 1\nnftables: {masqueradeBit: 3}",
    );
    let mut fields: Vec<&str> = options.notes.iter().map(|note| note.field.as_str()).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["featureGates.A", "modus", "nftables.masqueradeBit", "oomScoreAdj", "winkernel.enableDSR"]);
    let problem = &options.problems(&"node-1".into())[0];
    assert_eq!(problem.object, ObjectRef::Node("node-1".into()));
}

#[test]
fn bad_values_name_file_and_field() {
    for (lines, expected) in [
        ("mode: userspace", "/config.conf: mode: `userspace` is not iptables, ipvs or nftables"),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit: `32` is not a number from 0 to 31"),
        ("iptables: {syncPeriod: 30}", "iptables.syncPeriod: `30` is not a duration"),
        ("ipvs: {scheduler: best}", "ipvs.scheduler: `best` is not a scheduler of IPVS: rr,"),
        ("nodePortAddresses: [eth0]", "nodePortAddresses: `[\"eth0\"]` is not a list of prefixes"),
        ("nodePortAddresses: primary", "nodePortAddresses: `primary` is not a list"),
        ("clusterCIDR: 10.0.0.0/33", "clusterCIDR: `10.0.0.0/33` is not a prefix"),
        ("detectLocalMode: Pods", "detectLocalMode: `Pods` is not ClusterCIDR,"),
        ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface: detectLocalMode needs it"),
        ("healthzBindAddress: here", "healthzBindAddress: `here` is not an address and port such as 0.0.0.0:10256"),
        ("conntrack: {min: -1}", "conntrack.min: `-1` is not a number"),
        ("iptables: 5", "iptables: it is not a mapping"),
        ("kind: KubeletConfiguration", "does not parse"),
    ] {
        let error = load(&file(lines), &json!({}), None).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let error = load("kind: KubeletConfiguration", &json!({}), None).unwrap_err();
    assert!(error.contains("/config.conf: apiVersion: `` is not what kube-proxy reads"), "{error}");
}

/// Every field that is read, some that are idle, and one that is unknown.
const FIELDS: &[&str] = &[
    "mode",
    "hostnameOverride",
    "bindAddress",
    "healthzBindAddress",
    "metricsBindAddress",
    "bindAddressHardFail",
    "iptables.masqueradeBit",
    "iptables.masqueradeAll",
    "iptables.localhostNodePorts",
    "iptables.syncPeriod",
    "nftables.masqueradeBit",
    "ipvs.scheduler",
    "ipvs.excludeCIDRs",
    "ipvs.tcpTimeout",
    "detectLocalMode",
    "detectLocal.bridgeInterface",
    "clusterCIDR",
    "nodePortAddresses",
    "conntrack.maxPerCore",
    "conntrack.udpTimeout",
    "clientConnection.kubeconfig",
    "featureGates.A",
    "oomScoreAdj",
    "winkernel",
    "iptables",
    "unknown",
];

fn any_value() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        prop::sample::select(vec!["", "all", "primary", "10.0.0.0/8", "::1", "30s", "BridgeInterface", "ipvs", "rr"]),
        prop::sample::select(vec!["NodeCIDR", "127.0.0.1:1", "0", "-1s", "é", "10.0.0.0/8,fd00::/8"]),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u32..40).prop_map(Value::from),
        text.prop_map(Value::from),
        "\\PC{0,90}".prop_map(Value::from),
    ];
    prop_oneof![leaf.clone(), prop::collection::vec(leaf, 0..3).prop_map(Value::from)]
}

proptest! {
    #[test]
    fn any_values_are_read_or_refused_with_their_field(
        fields in prop::collection::vec((prop::sample::select(FIELDS.to_vec()), any_value()), 0..6),
    ) {
        let mut whole = json!({"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"});
        for (field, value) in &fields {
            match field.split_once('.') {
                Some((section, name)) if whole[section].is_object() || whole[section].is_null() => {
                    whole[section][name] = value.clone();
                }
                Some(_) => {}
                None => whole[*field] = value.clone(),
            }
        }
        match load(&whole.to_string(), &json!({}), None) {
            Ok(options) => prop_assert!(options.notes.iter().all(|note| !note.field.is_empty())),
            Err(error) => prop_assert!(fields.iter().any(|(field, _)| error.contains(field)) || error.contains("detectLocal."), "{}", error),
        }
    }
}
