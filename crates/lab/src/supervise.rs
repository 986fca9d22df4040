//! The process behind a lab: it builds the topology, serves the API, and runs agents and pods.
//!
//! ```text
//!   lab up ──▶ supervisor ─┬─ thread: API server
//!      ◀─ reports (pipe) ──┤─ one agent per node, started again if it dies
//!                          ├─ load balancers' addresses and routes
//!   lab down ─ control ───▶├─ servers outside the cluster
//!                          └─ kubelet ─▶ pods
//! ```
//!
//! Every process that it starts dies with it (`PR_SET_PDEATHSIG`), so a supervisor that is killed
//! leaves only namespaces and files, which `lab down` finds by the lab's description.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::client::Client;
use crate::description::Description;
use crate::inside::{self, Entry};
use crate::kubelet;
use crate::limits::{RESTART_DELAY_MAX, RESTART_DELAY_MIN};
use crate::manifest::Manifest;
use crate::report::Report;
use crate::topology::{OUTSIDE_PORT, namespace};
use crate::{LabError, Layout, Result, balancer, control_plane, standing, topology};

/// How often a starting agent's socket is tried.
const SOCKET_PERIOD: Duration = Duration::from_millis(5);

/// Runs a lab until it is told to stop. Its standard output is read by `lab up`.
pub fn supervise(name: &str) -> Result<()> {
    let layout = Layout::new(name)?;
    // Its own session: the terminal that started the lab may close.
    let _ = nix::unistd::setsid();
    write_whole(&layout.supervisor_pid(), &std::process::id().to_string()).context("writing the supervisor's id")?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the supervisor")?;
    let result = tokio::task::LocalSet::new().block_on(&runtime, run(layout.clone()));
    if let Err(error) = &result
        && Report::of(error).send().is_err()
    {
        // Whoever started the lab is gone: nobody else will take it down.
        crate::down::remove(&layout)?;
    }
    result
}

async fn run(layout: Layout) -> Result<()> {
    let description = Description::load(&layout)?;
    let control = UnixListener::bind(layout.control_socket()).context("opening the control socket")?;
    tell(&format!("making {} nodes", description.topology.nodes.len()))?;
    let built = {
        let (layout, topology) = (layout.clone(), description.topology.clone());
        tokio::task::spawn_blocking(move || topology::build(&layout, &topology))
    };
    standing::write_files(&layout, &description)?;
    if description.api_socket.is_none() {
        control_plane::start(&layout, &description).context("starting the API server")?;
    }
    built.await.context("building the topology")??;

    tell("starting agents")?;
    let mut agents = BTreeMap::new();
    for node in &description.topology.nodes {
        let (ready, watched) = watch::channel(false);
        agents.insert(node.name.clone(), watched);
        tokio::task::spawn_local(keep_agent(layout.clone(), description.clone(), node.name.clone(), ready));
    }
    let _outside = start_outside(&layout, &description)?;

    let client = Client::new(description.api(&layout));
    standing::create_namespaces(&client).await.context("creating namespaces")?;
    let context = Rc::new(kubelet::Context::new(layout.clone(), description.clone(), &agents));
    for node in context.nodes.values() {
        kubelet::register(&client, node).await.with_context(|| format!("registering {}", node.name))?;
    }
    tokio::task::spawn_local(kubelet::run(Rc::clone(&context)));
    tokio::task::spawn_local(balancer::run(layout.clone(), description.clone()));

    tell("applying manifests")?;
    standing::create_dns(&client, &layout, &description).await.context("creating the cluster's DNS")?;
    apply(&client, &layout).await?;
    Report::Ready.send().context("reporting that the lab is up")?;
    // Nobody reads on after that line.
    let null = File::options().write(true).open("/dev/null").context("opening /dev/null")?;
    nix::unistd::dup2_stdout(null).context("closing the report")?;
    until_stopped(&control).await
}

fn tell(progress: &str) -> Result<()> {
    Report::Progress(progress.to_owned()).send().context("the command that started the lab is gone")?;
    Ok(())
}

/// Creates the user's objects.
async fn apply(client: &Client, layout: &Layout) -> Result<()> {
    let text = std::fs::read(layout.manifests()).context("reading the manifests")?;
    let manifests: Vec<Manifest> = serde_json::from_slice(&text).context("reading the manifests")?;
    for manifest in manifests {
        let collection = manifest.kind.collection(Some(&manifest.namespace));
        client.apply(&collection, &manifest.name, &manifest.object).await.map_err(|error| {
            LabError::usage(
                format!("{}: {}: {error}", manifest.origin, manifest.title()),
                "change the field that the message names",
            )
        })?;
    }
    Ok(())
}

/// Runs a node's agent, and runs it again when it ends. The data plane stays in between.
async fn keep_agent(layout: Layout, description: Description, node: String, ready: watch::Sender<bool>) {
    let mut delay = RESTART_DELAY_MIN;
    loop {
        let begun = tokio::time::Instant::now();
        match start_agent(&layout, &description, &node) {
            Ok(mut agent) => {
                let socket = layout.node(&node).join("cni.sock");
                let status = tokio::select! {
                    () = answers(&socket, &ready) => agent.wait().await,
                    status = agent.wait() => status,
                };
                tracing::warn!(%node, ?status, "an agent ended");
            }
            Err(error) => tracing::error!(%node, error = format!("{error:#}"), "an agent does not start"),
        }
        ready.send_replace(false);
        if begun.elapsed() > RESTART_DELAY_MAX {
            delay = RESTART_DELAY_MIN;
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(RESTART_DELAY_MAX);
    }
}

/// Says that the agent is ready once its socket takes connections.
async fn answers(socket: &Path, ready: &watch::Sender<bool>) {
    while UnixStream::connect(socket).await.is_err() {
        tokio::time::sleep(SOCKET_PERIOD).await;
    }
    ready.send_replace(true);
}

fn start_agent(layout: &Layout, description: &Description, node: &str) -> anyhow::Result<Child> {
    let directory = layout.node(node);
    let entry = Entry::network(namespace::path(&layout.namespace(node)));
    let command: Vec<OsString> = vec![
        description.program.clone().into_os_string(),
        "agent".into(),
        "--config".into(),
        directory.join("agent.yaml").into_os_string(),
    ];
    let child = start(description, &entry, &command, &directory.join("agent.log"), &[])?;
    write_whole(&directory.join("agent.pid"), &child.id().unwrap_or_default().to_string())
        .context("writing agent.pid")?;
    Ok(child)
}

/// Writes a file that is there as a whole or not at all: others read it as soon as it appears.
fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let unfinished = path.with_extension("new");
    std::fs::write(&unfinished, text)?;
    std::fs::rename(&unfinished, path)
}

/// The servers outside the cluster: echo and DNS. They live as long as the returned handles.
fn start_outside(layout: &Layout, description: &Description) -> anyhow::Result<Vec<Child>> {
    let mut children = Vec::new();
    for server in description.topology.clients.iter().filter(|client| client.server) {
        let entry = Entry::network(namespace::path(&layout.namespace(&server.name)));
        let program = description.program.clone().into_os_string();
        let echo: Vec<OsString> =
            vec![program.clone(), "lab".into(), "echo".into(), "--port".into(), OUTSIDE_PORT.to_string().into()];
        let log = layout.directory().join(format!("{}.log", server.name));
        children.push(start(description, &entry, &echo, &log, &[("PORTOLAN_POD", &server.name)])?);
        let dns: Vec<OsString> = vec![program, "dns".into(), "--config".into(), layout.outside_dns().into_os_string()];
        children.push(start(description, &entry, &dns, &log, &[])?);
    }
    Ok(children)
}

fn start(
    description: &Description,
    entry: &Entry,
    command: &[OsString],
    log: &PathBuf,
    environment: &[(&str, &str)],
) -> anyhow::Result<Child> {
    let log =
        File::options().create(true).append(true).open(log).with_context(|| format!("opening {}", log.display()))?;
    let mut child = inside::child(&description.program, entry, command);
    child.envs(environment.iter().copied());
    child.stdin(Stdio::null()).stdout(OwnedFd::from(log.try_clone()?)).stderr(OwnedFd::from(log));
    child.kill_on_drop(true);
    child.spawn().with_context(|| format!("starting {}", command.join(" ".as_ref()).display()))
}

/// Serves the control socket. A peer that asked to stop learns the end by the closed connection.
async fn until_stopped(control: &UnixListener) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("waiting for signals")?;
    loop {
        let stream = tokio::select! {
            _ = terminate.recv() => return Ok(()),
            accepted = control.accept() => accepted.context("accepting on the control socket")?.0,
        };
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        let read = tokio::time::timeout(Duration::from_secs(1), stream.read_line(&mut line)).await;
        if !matches!(read, Ok(Ok(_))) {
            continue;
        }
        match line.trim() {
            "stop" => {
                tracing::info!("stopping");
                // The connection closes with the process: it must outlive everything here.
                std::mem::forget(stream);
                return Ok(());
            }
            "ping" => drop(stream.write_all(b"pong\n").await),
            other => tracing::debug!(command = other, "an unknown command"),
        }
    }
}
