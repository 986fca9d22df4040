//! Upstreams: asking other servers.
//!
//! Each attempt goes from a new socket, and so a random source port, under a random number
//! (RFC 5452 §4), over UDP first and over TCP where the answer was cut (RFC 7766 §5). What is not
//! the answer to the query is passed over, and the wait goes on. An upstream that fails
//! [`UPSTREAM_FAILURES_MAX`] times in a row is asked last for [`UPSTREAM_HOLD`].

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::PoisonError;

use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout, timeout_at};

use super::service::Random;
use super::tcp::{read_message, write_message};
use crate::limits::{
    FORWARD_ATTEMPTS_MAX, FORWARD_ATTEMPTS_MIN, FORWARD_DEADLINE, MESSAGE_LENGTH_MAX, UPSTREAM_FAILURES_MAX,
    UPSTREAM_HOLD, UPSTREAM_TIMEOUT,
};
use crate::metrics::{Metrics, increment};
use crate::wire::{
    Question, Response, UpstreamAnswer, decode_answer, encode_plain_query, encode_query, is_plea_for_plain,
};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ForwardError {
    /// The name cannot be on the wire.
    #[error("the name is too long for a query")]
    Name,
    /// Nobody answered.
    #[error("no upstream answered; the last, {upstream}: {reason}")]
    NoAnswer { upstream: SocketAddr, reason: io::Error },
    /// There is nobody to ask.
    #[error("no upstream is configured")]
    NoUpstream,
}

/// The servers to ask, in the order of the configuration.
#[derive(Debug)]
pub(super) struct Upstreams(Vec<Upstream>);

#[derive(Debug)]
struct Upstream {
    address: SocketAddr,
    health: Mutex<Health>,
}

#[derive(Debug, Default)]
struct Health {
    failures: u32,
    last_failure: Option<Instant>,
}

impl Upstream {
    fn is_healthy(&self, now: Instant) -> bool {
        let health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        health.failures < UPSTREAM_FAILURES_MAX || health.last_failure.is_none_or(|it| now >= it + UPSTREAM_HOLD)
    }

    fn succeeded(&self) {
        *self.health.lock().unwrap_or_else(PoisonError::into_inner) = Health::default();
    }

    fn failed(&self, now: Instant) {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        health.failures = health.failures.saturating_add(1);
        health.last_failure = Some(now);
        if health.failures == UPSTREAM_FAILURES_MAX {
            tracing::warn!(upstream = %self.address, "the upstream does not answer; it is asked last for a while");
        }
    }
}

impl Upstreams {
    pub(super) fn new(addresses: &[SocketAddr]) -> Upstreams {
        Upstreams(addresses.iter().map(|address| Upstream { address: *address, health: Mutex::default() }).collect())
    }

    /// Asks one upstream after the other until one answers, whatever it says.
    pub(super) async fn exchange(
        &self,
        question: &Question,
        random: &Random,
        metrics: &Metrics,
    ) -> Result<Response, ForwardError> {
        let deadline = Instant::now() + FORWARD_DEADLINE;
        let mut last = ForwardError::NoUpstream;
        for upstream in self.attempts() {
            let id = random.next() as u16;
            let query = encode_query(id, question).ok_or(ForwardError::Name)?;
            increment(&metrics.forward_requests);
            let attempt = timeout(UPSTREAM_TIMEOUT, ask(upstream.address, id, question, &query));
            let reason = match timeout_at(deadline, attempt).await {
                Ok(Ok(Ok(response))) => {
                    upstream.succeeded();
                    return Ok(response);
                }
                Ok(Ok(Err(reason))) => reason,
                Ok(Err(_)) | Err(_) => io::ErrorKind::TimedOut.into(),
            };
            increment(&metrics.forward_failures);
            upstream.failed(Instant::now());
            last = ForwardError::NoAnswer { upstream: upstream.address, reason };
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(last)
    }

    /// Whom to ask: the healthy in their order, then the others, in turns up to the bound.
    fn attempts(&self) -> impl Iterator<Item = &Upstream> {
        let now = Instant::now();
        let (mut order, rest): (Vec<_>, Vec<_>) = self.0.iter().partition(|upstream| upstream.is_healthy(now));
        order.extend(rest);
        let count = if order.is_empty() { 0 } else { order.len().clamp(FORWARD_ATTEMPTS_MIN, FORWARD_ATTEMPTS_MAX) };
        (0..count).filter_map(move |turn| order.get(turn % order.len()).copied())
    }
}

async fn ask(upstream: SocketAddr, id: u16, question: &Question, query: &[u8]) -> io::Result<Response> {
    let answer = ask_udp(upstream, id, question, query).await?;
    if is_plea_for_plain(answer.response.code)
        && let Some(plain) = encode_plain_query(id, question)
    {
        let answer = ask_udp(upstream, id, question, &plain).await?;
        return if answer.truncated { ask_tcp(upstream, id, question, &plain).await } else { Ok(answer.response) };
    }
    if answer.truncated { ask_tcp(upstream, id, question, query).await } else { Ok(answer.response) }
}

async fn ask_udp(upstream: SocketAddr, id: u16, question: &Question, query: &[u8]) -> io::Result<UpstreamAnswer> {
    let any: IpAddr = if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    // A connected socket takes datagrams from this upstream only, and hears that nobody listens.
    socket.connect(upstream).await?;
    socket.send(query).await?;
    let mut bytes = vec![0; 4096];
    loop {
        let length = socket.recv(&mut bytes).await?;
        if let Some(answer) = decode_answer(&bytes[..length], id, question) {
            return Ok(answer);
        }
    }
}

async fn ask_tcp(upstream: SocketAddr, id: u16, question: &Question, query: &[u8]) -> io::Result<Response> {
    let mut stream = TcpStream::connect(upstream).await?;
    write_message(&mut stream, query).await?;
    let mut bytes = Vec::with_capacity(MESSAGE_LENGTH_MAX.min(4096));
    if !read_message(&mut stream, &mut bytes).await? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let answer = decode_answer(&bytes, id, question);
    answer.map(|answer| answer.response).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
