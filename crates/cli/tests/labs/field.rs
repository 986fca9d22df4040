//! Manifests as they come from the field: a shop of twelve small services whose pods have init
//! containers, probes, environments, security contexts and named ports, none of which the lab runs.

use std::fmt::Write as _;

use crate::common::{TestLab, find, has};

/// Name, port of the Service, port of the container.
const SERVICES: [(&str, u16, u16); 12] = [
    ("storefront", 80, 8080),
    ("adverts", 9555, 9555),
    ("basket", 7070, 7070),
    ("basket-cache", 6379, 6379),
    ("billing", 50051, 50051),
    ("catalogue", 3550, 3550),
    ("currency", 7000, 7000),
    ("delivery", 50051, 50051),
    ("mailer", 5000, 8080),
    ("ordering", 5050, 5050),
    ("suggestions", 8080, 8080),
    ("visits", 9080, 9080),
];

fn deployment(name: &str, container_port: u16) -> String {
    format!(
        "
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  labels: {{app: {name}}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata:
      labels: {{app: {name}, version: v1}}
      annotations: {{sidecar.example.com/rewriteAppHTTPProbers: \"true\"}}
    spec:
      serviceAccountName: {name}
      terminationGracePeriodSeconds: 5
      securityContext: {{fsGroup: 1000, runAsGroup: 1000, runAsNonRoot: true, runAsUser: 1000}}
      initContainers:
      - name: wait-for-others
        image: registry.example.com/busybox:latest@sha256:0123456789abcdef
        command: ['/bin/sh', '-exc', 'until nc -z ordering 5050; do sleep 1; done']
        resources: {{requests: {{cpu: 10m}}}}
      containers:
      - name: server
        image: registry.example.com/shop/{name}:v0.10.4
        securityContext:
          allowPrivilegeEscalation: false
          capabilities: {{drop: [ALL]}}
          privileged: false
          readOnlyRootFilesystem: true
        ports:
        - name: serving
          containerPort: {container_port}
        env:
        - {{name: PORT, value: \"{container_port}\"}}
        - {{name: ORDERING_ADDRESS, value: \"ordering:5050\"}}
        - name: OWN_ADDRESS
          valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}
        readinessProbe:
          initialDelaySeconds: 10
          httpGet: {{path: /_healthz, port: serving, httpHeaders: [{{name: Cookie, value: probe}}]}}
        livenessProbe:
          grpc: {{port: {container_port}}}
        resources:
          requests: {{cpu: 100m, memory: 64Mi}}
          limits: {{cpu: 200m, memory: 128Mi}}
        volumeMounts:
        - {{name: scratch, mountPath: /tmp}}
      volumes:
      - name: scratch
        emptyDir: {{}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}}}
---"
    )
}

fn manifest() -> String {
    let mut text = String::from("# Copyright of nobody\n");
    for (name, port, container_port) in SERVICES {
        text.push_str(&deployment(name, container_port));
        let _ = write!(
            text,
            "
apiVersion: v1
kind: Service
metadata:
  name: {name}
  labels: {{app: {name}, service: {name}}}
spec:
  type: ClusterIP
  selector: {{app: {name}}}
  ports:
  - {{name: serving, port: {port}, targetPort: serving}}
---"
        );
    }
    text.push_str(
        "
apiVersion: v1
kind: Service
metadata: {name: storefront-external, labels: {app: storefront}}
spec:
  type: LoadBalancer
  selector: {app: storefront}
  ports:
  - {name: http, port: 80, targetPort: 8080}
",
    );
    text
}

/// Asks every line `NAME ADDRESS PORT` of standard input for an echo by its ADDRESS, and prints the
/// NAMEs that do not answer.
const ASK_ALL: &str = r#"
for line in $1; do
  IFS=, read -r name address port <<< "$line"
  { exec 3<>"/dev/tcp/$address/$port" && echo "for $name" >&3 && read -t 5 -r answer <&3; } 2>/dev/null
  [ "$answer" = "for $name" ] || echo "$name at $address:$port: $answer"
  answer=
done"#;

#[test]
fn every_service_of_a_shop_from_the_field_answers_by_name_and_by_address() {
    let Some(lab) = TestLab::new() else { return };
    if !has("dig", "bind9-dnsutils") {
        return;
    }
    lab.up(&manifest(), &[]);
    let status = lab.status();
    let pods = status["pods"].as_array().expect("pods");
    assert_eq!(pods.iter().filter(|pod| pod["namespace"] == "default" && pod["ready"] == true).count(), 12);

    let mut names: Vec<(String, u16)> = SERVICES.iter().map(|(name, port, _)| ((*name).to_owned(), *port)).collect();
    names.push(("storefront-external".to_owned(), 80));
    let by_address: Vec<String> =
        names.iter().map(|(name, port)| format!("{name},{},{port}", lab.service(name)[0])).collect();
    let by_name: Vec<String> = names
        .iter()
        .flat_map(|(name, port)| {
            ["", ".default", ".default.svc.cluster.local"].map(|end| format!("{name},{name}{end},{port}"))
        })
        .collect();
    assert_eq!((by_address.len(), by_name.len()), (13, 39));

    let ask = |target: &str, lines: &[String]| {
        let done = lab.exec(target, &["bash", "-c", ASK_ALL, "ask", &lines.join(" ")]);
        assert_eq!((done.code, done.stdout.as_str()), (0, ""), "{target}: {}", done.stderr);
    };
    for node in ["node-1", "node-2", "node-3"] {
        ask(&format!("node/{node}"), &by_address);
        // A node's own resolver is not the cluster's: it asks the cluster's DNS Service.
        for (name, line) in names.iter().map(|(name, _)| name).zip(&by_address) {
            let question = format!("dig +short +tries=1 +time=5 @10.96.0.10 {name}.default.svc.cluster.local");
            assert_eq!(lab.shell(node, &question).trim(), line.split(',').nth(1).unwrap(), "{node}: {question}");
        }
    }
    ask("deploy/visits", &by_address);
    ask("deploy/visits", &by_name);

    // What has type LoadBalancer has a node port as well, which answers outside the cluster.
    let rows = lab.table("services", "node-1");
    let row =
        rows.iter().find(|row| row["name"] == "storefront-external" && row["type"] == "NodePort").expect("a port");
    let port = find(&row["frontend"], "port").expect("a port").to_string();
    let places: Vec<String> = (11..14).map(|host| format!("storefront,192.168.64.{host},{port}")).collect();
    ask("client/client-1", &places);
    lab.assert_as_planned();
}
