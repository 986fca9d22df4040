//! A node between a client and a server, as three network namespaces.
//!
//! The server has every endpoint's address: its namespace takes the whole range for its own. The client's address is
//! a pod's, so that nothing is masqueraded.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::ensure;
use serde_json::json;

use super::super::agent;
use super::super::feed;
use super::super::machine::{Built, NetworkNamespace, Scratch, output};
use super::Mode;
use super::connect::{self, Speed};

/// To how many targets a client connects.
pub(super) const TARGETS: usize = 4;

/// A server that is killed with this value.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The namespaces. They go with this value.
pub(super) struct Bed {
    _server: Server,
    pub(super) node: NetworkNamespace,
    client: NetworkNamespace,
    _endpoints: NetworkNamespace,
    pub(super) scratch: Scratch,
    name: String,
}

impl Bed {
    /// Builds it; nobody serves Services on the node yet.
    pub(super) fn build(name: &str) -> anyhow::Result<Bed> {
        let of = |role: &str| NetworkNamespace::create(&format!("portolan-bench-{name}-{role}"));
        let (node, client, endpoints) = (of("node")?, of("client")?, of("server")?);
        let scripts = [
            (
                &node,
                format!(
                    "ip link set lo up
                     ip link add uplink0 type veth peer name eth0 netns {}
                     ip link add client0 type veth peer name eth0 netns {}
                     ip address add 192.0.2.1/24 dev uplink0; ip address add 10.100.0.1/24 dev client0
                     ip link set uplink0 up; ip link set client0 up
                     ip route add 10.0.0.0/9 via 192.0.2.2
                     sysctl -q -w net.ipv4.ip_forward=1",
                    endpoints.0, client.0
                ),
            ),
            (
                &client,
                "ip link set lo up; ip address add 10.100.0.7/24 dev eth0; ip link set eth0 up
                 ip route add default via 10.100.0.1
                 sysctl -q -w net.ipv4.ip_local_port_range='1024 65535'"
                    .to_owned(),
            ),
            (
                &endpoints,
                "ip link set lo up; ip address add 192.0.2.2/24 dev eth0; ip link set eth0 up
                 ip route add 10.100.0.0/24 via 192.0.2.1; ip route add local 10.0.0.0/10 dev lo"
                    .to_owned(),
            ),
        ];
        for (namespace, script) in scripts {
            output(namespace.command(Path::new("sh")).args(["-e", "-c", &script]))?;
        }
        let mut command = endpoints.command(&std::env::current_exe()?);
        command.args(["bench", super::INSIDE, "serve"]).stdout(Stdio::piped());
        let mut server = Server(command.spawn()?);
        connect::await_server(&mut server.0)?;
        let scratch = Scratch::create(&format!("services-{name}"))?;
        Ok(Bed { _server: server, node, client, _endpoints: endpoints, scratch, name: name.to_owned() })
    }

    /// Runs an agent on the node until it is ready. What it made stays, as after a kill.
    pub(super) fn start_agent(
        &self,
        built: &Built,
        mode: Mode,
        services: u32,
        endpoints: u32,
    ) -> anyhow::Result<(Duration, f64)> {
        if let Some(backend) = mode.backend {
            // The kubelet's mark, by which its choice is known.
            let mark = ["-t", "mangle", "-N", "KUBE-KUBELET-CANARY"];
            output(self.node.command(Path::new(&format!("iptables-{backend}"))).args(mark))?;
        }
        let api = self.scratch.0.join("api.sock");
        feed::serve(&api, feed::Cluster::new(services, endpoints))?;
        let config = self.scratch.0.join("agent.yaml");
        let content = json!({
            "node": "node-1", "kubernetes": {"socket": api}, "clusterPrefixes": ["10.0.0.0/9"],
            "servicePrefixes": ["10.128.0.0/12"], "stateDirectory": self.scratch.0.join("state"),
            "runtimeDirectory": &self.scratch.0, "services": mode.services,
        });
        std::fs::write(&config, content.to_string())?;
        agent::start(built, &self.node, &config, &self.scratch.0)
    }

    /// What connections cost to the endpoints themselves, and to the first, the middle and the last of the Services.
    pub(super) fn connect(
        &self,
        services: u32,
        endpoints: u32,
        rounds: usize,
    ) -> anyhow::Result<Vec<(&'static str, Speed)>> {
        let service = |index: u32| format!("{}:80", Ipv4Addr::from(0x0a80_0001 + index));
        // By turns, as a Service spreads them, so that the server has as many ports of the client's left.
        let endpoint = |offset: u32| format!("{}:8080", Ipv4Addr::from(0x0a00_0100 + offset));
        let targets: [_; TARGETS] = [
            ("an endpoint's own address", (0..endpoints).map(endpoint).collect::<Vec<_>>().join(",")),
            ("the first Service", service(0)),
            ("the middle Service", service(services / 2)),
            ("the last Service", service(services - 1)),
        ];
        let mut command: Command = self.client.command(&std::env::current_exe()?);
        command.args(["bench", super::INSIDE, "connect", &rounds.to_string()]);
        command.args(targets.iter().map(|(_, target)| target));
        let speeds = connect::read(&output(&mut command)?)?;
        ensure!(speeds.len() == targets.len(), "{}: not every target was measured", self.name);
        Ok(targets.map(|(name, _)| name).into_iter().zip(speeds).collect())
    }
}
