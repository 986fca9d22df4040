//! HTTP over a Unix socket, or over a metrics address: the agent's window for people and tools.
//!
//! It only carries requests to the loop and answers back. Over TCP it serves health and metrics, never
//! the tables; the Unix socket's file mode keeps it to root.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::{ACCEPT_PAUSE, ADMIN_BODY_MAX, ADMIN_CONNECTIONS_MAX, HEADER_TIMEOUT};

/// A request as the handler sees it.
#[derive(Debug)]
pub(crate) struct AdminRequest {
    /// `GET` or `POST`.
    pub(crate) method: hyper::Method,
    /// The path, without a query.
    pub(crate) path: String,
    /// The body, of bounded size.
    pub(crate) body: Bytes,
    /// Whether it came over the Unix socket, and so from root on this node.
    pub(crate) trusted: bool,
}

/// What the handler answers.
pub(crate) enum AdminAnswer {
    /// A whole body.
    Whole(StatusCode, &'static str, Vec<u8>),
    /// Lines, as they come.
    Lines(BoxStream<'static, String>),
}

impl AdminAnswer {
    /// Plain text.
    pub(crate) fn text(status: StatusCode, text: impl Into<String>) -> AdminAnswer {
        AdminAnswer::Whole(status, "text/plain; charset=utf-8", text.into().into_bytes())
    }

    /// JSON.
    pub(crate) fn json(value: &impl serde::Serialize) -> AdminAnswer {
        match serde_json::to_vec(value) {
            Ok(bytes) => AdminAnswer::Whole(StatusCode::OK, "application/json", bytes),
            Err(error) => AdminAnswer::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
}

/// Answers requests.
pub(crate) trait AdminHandler: Send + Sync + 'static {
    /// Answers one request.
    fn handle(&self, request: AdminRequest) -> impl Future<Output = AdminAnswer> + Send;
}

/// Why a socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process listens there.
    #[error("{0} is in use: another agent runs on this node; stop it, or set another runtimeDirectory")]
    InUse(PathBuf),
    /// The operating system refuses.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Binds a Unix socket for root alone. A file that a dead process left is replaced; a living
/// listener is not.
pub(crate) fn bind_unix(path: &Path) -> Result<UnixListener, SocketError> {
    use std::os::unix::fs::PermissionsExt;
    let listen = |source| SocketError::Listen { address: path.display().to_string(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(listen)?;
    }
    if path.exists() {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(SocketError::InUse(path.to_path_buf()));
        }
        std::fs::remove_file(path).map_err(listen)?;
    }
    let listener = UnixListener::bind(path).map_err(listen)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(listen)?;
    Ok(listener)
}

/// Serves the Unix socket until the task is dropped.
pub(crate) async fn serve_unix<H: AdminHandler>(listener: UnixListener, handler: Arc<H>) {
    let connections = Arc::new(Semaphore::new(ADMIN_CONNECTIONS_MAX));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        admit(accepted, permit, &handler, true).await;
    }
}

/// Binds the address of health and metrics. It comes before anything else is done, so that a port in
/// use is said at the start and not found out by a monitor that sees nothing.
pub(crate) async fn bind_tcp(address: SocketAddr) -> Result<TcpListener, SocketError> {
    let listen = |source| SocketError::Listen { address: format!("metricsAddress {address}"), source };
    TcpListener::bind(address).await.map_err(listen)
}

/// Serves health and metrics over TCP until the task is dropped.
pub(crate) async fn serve_tcp<H: AdminHandler>(listener: TcpListener, handler: Arc<H>) {
    let connections = Arc::new(Semaphore::new(ADMIN_CONNECTIONS_MAX));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        admit(accepted, permit, &handler, false).await;
    }
}

/// Serves a connection in a task of its own, which holds the permit as long as it lasts.
async fn admit<S, H>(accepted: std::io::Result<S>, permit: OwnedSemaphorePermit, handler: &Arc<H>, trusted: bool)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: AdminHandler,
{
    match accepted {
        Ok(stream) => {
            let handler = handler.clone();
            tokio::spawn(async move {
                serve_connection(stream, handler, trusted).await;
                drop(permit);
            });
        }
        // Out of descriptors, most likely: others must close theirs first.
        Err(error) => {
            tracing::warn!(%error, "an administration connection was not accepted");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

async fn serve_connection<S, H>(stream: S, handler: Arc<H>, trusted: bool)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: AdminHandler,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let handler = handler.clone();
        async move { Ok::<_, Infallible>(answer(request, &*handler, trusted).await) }
    });
    // A peer that says nothing must not hold one of the few connections for ever.
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "an administration connection ended early");
    }
}

async fn answer<H: AdminHandler>(
    request: Request<Incoming>,
    handler: &H,
    trusted: bool,
) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
    let (parts, body) = request.into_parts();
    let Ok(body) = Limited::new(body, ADMIN_BODY_MAX).collect().await else {
        return whole(StatusCode::PAYLOAD_TOO_LARGE, "text/plain", b"the request is too large\n".to_vec());
    };
    let request =
        AdminRequest { method: parts.method, path: parts.uri.path().to_owned(), body: body.to_bytes(), trusted };
    match handler.handle(request).await {
        AdminAnswer::Whole(status, content_type, bytes) => whole(status, content_type, bytes),
        AdminAnswer::Lines(lines) => {
            let frames = lines.map(|line| Ok::<_, Infallible>(Frame::data(Bytes::from(line + "\n"))));
            Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)))
        }
    }
}

fn whole(status: StatusCode, content_type: &'static str, bytes: Vec<u8>) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
    let mut response = Response::new(Full::new(Bytes::from(bytes)).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}
