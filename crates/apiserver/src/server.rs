//! Starts and stops it all.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use portolan_store::{Embedded, Location, Options, Store};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::api::Api;
use crate::config::Config;
use crate::error::Error;
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
    serving: JoinHandle<()>,
    running: JoinHandle<()>,
}

/// Starts the server on the embedded store. When it returns, requests are answered; when it fails,
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
    let file = config.data_directory.join(STORE_FILE);
    make_private(&file)?;
    let options = Options { history_revisions: config.history_revisions, ..Options::new(Location::File(file)) };
    let store: Arc<dyn Store> = Arc::new(Embedded::open(options)?);
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
    let running = tokio::spawn(Runner::new(api).run());
    tracing::info!(%address, socket = %unix_socket.display(), "the API is served");
    Ok(Server { address, kubeconfig, unix_socket, token: credentials.token, stop: Some(stop), serving, running })
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
        self.running.abort();
        if let Some(stop) = self.stop.take() {
            // Whoever serves may have ended on its own.
            let _ = stop.send(());
        }
        // Being aborted is how the controllers end.
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
