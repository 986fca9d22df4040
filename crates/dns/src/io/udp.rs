//! UDP: a few tasks per socket, each of which answers a batch of queries before it lets others run.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::service::{Handled, Service};
use crate::limits::{MESSAGE_LENGTH_MAX, UDP_BATCH_MAX};
use crate::metrics::Transport;

/// How long a task waits after its socket failed, so that a lasting failure does not spin.
const FAILURE_PAUSE: Duration = Duration::from_millis(10);

/// Answers queries for ever. Buffers are allocated once; queries that wait for an upstream end with
/// the task, so that the socket is free as soon as the server has stopped.
pub(super) async fn run(socket: Arc<UdpSocket>, service: Arc<Service>) {
    let mut query = vec![0; MESSAGE_LENGTH_MAX];
    let mut answer = Vec::with_capacity(1500);
    let mut waiting = JoinSet::new();
    loop {
        while waiting.try_join_next().is_some() {}
        if let Err(error) = socket.readable().await {
            pause(&error).await;
            continue;
        }
        for _ in 0..UDP_BATCH_MAX {
            match socket.try_recv_from(&mut query) {
                Ok((length, client)) => {
                    handle(&socket, &service, &query[..length], client, &mut answer, &mut waiting).await;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    pause(&error).await;
                    break;
                }
            }
        }
        tokio::task::yield_now().await;
    }
}

async fn handle(
    socket: &Arc<UdpSocket>,
    service: &Arc<Service>,
    query: &[u8],
    client: SocketAddr,
    answer: &mut Vec<u8>,
    waiting: &mut JoinSet<()>,
) {
    match service.handle(query, client.ip(), Transport::Udp, answer) {
        Handled::Ignored => {}
        Handled::Answered => send(socket, answer, client).await,
        Handled::Pending(pending) => {
            let (socket, service) = (socket.clone(), service.clone());
            waiting.spawn(async move {
                let mut answer = Vec::with_capacity(512);
                service.resolve(*pending, &mut answer).await;
                send(&socket, &answer, client).await;
            });
        }
    }
}

async fn send(socket: &UdpSocket, answer: &[u8], client: SocketAddr) {
    let sent = match socket.try_send_to(answer, client) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => socket.send_to(answer, client).await,
        other => other,
    };
    if let Err(error) = sent {
        // The client asks again: that is how DNS over UDP works.
        tracing::debug!(%error, %client, "an answer could not be sent");
    }
}

async fn pause(error: &std::io::Error) {
    tracing::warn!(%error, "the DNS socket failed");
    tokio::time::sleep(FAILURE_PAUSE).await;
}
