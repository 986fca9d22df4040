//! Why the server does not start.

use std::net::SocketAddr;
use std::path::PathBuf;

use portolan_store::StoreError;

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value of the configuration cannot work.
    #[error("{field}: {reason}")]
    Config {
        /// The field.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// Another server listens on the socket.
    #[error("the socket {path:?} is in use by another server: stop it, or choose another path")]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// Another program listens on the port.
    #[error("the address {address} is in use by another program: stop it, or choose port 0 for any that is free")]
    PortInUse {
        /// The address.
        address: SocketAddr,
    },
    /// The address is not this machine's own.
    #[error("{address} is not a loopback address: the server must not be open to others; use 127.0.0.1 or ::1")]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// A file or socket cannot be made.
    #[error("cannot {action} {path:?}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A certificate cannot be made or read back.
    #[error("the certificates in {path:?} cannot be used: {reason}; remove them to have new ones made")]
    Certificates {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The store cannot be opened or read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An object that the server itself needs cannot be written.
    #[error("cannot prepare the cluster's own objects: {0}")]
    Prepare(String),
}
