//! Steady traffic that counts what is lost.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::common::{PATIENCE, enter, until};

/// The pause between two messages of a stream.
const PACE: Duration = Duration::from_millis(1);

/// How long an answer may take before it counts as lost. Long: the machine may be busy, and a packet
/// that is dropped never comes.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// A stream of messages in a thread of its own, until it is dropped or finished.
pub(crate) struct Stream {
    what: String,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<u64, String>>>,
}

/// What is sent again and again.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// Datagrams of one flow.
    Datagrams,
    /// Each datagram from a port of its own, so that each is a new flow.
    Flows,
    /// A new TCP connection each time.
    Connections,
}

impl Stream {
    /// Starts a stream from a namespace to an echo server.
    pub(crate) fn start(kind: Kind, from: &Path, to: SocketAddr) -> Stream {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = {
            let (stop, answered, from) = (stop.clone(), answered.clone(), PathBuf::from(from));
            std::thread::spawn(move || {
                enter(&from);
                run(kind, to, &stop, &answered)
            })
        };
        Stream { what: format!("{kind:?} to {to}"), stop, answered, thread: Some(thread) }
    }

    /// How many messages were answered.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until so many more messages were answered.
    pub(crate) fn await_more(&self, messages: u64) {
        let goal = self.answered() + messages;
        until(&self.what, || self.answered() >= goal || self.thread.as_ref().is_some_and(JoinHandle::is_finished));
    }

    /// Ends the stream. Nothing may have been lost, and no segment sent twice.
    pub(crate) fn finish(self) {
        let what = self.what.clone();
        assert_eq!(self.finish_answered(), 0, "{what}: segments were sent twice");
    }

    /// Ends the stream. Every message must have been answered; returns how many segments were sent twice.
    pub(crate) fn finish_answered(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("a running stream");
        match thread.join().expect("a stream's thread") {
            Ok(retransmitted) => retransmitted,
            Err(lost) => panic!("{}: after {} answers: {lost}", self.what, self.answered()),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Returns how many TCP segments this namespace had to send twice.
fn run(kind: Kind, to: SocketAddr, stop: &AtomicBool, answered: &AtomicU64) -> Result<u64, String> {
    let before = retransmitted();
    let mut socket = datagrams(to)?;
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        match kind {
            Kind::Datagrams => ask(&socket, number)?,
            Kind::Flows => {
                socket = datagrams(to)?;
                ask(&socket, number)?;
            }
            Kind::Connections => connect(to, number)?,
        }
        number += 1;
        answered.store(number, Ordering::Relaxed);
        std::thread::sleep(PACE);
    }
    Ok(retransmitted() - before)
}

fn datagrams(to: SocketAddr) -> Result<UdpSocket, String> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).map_err(|error| format!("a socket: {error}"))?;
    socket.connect(to).map_err(|error| format!("connecting: {error}"))?;
    socket.set_read_timeout(Some(ANSWER_TIME_MAX)).map_err(|error| error.to_string())?;
    Ok(socket)
}

fn ask(socket: &UdpSocket, number: u64) -> Result<(), String> {
    let message = format!("message {number}\n");
    socket.send(message.as_bytes()).map_err(|error| format!("sending message {number}: {error}"))?;
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer).map_err(|error| format!("no answer to message {number}: {error}"))?;
    check(&answer[..length], &message)
}

fn connect(to: SocketAddr, number: u64) -> Result<(), String> {
    let message = format!("message {number}\n");
    let mut stream =
        TcpStream::connect_timeout(&to, PATIENCE).map_err(|error| format!("connection {number}: {error}"))?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
    let mut answer = vec![0; message.len()];
    let talked = stream.write_all(message.as_bytes()).and_then(|()| stream.read_exact(&mut answer));
    talked.map_err(|error| format!("connection {number}: {error}"))?;
    check(&answer, &message)
}

fn check(answer: &[u8], message: &str) -> Result<(), String> {
    if answer == message.as_bytes() {
        return Ok(());
    }
    Err(format!("`{}` instead of `{message}`", String::from_utf8_lossy(answer)))
}

/// `RetransSegs` of the calling thread's namespace (RFC 4022): what was lost had to be sent again.
pub(crate) fn retransmitted() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").expect("the counters of a namespace");
    let mut rows = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (rows.next().expect("names"), rows.next().expect("values"));
    let mut pairs = names.split(' ').zip(values.split(' '));
    let found = pairs.find(|(name, _)| *name == "RetransSegs").expect("a counter");
    found.1.parse().expect("a number")
}
