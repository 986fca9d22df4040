//! One container of a pod: the built-in echo server, or the command of an annotation.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;

use super::object::{Container, Pod};
use super::{Context, NodeContext};
use crate::clock;
use crate::inside::{self, Entry};
use crate::limits::READINESS_PERIOD;

/// What a container does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// It does not run yet, or not any more and will again.
    Waiting {
        reason: &'static str,
        message: String,
    },
    Running {
        since: String,
    },
    /// It ended and is not started again.
    Ended {
        code: i32,
    },
}

/// A container as its pod's task knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ContainerState {
    pub(super) name: String,
    pub(super) image: String,
    pub(super) pid: Option<u32>,
    pub(super) restarts: u32,
    /// Whether it listens on all its ports.
    pub(super) listening: bool,
    pub(super) state: State,
}

impl ContainerState {
    pub(super) fn new(container: &Container) -> ContainerState {
        ContainerState {
            name: container.name.clone(),
            image: container.image.clone(),
            pid: None,
            restarts: 0,
            listening: false,
            state: State::Waiting { reason: "ContainerCreating", message: String::new() },
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.listening && matches!(self.state, State::Running { .. })
    }

    pub(super) fn started(&mut self, pid: Option<u32>) {
        self.pid = pid;
        self.state = State::Running { since: clock::now() };
    }
}

/// A container's process, and how it is known that it listens.
pub(super) struct Running {
    pub(super) child: Child,
    pub(super) readiness: Readiness,
}

/// How it is known that a container listens.
pub(super) enum Readiness {
    /// It writes a line.
    Line(BufReader<tokio::process::ChildStdout>),
    /// All of these ports appear among the pod's listening sockets.
    Ports { sandbox: u32, ports: Vec<u16> },
    /// Running is enough.
    Started,
}

impl Readiness {
    /// Waits until the container listens. Ends without success only if its process ended.
    pub(super) async fn wait(self) -> bool {
        match self {
            Readiness::Started => true,
            Readiness::Line(mut output) => {
                let mut line = String::new();
                matches!(output.read_line(&mut line).await, Ok(length) if length > 0)
            }
            Readiness::Ports { sandbox, ports } => {
                while !listens_on_all(sandbox, &ports) {
                    tokio::time::sleep(READINESS_PERIOD).await;
                }
                true
            }
        }
    }
}

/// Starts a container in its pod's namespaces.
pub(super) fn start(
    context: &Context,
    node: &NodeContext,
    pod: &Pod,
    container: &Container,
    sandbox: u32,
) -> anyhow::Result<Running> {
    let log = log_file(&context.layout.pod(&pod.metadata.uid), &container.name)?;
    let program = &context.description.program;
    let entry = Entry::of_process(sandbox);
    let ports = container.ports();
    let (mut command, readiness_by_line) = if let Some(line) = pod.command(container) {
        let mut words = shell_words(line).with_context(|| format!("annotation portolan.dev/run: `{line}`"))?;
        // `portolan` is this lab's own program, however its file is called.
        if let Some(first) = words.first_mut().filter(|first| *first == "portolan") {
            program.as_os_str().clone_into(first);
        }
        let mut command = inside::child(program, &entry, &words);
        command.stdout(log.try_clone()?);
        (command, false)
    } else {
        let mut command = tokio::process::Command::new(program);
        command.args(["lab", "echo"]).args(entry.arguments());
        command.arg("--die-with").arg(std::process::id().to_string());
        for port in &ports {
            command.arg("--port").arg(port.to_string());
        }
        command.stdout(Stdio::piped());
        (command, true)
    };
    command.stdin(Stdio::null()).stderr(OwnedFd::from(log));
    for variable in &container.env {
        if let Some(value) = &variable.value {
            command.env(&variable.name, value);
        }
    }
    command.env("PORTOLAN_POD", &pod.metadata.name);
    command.env("PORTOLAN_NAMESPACE", &pod.metadata.namespace);
    command.env("PORTOLAN_NODE", &node.name);
    command.env("PORTOLAN_CONTAINER", &container.name);
    command.env("PORTOLAN_LAB", context.layout.name());
    command.env("PORTOLAN_LAB_FILES", context.layout.directory());
    command.env("PORTOLAN_API_SOCKET", context.client.socket());
    command.env("HOSTNAME", pod.hostname());
    command.env("PATH", path_with(program));
    let mut child =
        command.spawn().with_context(|| format!("starting container {} of {}", container.name, pod.metadata.name))?;
    let readiness = if readiness_by_line {
        child.stdout.take().map_or(Readiness::Started, |output| Readiness::Line(BufReader::new(output)))
    } else if ports.is_empty() {
        Readiness::Started
    } else {
        Readiness::Ports { sandbox, ports }
    };
    Ok(Running { child, readiness })
}

fn log_file(directory: &Path, container: &str) -> anyhow::Result<File> {
    let path = directory.join(format!("{container}.log"));
    File::options().create(true).append(true).open(&path).with_context(|| format!("opening {}", path.display()))
}

/// The search path with the program's own directory before it, so that a command may say `portolan`.
pub(crate) fn path_with(program: &Path) -> OsString {
    let mut paths: Vec<PathBuf> = program.parent().map(Path::to_owned).into_iter().collect();
    paths.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    std::env::join_paths(paths).unwrap_or_default()
}

/// Splits a command as a shell does: white space between words; quotes and backslashes keep it within.
/// Nothing is expanded; `sh -c '…'` is there for that.
pub(crate) fn shell_words(line: &str) -> anyhow::Result<Vec<OsString>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (None, '\'' | '"') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (Some(open), close) if open == close => quote = None,
            (None | Some('"'), '\\') => {
                let next = letters.next().context("it ends with a backslash")?;
                word.get_or_insert_default().push(next);
            }
            (None, space) if space.is_whitespace() => words.extend(word.take()),
            (_, letter) => word.get_or_insert_default().push(letter),
        }
    }
    if let Some(quote) = quote {
        anyhow::bail!("the quote {quote} is not closed");
    }
    words.extend(word);
    anyhow::ensure!(!words.is_empty(), "it is empty");
    Ok(words.into_iter().map(OsString::from).collect())
}

/// Whether something in a process's network namespace listens on each of the ports, by TCP or UDP.
fn listens_on_all(process: u32, ports: &[u16]) -> bool {
    let mut open = Vec::new();
    for (table, state) in [("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")] {
        if let Ok(text) = std::fs::read_to_string(format!("/proc/{process}/net/{table}")) {
            open.extend(listening_ports(&text, state));
        }
    }
    ports.iter().all(|port| open.contains(port))
}

/// The local ports of the sockets in a state, from the text of `/proc/PID/net/tcp` (proc(5)).
fn listening_ports<'a>(table: &'a str, state: &'a str) -> impl Iterator<Item = u16> + 'a {
    table.lines().skip(1).filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, _, socket_state) = (fields.next()?, fields.next()?, fields.next()?);
        let port = local.rsplit_once(':')?.1;
        (socket_state == state).then(|| u16::from_str_radix(port, 16).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_shell_does() {
        assert_eq!(
            shell_words("sh -c 'a \"b\" c' \"d e\" f\\ g ''").unwrap(),
            ["sh", "-c", "a \"b\" c", "d e", "f g", ""]
        );
        assert_eq!(shell_words("").unwrap_err().to_string(), "it is empty");
        assert_eq!(shell_words("a 'b").unwrap_err().to_string(), "the quote ' is not closed");
        assert_eq!(shell_words("a \\").unwrap_err().to_string(), "it ends with a backslash");
    }

    #[test]
    fn listening_sockets_are_read_from_proc() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     0: 00000000:1F90 00000000:0000 0A 00000000:00000000\n\
                     1: 0100007F:9C40 0100007F:1F90 01 00000000:00000000\n";
        assert_eq!(listening_ports(table, "0A").collect::<Vec<_>>(), [8080]);
    }
}
