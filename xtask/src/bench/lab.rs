//! A whole cluster: `portolan lab up --wait`, until all answers.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::machine::{Built, Scratch, output};
use super::report::{Goal, Row, median_milliseconds};

const ROUNDS: usize = 5;

/// A lab that goes with this value.
pub(super) struct Lab<'a> {
    portolan: &'a Path,
    name: String,
}

impl<'a> Lab<'a> {
    /// Brings it up, and says how long that took.
    pub(super) fn up(
        portolan: &'a Path,
        name: &str,
        manifest: Option<&Path>,
        options: &[&str],
    ) -> anyhow::Result<(Lab<'a>, Duration)> {
        let mut command = Command::new(portolan);
        command.args(["lab", "up", "--wait", "--name", name]).args(options);
        if let Some(manifest) = manifest {
            command.arg("-f").arg(manifest);
        }
        let lab = Lab { portolan, name: name.to_owned() };
        let begin = Instant::now();
        output(&mut command)?;
        Ok((lab, begin.elapsed()))
    }

    /// Where it keeps its things: beside its kubeconfig.
    pub(super) fn directory(&self) -> anyhow::Result<std::path::PathBuf> {
        let status = output(Command::new(self.portolan).args(["lab", "status", "--name", &self.name, "-o", "json"]))?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        let kubeconfig = Path::new(status["kubeconfig"].as_str().unwrap_or_default());
        Ok(kubeconfig.parent().unwrap_or(kubeconfig).to_path_buf())
    }
}

impl Drop for Lab<'_> {
    fn drop(&mut self) {
        let _ = Command::new(self.portolan).args(["lab", "down", "--name", &self.name]).output();
    }
}

pub(super) fn run(built: &Built) -> anyhow::Result<Vec<Row>> {
    let scratch = Scratch::create("lab")?;
    let thirty = scratch.0.join("thirty.yaml");
    fs::write(&thirty, manifest(10, 3))?;
    let shop = built.root.join("examples/shop.yaml");
    let mut rows = Vec::new();
    for (what, file, goal) in
        [("lab up: 3 nodes, 30 pods, 10 Services", &thirty, true), ("lab up: 3 nodes, the demo's shop", &shop, false)]
    {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            times.push(Lab::up(&built.portolan, "bench-up", Some(file), &["--nodes", "3"])?.1);
        }
        let row = Row::new(what, median_milliseconds(&times) / 1e3, "s");
        rows.push(if goal { row.goal(Goal::Below(5.0)) } else { row });
    }
    Ok(rows)
}

/// Deployments of some replicas, each with its Service.
fn manifest(deployments: u32, replicas: u32) -> String {
    let mut text = String::new();
    for index in 0..deployments {
        let _ = write!(
            text,
            "apiVersion: apps/v1
kind: Deployment
metadata: {{name: app-{index}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: app-{index}}}}}
  template:
    metadata: {{labels: {{app: app-{index}}}}}
    spec:
      containers: [{{name: server, image: echo, ports: [{{containerPort: 8080}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: app-{index}}}
spec:
  selector: {{app: app-{index}}}
  ports: [{{port: 80, targetPort: 8080}}]
---
"
        );
    }
    text
}
