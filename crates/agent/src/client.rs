//! A client of the administration socket: what the command line asks an agent with.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// Why an agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent answers at {path}: is it running? ({source})")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the agent at {path} did not finish its answer: {reason}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The agent refuses.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What the agent says.
        message: String,
    },
}

/// One agent's administration socket.
#[derive(Debug, Clone)]
pub struct AgentClient {
    path: PathBuf,
}

impl AgentClient {
    /// The client of the agent that listens at this path.
    pub fn new(path: impl Into<PathBuf>) -> AgentClient {
        AgentClient { path: path.into() }
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A text, such as metrics or a plan.
    pub async fn text(&self, path: &str) -> Result<String, ClientError> {
        let bytes = self.whole(Method::GET, path, Bytes::new()).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A JSON value.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.parse(&self.whole(Method::GET, path, Bytes::new()).await?)
    }

    /// A JSON value for a JSON question.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(&error))?;
        self.parse(&self.whole(Method::POST, path, body.into()).await?)
    }

    /// Opens a stream of JSON lines. When this returns, the agent has begun.
    pub async fn lines(&self, path: &str, body: &impl Serialize) -> Result<Lines, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(&error))?;
        let response = self.send(Method::POST, path, body.into()).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response).await);
        }
        Ok(Lines { body: response.into_body(), pending: Vec::new(), client: self.clone() })
    }

    fn parse<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(bytes).map_err(|error| self.broken(&error))
    }

    fn broken(&self, error: &dyn std::error::Error) -> ClientError {
        ClientError::Broken { path: self.path.clone(), reason: error.to_string() }
    }

    async fn whole(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let response = self.send(method, path, body).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response).await);
        }
        Ok(response.into_body().collect().await.map_err(|error| self.broken(&error))?.to_bytes())
    }

    async fn refusal(&self, response: Response<Incoming>) -> ClientError {
        let status = response.status().as_u16();
        let message = match response.into_body().collect().await {
            Ok(body) => String::from_utf8_lossy(&body.to_bytes()).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        ClientError::Refused { status, message }
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| ClientError::Connect { path: self.path.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the agent closed an administration connection");
            }
        });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "agent")
            .body(Full::new(body))
            .map_err(|error| self.broken(&error))?;
        sender.send_request(request).await.map_err(|error| self.broken(&error))
    }
}

/// JSON lines as an agent sends them.
#[derive(Debug)]
pub struct Lines {
    body: Incoming,
    pending: Vec<u8>,
    client: AgentClient,
}

impl Lines {
    /// The next value, or `None` at the end.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return self.client.parse(&line).map(Some);
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(self.client.broken(&error)),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.pending.extend_from_slice(data);
                    }
                }
            }
        }
    }
}
