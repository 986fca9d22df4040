//! The two listeners and their connections.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::error::Error;
use crate::limits::{CONNECTIONS_MAX, HANDSHAKE_WAIT_MAX, HEADER_WAIT_MAX};
use crate::serve::{Entrance, Service};

/// Opens the Unix socket. A socket file that nobody listens on is what a killed server left behind.
pub(crate) async fn unix(path: &Path) -> Result<UnixListener, Error> {
    let failed = |action| move |source| Error::Io { action, path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("look at")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            let error = io::Error::new(io::ErrorKind::AlreadyExists, "it is there and not a socket; remove it");
            return Err(failed("listen on")(error));
        }
        Ok(_) => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(Error::SocketInUse { path: path.to_owned() });
            }
            std::fs::remove_file(path).map_err(failed("remove the old socket"))?;
        }
    }
    let listener = UnixListener::bind(path).map_err(failed("listen on"))?;
    let owner_only = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, owner_only).map_err(failed("restrict"))?;
    Ok(listener)
}

/// Opens the loopback port.
pub(crate) async fn loopback(address: SocketAddr) -> Result<TcpListener, Error> {
    if !address.ip().is_loopback() {
        return Err(Error::NotLoopback { address });
    }
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => Error::PortInUse { address },
        _ => Error::Listen { address, source },
    })
}

/// Takes connections until it is told to stop, and then ends those that are open. When it returns,
/// nothing of them is left, and nothing holds the store.
pub(crate) async fn serve(
    (unix, tcp): (UnixListener, TcpListener),
    tls: TlsAcceptor,
    service: Arc<Service>,
    mut stop: oneshot::Receiver<()>,
) {
    let mut connections = JoinSet::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // At the bound new connections wait in the kernel's queue.
        let place = tokio::select! {
            _ = &mut stop => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let Ok(place) = place else { break };
        let service = Arc::clone(&service);
        tokio::select! {
            _ = &mut stop => break,
            accepted = unix.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(async move {
                        converse(stream, Entrance::UnixSocket, service).await;
                        drop(place);
                    });
                }
                Err(error) => pause_after(&error).await,
            },
            accepted = tcp.accept() => match accepted {
                Ok((stream, _)) => {
                    let tls = tls.clone();
                    connections.spawn(async move {
                        // Small answers must not wait for more to come. Without it they only do.
                        let _ = stream.set_nodelay(true);
                        match tokio::time::timeout(HANDSHAKE_WAIT_MAX, tls.accept(stream)).await {
                            Ok(Ok(stream)) => converse(stream, Entrance::Loopback, service).await,
                            Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                            Err(_) => tracing::debug!("a TLS handshake took too long"),
                        }
                        drop(place);
                    });
                }
                Err(error) => pause_after(&error).await,
            },
        }
        while connections.try_join_next().is_some() {}
    }
    connections.shutdown().await;
}

/// Out of file descriptors, most likely: they come back when connections end.
async fn pause_after(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be taken");
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
}

async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin, entrance: Entrance, service: Arc<Service>) {
    let handler = service_fn(move |request| {
        let service = Arc::clone(&service);
        async move { Ok::<_, Infallible>(service.answer(entrance, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_WAIT_MAX)
        .serve_connection(TokioIo::new(stream), handler);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection ended");
    }
}
