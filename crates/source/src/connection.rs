//! Where the cluster's API is, and a client for it.

use std::path::{Path, PathBuf};

use hyper_util::rt::{TokioExecutor, TokioIo};
use kube::client::{Body, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::net::UnixStream;
use tower::ServiceBuilder;

use crate::SourceError;

/// How to reach the cluster's API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// As a kubeconfig file says, in its current context.
    Kubeconfig(PathBuf),
    /// Plain HTTP over a Unix socket: the file's permissions say who may connect.
    Socket(PathBuf),
    /// As a pod of the cluster: the service account's token, the address from the environment.
    InCluster,
}

impl Connection {
    /// A client. It connects when it is first used, so a server that is away is no error here.
    pub async fn client(&self) -> Result<Client, SourceError> {
        match self {
            Connection::Kubeconfig(path) => from_kubeconfig(path).await,
            Connection::Socket(path) => Ok(over_socket(path.clone())),
            Connection::InCluster => {
                let config = Config::incluster().map_err(|source| SourceError::NotInCluster { source })?;
                with_config(config)
            }
        }
    }
}

async fn from_kubeconfig(path: &Path) -> Result<Client, SourceError> {
    let unusable = |source| SourceError::Kubeconfig { path: path.to_owned(), source };
    let kubeconfig = Kubeconfig::read_from(path).map_err(unusable)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(unusable)?;
    with_config(config)
}

fn with_config(mut config: Config) -> Result<Client, SourceError> {
    // Retries are ours: bounded, jittered, and visible as a disconnection.
    config.default_retry = false;
    Client::try_from(config).map_err(|source| SourceError::Client { source: Box::new(source) })
}

fn over_socket(path: PathBuf) -> Client {
    // The authority is for the Host header only.
    let config = Config::new(http::Uri::from_static("http://localhost/"));
    let connect = tower::service_fn(move |_: http::Uri| {
        let path = path.clone();
        Box::pin(async move { UnixStream::connect(path).await.map(TokioIo::new) })
    });
    let client = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(connect);
    let service = ServiceBuilder::new().layer(config.base_uri_layer()).service(client);
    Client::new(service, config.default_namespace)
}
