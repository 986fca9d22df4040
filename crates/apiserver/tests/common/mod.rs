//! A server in a directory of its own, and a plain HTTP client on its Unix socket.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use portolan_apiserver::{Config, Server, start};
use serde_json::{Value, json};
use tokio::net::UnixStream;

/// How long anything may take that happens on its own.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Rig {
    pub(crate) server: Server,
    pub(crate) directory: tempfile::TempDir,
}

pub(crate) async fn rig() -> Rig {
    rig_with(|_| ()).await
}

pub(crate) async fn rig_with(change: impl FnOnce(&mut Config)) -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let mut config = Config::new(directory.path());
    change(&mut config);
    let server = start(config).await.unwrap();
    Rig { server, directory }
}

impl Rig {
    pub(crate) async fn connect(&self) -> Connection {
        let stream = UnixStream::connect(self.server.unix_socket()).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Connection { sender }
    }

    pub(crate) async fn call(&self, method: Method, path: &str, content: &str, body: Option<Value>) -> (u16, Value) {
        self.connect().await.call(method, path, content, body).await
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        self.call(Method::GET, path, "", None).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::POST, path, "application/json", Some(body)).await
    }

    pub(crate) async fn put(&self, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::PUT, path, "application/json", Some(body)).await
    }

    pub(crate) async fn patch(&self, path: &str, kind: &str, body: Value) -> (u16, Value) {
        self.call(Method::PATCH, path, &format!("application/{kind}"), Some(body)).await
    }

    pub(crate) async fn delete(&self, path: &str, body: Option<Value>) -> (u16, Value) {
        self.call(Method::DELETE, path, "application/json", body).await
    }

    pub(crate) async fn watch(&self, path: &str) -> Lines {
        let mut connection = self.connect().await;
        let request = Request::get(path).header(header::HOST, "localhost").body(Full::default()).unwrap();
        let response = connection.sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        Lines { body: response.into_body(), partial: Vec::new(), waiting: VecDeque::new(), _connection: connection }
    }

    /// Asks again until the answer is as wanted.
    pub(crate) async fn until(&self, path: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                last = self.get(path).await.1;
                if wanted(&last) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        assert!(waited.await.is_ok(), "{path} never was {what}: {last:#}");
        last
    }
}

pub(crate) struct Connection {
    sender: SendRequest<Full<Bytes>>,
}

impl Connection {
    pub(crate) async fn call(
        &mut self,
        method: Method,
        path: &str,
        content: &str,
        body: Option<Value>,
    ) -> (u16, Value) {
        let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
        if !content.is_empty() {
            request = request.header(header::CONTENT_TYPE, content);
        }
        self.send(request.body(Full::new(body)).unwrap()).await
    }

    pub(crate) async fn send(&mut self, request: Request<Full<Bytes>>) -> (u16, Value) {
        self.sender.ready().await.unwrap();
        let response = self.sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8_lossy(&body).into_owned();
        (status, serde_json::from_slice(&body).unwrap_or(Value::String(text)))
    }
}

/// The events of a watch.
pub(crate) struct Lines {
    body: Incoming,
    partial: Vec<u8>,
    waiting: VecDeque<Value>,
    _connection: Connection,
}

impl Lines {
    /// The next event; `None` when the stream ended.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        while self.waiting.is_empty() {
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.unwrap()?;
            self.partial.extend_from_slice(&frame.unwrap().into_data().unwrap());
            while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                self.waiting.push_back(serde_json::from_slice(&line).unwrap());
            }
        }
        self.waiting.pop_front()
    }

    /// Kind and name of the next event.
    pub(crate) async fn next_named(&mut self) -> (String, String) {
        let event = self.next().await.unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&event["type"]), text(&event["object"]["metadata"]["name"]))
    }
}

pub(crate) fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"key": value}})
}

pub(crate) fn revision(object: &Value) -> String {
    object["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
}

pub(crate) const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";
