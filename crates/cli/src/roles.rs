//! The long-running roles, each from its configuration file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use portolan_agent::node::RunError;
use portolan_apiserver::StoreLocation;
use portolan_net::IpNet;
use tracing_subscriber::EnvFilter;

use crate::output::Failure;

/// Worker threads of a role's runtime. The node's loop has a thread of its own beside them.
const WORKER_THREADS: usize = 2;

/// Runs a short command's async part.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    runtime()?.block_on(future)
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .enable_all()
        .build()
        .context("no runtime could be started")
        .map_err(Failure::Environment)
}

/// Logs go to stderr. `PORTOLAN_LOG` chooses what, as `info` or `portolan_agent=debug`.
fn start_logging() {
    let filter = EnvFilter::try_from_env("PORTOLAN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

/// Ends with the first SIGTERM or SIGINT.
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// The node's agent.
pub(crate) fn agent(config: &Path) -> Result<ExitCode, Failure> {
    start_logging();
    let config = portolan_agent::AgentConfig::load(config).map_err(|error| Failure::Usage(error.into()))?;
    runtime()?.block_on(async {
        portolan_agent::node::run(config, terminated()).await.map_err(|error| match error {
            RunError::LoopEnded => Failure::Internal(error.into()),
            error => Failure::Environment(anyhow::Error::from(error).context("the agent stopped")),
        })
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The cluster's DNS server.
pub(crate) fn dns(config: &Path) -> Result<ExitCode, Failure> {
    start_logging();
    let config = portolan_agent::config::read(config).map_err(|error| Failure::Usage(error.into()))?;
    runtime()?.block_on(async {
        portolan_agent::dns::run(config, terminated())
            .await
            .context("the DNS server stopped")
            .map_err(Failure::Environment)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Removes what is ours from the kernel.
pub(crate) fn clean(config: &Path) -> Result<ExitCode, Failure> {
    let config = portolan_agent::AgentConfig::load(config).map_err(|error| Failure::Usage(error.into()))?;
    for line in portolan_agent::node::clean(&config).context("not everything could be removed")? {
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, clap::Args)]
pub(crate) struct ApiserverArguments {
    /// Where certificates and the token are kept, and objects if the store is embedded
    #[arg(long, value_name = "DIRECTORY", default_value = "/var/lib/portolan/apiserver")]
    data_directory: PathBuf,
    /// Where objects are kept: embedded, or etcd=URL[,URL…][/PREFIX][?ca=…&certificate=…&key=…&user=…&password-file=…]
    #[arg(long, value_name = "embedded|etcd=URL", default_value = "embedded")]
    store: StoreLocation,
    /// The Unix socket for agents on this machine
    #[arg(long, value_name = "PATH", default_value = "/run/portolan/api.sock")]
    socket: PathBuf,
    /// The loopback address for kubectl; port 0 takes any free one
    #[arg(long, default_value = "127.0.0.1:6443")]
    listen: SocketAddr,
    /// Prefixes of pods, at most one per family
    #[arg(long, value_delimiter = ',', default_value = "10.42.0.0/16")]
    cluster_prefixes: Vec<IpNet>,
    /// Prefixes of ClusterIPs, at most one per family
    #[arg(long, value_delimiter = ',', default_value = "10.96.0.0/16")]
    service_prefixes: Vec<IpNet>,
}

/// The embedded control plane.
pub(crate) fn apiserver(arguments: ApiserverArguments) -> Result<ExitCode, Failure> {
    start_logging();
    let mut config = portolan_apiserver::Config::new(arguments.data_directory);
    config.store = arguments.store;
    config.unix_socket = arguments.socket;
    (config.loopback_address, config.loopback_port) = (arguments.listen.ip(), arguments.listen.port());
    config.cluster_prefixes = arguments.cluster_prefixes;
    config.service_prefixes = arguments.service_prefixes;
    runtime()?.block_on(async {
        let server = portolan_apiserver::start(config)
            .await
            .context("the control plane could not be started")
            .map_err(Failure::Environment)?;
        println!("export KUBECONFIG={}", server.kubeconfig().display());
        terminated().await;
        server.shutdown().await;
        Ok(ExitCode::SUCCESS)
    })
}
