//! The life of one pod, in one task.

use std::net::IpAddr;
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures::future::LocalBoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio::process::Child;
use tokio::sync::watch;

use super::cni::Attachment;
use super::container::{self, ContainerState, Running, State};
use super::object::{Container, Pod, PodRecord, RecordedContainer};
use super::{Context, NodeContext, Wanted, resolver, status};
use crate::clock;
use crate::limits::{RESTART_DELAY_MAX, RESTART_DELAY_MIN, RETRY_DELAY_MAX, RETRY_DELAY_MIN, TERMINATION_TIME_MAX};
use crate::topology::namespace;

/// Runs a pod from its first sight to the removal of its object.
pub(super) async fn run(context: Rc<Context>, node: NodeContext, pod: Pod, mut wanted: watch::Receiver<Wanted>) {
    let mut life = Life::new(context, node, pod);
    if *wanted.borrow() == Wanted::Running {
        tokio::select! {
            biased;
            _ = wanted.wait_for(|wanted| *wanted != Wanted::Running) => {}
            () = life.live() => {}
        }
        // A pod whose containers have all ended stays until its object is deleted.
        let _ = wanted.wait_for(|wanted| *wanted != Wanted::Running).await;
    }
    life.end().await;
    if *wanted.borrow() != Wanted::Gone {
        life.delete_object(&mut wanted).await;
    }
}

struct Life {
    context: Rc<Context>,
    node: NodeContext,
    pod: Pod,
    begun: String,
    sandbox: Option<Child>,
    /// Whether ADD was tried: DEL must follow, also after an ADD that failed.
    attached: bool,
    addresses: Vec<IpAddr>,
    containers: Vec<ContainerState>,
    /// The message of the last event, so that a retry does not repeat it.
    told: String,
}

/// What happened in a container.
enum Happening {
    Listens(usize),
    Ended(usize, i32),
    Start(usize),
}

impl Life {
    fn new(context: Rc<Context>, node: NodeContext, pod: Pod) -> Life {
        let containers = pod.spec.containers.iter().map(ContainerState::new).collect();
        Life {
            context,
            node,
            pod,
            begun: clock::now(),
            sandbox: None,
            attached: false,
            addresses: Vec::new(),
            containers,
            told: String::new(),
        }
    }

    /// Brings the pod up and keeps it up. Ends only when all containers have ended for good.
    async fn live(&mut self) {
        if let Some((port, first, second)) = self.pod.port_conflict() {
            let message =
                format!("containers `{first}` and `{second}` both have containerPort {port}; give one another");
            for container in &mut self.containers {
                container.state = State::Waiting { reason: "PortConflict", message: message.clone() };
            }
            self.tell("PortConflict", &message).await;
            self.report().await;
            return std::future::pending().await;
        }
        self.retry_sandbox().await;
        self.retry_attach().await;
        self.run_containers().await;
    }

    async fn retry_sandbox(&mut self) {
        let mut delay = RETRY_DELAY_MIN;
        while let Err(error) = self.make_sandbox().await {
            self.tell("FailedCreatePodSandBox", &format!("{error:#}")).await;
            self.remove_sandbox().await;
            pause(&mut delay).await;
        }
    }

    async fn make_sandbox(&mut self) -> anyhow::Result<()> {
        let _turn = self.context.starts.acquire().await;
        let layout = &self.context.layout;
        let uid = &self.pod.metadata.uid;
        let directory = layout.pod(uid);
        std::fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
        let description = &self.context.description;
        let upstream = description.topology.outside_server().map(|server| server.addresses.clone()).unwrap_or_default();
        let files = [
            ("resolv.conf", resolver::resolver(&self.pod, &description.dns_addresses(), &upstream)),
            ("hosts", resolver::hosts(&self.pod, &[])),
        ];
        for (name, text) in files {
            std::fs::write(directory.join(name), text).with_context(|| format!("writing a pod's {name}"))?;
        }
        let mut command = tokio::process::Command::new(&description.program);
        command.args(["lab", "pause", "--hostname", self.pod.hostname()]);
        command.arg("--resolver").arg(directory.join("resolv.conf")).arg("--hosts").arg(directory.join("hosts"));
        command.arg("--die-with").arg(std::process::id().to_string());
        if self.pod.spec.host_network {
            command.arg("--network").arg(&self.node.namespace);
        } else {
            let name = layout.pod_namespace(uid);
            namespace::claim(layout, &name)?;
            command.arg("--new-network").arg(name);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("starting the sandbox's process")?;
        let mut ready = String::new();
        if let Some(output) = &mut child.stdout {
            let mut bytes = [0; 6];
            if output.read_exact(&mut bytes).await.is_ok() {
                ready = String::from_utf8_lossy(&bytes).into_owned();
            }
        }
        if ready != "ready\n" {
            let output = child.wait_with_output().await.context("waiting for the sandbox's process")?;
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        self.sandbox = Some(child);
        Ok(())
    }

    async fn retry_attach(&mut self) {
        if self.pod.spec.host_network {
            self.addresses.clone_from(&self.node.addresses);
            return;
        }
        // Until the agent serves, every ADD would only fail.
        let mut agent = self.node.agent.clone();
        let _ = agent.wait_for(|ready| *ready).await;
        let mut delay = RETRY_DELAY_MIN;
        loop {
            let attempt = {
                let _turn = self.context.starts.acquire().await;
                self.attached = true;
                self.attachment().add().await
            };
            match attempt {
                Ok(addresses) => {
                    self.addresses = addresses;
                    break;
                }
                Err(error) => {
                    tracing::info!(pod = %self.pod.metadata.name, %error, "ADD failed and is tried again");
                    if !error.is_temporary() {
                        self.tell("FailedCreatePodSandBox", &error.to_string()).await;
                        let _ = self.attachment().delete().await;
                        delay = delay.max(RESTART_DELAY_MIN);
                    }
                }
            }
            pause(&mut delay).await;
        }
        // The file is mounted into the sandbox: it is written in place, not replaced.
        let hosts = resolver::hosts(&self.pod, &self.addresses);
        let _ = std::fs::write(self.context.layout.pod(&self.pod.metadata.uid).join("hosts"), hosts);
    }

    async fn run_containers(&mut self) {
        self.record();
        let mut happenings: FuturesUnordered<LocalBoxFuture<'static, Happening>> = FuturesUnordered::new();
        for index in 0..self.containers.len() {
            happenings.push(Box::pin(async move { Happening::Start(index) }));
        }
        while let Some(happening) = happenings.next().await {
            match happening {
                Happening::Start(index) => self.start_container(index, &mut happenings).await,
                Happening::Listens(index) => {
                    self.containers[index].listening = true;
                    // One report for all containers that started together.
                    let others_start = self.containers.iter().any(|it| !it.listening);
                    if !others_start || self.containers.iter().any(|it| it.restarts > 0) {
                        self.report().await;
                    }
                }
                Happening::Ended(index, code) => self.container_ended(index, code, &mut happenings).await,
            }
        }
    }

    async fn start_container(
        &mut self,
        index: usize,
        happenings: &mut FuturesUnordered<LocalBoxFuture<'static, Happening>>,
    ) {
        let context = Rc::clone(&self.context);
        let _turn = context.starts.acquire().await;
        let container = &self.pod.spec.containers[index];
        let sandbox = self.sandbox.as_ref().and_then(Child::id).unwrap_or_default();
        match container::start(&self.context, &self.node, &self.pod, container, sandbox) {
            Ok(Running { mut child, readiness }) => {
                self.containers[index].started(child.id());
                let (sender, ended) = tokio::sync::oneshot::channel::<()>();
                happenings.push(Box::pin(async move {
                    tokio::select! {
                        true = readiness.wait() => Happening::Listens(index),
                        // The other future tells of the end.
                        _ = ended => std::future::pending().await,
                    }
                }));
                happenings.push(Box::pin(async move {
                    let code = child.wait().await.ok().and_then(|status| status.code()).unwrap_or(137);
                    drop(sender);
                    Happening::Ended(index, code)
                }));
            }
            Err(error) => {
                let message = format!("{error:#}");
                self.containers[index].state =
                    State::Waiting { reason: "CreateContainerError", message: message.clone() };
                self.tell("Failed", &message).await;
                self.report().await;
                happenings.push(self.restart(index));
            }
        }
    }

    async fn container_ended(
        &mut self,
        index: usize,
        code: i32,
        happenings: &mut FuturesUnordered<LocalBoxFuture<'static, Happening>>,
    ) {
        let again = match self.pod.spec.restart_policy.as_deref() {
            Some("Never") => false,
            Some("OnFailure") => code != 0,
            _ => true,
        };
        let name = self.containers[index].name.clone();
        let container = &mut self.containers[index];
        container.listening = false;
        container.pid = None;
        if again {
            let log = self.context.layout.pod(&self.pod.metadata.uid).join(format!("{name}.log"));
            let message = format!("container `{name}` ended with code {code}: {}", last_line(&log));
            container.state = State::Waiting { reason: "CrashLoopBackOff", message: message.clone() };
            happenings.push(self.restart(index));
            self.tell("BackOff", &message).await;
        } else {
            container.state = State::Ended { code };
        }
        self.report().await;
    }

    fn restart(&mut self, index: usize) -> LocalBoxFuture<'static, Happening> {
        let container = &mut self.containers[index];
        let delay = RESTART_DELAY_MIN.saturating_mul(1 << container.restarts.min(16)).min(RESTART_DELAY_MAX);
        container.restarts += 1;
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            Happening::Start(index)
        })
    }

    /// Takes everything of the pod away. May be called at any point of its life.
    async fn end(&mut self) {
        for container in &mut self.containers {
            container.listening = false;
        }
        let processes: Vec<u32> = self.containers.iter().filter_map(|container| container.pid).collect();
        signal(&processes, Signal::SIGTERM);
        let until = tokio::time::Instant::now() + TERMINATION_TIME_MAX;
        while processes.iter().any(|pid| is_running(*pid)) && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        signal(&processes, Signal::SIGKILL);
        let mut delay = RETRY_DELAY_MIN;
        while self.attached && !self.pod.spec.host_network {
            match self.attachment().delete().await {
                Ok(()) => self.attached = false,
                Err(error) => {
                    self.tell("FailedKillPod", &error.to_string()).await;
                    pause(&mut delay).await;
                }
            }
        }
        self.remove_sandbox().await;
        let _ = std::fs::remove_dir_all(self.context.layout.pod(&self.pod.metadata.uid));
    }

    async fn remove_sandbox(&mut self) {
        if let Some(mut sandbox) = self.sandbox.take() {
            let _ = sandbox.kill().await;
        }
        if !self.pod.spec.host_network {
            let layout = &self.context.layout;
            let name = layout.pod_namespace(&self.pod.metadata.uid);
            // Whatever a command left running in the pod ends with it.
            if let Err(error) = namespace::evict(layout, &name) {
                tracing::warn!(%name, %error, "a pod's namespace stays");
            }
        }
    }

    async fn delete_object(&mut self, wanted: &mut watch::Receiver<Wanted>) {
        let mut delay = RETRY_DELAY_MIN;
        while let Err(error) = self.context.client.delete_now(&self.pod.path()).await {
            tracing::debug!(pod = %self.pod.metadata.name, %error, "the object of an ended pod stays for now");
            tokio::select! {
                _ = wanted.wait_for(|wanted| *wanted == Wanted::Gone) => return,
                () = pause(&mut delay) => {}
            }
        }
    }

    fn attachment(&self) -> Attachment {
        let metadata = &self.pod.metadata;
        Attachment {
            plugin: self.context.plugin.clone(),
            socket: self.node.cni_socket.clone(),
            uid: metadata.uid.clone(),
            network: namespace::path(&self.context.layout.pod_namespace(&metadata.uid)),
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
        }
    }

    /// Notes the pod for the commands that enter it.
    fn record(&self) {
        let metadata = &self.pod.metadata;
        let record = PodRecord {
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
            node: self.node.name.clone(),
            addresses: self.addresses.clone(),
            network: if self.pod.spec.host_network {
                self.node.namespace.clone()
            } else {
                namespace::path(&self.context.layout.pod_namespace(&metadata.uid))
            },
            sandbox: self.sandbox.as_ref().and_then(Child::id).unwrap_or_default(),
            containers: self.pod.spec.containers.iter().map(recorded).collect(),
        };
        if let Err(error) = record.save(&self.context.layout) {
            tracing::warn!(pod = %metadata.name, %error, "a pod's record cannot be written");
        }
    }

    /// Tells the API how the pod is, until it is heard.
    async fn report(&self) {
        let status = status::status(&self.pod, &self.node.addresses, &self.addresses, &self.containers, &self.begun);
        let patch = json!({ "status": status });
        let path = format!("{}/status", self.pod.path());
        let mut delay = RETRY_DELAY_MIN;
        while let Err(error) = self.context.client.merge(&path, &patch).await {
            if error.is(http::StatusCode::NOT_FOUND) {
                return;
            }
            tracing::debug!(pod = %self.pod.metadata.name, %error, "a pod's status was not taken");
            pause(&mut delay).await;
        }
    }

    /// Writes an event of the pod, unless it says what the last one said.
    async fn tell(&mut self, reason: &str, message: &str) {
        if self.told == message {
            return;
        }
        message.clone_into(&mut self.told);
        let metadata = &self.pod.metadata;
        tracing::warn!(namespace = %metadata.namespace, pod = %metadata.name, reason, message, "pod");
        let now = clock::now();
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": format!("{}.", metadata.name), "namespace": metadata.namespace},
            "involvedObject": {
                "apiVersion": "v1", "kind": "Pod", "namespace": metadata.namespace,
                "name": metadata.name, "uid": metadata.uid,
            },
            "type": "Warning",
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet", "host": self.node.name},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        });
        let collection = format!("/api/v1/namespaces/{}/events", metadata.namespace);
        if let Err(error) = self.context.client.create(&collection, &event).await {
            tracing::debug!(%error, "an event was not taken");
        }
    }
}

fn recorded(container: &Container) -> RecordedContainer {
    RecordedContainer { name: container.name.clone(), ports: container.ports() }
}

async fn pause(delay: &mut Duration) {
    tokio::time::sleep(*delay).await;
    *delay = (*delay * 2).min(RETRY_DELAY_MAX);
}

fn signal(processes: &[u32], signal: Signal) {
    for pid in processes.iter().filter_map(|pid| i32::try_from(*pid).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// Whether a process exists and is not a zombie: its status is collected later, or by init.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn last_line(log: &std::path::Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned()
}
