//! The CNI plugin process: what the container runtime runs for each pod.
//!
//! It starts no runtime, no logger and no argument parser: a node that starts a hundred pods pays for
//! this process a hundred times. It reads the environment and standard input, hands both to the
//! agent over its socket, and prints the answer. All else is `portolan_cni::plugin`, which is pure.

use std::collections::BTreeMap;
use std::env;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use portolan_cni::limits::{CONFIGURATION_BYTES_MAX, LINE_BYTES_MAX};
use portolan_cni::plugin::{self, Output, Step};
use portolan_cni::{PLUGIN_NAME, Parameters};

/// How long the agent may take. Kubelet gives a sandbox four minutes, and the agent itself answers
/// with an error after one.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

/// Serves one call.
pub(crate) fn run() -> ExitCode {
    let environment: BTreeMap<String, String> = Parameters::VARIABLES
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), env::var_os(name)?.to_string_lossy().into_owned())))
        .collect();
    if environment.is_empty() {
        eprintln!(
            "{PLUGIN_NAME}: CNI_COMMAND is missing\nhint: container runtimes run this program, people run `portolan`"
        );
        return ExitCode::from(1);
    }
    let output = match read_bounded(io::stdin().lock(), CONFIGURATION_BYTES_MAX) {
        Ok(stdin) => serve(&environment, &stdin),
        // The answer is an error about standard input either way; nothing was asked of the agent.
        Err(_) => serve(&environment, b""),
    };
    if io::stdout().lock().write_all(output.text.as_bytes()).is_err() {
        return ExitCode::from(1);
    }
    ExitCode::from(output.exit_code)
}

fn serve(environment: &BTreeMap<String, String>, stdin: &[u8]) -> Output {
    match plugin::prepare(environment, stdin) {
        Step::Answer(output) => output,
        Step::Ask(question) => match ask(&question.socket, &question.line) {
            Ok(line) => question.answered(&line),
            Err(error) => question.unreachable(&error.to_string()),
        },
    }
}

/// One line to the agent, one line back.
fn ask(socket: &str, line: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    stream.write_all(line)?;
    let answer = read_bounded(stream, LINE_BYTES_MAX)?;
    if answer.last() != Some(&b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the connection closed before the answer was complete",
        ));
    }
    Ok(answer)
}

/// Reads to the end, or one byte beyond the bound, so that the reader of the bytes sees it crossed.
fn read_bounded(source: impl Read, bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(4096);
    source.take(bytes_max as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn environment() -> BTreeMap<String, String> {
        [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c0ffee"), ("CNI_IFNAME", "eth0")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    }

    #[test]
    fn a_call_goes_to_the_socket_and_back() {
        let path = env::temp_dir().join(format!("portolan-cni-plugin-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let agent = std::thread::spawn(move || {
            let mut lines = Vec::new();
            for answer in [&b"\"done\"\n"[..], b"\"do"] {
                let (stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                io::BufRead::read_line(&mut io::BufReader::new(&stream), &mut line).unwrap();
                (&stream).write_all(answer).unwrap();
                lines.push(line);
            }
            lines
        });
        let socket = path.to_str().unwrap();
        let stdin = format!(r#"{{"cniVersion":"1.0.0","name":"pods","type":"portolan-cni","socket":"{socket}"}}"#);
        assert_eq!(serve(&environment(), stdin.as_bytes()), Output { text: String::new(), exit_code: 0 });
        let torn = serve(&environment(), stdin.as_bytes());
        assert!(torn.text.contains("\"code\":11"), "{torn:?}");
        let lines = agent.join().unwrap();
        assert!(lines.iter().all(|line| portolan_cni::Request::decode(line.as_bytes()).is_ok()));
        std::fs::remove_file(&path).unwrap();
        let gone = serve(&environment(), stdin.as_bytes());
        assert!(gone.text.contains("\"code\":11") && gone.text.contains(socket), "{gone:?}");
    }
}
