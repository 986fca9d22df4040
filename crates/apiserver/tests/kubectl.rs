//! The real `kubectl`, with plain commands and no extra flags.
//!
//! It takes the one in the path, or the one that `PORTOLAN_TEST_KUBECTL` names.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use portolan_apiserver::{Config, Server, start};

const PATIENCE: Duration = Duration::from_secs(30);

/// Ends a process whatever becomes of the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    home: tempfile::TempDir,
}

impl Kubectl {
    fn find(server: &Server) -> Option<Self> {
        let program = std::env::var_os("PORTOLAN_TEST_KUBECTL").map_or_else(|| PathBuf::from("kubectl"), PathBuf::from);
        let found = Command::new(&program).args(["version", "--client"]).output().is_ok_and(|it| it.status.success());
        let home = tempfile::tempdir().unwrap();
        found.then(|| Self { program, kubeconfig: server.kubeconfig().to_owned(), home })
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(&self.program);
        // The home is where it keeps what it learned of servers.
        command.env("HOME", self.home.path()).env_remove("KUBECONFIG").arg("--kubeconfig").arg(&self.kubeconfig);
        command.args(line.split_whitespace());
        command
    }

    /// Runs a command that must succeed.
    fn run(&self, line: &str) -> String {
        let output = self.command(line).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "kubectl {line}\n{out}{err}");
        assert!(!err.to_lowercase().contains("error"), "kubectl {line}\n{err}");
        out.into_owned()
    }

    /// Runs a command that must fail.
    fn refused(&self, line: &str) -> String {
        let output = self.command(line).output().unwrap();
        assert!(!output.status.success(), "kubectl {line}\n{}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn apply(&self, name: &str, manifest: &str) -> String {
        let path = self.home.path().join(name);
        std::fs::write(&path, manifest).unwrap();
        self.run(&format!("apply -f {}", path.display()))
    }

    /// Starts a command that goes on, and hands over its lines.
    fn follow(&self, line: &str) -> (Running, mpsc::Receiver<String>) {
        let mut child = self.command(line).stdout(Stdio::piped()).spawn().unwrap();
        let output = child.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        (Running(child), lines)
    }
}

fn wait_for(lines: &mpsc::Receiver<String>, wanted: &str) -> String {
    loop {
        let line = lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no line with {wanted:?}"));
        if line.contains(wanted) {
            return line;
        }
    }
}

const SHOP: &str = "
apiVersion: v1
kind: Service
metadata: {name: cart, labels: {tier: back}}
spec:
  selector: {app: cart}
  ports:
  - {name: grpc, port: 7070, targetPort: 8080}
  - {name: metrics, port: 9090}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: cart}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart}
spec:
  replicas: 2
  selector: {matchLabels: {app: cart}}
  template:
    metadata: {labels: {app: cart}}
    spec:
      serviceAccountName: cart
      containers:
      - name: server
        image: example.com/cart:1
        ports: [{containerPort: 8080}]
        env: [{name: MODE, value: plain}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: front}
spec:
  selector: {matchLabels: {app: front}}
  template:
    metadata: {labels: {app: front}}
    spec: {containers: [{name: server, image: 'example.com/front:1'}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: shop}
spec:
  rules:
  - host: shop.example.com
    http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: cart, port: {number: 7070}}}}]}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_works_without_extra_flags() {
    let directory = tempfile::tempdir().unwrap();
    let server = start(Config::new(directory.path())).await.unwrap();
    let Some(kubectl) = Kubectl::find(&server) else {
        println!("skipped: kubectl is not installed");
        return;
    };
    tokio::task::spawn_blocking(move || {
        manifests(&kubectl);
        changes(&kubectl);
        looks(&kubectl);
        custom_kinds(&kubectl);
        removals(&kubectl);
    })
    .await
    .unwrap();
    server.shutdown().await;
}

fn manifests(kubectl: &Kubectl) {
    let out = kubectl.apply("shop.yaml", SHOP);
    for line in ["service/cart created", "deployment.apps/cart created", "ingress.networking.k8s.io/shop created"] {
        assert!(out.contains(line), "{out}");
    }
    let out = kubectl.apply("shop.yaml", SHOP);
    assert!(out.lines().all(|line| line.ends_with("unchanged")), "{out}");
    let changed =
        SHOP.replace("- {name: metrics, port: 9090}", "").replace("plain", "fancy").replace("cart:1", "cart:2");
    let out = kubectl.apply("shop.yaml", &changed);
    assert!(out.contains("service/cart configured") && out.contains("deployment.apps/cart configured"), "{out}");
    assert!(out.contains("deployment.apps/front unchanged"), "{out}");
    let ports = kubectl.run("get service cart -o jsonpath={.spec.ports[*].port}");
    assert_eq!(ports, "7070", "a port that is no longer applied goes");
    let template = "get deployment cart -o jsonpath={.spec.template.spec.containers[0].image}|{.spec.template.spec.containers[0].env[0].value}";
    assert_eq!(kubectl.run(template), "example.com/cart:2|fancy");
    let out = kubectl
        .run(&format!("apply --server-side --force-conflicts -f {}", kubectl.home.path().join("shop.yaml").display()));
    assert!(out.contains("service/cart serverside-applied"), "{out}");
    let bad = kubectl.home.path().join("bad.yaml");
    std::fs::write(&bad, "apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec: {ports: [{port: 0}]}\n").unwrap();
    let err = kubectl.refused(&format!("apply -f {}", bad.display()));
    assert!(err.contains("spec.ports[0].port"), "{err}");
    std::fs::write(&bad, "apiVersion: example.com/v1\nkind: Nothing\nmetadata: {name: bad}\n").unwrap();
    let err = kubectl.refused(&format!("apply -f {}", bad.display()));
    assert!(err.contains("no matches for kind \"Nothing\""), "{err}");
}

fn changes(kubectl: &Kubectl) {
    let (_watch, lines) = kubectl.follow("get deployments -w");
    wait_for(&lines, "front");
    let out = kubectl.run("scale deployment/front --replicas=3");
    assert!(out.contains("front scaled"), "{out}");
    let line = wait_for(&lines, "0/3");
    assert!(line.starts_with("front"), "{line}");
    assert_eq!(kubectl.run("get deployment front -o jsonpath={.spec.replicas}"), "3");
    let out = kubectl.run("label service cart stage=test");
    assert!(out.contains("service/cart labeled"), "{out}");
    assert!(kubectl.run("get services -l stage=test").contains("cart"));
    assert!(kubectl.refused("label service cart stage=other").contains("already has a value"));
    kubectl.run("annotate service cart note=hello");
    let patch = kubectl.run(r#"patch service cart -p {"spec":{"ports":[{"port":7070,"targetPort":9999}]}}"#);
    assert!(patch.contains("patched"), "{patch}");
    assert_eq!(
        kubectl.run("get service cart -o jsonpath={.spec.ports[0].name}:{.spec.ports[0].targetPort}"),
        "grpc:9999"
    );
    // Not `create configmap`: newer ones send it as protobuf, which this server does not read.
    kubectl.apply("letters.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: letters}\ndata: {a: b}\n");
    kubectl.run("expose deployment front --port=80");
    kubectl.run("set image deployment/front server=example.com/front:2");
}

fn looks(kubectl: &Kubectl) {
    let out = kubectl.run("get services");
    assert!(out.starts_with("NAME") && out.contains("CLUSTER-IP") && out.contains("7070/TCP"), "{out}");
    assert!(kubectl.run("get svc,deploy,po -A -o wide").contains("front"));
    assert!(kubectl.run("get all").contains("replicaset.apps/"));
    let out = kubectl.run("get service cart -o yaml");
    assert!(out.contains("clusterIP: 10.96.") && out.contains("kind: Service"), "{out}");
    assert!(kubectl.run("get service cart -o json").contains("\"uid\""));
    for (line, wanted) in [
        ("describe service cart", "grpc"),
        ("describe deployment cart", "example.com/cart:2"),
        ("describe pods", "Pending"),
        ("describe ingress shop", "shop.example.com"),
        ("describe namespace default", "Active"),
        ("describe configmap letters", "letters"),
        ("api-resources", "endpointslices"),
        ("api-versions", "discovery.k8s.io/v1"),
        ("get endpointslices", "cart"),
        ("get namespaces", "kube-system"),
        ("version", "portolan"),
        ("cluster-info", "running at"),
        ("get events", ""),
    ] {
        let out = kubectl.run(line);
        assert!(out.contains(wanted), "kubectl {line}\n{out}");
    }
    let err = kubectl.refused("--token=wrong get services");
    assert!(err.contains("must be logged in") || err.contains("provide credentials"), "{err}");
    let err = kubectl.refused("get service none");
    assert!(err.contains("services \"none\" not found"), "{err}");
    let err = kubectl.refused("get nothings");
    assert!(err.contains("the server doesn't have a resource type \"nothings\""), "{err}");
}

fn custom_kinds(kubectl: &Kubectl) {
    let definition = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: ships.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: ships, singular: ship, kind: Ship, shortNames: [sh]}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
    additionalPrinterColumns: [{name: Masts, type: integer, jsonPath: .spec.masts}]
";
    kubectl.apply("definition.yaml", definition);
    kubectl.run("wait --for=condition=established crd/ships.example.com --timeout=20s");
    let ship = "apiVersion: example.com/v1\nkind: Ship\nmetadata: {name: caravel}\nspec: {masts: 2}\n";
    assert!(kubectl.apply("ship.yaml", ship).contains("ship.example.com/caravel created"));
    let out = kubectl.apply("ship.yaml", &ship.replace('2', "3"));
    assert!(out.contains("configured"), "{out}");
    let out = kubectl.run("get ships");
    assert!(out.contains("MASTS") && out.contains('3'), "{out}");
    kubectl.run("delete ship caravel");
}

fn removals(kubectl: &Kubectl) {
    let out = kubectl.run(&format!("delete -f {}", kubectl.home.path().join("shop.yaml").display()));
    assert!(out.contains("\"cart\" deleted"), "{out}");
    kubectl.run("delete service front");
    let deadline = Instant::now() + PATIENCE;
    while !kubectl.run("get pods -l app=front -o name").is_empty() {
        assert!(Instant::now() < deadline, "pods outlive their deployment");
    }
    kubectl.apply("crew.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: crew}\n");
    let list = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: list, namespace: crew}\n";
    assert!(kubectl.apply("list.yaml", list).contains("configmap/list created"));
    kubectl.run("delete namespace crew");
    assert!(kubectl.refused("get namespace crew").contains("not found"));
    assert!(kubectl.run("delete configmaps --all").contains("letters"));
}
