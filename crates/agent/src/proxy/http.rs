//! Small HTTP servers: bounded in connections and in time, and gone with the task that serves.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::limits::{ACCEPT_PAUSE, CONNECTIONS_MAX, HEADER_TIMEOUT};

/// What is answered.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    content_type: &'static str,
    headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// JSON that was written already.
    pub(super) fn json(status: StatusCode, body: String) -> Answer {
        Answer { status, content_type: "application/json", headers: Vec::new(), body: body.into_bytes() }
    }

    /// Plain text.
    pub(super) fn text(status: StatusCode, body: impl Into<String>) -> Answer {
        let content_type = "text/plain; charset=utf-8";
        Answer { status, content_type, headers: Vec::new(), body: body.into().into_bytes() }
    }

    /// Metrics, in the format that they are written in.
    pub(super) fn metrics(body: String) -> Answer {
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        Answer { status: StatusCode::OK, content_type, headers: Vec::new(), body: body.into_bytes() }
    }

    /// The same with a header more.
    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Answer {
        self.headers.push((name, value.into()));
        self
    }

    fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(self.body)));
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        for (name, value) in self.headers {
            if let Ok(value) = HeaderValue::from_str(&value) {
                response.headers_mut().insert(HeaderName::from_static(name), value);
            }
        }
        response
    }
}

/// Answers a path.
pub(super) type Handler = Arc<dyn Fn(&str) -> Answer + Send + Sync>;

/// A task that ends when nobody holds it.
#[derive(Debug)]
pub(super) struct Task(JoinHandle<()>);

impl Task {
    pub(super) fn spawn(work: impl Future<Output = ()> + Send + 'static) -> Task {
        Task(tokio::spawn(work))
    }

    /// Ends it, and returns when its sockets are closed.
    pub(super) async fn end(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Listens.
pub(super) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until the future is dropped, and its connections with it.
pub(super) async fn serve(listener: TcpListener, handler: Handler) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let handler = handler.clone();
                connections.spawn(async move {
                    serve_connection(stream, handler).await;
                    drop(permit);
                });
            }
            // Out of descriptors, most likely: others must close theirs first.
            Err(error) => {
                tracing::warn!(%error, "a connection for health or metrics was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, handler: Handler) {
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = match *request.method() {
            Method::GET | Method::HEAD => handler(request.uri().path()),
            _ => Answer::text(StatusCode::METHOD_NOT_ALLOWED, "ask with GET\n"),
        };
        async move { Ok::<_, Infallible>(answer.into_response()) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection for health or metrics ended early");
    }
}
