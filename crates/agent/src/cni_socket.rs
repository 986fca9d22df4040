//! The socket on which the CNI plugin asks: one line in, one line out, then the connection closes.
//!
//! ```text
//!   plugin ─▶ socket ─▶ one of a fixed number of threads ─▶ CniCall ─▶ the agent's loop
//!          ◀─────────────────────────────────────────────── Reply  ◀─┘
//! ```
//!
//! Plain threads, no runtime: a call costs two context switches more than the kernel's own. It
//! promises that every call gets an answer, also where the loop forgets it, panics or stops, and
//! that a peer that says nothing or too much holds one thread for a bounded time. Only root may
//! connect, since whoever may call can make interfaces.

use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use portolan_cni::limits::LINE_BYTES_MAX;
use portolan_cni::{CniError, Request, Response};

/// Calls that are served at one time; further callers wait in the listener's backlog.
pub const CALLS_MAX: usize = 16;

/// How long a peer may take to send its line or to take its answer.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the loop may take for one call. Kubelet waits four minutes.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);

/// The threads hold one line and call little; the default of 2 MiB each would only be reserved.
const STACK_BYTES: usize = 256 << 10;

/// One call, for the agent's loop.
#[derive(Debug)]
pub struct CniCall {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes.
    pub reply: Reply,
}

/// The way back. Dropping it without an answer tells the runtime to try again later.
#[derive(Debug)]
pub struct Reply(SyncSender<Response>);

impl Reply {
    /// Sends the answer. The caller never waits, and need not care whether the plugin still does.
    pub fn send(self, response: impl Into<Response>) {
        let _ = self.0.try_send(response.into());
    }

    /// A reply and its other end, for tests of the loop.
    pub fn channel() -> (Reply, Receiver<Response>) {
        let (sender, receiver) = sync_channel(1);
        (Reply(sender), receiver)
    }
}

/// The listening socket and its threads. Dropping it stops them, after the calls that they serve.
#[derive(Debug)]
pub struct CniSocket {
    path: PathBuf,
    stopping: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// The socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CniSocketError {
    /// Someone answers there.
    #[error("another agent listens on the CNI socket {}; stop it, or set another path", .0.display())]
    InUse(PathBuf),
    /// The system refused it.
    #[error("the CNI socket {} cannot be opened; see that the agent may write its directory", path.display())]
    Unusable {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl CniSocket {
    /// Listens on a path and gives every call to `serve`, on one of the socket's threads. `serve`
    /// returns at once: it hands the call to the loop, which answers when it has an answer.
    ///
    /// The socket appears under its name complete, with its permissions set; one that a killed agent
    /// left is replaced.
    pub fn listen(path: &Path, serve: impl Fn(CniCall) + Send + Sync + 'static) -> Result<CniSocket, CniSocketError> {
        if UnixStream::connect(path).is_ok() {
            return Err(CniSocketError::InUse(path.to_owned()));
        }
        let unusable = |source| CniSocketError::Unusable { path: path.to_owned(), source };
        let listener = Arc::new(publish(path).map_err(unusable)?);
        let stopping = Arc::new(AtomicBool::new(false));
        let serve = Arc::new(serve);
        let mut socket = CniSocket { path: path.to_owned(), stopping: stopping.clone(), threads: Vec::new() };
        for number in 0..CALLS_MAX {
            let (listener, stopping, serve) = (listener.clone(), stopping.clone(), serve.clone());
            let thread = thread::Builder::new()
                .name(format!("cni-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || accept(&listener, &stopping, &*serve))
                .map_err(unusable)?;
            socket.threads.push(thread);
        }
        Ok(socket)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for CniSocket {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // Each connection wakes one thread, which sees that it is to stop. A thread that serves a
        // call sees it afterwards; nobody waits for it here.
        for _ in &self.threads {
            let _ = UnixStream::connect(&self.path);
        }
        let _ = fs::remove_file(&self.path);
    }
}

/// Binds under a temporary name, closes it to others, and renames it.
fn publish(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
    fs::rename(&temporary, path)?;
    Ok(listener)
}

fn accept(listener: &UnixListener, stopping: &AtomicBool, serve: &dyn Fn(CniCall)) {
    while !stopping.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((stream, _)) if !stopping.load(Ordering::Acquire) => {
                if let Err(error) = answer(&stream, serve) {
                    tracing::debug!(%error, "a CNI call was not answered");
                }
            }
            Ok(_) => return,
            // Out of descriptors, most likely: others must close theirs first.
            Err(error) => {
                tracing::warn!(%error, "the CNI socket cannot accept a call");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn answer(mut stream: &UnixStream, serve: &dyn Fn(CniCall)) -> io::Result<()> {
    stream.set_read_timeout(Some(PEER_TIMEOUT))?;
    stream.set_write_timeout(Some(PEER_TIMEOUT))?;
    let mut line = Vec::with_capacity(2048);
    BufReader::new(stream.take(LINE_BYTES_MAX as u64 + 1)).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(());
    }
    let response = match Request::decode(&line) {
        Ok(request) => call(request, serve),
        Err(error) => Response::Failed(error),
    };
    let line = response.encode().or_else(|error| Response::Failed(error).encode()).unwrap_or_default();
    stream.write_all(&line)
}

fn call(request: Request, serve: &dyn Fn(CniCall)) -> Response {
    let command = request.parameters.command;
    let (reply, answer) = Reply::channel();
    serve(CniCall { request, reply });
    answer.recv_timeout(ANSWER_TIMEOUT).unwrap_or_else(|error| {
        let message = match error {
            RecvTimeoutError::Timeout => format!("the agent has not finished {command} after {ANSWER_TIMEOUT:?}"),
            RecvTimeoutError::Disconnected => format!("the agent is stopping and has not served {command}"),
        };
        Response::Failed(CniError::try_again_later(message).with_details("see the agent's log and `portolan doctor`"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use portolan_cni::{Command, NetworkConfiguration, Parameters};

    fn request(container: &str) -> Request {
        Request {
            parameters: Parameters {
                command: Command::Add,
                container: container.to_owned(),
                namespace_path: "/run/netns/a".to_owned(),
                interface: "eth0".to_owned(),
                pod: None,
                mac: None,
            },
            configuration: NetworkConfiguration::default(),
        }
    }

    fn ask_bytes(path: &Path, bytes: &[u8]) -> Response {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(bytes).unwrap();
        let mut line = Vec::new();
        stream.read_to_end(&mut line).unwrap();
        Response::decode(&line).unwrap()
    }

    fn ask(path: &Path, container: &str) -> Response {
        ask_bytes(path, &request(container).encode().unwrap())
    }

    fn code(response: &Response) -> u32 {
        match response {
            Response::Failed(error) => error.code.number(),
            other => panic!("no error: {other:?}"),
        }
    }

    #[test]
    fn calls_go_to_the_loop_and_answers_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/cni.sock");
        let (sender, calls) = channel::<CniCall>();
        let socket = CniSocket::listen(&path, move |call| drop(sender.send(call))).unwrap();
        let agent = thread::spawn(move || {
            for call in calls {
                match call.request.parameters.container.as_str() {
                    "forgotten" => drop(call.reply),
                    "refused" => call.reply.send(Err(CniError::addresses_exhausted("none"))),
                    _ => call.reply.send(Response::Done),
                }
            }
        });
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(ask(&path, "a"), Response::Done);
        assert_eq!(code(&ask(&path, "refused")), 102);
        assert_eq!(code(&ask(&path, "forgotten")), 11);
        assert_eq!(code(&ask_bytes(&path, b"{}\n")), 6);
        assert_eq!(code(&ask_bytes(&path, b"\xff\n")), 6);
        drop(UnixStream::connect(&path).unwrap());
        assert!(matches!(CniSocket::listen(&path, drop), Err(CniSocketError::InUse(_))));

        let times: Vec<Duration> = (0..200)
            .map(|_| {
                let start = Instant::now();
                ask(&path, "a");
                start.elapsed()
            })
            .collect();
        let median = {
            let mut sorted = times;
            sorted.sort();
            sorted[100]
        };
        println!("median of 200 calls, both ends in one process: {median:?}");

        let (socket_path, open) = (path.clone(), socket);
        drop(open);
        assert!(!socket_path.exists());
        agent.join().unwrap();
    }

    #[test]
    fn the_socket_of_a_killed_agent_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = CniSocket::listen(&path, |call| call.reply.send(Response::Done)).unwrap();
        assert_eq!(ask(socket.path(), "a"), Response::Done);
    }

    #[test]
    fn more_callers_than_threads_are_all_answered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let _socket = CniSocket::listen(&path, |call| call.reply.send(Response::Done)).unwrap();
        let callers: Vec<_> = (0..CALLS_MAX * 4)
            .map(|number| {
                let path = path.clone();
                thread::spawn(move || ask(&path, &number.to_string()))
            })
            .collect();
        for caller in callers {
            assert_eq!(caller.join().unwrap(), Response::Done);
        }
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_bound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let _socket = CniSocket::listen(&path, |call| call.reply.send(Response::Done)).unwrap();
        let response = ask_bytes(&path, &vec![b' '; LINE_BYTES_MAX + 1]);
        assert_eq!(code(&response), 6);
    }
}
