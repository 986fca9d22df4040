//! The servers at `healthzBindAddress` and `metricsBindAddress`.

use std::net::SocketAddr;
use std::sync::Arc;

use hyper::StatusCode;
use portolan_net::NodeName;
use portolan_state::{ObjectRef, Problem};
use serde_json::{Value, json};

use super::board::ProblemBoard;
use super::duration::render;
use super::health::{Now, ProxyHealth};
use super::http::{Answer, Handler, Task, bind, serve};
use super::limits::LISTEN_RETRY;
use super::options::ProxyOptions;
use crate::admin_socket::SocketError;
use crate::config::AgentConfig;
use crate::metrics::Metrics;

/// A server to be: the field that asks for it, where, and what it answers.
struct Wanted {
    field: &'static str,
    address: SocketAddr,
    handler: Handler,
}

/// Starts what the configuration asks for. An address in use is a problem and is tried again, unless
/// `bindAddressHardFail` says that it is an error.
pub(super) async fn start(
    config: &AgentConfig,
    health: &Arc<ProxyHealth>,
    metrics: &Arc<Metrics>,
    board: &Arc<ProblemBoard>,
) -> Result<Vec<Task>, SocketError> {
    let options = &config.proxy_options;
    let mut wanted = Vec::new();
    if let Some(address) = options.healthz_address {
        wanted.push(Wanted {
            field: "healthzBindAddress",
            address,
            handler: health_handler(health.clone(), metrics.clone()),
        });
    }
    if let Some(address) = options.metrics_address {
        let handler = metrics_handler(config, metrics.clone());
        wanted.push(Wanted { field: "metricsBindAddress", address, handler });
    }
    let mut tasks = Vec::new();
    for server in wanted {
        let bound = bind(server.address).await;
        if let (Err(source), true) = (&bound, options.bind_address_hard_fail) {
            let source = std::io::Error::new(source.kind(), source.to_string());
            return Err(SocketError::Listen { address: format!("{} {}", server.field, server.address), source });
        }
        let (board, node) = (board.clone(), config.node.clone());
        tasks.push(Task::spawn(async move {
            let mut bound = bound;
            let listener = loop {
                match bound {
                    Ok(listener) => break listener,
                    Err(error) => board.set(server.field, vec![problem(&node, &server, &error)]),
                }
                tokio::time::sleep(LISTEN_RETRY).await;
                bound = bind(server.address).await;
            };
            board.set(server.field, Vec::new());
            serve(listener, server.handler).await;
        }));
    }
    Ok(tasks)
}

fn problem(node: &NodeName, server: &Wanted, error: &std::io::Error) -> Problem {
    Problem {
        object: ObjectRef::Node(node.clone()),
        field: server.field.into(),
        reason: format!("cannot listen on {}: {error}", server.address).into(),
        hint: "it is tried again; stop what uses the port (`ss -ltnp`; kube-proxy, perhaps), or set another".into(),
    }
}

fn health_handler(health: Arc<ProxyHealth>, metrics: Arc<Metrics>) -> Handler {
    Arc::new(move |path| match path {
        "/healthz" => {
            let answer = health.healthz(Now::read());
            metrics.proxy.healthz(answer.status.as_u16());
            answer
        }
        "/livez" => {
            let answer = health.livez(Now::read());
            metrics.proxy.livez(answer.status.as_u16());
            answer
        }
        _ => Answer::text(StatusCode::NOT_FOUND, "404 page not found\n"),
    })
}

fn metrics_handler(config: &AgentConfig, metrics: Arc<Metrics>) -> Handler {
    let mode = config.services_mode().name();
    let configuration = json!({ "kubeproxy.config.k8s.io": configz(config) }).to_string();
    Arc::new(move |path| match path {
        "/metrics" => Answer::metrics(metrics.render()),
        "/proxyMode" => Answer::text(StatusCode::OK, mode),
        "/configz" => Answer::json(StatusCode::OK, configuration.clone()),
        "/healthz" => Answer::text(StatusCode::OK, "ok"),
        _ => Answer::text(StatusCode::NOT_FOUND, "404 page not found\n"),
    })
}

/// The configuration as it is in effect, under kube-proxy's names.
fn configz(config: &AgentConfig) -> Value {
    use portolan_intent::services::{DetectLocal, NodePortAddresses};
    let ProxyOptions { settings, ipvs, conntrack, .. } = &config.proxy_options;
    let options = &config.proxy_options;
    let (local_mode, bridge, prefix) = match &settings.detect_local {
        DetectLocal::ClusterPrefixes => ("ClusterCIDR", "", ""),
        DetectLocal::NodePrefixes => ("NodeCIDR", "", ""),
        DetectLocal::Bridge(name) => ("BridgeInterface", name.as_str(), ""),
        DetectLocal::InterfacePrefix(prefix) => ("InterfaceNamePrefix", "", prefix.as_str()),
        DetectLocal::Nothing => ("", "", ""),
    };
    let node_ports: Vec<String> = match &settings.node_port_addresses {
        NodePortAddresses::All => vec!["all".to_owned()],
        NodePortAddresses::Primary => vec!["primary".to_owned()],
        NodePortAddresses::Within(prefixes) => prefixes.iter().map(ToString::to_string).collect(),
    };
    let cluster: Vec<String> = config.cluster_prefixes.iter().map(ToString::to_string).collect();
    let address = |address: Option<SocketAddr>| address.map(|it| it.to_string()).unwrap_or_default();
    let period = render(options.sync_period);
    let time = |duration: Option<std::time::Duration>| render(duration.unwrap_or_default());
    let seconds = |seconds: Option<u32>| render(std::time::Duration::from_secs(seconds.unwrap_or_default().into()));
    let masquerade = json!({
        "masqueradeAll": settings.masquerade_all,
        "masqueradeBit": options.masquerade_bit,
        "syncPeriod": period,
    });
    let mut iptables = masquerade.clone();
    iptables["localhostNodePorts"] = settings.localhost_node_ports.into();
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": config.services_mode().name(),
        "hostnameOverride": config.node.as_str(),
        "healthzBindAddress": address(options.healthz_address),
        "metricsBindAddress": address(options.metrics_address),
        "bindAddressHardFail": options.bind_address_hard_fail,
        "clusterCIDR": cluster.join(","),
        "detectLocalMode": local_mode,
        "detectLocal": { "bridgeInterface": bridge, "interfaceNamePrefix": prefix },
        "nodePortAddresses": node_ports,
        "iptables": iptables,
        "nftables": masquerade,
        "ipvs": {
            "syncPeriod": period,
            "scheduler": ipvs.scheduler.name(),
            "excludeCIDRs": ipvs.exclude.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "strictARP": ipvs.strict_arp,
            "tcpTimeout": seconds(ipvs.timeouts.tcp),
            "tcpFinTimeout": seconds(ipvs.timeouts.tcp_fin),
            "udpTimeout": seconds(ipvs.timeouts.udp),
        },
        "conntrack": {
            "maxPerCore": conntrack.max_per_core.unwrap_or_default(),
            "min": conntrack.min,
            "tcpEstablishedTimeout": time(conntrack.tcp_established_timeout),
            "tcpCloseWaitTimeout": time(conntrack.tcp_close_wait_timeout),
            "tcpBeLiberal": conntrack.tcp_be_liberal,
            "udpTimeout": time(conntrack.udp_timeout),
            "udpStreamTimeout": time(conntrack.udp_stream_timeout),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(answer: Answer) -> (u16, String) {
        (answer.status.as_u16(), String::from_utf8(answer.body).unwrap())
    }

    #[test]
    fn metrics_mode_and_configuration_are_at_kube_proxys_paths() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.yaml");
        let text = "node: node-7\nkubernetes: {}\nclusterPrefixes: [10.42.0.0/16, 'fd42::/56']\nservices: ipvs\n\
                    proxy: {ipvs: {scheduler: sh, tcpTimeout: 15m}, nodePortAddresses: [192.0.2.0/24]}\n";
        std::fs::write(&path, text).unwrap();
        let config = AgentConfig::load(&path).unwrap();
        let handler = metrics_handler(&config, Arc::new(Metrics::new()));
        assert_eq!(body(handler("/proxyMode")), (200, "ipvs".to_owned()));
        assert_eq!(body(handler("/healthz")), (200, "ok".to_owned()));
        assert_eq!(body(handler("/debug/pprof")).0, 404);
        assert!(body(handler("/metrics")).1.contains("kubeproxy_sync_proxy_rules_duration_seconds_count 0"));
        let configuration: Value = serde_json::from_str(&body(handler("/configz")).1).unwrap();
        let configuration = &configuration["kubeproxy.config.k8s.io"];
        assert_eq!(configuration["mode"], "ipvs");
        assert_eq!(configuration["clusterCIDR"], "10.42.0.0/16,fd42::/56");
        assert_eq!(configuration["ipvs"]["tcpTimeout"], "15m0s");
        assert_eq!(configuration["nodePortAddresses"], json!(["192.0.2.0/24"]));
    }

    #[test]
    fn what_is_in_effect_reads_as_a_configuration_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let (path, file) = (directory.path().join("agent.yaml"), directory.path().join("config.conf"));
        let lines = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: iptables\n\
                     detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}\n\
                     conntrack: {maxPerCore: 0, udpTimeout: 30s}\niptables: {masqueradeAll: true, syncPeriod: 1m}\n";
        let own = "node: a\nkubernetes: {}\nclusterPrefixes: [10.42.0.0/16]\nkubeProxyConfiguration: config.conf\n";
        std::fs::write(&path, own).unwrap();
        std::fs::write(&file, lines).unwrap();
        let first = AgentConfig::load(&path).unwrap();
        std::fs::write(&file, configz(&first).to_string()).unwrap();
        let second = AgentConfig::load(&path).unwrap();
        assert_eq!(second.proxy_options.notes, []);
        let without_source = |config: AgentConfig| ProxyOptions {
            // What stands in the agent's file is in effect, too.
            hostname_override: None,
            cluster_prefixes: Vec::new(),
            ..config.proxy_options
        };
        assert_eq!(without_source(first), without_source(second));
    }
}
