//! The server: binding, following the tables, running, stopping.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use portolan_intent::names::Names;
use portolan_state::Snapshot;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::holder::holder_of;
use super::service::{Service, Tables};
use super::{tcp, udp};
use crate::limits::{BIND_ATTEMPTS_MAX, TCP_CONNECTIONS_MAX, UDP_TASKS_PER_SOCKET};
use crate::metrics::Metrics;
use crate::{Config, ConfigError, Settings};

/// Why the server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot work.
    #[error("the DNS configuration is wrong")]
    Config(#[from] ConfigError),
    /// Another program has the port.
    #[error(
        "cannot answer DNS on {address} over {protocol}: the port is held by {holder}; stop it, or give `listen` another address or port"
    )]
    PortInUse {
        /// The address.
        address: SocketAddr,
        /// `udp` or `tcp`.
        protocol: &'static str,
        /// Who holds it.
        holder: String,
    },
    /// The address cannot be listened on for another reason.
    #[error("cannot answer DNS on {address} over {protocol}: {hint}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// `udp` or `tcp`.
        protocol: &'static str,
        /// What the user can do.
        hint: &'static str,
        /// What the operating system says.
        source: io::Error,
    },
    /// A task of the server ended though it never should.
    #[error("a task of the DNS server ended; start the server again and report this with its log")]
    TaskEnded,
}

/// A server that holds its sockets and does not answer yet.
#[derive(Debug)]
pub struct Server {
    service: Arc<Service>,
    tables: watch::Receiver<Snapshot>,
    sockets: Vec<(Arc<UdpSocket>, TcpListener)>,
}

/// Answers until `shutdown` is done. The same as [`Server::bind`] and [`Server::run`].
pub async fn serve(
    config: Config,
    tables: watch::Receiver<Snapshot>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    Server::bind(config, tables).await?.run(shutdown).await
}

impl Server {
    /// Takes the sockets. Port 0 means any free port, the same for UDP and TCP.
    pub async fn bind(config: Config, mut tables: watch::Receiver<Snapshot>) -> Result<Server, Error> {
        let settings = Settings::try_from(config)?;
        let mut sockets = Vec::new();
        for address in &settings.listen {
            sockets.push(bind(*address).await?);
        }
        let snapshot = tables.borrow_and_update().clone();
        let mut names = Names::new(settings.zone.clone()).with_pods(settings.pods);
        names.update(&snapshot);
        let service = Arc::new(Service::new(settings, Tables { snapshot, names }));
        Ok(Server { service, tables, sockets })
    }

    /// The addresses that it answers on.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(|(socket, _)| socket.local_addr().ok()).collect()
    }

    /// The counters, which live as long as anybody reads them.
    pub fn metrics(&self) -> Arc<Metrics> {
        self.service.metrics.clone()
    }

    /// Answers until `shutdown` is done. Queries that wait for an upstream are given up then.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        let mut tasks = JoinSet::new();
        let connections = Arc::new(Semaphore::new(TCP_CONNECTIONS_MAX));
        for (socket, listener) in self.sockets {
            for _ in 0..UDP_TASKS_PER_SOCKET {
                tasks.spawn(udp::run(socket.clone(), self.service.clone()));
            }
            tasks.spawn(tcp::run(listener, self.service.clone(), connections.clone()));
        }
        tasks.spawn(follow(self.tables, self.service));
        let ended = tokio::select! {
            () = shutdown => Ok(()),
            _ = tasks.join_next() => Err(Error::TaskEnded),
        };
        // The sockets are free when this returns.
        tasks.shutdown().await;
        ended
    }
}

/// Keeps the names up to the tables. Where nobody writes the tables any more, the last stay.
async fn follow(mut tables: watch::Receiver<Snapshot>, service: Arc<Service>) {
    while tables.changed().await.is_ok() {
        let snapshot = tables.borrow_and_update().clone();
        let mut names = service.tables().names.clone();
        names.update(&snapshot);
        service.replace_tables(Tables { snapshot, names });
    }
    std::future::pending::<()>().await;
}

async fn bind(address: SocketAddr) -> Result<(Arc<UdpSocket>, TcpListener), Error> {
    let attempts = if address.port() == 0 { BIND_ATTEMPTS_MAX } else { 1 };
    for _ in 1..attempts {
        if let Ok(pair) = bind_once(address).await {
            return Ok(pair);
        }
    }
    bind_once(address).await
}

async fn bind_once(address: SocketAddr) -> Result<(Arc<UdpSocket>, TcpListener), Error> {
    let refuse = |protocol: &'static str| move |source: io::Error| refusal(address, protocol, source);
    let listener = TcpListener::bind(address).await.map_err(refuse("tcp"))?;
    let bound = listener.local_addr().map_err(refuse("tcp"))?;
    let socket = UdpSocket::bind(bound).await.map_err(refuse("udp"))?;
    Ok((Arc::new(socket), listener))
}

fn refusal(address: SocketAddr, protocol: &'static str, source: io::Error) -> Error {
    let hint = match source.kind() {
        io::ErrorKind::AddrInUse => {
            let holder = holder_of(address, protocol).unwrap_or_else(|| "another program".to_owned());
            return Error::PortInUse { address, protocol, holder };
        }
        io::ErrorKind::PermissionDenied => "ports under 1024 need root or the capability CAP_NET_BIND_SERVICE",
        io::ErrorKind::AddrNotAvailable => "this machine does not have the address; add it to a link first",
        _ => "the operating system refused the socket; the cause is below",
    };
    Error::Listen { address, protocol, hint, source }
}
