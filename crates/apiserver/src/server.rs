//! Starts and stops it all.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use portolan_store::{Embedded, Etcd, KeyRange, Location, Options, Store, StoreError, Transaction};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::api::Api;
use crate::config::{Config, StoreLocation};
use crate::election::Election;
use crate::error::Error;
use crate::limits::COMPACTION_INTERVAL;
use crate::runner::Runner;
use crate::serve::Service;
use crate::{listen, tls};

/// The store's file in the data directory.
const STORE_FILE: &str = "store.redb";

/// A running server. Dropping it stops it without waiting.
pub struct Server {
    address: SocketAddr,
    kubeconfig: PathBuf,
    unix_socket: PathBuf,
    token: String,
    stop: Option<oneshot::Sender<()>>,
    stop_running: Option<oneshot::Sender<()>>,
    serving: JoinHandle<()>,
    running: JoinHandle<()>,
}

/// Starts the server. When it returns, requests are answered; when it fails,
/// the socket is not left behind.
pub async fn start(config: Config) -> Result<Server, Error> {
    config.check()?;
    make_directory(&config.data_directory)?;
    let unix_socket = config.unix_socket.clone();
    let unix = listen::unix(&unix_socket).await?;
    let started = start_listening(config, unix).await;
    if started.is_err() {
        let _ = std::fs::remove_file(&unix_socket);
    }
    started
}

async fn start_listening(config: Config, unix: UnixListener) -> Result<Server, Error> {
    let wanted = SocketAddr::new(config.loopback_address, config.loopback_port);
    let tcp = listen::loopback(wanted).await?;
    let address = tcp.local_addr().map_err(|source| Error::Listen { address: wanted, source })?;
    let credentials = tls::credentials(&config)?;
    let store = open_store(&config).await?;
    let kubeconfig = config.kubeconfig_path();
    let unix_socket = config.unix_socket.clone();
    let prepared = |error: crate::status::ApiError| Error::Prepare(error.to_string());
    let api = Arc::new(Api::new(store, config).await.map_err(prepared)?);
    api.prepare().await.map_err(prepared)?;
    credentials.write_kubeconfig(&kubeconfig, address)?;
    let service = Arc::new(Service { api: Arc::clone(&api), token: credentials.token.clone() });
    let acceptor = TlsAcceptor::from(Arc::clone(&credentials.tls));
    let (stop, stopped) = oneshot::channel();
    let serving = tokio::spawn(listen::serve((unix, tcp), acceptor, service, stopped));
    let (stop_running, stopped) = oneshot::channel();
    let running = tokio::spawn(run_controllers(api, stopped));
    tracing::info!(%address, socket = %unix_socket.display(), "the API is served");
    let (stop, stop_running) = (Some(stop), Some(stop_running));
    Ok(Server { address, kubeconfig, unix_socket, token: credentials.token, stop, stop_running, serving, running })
}

async fn open_store(config: &Config) -> Result<Arc<dyn Store>, Error> {
    match &config.store {
        StoreLocation::Embedded => {
            let file = config.data_directory.join(STORE_FILE);
            make_private(&file)?;
            let options = Options { history_revisions: config.history_revisions, ..Options::new(Location::File(file)) };
            Ok(Arc::new(Embedded::open(options)?))
        }
        StoreLocation::Etcd(etcd) => Ok(Arc::new(Etcd::connect(etcd.clone()).await?)),
    }
}

/// Removes all objects of the cluster that an etcd holds at this place; the embedded store's go with its
/// directory. Servers that still run on it lose everything, their own objects included.
pub async fn clear(store: &StoreLocation) -> Result<(), Error> {
    if let StoreLocation::Etcd(etcd) = store {
        let store = Etcd::connect(etcd.clone()).await?;
        // From "/" on, so that a prefix that begins with all of this one is another's.
        store.transaction(Transaction::delete(KeyRange::prefix("/"))).await?;
    }
    Ok(())
}

/// Runs the controllers until told to stop: always on a store of our own, in turns on a shared one.
async fn run_controllers(api: Arc<Api>, stopped: oneshot::Receiver<()>) {
    if api.config.store == StoreLocation::Embedded {
        tokio::select! {
            () = Runner::new(api).run() => {}
            _ = stopped => {}
        }
        return;
    }
    let identity = format!("{} {}", std::process::id(), api.config.unix_socket.display());
    let election = Election::new(Arc::clone(&api.store), identity);
    let lead = || async {
        tokio::select! {
            () = Runner::new(Arc::clone(&api)).run() => {}
            () = compact_now_and_then(api.store.as_ref()) => {}
        }
    };
    tokio::select! {
        () = election.run(lead) => {}
        () = api.follow_definitions() => {}
        _ = stopped => election.resign().await,
    }
}

/// Keeps an etcd's history short, as kube-apiserver does: etcd by itself keeps all of it.
async fn compact_now_and_then(store: &dyn Store) {
    let mut before = None;
    loop {
        let now = store.revision().await;
        if let Some(revision) = before {
            match store.compact(revision).await {
                // Others compact the same etcd for their own part of it.
                Ok(()) | Err(StoreError::Compacted { .. }) => {}
                Err(error) => tracing::warn!(%error, revision, "the store's history could not be shortened"),
            }
        }
        before = now.ok();
        tokio::time::sleep(COMPACTION_INTERVAL).await;
    }
}

impl Server {
    /// Where TLS listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The kubeconfig for it.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The Unix socket.
    pub fn unix_socket(&self) -> &Path {
        &self.unix_socket
    }

    /// The bearer token of TLS clients.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Stops: connections end, what was answered is kept, the store's file is free afterwards.
    pub async fn shutdown(mut self) {
        for stop in [self.stop.take(), self.stop_running.take()].into_iter().flatten() {
            // Whoever runs may have ended on its own.
            let _ = stop.send(());
        }
        let _ = (&mut self.running).await;
        let _ = (&mut self.serving).await;
        let _ = std::fs::remove_file(&self.unix_socket);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.running.abort();
        self.serving.abort();
    }
}

/// Makes the store's file, so that only its owner reads it: it holds Secrets.
fn make_private(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::OpenOptionsExt;
    let made = std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    made.map(drop).map_err(|source| Error::Io { action: "make", path: path.to_owned(), source })
}

fn make_directory(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| Error::Io { action: "make the directory", path: path.to_owned(), source })
}
