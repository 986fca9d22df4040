//! A small client of the Kubernetes API over a Unix socket: what the lab's kubelets and commands need.
//!
//! It works against the lab's own API server and against `kubectl proxy --unix-socket` alike.
//! One connection per request: on a Unix socket that costs less than keeping a pool right.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::limits::{LIST_PAGE, RETRY_DELAY_MAX, RETRY_DELAY_MIN, WATCH_LINE_BYTES_MAX, WATCH_QUEUE_MAX};

/// Why a request did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server was not reached, or it hung up.
    #[error("the API at {socket} did not answer: {reason}")]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        reason: String,
    },
    /// The server refused.
    #[error("{message} ({code} {reason})")]
    Refused {
        /// The HTTP status.
        code: u16,
        /// `Status.reason`.
        reason: String,
        /// `Status.message`.
        message: String,
    },
    /// The answer is not JSON, or not of the expected shape.
    #[error("the API's answer cannot be read: {0}")]
    Garbled(String),
}

impl ClientError {
    /// Whether the server refused with this HTTP status.
    pub fn is(&self, status: StatusCode) -> bool {
        matches!(self, ClientError::Refused { code, .. } if *code == status.as_u16())
    }
}

/// What a watch tells.
#[derive(Debug, Clone)]
pub enum Event {
    /// All objects that there are.
    Replace(Vec<Value>),
    /// An object is new or changed.
    Upsert(Value),
    /// An object is gone; this was its last state.
    Delete(Value),
}

/// A client.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the API server on a socket.
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into() }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Reads an object.
    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.request(Method::GET, path, "application/json", None).await
    }

    /// Creates an object in a collection.
    pub async fn create(&self, collection: &str, object: &Value) -> Result<Value, ClientError> {
        self.request(Method::POST, collection, "application/json", Some(object)).await
    }

    /// Changes an object by a JSON merge patch (RFC 7396).
    pub async fn merge(&self, path: &str, patch: &Value) -> Result<Value, ClientError> {
        self.request(Method::PATCH, path, "application/merge-patch+json", Some(patch)).await
    }

    /// Removes an object at once. One that is gone already counts as removed.
    pub async fn delete_now(&self, path: &str) -> Result<(), ClientError> {
        let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0});
        match self.request(Method::DELETE, path, "application/json", Some(&options)).await {
            Err(error) if !error.is(StatusCode::NOT_FOUND) => Err(error),
            _ => Ok(()),
        }
    }

    /// Creates an object, or changes the one that is there.
    pub async fn apply(&self, collection: &str, name: &str, object: &Value) -> Result<Value, ClientError> {
        match self.create(collection, object).await {
            Err(error) if error.is(StatusCode::CONFLICT) => self.merge(&format!("{collection}/{name}"), object).await,
            result => result,
        }
    }

    /// Reads all objects of a collection, page by page.
    pub async fn list(&self, collection: &str) -> Result<Vec<Value>, ClientError> {
        self.list_at(collection).await.map(|(objects, _)| objects)
    }

    /// Tells what happens in a collection from now on, until the receiver is dropped.
    pub fn watch(&self, collection: &str) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE_MAX);
        let (client, collection) = (self.clone(), collection.to_owned());
        tokio::spawn(async move {
            let mut delay = RETRY_DELAY_MIN;
            while !sender.is_closed() {
                match client.list_and_watch(&collection, &sender).await {
                    // The server ended the watch after it had worked.
                    Ok(()) => delay = RETRY_DELAY_MIN,
                    Err(error) => {
                        tracing::debug!(%collection, %error, "the watch failed and begins again");
                        delay = (delay * 2).min(RETRY_DELAY_MAX);
                    }
                }
                tokio::time::sleep(delay).await;
            }
        });
        receiver
    }

    /// Whether a path is answered with success, whatever the answer is.
    pub async fn is_success(&self, path: &str) -> Result<bool, ClientError> {
        Ok(self.send(Method::GET, path, "application/json", String::new()).await?.status().is_success())
    }

    /// Any request; the answer as JSON.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Option<&Value>,
    ) -> Result<Value, ClientError> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let response = self.send(method, path, content_type, body).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(|error| self.unreachable(&error))?.to_bytes();
        let value = || serde_json::from_slice(&bytes).map_err(|error| ClientError::Garbled(error.to_string()));
        if status.is_success() { value() } else { Err(refusal(status, value().ok().as_ref())) }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: String,
    ) -> Result<http::Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.unreachable(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Accept", "application/json")
            .header("Content-Type", content_type)
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| ClientError::Garbled(error.to_string()))?;
        sender.send_request(request).await.map_err(|error| self.unreachable(&error))
    }

    fn unreachable(&self, error: &dyn std::fmt::Display) -> ClientError {
        ClientError::Unreachable { socket: self.socket.clone(), reason: error.to_string() }
    }

    async fn list_at(&self, collection: &str) -> Result<(Vec<Value>, String), ClientError> {
        let mut objects = Vec::new();
        let mut continuation = String::new();
        loop {
            let separator = if collection.contains('?') { '&' } else { '?' };
            let mut page = self.get(&format!("{collection}{separator}limit={LIST_PAGE}{continuation}")).await?;
            if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
                objects.extend(items);
            }
            let text = |pointer: &str| page.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            match text("/metadata/continue") {
                "" => return Ok((objects, text("/metadata/resourceVersion").to_owned())),
                token => continuation = format!("&continue={}", percent_encoded(token)),
            }
        }
    }

    /// One list, then watches from where the last one ended, until one fails or says 410 Gone.
    async fn list_and_watch(&self, collection: &str, events: &mpsc::Sender<Event>) -> Result<(), ClientError> {
        let (objects, mut version) = self.list_at(collection).await?;
        if events.send(Event::Replace(objects)).await.is_err() {
            return Ok(());
        }
        loop {
            let separator = if collection.contains('?') { '&' } else { '?' };
            let path = format!("{collection}{separator}watch=true&allowWatchBookmarks=true&resourceVersion={version}");
            let response = self.send(Method::GET, &path, "application/json", String::new()).await?;
            if !response.status().is_success() {
                return Err(refusal(response.status(), None));
            }
            if !self.follow(response.into_body(), &mut version, events).await? {
                return Ok(());
            }
        }
    }

    /// Reads one watch to its end. False: the watcher is gone, or the version is too old.
    async fn follow(
        &self,
        mut body: Incoming,
        version: &mut String,
        events: &mpsc::Sender<Event>,
    ) -> Result<bool, ClientError> {
        let mut buffer: Vec<u8> = Vec::new();
        let mut told = false;
        loop {
            let frame = tokio::select! {
                () = events.closed() => return Ok(false),
                frame = body.frame() => frame,
            };
            let Some(frame) = frame else {
                // A server that ends each watch at once must not be asked in a loop.
                return Ok(told);
            };
            let frame = frame.map_err(|error| self.unreachable(&error))?;
            let Ok(data) = frame.into_data() else { continue };
            buffer.extend_from_slice(&data);
            if buffer.len() > WATCH_LINE_BYTES_MAX {
                return Err(ClientError::Garbled(format!("a watch event is longer than {WATCH_LINE_BYTES_MAX} bytes")));
            }
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                let Some(event) = read_event(&line, version)? else { continue };
                told = true;
                let Ok(event) = event else { return Ok(false) };
                if events.send(event).await.is_err() {
                    return Ok(false);
                }
            }
        }
    }
}

/// The version that a watch was asked to begin at is gone.
struct Gone;

/// One line of a watch: nothing for a bookmark.
fn read_event(line: &[u8], version: &mut String) -> Result<Option<Result<Event, Gone>>, ClientError> {
    let mut event: Value = serde_json::from_slice(line).map_err(|error| ClientError::Garbled(error.to_string()))?;
    let object = event.get_mut("object").map(Value::take).unwrap_or_default();
    if let Some(seen) = object.pointer("/metadata/resourceVersion").and_then(Value::as_str) {
        seen.clone_into(version);
    }
    match event.get("type").and_then(Value::as_str).unwrap_or_default() {
        "ADDED" | "MODIFIED" => Ok(Some(Ok(Event::Upsert(object)))),
        "DELETED" => Ok(Some(Ok(Event::Delete(object)))),
        "BOOKMARK" => Ok(None),
        "ERROR" if object.get("code").and_then(Value::as_u64) == Some(410) => Ok(Some(Err(Gone))),
        "ERROR" => Err(refusal(StatusCode::INTERNAL_SERVER_ERROR, Some(&object))),
        other => Err(ClientError::Garbled(format!("a watch event of type `{other}`"))),
    }
}

fn refusal(status: StatusCode, body: Option<&Value>) -> ClientError {
    let text = |field: &str| body.and_then(|body| body.get(field)).and_then(Value::as_str);
    ClientError::Refused {
        code: status.as_u16(),
        reason: text("reason").unwrap_or("no reason given").to_owned(),
        message: text("message").or(status.canonical_reason()).unwrap_or_default().to_owned(),
    }
}

/// Percent-encoding of a query value (RFC 3986 §2.1).
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests;
