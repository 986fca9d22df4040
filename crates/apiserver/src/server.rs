//! Starts and stops it all.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use portolan_store::{Embedded, Location, Options, Store};
use tokio::net::UnixListener;
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
    tasks: Vec<JoinHandle<()>>,
}

/// Starts the server on the embedded store. When it returns, requests are answered; when it fails,
/// the socket is not left behind.
pub async fn start(config: Config) -> Result<Server, Error> {
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
    let tasks = vec![tokio::spawn(listen::serve(unix, tcp, acceptor, service)), tokio::spawn(Runner::new(api).run())];
    tracing::info!(%address, socket = %unix_socket.display(), "the API is served");
    Ok(Server { address, kubeconfig, unix_socket, token: credentials.token, tasks })
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
        for task in &self.tasks {
            task.abort();
        }
        for task in self.tasks.drain(..) {
            // It ends by being aborted, and that is what was asked for.
            let _ = task.await;
        }
        let _ = std::fs::remove_file(&self.unix_socket);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn make_directory(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| Error::Io { action: "make the directory", path: path.to_owned(), source })
}
