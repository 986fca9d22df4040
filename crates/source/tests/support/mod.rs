//! A server that says what a test tells it to, one request at a time, over a Unix socket.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::stream;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

/// A test that waits longer than this has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// The server. Dropping it closes every connection.
pub(crate) struct Server {
    calls: mpsc::Receiver<Call>,
    _tasks: JoinSet<()>,
}

/// A request that waits for its answer.
pub(crate) struct Call {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: BTreeMap<String, String>,
    pub(crate) body: Value,
    answer: oneshot::Sender<Response<Body>>,
}

/// The open answer to a watch. Dropping it ends the answer as a server does.
pub(crate) struct Watch(mpsc::Sender<Result<Bytes, std::io::Error>>);

impl Server {
    pub(crate) fn start(socket: &Path) -> Server {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let (sender, calls) = mpsc::channel(16);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let sender = sender.clone();
                let service = hyper::service::service_fn(move |request| answer(request, sender.clone()));
                let connection =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                connections.spawn(async move {
                    let _ = connection.await;
                });
            }
        });
        Server { calls, _tasks: tasks }
    }

    /// The next request.
    pub(crate) async fn call(&mut self) -> Call {
        tokio::time::timeout(PATIENCE, self.calls.recv()).await.expect("a request").expect("a running server")
    }

    /// The next request, which is a list from the start.
    pub(crate) async fn list(&mut self) -> Call {
        let call = self.call().await;
        assert!(!call.query.contains_key("watch"), "{:?}", call.query);
        assert!(!call.query.contains_key("sendInitialEvents"), "old servers answer 422 to it");
        call
    }

    /// The next request, which is a watch from this revision.
    pub(crate) async fn watch(&mut self, revision: &str) -> Watch {
        let call = self.call().await;
        assert_eq!(call.query.get("watch").map(String::as_str), Some("true"), "{} {:?}", call.path, call.query);
        assert_eq!(call.query.get("resourceVersion").map(String::as_str), Some(revision));
        call.stream()
    }
}

impl Call {
    pub(crate) fn json(self, status: u16, value: &Value) {
        let body = Full::new(Bytes::from(value.to_string())).map_err(|never: Infallible| match never {});
        let response = Response::builder().status(StatusCode::from_u16(status).unwrap());
        let response = response.header("content-type", "application/json").body(body.boxed_unsync()).unwrap();
        let _ = self.answer.send(response);
    }

    /// Answers with a whole list.
    pub(crate) fn items(self, kind: &str, revision: &str, items: &[Value]) {
        self.json(200, &list(kind, &json!({"resourceVersion": revision}), items));
    }

    /// Answers with an error in Kubernetes' shape.
    pub(crate) fn error(self, status: u16, reason: &str) {
        self.json(status, &failure(status, reason));
    }

    pub(crate) fn stream(self) -> Watch {
        let (sender, receiver) = mpsc::channel(1);
        let frames = stream::unfold(receiver, async |mut receiver: mpsc::Receiver<Result<Bytes, _>>| {
            let frame = receiver.recv().await?.map(Frame::data);
            Some((frame, receiver))
        });
        let _ = self.answer.send(Response::new(BodyExt::boxed_unsync(StreamBody::new(Box::pin(frames)))));
        Watch(sender)
    }
}

impl Watch {
    pub(crate) async fn event(&self, kind: &str, object: &Value) {
        self.bytes(format!("{}\n", json!({"type": kind, "object": object}))).await;
    }

    pub(crate) async fn bytes(&self, text: String) {
        self.0.send(Ok(text.into())).await.expect("a reader of the watch");
    }

    /// Breaks the connection off in the middle of the answer.
    pub(crate) async fn break_off(self) {
        let _ = self.0.send(Err(std::io::Error::other("broken off by the test"))).await;
    }
}

pub(crate) fn list(kind: &str, metadata: &Value, items: &[Value]) -> Value {
    json!({"apiVersion": "v1", "kind": format!("{kind}List"), "metadata": metadata, "items": items})
}

pub(crate) fn failure(status: u16, reason: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": status,
           "reason": reason, "message": format!("told to say {reason}")})
}

/// A socket path in a directory that goes away with the test.
pub(crate) fn socket() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    (directory, path)
}

async fn answer(request: Request<Incoming>, calls: mpsc::Sender<Call>) -> Result<Response<Body>, std::io::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let (answer, answered) = oneshot::channel();
    let query = parts.uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let call = Call {
        method: parts.method.to_string(),
        path: parts.uri.path().to_owned(),
        query: query.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        body: serde_json::from_slice(&body).unwrap_or_default(),
        answer,
    };
    calls.send(call).await.map_err(std::io::Error::other)?;
    // A call that the test drops without an answer breaks the connection off.
    answered.await.map_err(std::io::Error::other)
}
