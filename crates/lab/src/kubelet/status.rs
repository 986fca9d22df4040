//! What the kubelet tells the API about a pod.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::container::{ContainerState, State};
use super::object::Pod;
use crate::clock;

/// The `status` of a pod, to be merged into what the scheduler wrote. Arrays are replaced as a whole
/// by a merge patch (RFC 7396), so the scheduler's condition is repeated.
pub(super) fn status(
    pod: &Pod,
    host: &[IpAddr],
    addresses: &[IpAddr],
    containers: &[ContainerState],
    begun: &str,
) -> Value {
    let ready = !containers.is_empty() && containers.iter().all(ContainerState::is_ready);
    let initialized = !addresses.is_empty();
    let address = |list: &[IpAddr]| list.first().map(ToString::to_string);
    let list = |list: &[IpAddr]| list.iter().map(|ip| json!({ "ip": ip })).collect::<Vec<_>>();
    let condition = |kind: &str, holds: bool| {
        let mut condition = json!({
            "type": kind,
            "status": if holds { "True" } else { "False" },
            "lastProbeTime": null,
            "lastTransitionTime": clock::now(),
        });
        if !holds && let Some(fields) = condition.as_object_mut() {
            fields.insert("reason".into(), "ContainersNotReady".into());
        }
        condition
    };
    json!({
        "phase": phase(pod, containers, initialized),
        "startTime": begun,
        "hostIP": address(host),
        "hostIPs": list(host),
        "podIP": address(addresses),
        "podIPs": list(addresses),
        "conditions": [
            condition("PodScheduled", true),
            condition("PodReadyToStartContainers", initialized),
            condition("Initialized", true),
            condition("ContainersReady", ready),
            condition("Ready", ready),
        ],
        "containerStatuses": containers.iter().map(container_status).collect::<Vec<_>>(),
        "qosClass": "BestEffort",
    })
}

fn phase(pod: &Pod, containers: &[ContainerState], initialized: bool) -> &'static str {
    let ended = |container: &ContainerState| matches!(container.state, State::Ended { .. });
    if !containers.is_empty() && containers.iter().all(ended) && pod.spec.restart_policy.as_deref() != Some("Always") {
        let succeeded = containers.iter().all(|container| matches!(container.state, State::Ended { code: 0 }));
        return if succeeded { "Succeeded" } else { "Failed" };
    }
    let started = containers.iter().any(|container| !matches!(container.state, State::Waiting { .. }));
    if initialized && started { "Running" } else { "Pending" }
}

fn container_status(container: &ContainerState) -> Value {
    let state = match &container.state {
        State::Waiting { reason, message } => json!({"waiting": {"reason": reason, "message": message}}),
        State::Running { since } => json!({"running": {"startedAt": since}}),
        State::Ended { code } => json!({"terminated": {
            "exitCode": code, "reason": if *code == 0 { "Completed" } else { "Error" },
        }}),
    };
    json!({
        "name": container.name,
        "image": container.image,
        "imageID": "",
        "containerID": container.pid.map(|pid| format!("portolan-lab://{pid}")),
        "ready": container.is_ready(),
        "started": matches!(container.state, State::Running { .. }),
        "restartCount": container.restarts,
        "state": state,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(policy: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": {"restartPolicy": policy}})).unwrap()
    }

    fn container(state: State, listening: bool) -> ContainerState {
        ContainerState { name: "a".into(), image: "x".into(), pid: Some(7), restarts: 0, listening, state }
    }

    fn ready(status: &Value) -> &str {
        let conditions = status["conditions"].as_array().unwrap();
        conditions.iter().find(|it| it["type"] == "Ready").unwrap()["status"].as_str().unwrap()
    }

    #[test]
    fn a_pod_is_ready_when_all_its_containers_listen() {
        let running = || State::Running { since: "t".into() };
        let address = ["10.42.0.7".parse().unwrap()];
        let both = [container(running(), true), container(running(), true)];
        let one = [container(running(), true), container(running(), false)];
        let waiting = [container(State::Waiting { reason: "ContainerCreating", message: String::new() }, false)];
        let told = status(&pod("Always"), &address, &address, &both, "t");
        assert_eq!((ready(&told), &told["phase"], &told["podIP"]), ("True", &json!("Running"), &json!("10.42.0.7")));
        assert_eq!(ready(&status(&pod("Always"), &address, &address, &one, "t")), "False");
        let told = status(&pod("Always"), &address, &[], &waiting, "t");
        assert_eq!((ready(&told), &told["phase"]), ("False", &json!("Pending")));
    }

    #[test]
    fn a_pod_that_is_not_restarted_ends_as_its_containers_did() {
        let address = ["10.42.0.7".parse().unwrap()];
        let phase = |codes: [i32; 2]| {
            let containers = codes.map(|code| container(State::Ended { code }, false));
            status(&pod("Never"), &address, &address, &containers, "t")["phase"].as_str().unwrap().to_owned()
        };
        assert_eq!(phase([0, 0]), "Succeeded");
        assert_eq!(phase([0, 1]), "Failed");
    }
}
