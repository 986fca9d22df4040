//! TCP: messages after their length (RFC 1035 §4.2.2), several per connection (RFC 7766).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::service::{Handled, Service};
use crate::limits::TCP_IDLE;
use crate::metrics::{Transport, increment};

/// How long the task waits after accepting failed (often for lack of file descriptors).
const FAILURE_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections for ever; those above the bound are closed at once. Connections end with the
/// task.
pub(super) async fn run(listener: TcpListener, service: Arc<Service>, places: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, client)) => {
                let Ok(place) = places.clone().try_acquire_owned() else {
                    increment(&service.metrics.connection_rejects);
                    continue;
                };
                let service = service.clone();
                connections.spawn(async move {
                    let _place = place;
                    if let Err(error) = converse(stream, client, &service).await {
                        tracing::debug!(%error, %client, "a connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(FAILURE_PAUSE).await;
            }
        }
    }
}

/// Answers one query after the other. A client that is silent, or does not take its answers, for
/// too long loses its connection.
async fn converse(mut stream: TcpStream, client: SocketAddr, service: &Service) -> io::Result<()> {
    let mut query = Vec::new();
    let mut answer = Vec::new();
    loop {
        if !timeout(TCP_IDLE, read_message(&mut stream, &mut query)).await?? {
            return Ok(());
        }
        match service.handle(&query, client.ip(), Transport::Tcp, &mut answer) {
            Handled::Ignored => return Ok(()),
            Handled::Answered => {}
            Handled::Pending(pending) => service.resolve(*pending, &mut answer).await,
        }
        timeout(TCP_IDLE, write_message(&mut stream, &answer)).await??;
    }
}

/// Reads one message; false where the other side has ended the connection between two messages.
pub(super) async fn read_message(stream: &mut TcpStream, message: &mut Vec<u8>) -> io::Result<bool> {
    let mut length = [0; 2];
    if stream.read(&mut length[..1]).await? == 0 {
        return Ok(false);
    }
    stream.read_exact(&mut length[1..]).await?;
    message.resize(usize::from(u16::from_be_bytes(length)), 0);
    stream.read_exact(message).await?;
    Ok(true)
}

/// Writes one message, in one segment where it fits (RFC 7766 §8).
pub(super) async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}
