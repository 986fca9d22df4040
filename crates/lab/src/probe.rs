//! Asks echo servers, from within a namespace: the client of the demo and of tests.
//!
//! `portolan lab probe` enters a pod, a node or a client, reads questions from its standard input and
//! writes replies to its standard output, both as JSON. Names are resolved by the C library, as by any
//! program in that pod, so the pod's own resolv.conf decides.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::time::Instant;

use anyhow::{Context as _, bail};
use portolan_net::Protocol;
use serde::{Deserialize, Serialize};

use crate::echo::Answer;
use crate::limits::{ECHO_MESSAGE_BYTES_MAX, PROBE_TIME_MAX};

/// One question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// A name or an address.
    pub host: String,
    /// The port.
    pub port: u16,
    /// TCP asks by HTTP, UDP with one datagram.
    pub protocol: Protocol,
    /// Whether to ask each address of the name and not only the first.
    pub each: bool,
}

/// What came back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The addresses of the host, sorted.
    pub addresses: Vec<IpAddr>,
    /// Who answered, one per address that was asked.
    pub answers: Vec<Answer>,
    /// How long it took, name and answers together.
    pub latency_us: u64,
    /// Why there is no answer.
    pub error: Option<String>,
}

/// Answers questions from the standard input on the standard output.
pub fn run() -> anyhow::Result<()> {
    let questions: Vec<Question> = serde_json::from_reader(std::io::stdin().lock()).context("reading questions")?;
    let replies: Vec<Reply> = questions.iter().map(ask).collect();
    let mut output = std::io::stdout().lock();
    serde_json::to_writer(&mut output, &replies).context("writing replies")?;
    output.flush().context("writing replies")
}

/// Asks one question.
pub fn ask(question: &Question) -> Reply {
    let mut reply = Reply::default();
    let begun = Instant::now();
    let result = fill(question, &mut reply);
    reply.latency_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    reply.error = result.err().map(|error| format!("{error:#}"));
    reply
}

fn fill(question: &Question, reply: &mut Reply) -> anyhow::Result<()> {
    let host = question.host.trim_start_matches('[').trim_end_matches(']');
    let mut addresses: Vec<SocketAddr> =
        (host, question.port).to_socket_addrs().with_context(|| format!("resolving {host}"))?.collect();
    if !question.each {
        addresses.truncate(1);
    }
    addresses.sort();
    addresses.dedup();
    reply.addresses = addresses.iter().map(SocketAddr::ip).collect();
    for address in addresses {
        let text = match question.protocol {
            Protocol::Tcp => by_http(address, host),
            Protocol::Udp => by_datagram(address),
            other => bail!("{other} has no echo server"),
        };
        let text = text.with_context(|| format!("asking {address}"))?;
        reply.answers.push(serde_json::from_str(&text).with_context(|| format!("{address} answered `{text}`"))?);
    }
    Ok(())
}

fn by_http(address: SocketAddr, host: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PROBE_TIME_MAX)?;
    stream.set_read_timeout(Some(PROBE_TIME_MAX))?;
    stream.write_all(format!("GET /probe HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.take(ECHO_MESSAGE_BYTES_MAX as u64).read_to_string(&mut text)?;
    let Some((_, body)) = text.split_once("\r\n\r\n") else { bail!("the answer is not HTTP: `{text}`") };
    Ok(body.to_owned())
}

fn by_datagram(address: SocketAddr) -> anyhow::Result<String> {
    let any: IpAddr = if address.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(PROBE_TIME_MAX))?;
    socket.send(b"GET /probe HTTP/1.1\n")?;
    let mut buffer = vec![0; ECHO_MESSAGE_BYTES_MAX];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned())
}
