//! Services of type `LoadBalancer`: an address in the status, and the way to it from outside.

use serde_json::Value;

use crate::common::{CART, TestLab, has, until};

/// The addresses in the status of the Service `cart`.
fn ingress(lab: &TestLab) -> Vec<(String, String)> {
    let service = lab.kubectl(&["get", "service", "cart", "-o", "json"], "").json();
    let list = service["status"]["loadBalancer"]["ingress"].as_array().cloned().unwrap_or_default();
    let text = |entry: &Value, field: &str| entry[field].as_str().unwrap_or_default().to_owned();
    list.iter().map(|entry| (text(entry, "ip"), text(entry, "ipMode"))).collect()
}

/// Asks from outside the cluster.
fn answers(lab: &TestLab, address: &str) -> bool {
    let script = format!("timeout 5 bash -c 'exec 3<>/dev/tcp/{address}/7070 && echo hello >&3 && head -n 1 <&3'");
    lab.try_shell("client-1", &script).stdout == "hello\n"
}

fn patch(lab: &TestLab, spec: &str) {
    let done = lab.kubectl(&["patch", "service", "cart", "--type=merge", "-p", &format!("{{\"spec\": {spec}}}")], "");
    assert_eq!(done.code, 0, "{}", done.stderr);
}

#[test]
fn a_load_balancer_is_reached_from_outside_and_gives_its_address_back() {
    let Some(lab) = TestLab::new() else { return };
    if !has("kubectl", "kubernetes-client") {
        return;
    }
    let manifest =
        CART.replace("ipFamilyPolicy: PreferDualStack", "ipFamilyPolicy: PreferDualStack\n  type: LoadBalancer");
    lab.up(&manifest, &["--nodes", "2", "--ip-family", "dual"]);
    let expected = [("192.168.70.1", "VIP"), ("fd00:70::1", "VIP")].map(|(ip, mode)| (ip.to_owned(), mode.to_owned()));
    assert_eq!(ingress(&lab), expected);
    for (address, _) in &expected {
        until(address, || answers(&lab, address));
    }

    // With the policy Local, the node that is asked has an endpoint: else it would drop what comes.
    let scaled = lab.kubectl(&["scale", "deployment", "cart", "--replicas=1"], "");
    assert_eq!(scaled.code, 0, "{}", scaled.stderr);
    until("one pod is left", || {
        lab.pods_on("node-1").iter().chain(&lab.pods_on("node-2")).filter(|pod| pod.pod.starts_with("cart-")).count()
            == 1
    });
    patch(&lab, r#"{"externalTrafficPolicy": "Local"}"#);
    let is_on_first = lab.pods_on("node-1").iter().any(|pod| pod.pod.starts_with("cart-"));
    let gateway = if is_on_first { "192.168.64.11" } else { "192.168.64.12" };
    until("the route leads to the pod's node", || lab.shell("router", "ip route get 192.168.70.1").contains(gateway));
    until("a local endpoint answers", || answers(&lab, "192.168.70.1"));

    patch(&lab, r#"{"type": "ClusterIP", "externalTrafficPolicy": null}"#);
    until("the address is given back", || ingress(&lab).is_empty());
    until("the route is gone", || !lab.shell("router", "ip route").contains("192.168.70."));
}

#[test]
fn a_topology_file_gives_nodes_their_zones() {
    let Some(lab) = TestLab::new() else { return };
    if !has("kubectl", "kubernetes-client") {
        return;
    }
    let file = lab.manifest(
        "segments: [{name: rack, router: [10.0.0.1/24]}]\n\
         nodes:\n- {name: a, segment: rack, addresses: [10.0.0.2], zone: east}\n- {name: b, segment: rack, addresses: [10.0.0.3]}\n",
    );
    let done = lab.run("up", &["--topology", &file]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let labelled = lab.kubectl(&["label", "node", "b", "topology.kubernetes.io/zone=west"], "");
    assert_eq!(labelled.code, 0, "{}", labelled.stderr);
    let zones = "jsonpath={.items[*].metadata.labels.topology\\.kubernetes\\.io/zone}";
    assert_eq!(lab.kubectl(&["get", "nodes", "-o", zones], "").stdout, "east west");
}
