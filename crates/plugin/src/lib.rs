//! The CNI plugin's process: what the container runtime runs for each pod.
//!
//! It starts no runtime, no logger and no argument parser: a node that starts a hundred pods pays for
//! this process a hundred times. It reads standard input, hands it to the agent over its socket with
//! the environment, and prints the answer. What it says is `portolan_cni::plugin`, which is pure.
//!
//! `portolan` runs it when a runtime calls it, and the program `portolan-cni` of this package does
//! nothing else. That one has no C library and so no standard library: this is written without.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod problem;

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;

use portolan_cni::Parameters;
use portolan_cni::limits::{CONFIGURATION_BYTES_MAX, LINE_BYTES_MAX};
use portolan_cni::plugin::{self, Output, Step};
use rustix::buffer::spare_capacity;
use rustix::fd::AsFd;
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with};

pub use portolan_cni::PLUGIN_NAME;

use crate::problem::Problem;

/// How long the agent may take. Kubelet gives a sandbox four minutes, and the agent itself answers
/// with an error after one.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

/// What is read at first, in bytes: a network configuration, or an answer, of the usual length.
const READ_BYTES: usize = 4096;

/// What a person is told who starts the plugin by hand.
const HINT: &str = ": CNI_COMMAND is missing\nhint: container runtimes run this program, people run `portolan`\n";

/// What the environment says to a plugin, of all that it says. Of two entries of one name the first counts.
pub fn variables<N: AsRef<[u8]>, V: AsRef<[u8]>>(
    environment: impl IntoIterator<Item = (N, V)>,
) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    for (name, value) in environment {
        if let Some(known) = Parameters::VARIABLES.into_iter().find(|known| known.as_bytes() == name.as_ref()) {
            let value = || String::from_utf8_lossy(value.as_ref()).into_owned();
            variables.entry(known.to_owned()).or_insert_with(value);
        }
    }
    variables
}

/// Serves one call, and returns the process's exit code.
pub fn run(variables: &BTreeMap<String, String>, stdin: impl AsFd, stdout: impl AsFd, stderr: impl AsFd) -> u8 {
    if variables.is_empty() {
        let _ = write_all(PLUGIN_NAME.as_bytes(), |bytes| write(&stderr, bytes));
        let _ = write_all(HINT.as_bytes(), |bytes| write(&stderr, bytes));
        return 1;
    }
    // Where it cannot be read, the answer is an error about standard input; nothing is asked of the agent.
    let configuration = read_bounded(stdin, CONFIGURATION_BYTES_MAX, |_| false).unwrap_or_default();
    let output = serve(variables, &configuration);
    match write_all(output.text.as_bytes(), |bytes| write(&stdout, bytes)) {
        Ok(()) => output.exit_code,
        Err(_) => 1,
    }
}

fn serve(variables: &BTreeMap<String, String>, stdin: &[u8]) -> Output {
    match plugin::prepare(variables, stdin) {
        Step::Answer(output) => output,
        Step::Ask(question) => match ask(&question.socket, &question.line) {
            Ok(line) => question.answered(&line),
            Err(problem) => question.unreachable(&problem.to_string()),
        },
    }
}

/// One line to the agent, one line back.
fn ask(path: &str, line: &[u8]) -> Result<Vec<u8>, Problem> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Before connecting: an agent that accepts no one lets a caller wait there.
    set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_TIMEOUT))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
    connect(&socket, &address)?;
    write_all(line, |bytes| send(&socket, bytes, SendFlags::NOSIGNAL))?;
    let is_line = |bytes: &[u8]| bytes.last() == Some(&b'\n');
    let answer = read_bounded(&socket, LINE_BYTES_MAX, is_line)?;
    if !is_line(&answer) && answer.len() <= LINE_BYTES_MAX {
        return Err(Problem::Incomplete);
    }
    Ok(answer)
}

/// Reads to the end, or until it is complete, or one byte beyond the bound, so that the reader of the bytes
/// sees it crossed.
fn read_bounded(source: impl AsFd, bytes_max: usize, is_complete: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>, Errno> {
    let mut bytes = Vec::with_capacity(READ_BYTES);
    while bytes.len() <= bytes_max && !is_complete(&bytes) {
        if bytes.len() == bytes.capacity() {
            bytes.reserve(bytes.len());
        }
        if retry_on_intr(|| read(&source, spare_capacity(&mut bytes)))? == 0 {
            break;
        }
    }
    bytes.truncate(bytes_max + 1);
    Ok(bytes)
}

fn write_all(mut bytes: &[u8], write: impl Fn(&[u8]) -> Result<usize, Errno>) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let written = retry_on_intr(|| write(bytes))?;
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use std::io::Write;

    #[test]
    fn only_the_variables_of_the_specification_are_read() {
        let entries: [(&[u8], &[u8]); 5] = [
            (b"PATH", b"/bin"),
            (b"CNI_COMMAND", b"ADD"),
            (b"CNI_COMMAND", b"DEL"),
            (b"CNI_ARGS", b"A=\xff"),
            (b"", b""),
        ];
        let expected = [("CNI_ARGS", "A=\u{fffd}"), ("CNI_COMMAND", "ADD")];
        assert_eq!(variables(entries), expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }

    #[test]
    fn reading_ends_one_byte_beyond_the_bound() {
        let mut file = tempfile::tempfile().unwrap();
        for (length, bound, expected) in
            [(0, 10, 0), (10, 10, 10), (11, 10, 11), (12, 10, 11), (20_000, 10_000, 10_001)]
        {
            file.set_len(0).unwrap();
            std::io::Seek::rewind(&mut file).unwrap();
            file.write_all(&vec![b'x'; length]).unwrap();
            std::io::Seek::rewind(&mut file).unwrap();
            assert_eq!(read_bounded(&file, bound, |_| false).map(|bytes| bytes.len()), Ok(expected));
        }
    }
}
