//! Sending one real packet, from the calling thread's network namespace.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use portolan_kernel::KernelError;
use portolan_kernel::ping::{Echo, echo};
use portolan_net::{Packet, Protocol};
use tokio::net::{TcpSocket, UdpSocket};

use crate::api::ProbeAnswer;

/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a probe cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The protocol has no prober.
    #[error("a live trace cannot send {0}: use --protocol tcp, udp or icmp, or --predict")]
    Unsupported(Protocol),
    /// The kernel refuses.
    #[error("the probe could not be sent: {0}")]
    Kernel(#[from] KernelError),
    /// The operating system refuses.
    #[error("the probe could not be sent: {0}")]
    Send(#[from] std::io::Error),
}

/// Sends the packet and waits for its answer. The namespace is the calling thread's, so this builds a
/// runtime of its own.
pub fn send_blocking(packet: &Packet, cookie: &str) -> Result<ProbeAnswer, ProbeError> {
    if packet.protocol == Protocol::Icmp {
        return ping(packet, cookie);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(send(packet, cookie))
}

fn ping(packet: &Packet, cookie: &str) -> Result<ProbeAnswer, ProbeError> {
    let (source, destination) = (packet.source, packet.destination);
    let outcome = echo(source, destination, packet.source_port, cookie.as_bytes(), ANSWER_TIMEOUT)?;
    Ok(match outcome {
        Echo::Answered(after) => {
            ProbeAnswer::Answered { microseconds: u64::try_from(after.as_micros()).unwrap_or(u64::MAX) }
        }
        Echo::Refused(errno) => ProbeAnswer::Refused { reason: errno.desc().to_owned() },
        Echo::Silence => ProbeAnswer::Silence,
    })
}

async fn send(packet: &Packet, cookie: &str) -> Result<ProbeAnswer, ProbeError> {
    let source = SocketAddr::new(packet.source, packet.source_port);
    let destination = SocketAddr::new(packet.destination, packet.destination_port);
    let begin = Instant::now();
    let outcome = match packet.protocol {
        Protocol::Tcp => {
            let socket = if source.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            socket.set_reuseaddr(true)?;
            socket.bind(source)?;
            tokio::time::timeout(ANSWER_TIMEOUT, socket.connect(destination)).await.map(|result| result.map(drop))
        }
        Protocol::Udp => {
            let socket = UdpSocket::bind(source).await?;
            socket.connect(destination).await?;
            socket.send(cookie.as_bytes()).await?;
            let mut answer = [0; 2048];
            tokio::time::timeout(ANSWER_TIMEOUT, socket.recv(&mut answer)).await.map(|result| result.map(drop))
        }
        other @ (Protocol::Sctp | Protocol::Icmp) => return Err(ProbeError::Unsupported(other)),
    };
    Ok(match outcome {
        Err(_) => ProbeAnswer::Silence,
        Ok(Ok(())) => {
            let microseconds = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
            ProbeAnswer::Answered { microseconds }
        }
        Ok(Err(error)) => ProbeAnswer::Refused { reason: error.to_string() },
    })
}
