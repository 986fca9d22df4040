//! `portolan lab`: clusters on one machine.

use std::ffi::OsString;
use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::{Args, Subcommand, ValueEnum};
use portolan_apiserver::StoreLocation;
use portolan_lab::echo::Identity;
use portolan_lab::inside::{self, Entry};
use portolan_lab::pause::{Network, Sandbox};
use portolan_lab::target::Target;
use portolan_lab::{DEFAULT_NAME, FABRICS, IpFamilies, LabError, SERVICES, UpOptions};

use crate::output::{Failure, Format, print_value};

#[derive(Debug, Args)]
pub(crate) struct LabArguments {
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Bring a cluster up
    Up(UpArguments),
    /// Show what a cluster is made of and how to reach it
    Status(StatusArguments),
    /// Take a cluster down, also one that crashed
    Down(NameArguments),
    /// Run a command in a pod, on a node or on a machine outside the cluster
    Exec(ExecArguments),
    /// Bring a cluster up, send real traffic over every way, show it, and take the cluster down
    Demo(DemoArguments),
    #[command(hide = true)]
    Supervise(NameArguments),
    #[command(hide = true)]
    Inside(InsideArguments),
    #[command(hide = true)]
    Pause(PauseArguments),
    #[command(hide = true)]
    Echo(EchoArguments),
    #[command(hide = true)]
    Probe(EntryArguments),
    #[command(hide = true)]
    Knock(KnockArguments),
}

#[derive(Debug, Args)]
struct NameArguments {
    /// The lab's name
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
}

/// The cluster's IP families
#[derive(Debug, Clone, Copy, ValueEnum)]
enum FamilyArgument {
    /// IPv4 only
    Ipv4,
    /// IPv6 only
    Ipv6,
    /// Both, IPv4 first
    Dual,
}

#[derive(Debug, Args)]
struct ModeArguments {
    /// How many nodes
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// How many segments the nodes are on; a router joins them
    #[arg(long, default_value_t = 1)]
    segments: usize,
    /// How pods reach pods on other nodes
    #[arg(long, default_value = FABRICS[0], value_parser = FABRICS)]
    fabric: String,
    /// What is set for the fabric, as in an agent's configuration: vxlan.directRouting=true, hostGw.beyond=vxlan, …
    #[arg(long = "fabric-option", value_name = "SECTION.FIELD=VALUE")]
    fabric_options: Vec<String>,
    /// How Services are proxied
    #[arg(long, default_value = SERVICES[0], value_parser = SERVICES)]
    services: String,
    /// The cluster's IP families
    #[arg(long, value_enum, default_value_t = FamilyArgument::Ipv4)]
    ip_family: FamilyArgument,
}

#[derive(Debug, Args)]
struct UpArguments {
    #[command(flatten)]
    name: NameArguments,
    /// A file of manifests, or - for standard input; may be given several times
    #[arg(short = 'f', long = "file", value_name = "MANIFEST")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    modes: ModeArguments,
    /// A file that describes nodes, clients and segments, instead of --nodes
    #[arg(long, value_name = "FILE", conflicts_with_all = ["nodes", "segments"])]
    topology: Option<PathBuf>,
    /// Where the API server keeps its objects: embedded, or etcd=URL[,URL…], as `portolan apiserver` takes it.
    /// A lab's objects go with it
    #[arg(long, value_name = "embedded|etcd=URL", default_value = "embedded", value_parser = store)]
    store: String,
    /// A Unix socket that serves the Kubernetes API (`kubectl proxy --unix-socket`), instead of the
    /// lab's own API server
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// Wait until every pod is ready and every Service answers from every node
    #[arg(long)]
    wait: bool,
    /// Leave a lab that does not come up, to look at it
    #[arg(long)]
    keep: bool,
}

/// Whether a text says where to keep objects. The lab's description holds it as it is.
fn store(text: &str) -> Result<String, String> {
    text.parse::<StoreLocation>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

#[derive(Debug, Args)]
struct StatusArguments {
    #[command(flatten)]
    name: NameArguments,
    /// The form of the output
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Format::Text)]
    output: Format,
}

#[derive(Debug, Args)]
struct ExecArguments {
    #[command(flatten)]
    name: NameArguments,
    /// pod/[NAMESPACE/]NAME, deploy/[NAMESPACE/]NAME (its first pod), node/NAME or client/NAME
    target: Target,
    /// The container, where a pod has several; they share the pod's network
    #[arg(short, long)]
    container: Option<String>,
    /// The command and its arguments
    #[arg(required = true, last = true)]
    command: Vec<OsString>,
}

#[derive(Debug, Args)]
struct DemoArguments {
    #[command(flatten)]
    modes: ModeArguments,
    /// The lab's name
    #[arg(long, default_value = "demo")]
    name: String,
    /// The manifests of the shop
    #[arg(short = 'f', long = "file", value_name = "MANIFEST", default_value = "examples/shop.yaml")]
    file: PathBuf,
    /// Leave the cluster up
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Args)]
struct EntryArguments {
    #[arg(long)]
    network: Option<PathBuf>,
    #[arg(long)]
    mount: Option<PathBuf>,
    #[arg(long)]
    uts: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct InsideArguments {
    #[command(flatten)]
    entry: EntryArguments,
    #[arg(long)]
    die_with: Option<u32>,
    #[arg(required = true, last = true)]
    command: Vec<OsString>,
}

#[derive(Debug, Args)]
struct PauseArguments {
    #[arg(long)]
    new_network: Option<String>,
    #[arg(long)]
    network: Option<PathBuf>,
    #[arg(long)]
    hostname: String,
    #[arg(long)]
    resolver: PathBuf,
    #[arg(long)]
    hosts: PathBuf,
    #[arg(long)]
    die_with: u32,
}

#[derive(Debug, Args)]
struct EchoArguments {
    #[command(flatten)]
    entry: EntryArguments,
    #[arg(long)]
    die_with: Option<u32>,
    #[arg(long = "port")]
    ports: Vec<u16>,
}

#[derive(Debug, Args)]
struct KnockArguments {
    #[command(flatten)]
    entry: EntryArguments,
    #[arg(long)]
    seconds: u64,
    addresses: Vec<SocketAddr>,
}

impl From<LabError> for Failure {
    fn from(error: LabError) -> Failure {
        let hint = error.hint();
        let told = if hint.is_empty() { anyhow!("{error}") } else { anyhow!("{error}\nhint: {hint}") };
        match error {
            LabError::Negative { .. } => Failure::No(told),
            LabError::Usage { .. } => Failure::Usage(told),
            LabError::Environment { .. } => Failure::Environment(told),
            LabError::Internal(_) => Failure::Internal(told),
        }
    }
}

impl From<FamilyArgument> for IpFamilies {
    fn from(family: FamilyArgument) -> IpFamilies {
        match family {
            FamilyArgument::Ipv4 => IpFamilies::Ipv4,
            FamilyArgument::Ipv6 => IpFamilies::Ipv6,
            FamilyArgument::Dual => IpFamilies::Dual,
        }
    }
}

impl From<EntryArguments> for Entry {
    fn from(arguments: EntryArguments) -> Entry {
        Entry { network: arguments.network, mount: arguments.mount, uts: arguments.uts }
    }
}

pub(crate) fn run(arguments: LabArguments) -> Result<ExitCode, Failure> {
    match arguments.command {
        LabCommand::Up(arguments) => up(arguments),
        LabCommand::Status(arguments) => status(&arguments),
        LabCommand::Down(arguments) => {
            portolan_lab::down(&arguments.name)?;
            eprintln!("lab {} is down", arguments.name);
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::Exec(arguments) => {
            let ExecArguments { name, target, container, command } = arguments;
            portolan_lab::exec(&name.name, &target, container.as_deref(), &command)?;
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::Demo(arguments) => demo(arguments),
        LabCommand::Supervise(arguments) => {
            start_logging();
            portolan_lab::supervise(&arguments.name)?;
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::Inside(arguments) => {
            inside::become_command(&arguments.entry.into(), arguments.die_with, &arguments.command)?;
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::Pause(arguments) => {
            let network = match (arguments.new_network, arguments.network) {
                (Some(name), _) => Network::New(name),
                (None, Some(path)) => Network::Existing(path),
                (None, None) => return Err(Failure::Usage(anyhow!("--network or --new-network is missing"))),
            };
            let PauseArguments { hostname, resolver, hosts, die_with, .. } = arguments;
            portolan_lab::pause::pause(&Sandbox { network, hostname, resolver, hosts, parent: die_with })?;
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::Echo(arguments) => echo(arguments),
        LabCommand::Probe(arguments) => {
            Entry::from(arguments).enter()?;
            portolan_lab::probe::run()?;
            Ok(ExitCode::SUCCESS)
        }
        LabCommand::Knock(arguments) => {
            Entry::from(arguments.entry).enter()?;
            let closed = portolan_lab::knock::knock(&arguments.addresses, Duration::from_secs(arguments.seconds));
            for address in &closed {
                println!("{address}");
            }
            Ok(ExitCode::from(u8::from(!closed.is_empty())))
        }
    }
}

/// The log of the supervisor: its standard error is a file.
fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("PORTOLAN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

fn options(name: &str, modes: &ModeArguments) -> UpOptions {
    UpOptions {
        nodes: modes.nodes,
        segments: modes.segments,
        fabric: modes.fabric.clone(),
        fabric_options: modes.fabric_options.clone(),
        services: modes.services.clone(),
        ip_families: modes.ip_family.into(),
        ..UpOptions::new(name)
    }
}

fn up(arguments: UpArguments) -> Result<ExitCode, Failure> {
    let store = Some(arguments.store).filter(|store| store != "embedded");
    if store.is_some() && arguments.api_socket.is_some() {
        return Err(Failure::Usage(anyhow!(
            "--store is about the lab's own API server, and --api-socket names another"
        )));
    }
    let name = arguments.name.name;
    let begun = Instant::now();
    let options = UpOptions {
        manifests: arguments.files,
        topology: arguments.topology,
        api_socket: arguments.api_socket,
        store,
        wait: arguments.wait,
        keep: arguments.keep,
        ..options(&name, &arguments.modes)
    };
    let mut progress = Progress::new();
    let result = portolan_lab::up(&options, &mut |text| progress.step(text));
    progress.end();
    result?;
    eprintln!("lab {name} is up after {:.1} s", begun.elapsed().as_secs_f64());
    let status = portolan_lab::status(&name)?;
    println!("export KUBECONFIG={}", status.kubeconfig.display());
    let named = if name == DEFAULT_NAME { String::new() } else { format!(" --name {name}") };
    eprintln!("next: kubectl get pods -A -o wide");
    eprintln!("      portolan lab status{named}");
    eprintln!("      portolan lab exec{named} node/{} -- ip route", status.nodes[0].name);
    eprintln!("      portolan lab down{named}");
    Ok(ExitCode::SUCCESS)
}

fn status(arguments: &StatusArguments) -> Result<ExitCode, Failure> {
    let status = portolan_lab::status(&arguments.name.name)?;
    match arguments.output {
        Format::Text => print!("{}", status.text()),
        format => print_value(&status, format)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn demo(arguments: DemoArguments) -> Result<ExitCode, Failure> {
    let options = UpOptions {
        manifests: vec![arguments.file],
        wait: true,
        keep: arguments.keep,
        ..options(&arguments.name, &arguments.modes)
    };
    let mut progress = Progress::new();
    let mut output = std::io::stdout().lock();
    let mut steps = |text: &str| progress.step(text);
    let result = portolan_lab::demo::demo(&options, &mut steps, &mut output);
    progress.end();
    Ok(if result? { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn echo(arguments: EchoArguments) -> Result<ExitCode, Failure> {
    if let Some(parent) = arguments.die_with {
        inside::die_with(parent)?;
    }
    Entry::from(arguments.entry).enter()?;
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let identity = Identity {
        pod: variable("PORTOLAN_POD"),
        namespace: variable("PORTOLAN_NAMESPACE"),
        node: variable("PORTOLAN_NODE"),
        container: variable("PORTOLAN_CONTAINER"),
    };
    portolan_lab::echo::serve(identity, &arguments.ports)?;
    Ok(ExitCode::SUCCESS)
}

/// Says on stderr what is being done: one line that changes on a terminal, lines elsewhere.
struct Progress {
    terminal: bool,
    open: bool,
    begun: Instant,
}

impl Progress {
    fn new() -> Progress {
        Progress { terminal: std::io::stderr().is_terminal(), open: false, begun: Instant::now() }
    }

    fn step(&mut self, text: &str) {
        if text.is_empty() {
            self.end();
            return;
        }
        if text.starts_with("warning: ") {
            self.end();
            eprintln!("{text}");
            return;
        }
        let elapsed = self.begun.elapsed().as_secs_f64();
        if self.terminal {
            eprint!("\r\x1b[K{elapsed:5.1} s  {text} …");
            let _ = std::io::stderr().flush();
            self.open = true;
        } else {
            eprintln!("{elapsed:5.1} s  {text}");
        }
    }

    fn end(&mut self) {
        if self.open {
            eprint!("\r\x1b[K");
            self.open = false;
        }
    }
}
