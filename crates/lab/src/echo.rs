//! The server that stands in for a container's image.
//!
//! It listens on each of the container's ports, on TCP and UDP alike:
//!
//! - an HTTP/1 request is answered with JSON that says who answered and whom it saw;
//! - a UDP datagram that starts with an HTTP request line is answered with the same JSON;
//! - any other line or datagram comes back as it was.
//!
//! It is threads and blocking sockets: it starts in a millisecond and needs a few hundred kilobytes,
//! since a lab runs dozens of them.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::limits::{ECHO_CONNECTIONS_MAX, ECHO_IDLE_TIME_MAX, ECHO_MESSAGE_BYTES_MAX};

/// The pause after a connection that could not be accepted, so that a lasting failure does not spin.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

/// Stack of a thread: the buffers are on the heap.
const STACK_BYTES: usize = 128 << 10;

/// Who answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The pod's name, or the machine's outside the cluster.
    pub pod: String,
    /// The pod's namespace; empty outside the cluster.
    pub namespace: String,
    /// The node's name; empty outside the cluster.
    pub node: String,
    /// The container's name.
    pub container: String,
}

/// The JSON of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Who answered.
    #[serde(flatten)]
    pub identity: Identity,
    /// The address and port that the request came from, as the server saw it.
    pub client: String,
    /// The `Host` of the request.
    pub host: String,
    /// The path of the request.
    pub path: String,
    /// The port that the server listens on.
    pub port: u16,
}

/// Listens on the ports, writes a line `ready` to stdout, and answers until it is killed.
///
/// # Errors
/// If a port cannot be bound.
pub fn serve(identity: Identity, ports: &[u16]) -> anyhow::Result<()> {
    let identity = Arc::new(identity);
    let connections = Arc::new(AtomicUsize::new(0));
    let mut threads = Vec::new();
    for port in ports {
        let listener = bind(*port, TcpListener::bind).with_context(|| format!("listening on TCP port {port}"))?;
        let socket = bind(*port, UdpSocket::bind).with_context(|| format!("listening on UDP port {port}"))?;
        let (port, connections) = (*port, Arc::clone(&connections));
        let for_streams = Arc::clone(&identity);
        threads.push(spawn(move || accept(&listener, port, &for_streams, &connections))?);
        let for_datagrams = Arc::clone(&identity);
        threads.push(spawn(move || answer_datagrams(&socket, port, &for_datagrams))?);
    }
    let mut report = io::stdout();
    report.write_all(b"ready\n").and_then(|()| report.flush()).context("reporting that the ports are open")?;
    for thread in threads {
        let _ = thread.join();
    }
    // Without ports there is nothing to answer; the container still runs.
    loop {
        nix::unistd::pause();
    }
}

/// Binds the wildcard of both families, or of IPv4 where the kernel has no IPv6.
fn bind<T>(port: u16, bind: impl Fn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    match bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32) => {
            bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
        }
        result => result,
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> anyhow::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().stack_size(STACK_BYTES).spawn(work).context("starting a thread")
}

fn accept(listener: &TcpListener, port: u16, identity: &Arc<Identity>, connections: &Arc<AtomicUsize>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // For lack of files or memory, most often: they come back when connections end.
            std::thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        // Beyond the bound a connection is closed at once, so that its client can try again.
        if connections.fetch_add(1, Ordering::Relaxed) >= ECHO_CONNECTIONS_MAX {
            connections.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (identity, open) = (Arc::clone(identity), Arc::clone(connections));
        let started = spawn(move || {
            let _ = answer_stream(&stream, port, &identity);
            open.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn answer_stream(stream: &TcpStream, port: u16, identity: &Identity) -> io::Result<()> {
    stream.set_read_timeout(Some(ECHO_IDLE_TIME_MAX))?;
    stream.set_nodelay(true)?;
    let client = plain(stream.peer_addr()?);
    let mut reader = BufReader::with_capacity(4 << 10, stream);
    let mut writer = stream;
    loop {
        let mut line = Vec::new();
        if (&mut reader).take(ECHO_MESSAGE_BYTES_MAX as u64).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let Some(path) = request_path(&line) else {
            writer.write_all(&line)?;
            continue;
        };
        let head = read_head(&mut reader)?;
        io::copy(&mut (&mut reader).take(head.body), &mut io::sink())?;
        let answer = answer(identity, client, &head.host, path, port);
        let close = if head.close { "Connection: close\r\n" } else { "" };
        let response = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{close}\r\n{answer}",
            answer.len()
        );
        writer.write_all(response.as_bytes())?;
        if head.close {
            return Ok(());
        }
    }
}

fn answer_datagrams(socket: &UdpSocket, port: u16, identity: &Identity) {
    let mut buffer = vec![0; ECHO_MESSAGE_BYTES_MAX];
    loop {
        let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
        let message = buffer.get(..length).unwrap_or_default();
        let line = message.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
        let _ = match request_path(line) {
            Some(path) => socket.send_to(answer(identity, plain(client), "", path, port).as_bytes(), client),
            None => socket.send_to(message, client),
        };
    }
}

/// The path of an HTTP/1 request line (RFC 9112 §3), or nothing if the line is none.
fn request_path(line: &[u8]) -> Option<&str> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (method, path, version) = (words.next()?, words.next()?, words.next()?);
    let is_request = method.bytes().all(|byte| byte.is_ascii_uppercase()) && version.starts_with("HTTP/1.");
    (is_request && words.next().is_none()).then_some(path)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Head {
    host: String,
    body: u64,
    close: bool,
}

/// Reads the header fields up to the empty line.
fn read_head(reader: &mut impl io::BufRead) -> io::Result<Head> {
    let mut head = Head::default();
    let mut left = ECHO_MESSAGE_BYTES_MAX as u64;
    loop {
        let mut line = Vec::new();
        let length = reader.take(left).read_until(b'\n', &mut line)? as u64;
        left -= length;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if text.is_empty() || left == 0 {
            head.close |= left == 0;
            return Ok(head);
        }
        let Some((name, value)) = text.split_once(':') else { continue };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "host" => value.clone_into(&mut head.host),
            "content-length" => head.body = value.parse().unwrap_or(0),
            "connection" => head.close = value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
}

fn answer(identity: &Identity, client: SocketAddr, host: &str, path: &str, port: u16) -> String {
    let answer = Answer {
        identity: identity.clone(),
        client: client.to_string(),
        host: host.to_owned(),
        path: path.to_owned(),
        port,
    };
    let mut text = serde_json::to_string(&answer).unwrap_or_default();
    text.push('\n');
    text
}

/// An IPv4 client of a dual-stack socket, as IPv4 (RFC 4291 §2.5.5.2).
fn plain(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = address.ip().to_canonical();
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_line_is_told_from_any_other_line() {
        assert_eq!(request_path(b"GET /a?b=1 HTTP/1.1\r\n"), Some("/a?b=1"));
        assert_eq!(request_path(b"hello\n"), None);
        assert_eq!(request_path(b"hello world HTTP/1.1\n"), None);
        assert_eq!(request_path(b"\xff\xfe GET\n"), None);
    }

    #[test]
    fn a_head_ends_at_the_empty_line() {
        let mut text: &[u8] = b"Host: cart\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc";
        assert_eq!(read_head(&mut text).unwrap(), Head { host: "cart".into(), body: 3, close: true });
        assert_eq!(text, b"abc");
    }

    proptest! {
        #[test]
        fn a_head_never_panics_and_is_bounded(bytes: Vec<u8>) {
            let mut text: &[u8] = &bytes;
            let _ = read_head(&mut text);
            let _ = request_path(&bytes);
        }
    }

    fn connect() -> (TcpStream, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let identity = Arc::new(Identity { pod: "cart-1".into(), ..Identity::default() });
        std::thread::spawn(move || accept(&listener, address.port(), &identity, &Arc::default()));
        (TcpStream::connect(address).unwrap(), address)
    }

    #[test]
    fn an_http_request_is_answered_with_who_and_whom() {
        let (mut stream, server) = connect();
        stream.write_all(b"GET /x HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (_, body) = text.split_once("\r\n\r\n").unwrap();
        let answer: Answer = serde_json::from_str(body).unwrap();
        assert_eq!(answer.identity.pod, "cart-1");
        assert_eq!(answer.client, stream.local_addr().unwrap().to_string());
        assert_eq!((answer.host.as_str(), answer.path.as_str(), answer.port), ("shop", "/x", server.port()));
    }

    #[test]
    fn a_line_comes_back_and_a_connection_is_kept() {
        let (mut stream, _) = connect();
        for line in [b"one\n", b"two\n"] {
            stream.write_all(line).unwrap();
            let mut back = [0; 4];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(&back, line);
        }
    }
}
