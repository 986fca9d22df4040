//! A scripted API server over a Unix socket: it lists a made-up cluster, page by page, and then keeps its
//! watches open. HTTP/1.1 (RFC 9112) as far as one known client needs it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};

/// The made-up cluster.
pub(super) struct Cluster {
    namespaces: Vec<String>,
    nodes: Vec<String>,
    services: Vec<String>,
    slices: Vec<String>,
}

impl Cluster {
    /// One node's view: so many Services, each with so many endpoints on another node.
    pub(super) fn new(services: u32, endpoints: u32) -> Cluster {
        let meta = |name: String, namespace: &str| {
            json!({"name": name, "namespace": namespace, "uid": format!("uid-{name}"), "resourceVersion": "1",
                   "creationTimestamp": "2026-01-01T00:00:00Z"})
        };
        let node = json!({
            "metadata": {"name": "node-1", "uid": "node-1", "resourceVersion": "1"},
            "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
        });
        let service = |index: u32| {
            let address = std::net::Ipv4Addr::from(0x0a80_0001 + index).to_string();
            json!({
                "metadata": meta(format!("service-{index}"), "default"),
                "spec": {
                    "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
                    "selector": {"app": format!("service-{index}")}, "sessionAffinity": "None",
                    "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
                },
            })
        };
        let slice = |index: u32| {
            let mut metadata = meta(format!("service-{index}-abcde"), "default");
            metadata["labels"] = json!({"kubernetes.io/service-name": format!("service-{index}")});
            let endpoint = |offset: u32| {
                let address = std::net::Ipv4Addr::from(0x0a00_0100 + index * endpoints + offset).to_string();
                json!({
                    "addresses": [address], "nodeName": "node-2",
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                    "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("service-{index}-{offset}")},
                })
            };
            json!({
                "metadata": metadata, "addressType": "IPv4",
                "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
                "endpoints": (0..endpoints).map(endpoint).collect::<Value>(),
            })
        };
        Cluster {
            namespaces: vec![json!({"metadata": {"name": "default", "resourceVersion": "1"}}).to_string()],
            nodes: vec![node.to_string()],
            services: (0..services).map(|index| service(index).to_string()).collect(),
            slices: (0..services).map(|index| slice(index).to_string()).collect(),
        }
    }

    /// The nodes, for another API that serves them.
    pub(super) fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// The Services.
    pub(super) fn services(&self) -> &[String] {
        &self.services
    }

    /// The slices of endpoints, one for each Service.
    pub(super) fn slices(&self) -> &[String] {
        &self.slices
    }

    fn table(&self, path: &str) -> (&str, &str, &[String]) {
        match path {
            "/api/v1/namespaces" => ("v1", "NamespaceList", &self.namespaces),
            "/api/v1/nodes" => ("v1", "NodeList", &self.nodes),
            "/api/v1/services" => ("v1", "ServiceList", &self.services),
            "/apis/discovery.k8s.io/v1/endpointslices" => ("discovery.k8s.io/v1", "EndpointSliceList", &self.slices),
            _ => ("v1", "PodList", &[]),
        }
    }

    fn list(&self, path: &str, query: &str) -> String {
        let parameter = |name: &str| {
            let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<usize>().ok())
        };
        let (version, kind, items) = self.table(path);
        let start = parameter("continue").unwrap_or(0).min(items.len());
        let end = (start + parameter("limit").unwrap_or(items.len())).min(items.len());
        let next = if end < items.len() { end.to_string() } else { String::new() };
        let page = items.get(start..end).unwrap_or_default().join(",");
        format!(
            r#"{{"kind":"{kind}","apiVersion":"{version}","metadata":{{"resourceVersion":"1","continue":"{next}"}},"items":[{page}]}}"#
        )
    }
}

/// Serves until the process ends.
pub(super) fn serve(socket: &Path, cluster: Cluster) -> anyhow::Result<()> {
    let listener = UnixListener::bind(socket)?;
    let cluster = Arc::new(cluster);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let cluster = cluster.clone();
            thread::spawn(move || converse(&stream, &cluster));
        }
    });
    Ok(())
}

fn converse(mut stream: &UnixStream, cluster: &Cluster) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut body_length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            if line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                body_length = value.trim().parse().unwrap_or(0);
            }
        }
        let mut body = vec![0; body_length];
        reader.read_exact(&mut body)?;
        let target = request.split(' ').nth(1).unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        if query.contains("watch=true") {
            // A watch on which nothing happens: its answer begins and has no end.
            stream.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            let mut rest = Vec::new();
            reader.read_to_end(&mut rest)?;
            return Ok(());
        }
        let answer = match (path, cluster.nodes.first()) {
            ("/api/v1/nodes/node-1" | "/api/v1/nodes/node-1/status", Some(node)) => node.clone(),
            _ => cluster.list(path, query),
        };
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{answer}",
            answer.len()
        )?;
    }
}
