//! A node that a real kube-proxy served is taken over in place, if this machine has one: `cargo xtask kube-proxy`
//! builds it.
//!
//! The agent is stopped, as if it were not there yet, and kube-proxy serves the node's Services by its iptables mode.
//! Then kube-proxy goes and the agent comes: what is open stays open, what is new never fails, and what kube-proxy
//! left behind is gone.

#[path = "../../../../xtask/src/kube_proxy/place.rs"]
mod place;
#[path = "../../../../xtask/src/kube_proxy/process.rs"]
mod process;

use std::net::SocketAddr;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use process::{Api, KubeProxy, NODES, SERVICES, SLICES};
use serde_json::json;

use crate::common::{CART, TestLab, has, until, within};
use crate::traffic::{Kind, Stream};

const NODE: &str = "node-1";

/// Puts everything of a kind into kube-proxy's API, as that version knows it.
fn put(lab: &TestLab, api: &Api, kind: &str, table: &'static str, version: &str, name: &str) {
    let mut list = lab.kubectl(&["get", kind, "--all-namespaces", "-o", "json"], "").json();
    for object in list["items"].as_array_mut().expect("items") {
        object["apiVersion"] = json!(version);
        object["kind"] = json!(name);
        for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
            endpoint["topology"] = json!({"kubernetes.io/hostname": endpoint["nodeName"]});
        }
        let of = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
        // The API finds a node by its name alone.
        let name = format!("{}/{}", of("namespace"), of("name"));
        api.put(table, name.trim_start_matches('/'), &object.to_string());
    }
}

fn take_over(mode: &str) {
    let Some(lab) = TestLab::new() else { return };
    let binary = match process::find() {
        Ok(binary) => binary,
        Err(missing) => {
            println!("skipped: {missing}");
            return;
        }
    };
    if !has("iptables-save", "iptables") || !has("kubectl", "kubernetes-client") || !has("conntrack", "conntrack") {
        return;
    }
    lab.up(CART, &["--nodes", "1", "--services", mode]);
    let from = lab.pod_on(NODE, "cart");
    let to = SocketAddr::new(lab.service("cart")[0], 7070);
    let all_flow = |streams: &[Stream]| streams.iter().for_each(|stream| stream.await_more(50));

    // As if the agent were not there yet. It is stopped, not killed, so that no other takes its place.
    let agent = Pid::from_raw(lab.number(&format!("nodes/{NODE}/agent.pid")));
    kill(agent, Signal::SIGSTOP).expect("stopping the agent");
    let directory = lab.directory().join("kube-proxy");
    let network = lab.namespace(NODE);
    let api = within(&network, || Api::start().expect("an API"));
    put(&lab, &api, "nodes", NODES, "v1", "Node");
    put(&lab, &api, "services", SERVICES, "v1", "Service");
    put(&lab, &api, "endpointslices", SLICES, "discovery.k8s.io/v1beta1", "EndpointSlice");
    let fields = "mode: iptables\nclusterCIDR: \"10.42.0.0/16\"\niptables: {minSyncPeriod: 0s, syncPeriod: 1h}\n";
    lab.shell(NODE, "iptables -t nat -N PEER-WAS-HERE");
    let streams = std::thread::scope(|scope| {
        // The kernel kills kube-proxy when the thread that started it ends, so this one stays with it.
        scope
            .spawn(|| {
                crate::common::enter(&network);
                let mut proxy = KubeProxy::start(&binary, &api, &directory, NODE, fields).expect("kube-proxy");
                until("kube-proxy serves the Service", || {
                    proxy.check(&directory).expect("a running kube-proxy");
                    // Only kube-proxy of this age writes this chain.
                    let rules = lab.shell(NODE, "iptables-save -t nat");
                    rules.contains(":KUBE-MARK-DROP") && rules.contains(&format!("-d {}/32", to.ip()))
                });
                lab.try_shell(NODE, "nft delete table ip portolan-services");
                // Not earlier: kube-proxy of this age forgets all flows of datagrams to Services at its start.
                let streams = [Kind::Datagrams, Kind::Connections].map(|kind| Stream::start(kind, &from.network, to));
                all_flow(&streams);
                streams
            })
            .join()
            .expect("kube-proxy's time")
    });

    let killed = lab.kill_agent(NODE);
    all_flow(&streams);
    lab.await_agent_after(NODE, killed);
    all_flow(&streams);
    lab.assert_as_planned();
    let rules = lab.shell(NODE, "iptables-save");
    assert!(rules.contains("PEER-WAS-HERE"), "others' chains stay: {rules}");
    // KUBE-MARK-DROP stays: kubelet has it too.
    assert!(!rules.contains("KUBE-XLB-"), "kube-proxy's leftovers: {rules}");
    for chain in ["KUBE-SERVICES", "KUBE-SVC-", "KUBE-SEP-", "KUBE-NODEPORTS"] {
        assert_eq!(rules.contains(chain), mode == "iptables", "{chain}: {rules}");
    }
    // Every message is answered; a segment that met the change of chains may have been sent again.
    for stream in streams {
        stream.finish_answered();
    }
    assert_eq!(lab.run("down", &[]).code, 0);
    lab.assert_gone();
}

#[test]
fn the_nftables_mode_takes_a_node_over_from_kube_proxy() {
    take_over("nftables");
}

#[test]
fn the_iptables_mode_takes_a_node_over_from_kube_proxy() {
    take_over("iptables");
}
