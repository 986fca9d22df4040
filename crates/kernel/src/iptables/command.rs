//! Runs iptables' programs, in the network namespace of the room.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::KernelError;
use crate::netns::Namespace;
use crate::process::enter_on_start;

/// The longest that one program may run. With 10,000 Services of 10 endpoints each, `iptables-nft-save` takes more
/// than two minutes on two busy cores; nothing else takes a tenth of that.
const RUN_MAX: Duration = Duration::from_mins(10);

/// Where programs are looked for besides `PATH`, which of daemons often lacks the directories of administrators.
const DIRECTORIES: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// The longest line that is read whole. A rule of the kernel's has less than 64 KiB, and its text not much more.
const LINE_LENGTH_MAX: u64 = 1024 * 1024;

/// What a program said.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) success: bool,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

/// How a program ended.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) success: bool,
    pub(super) stderr: String,
}

/// The path of an installed program.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(DIRECTORIES.iter().map(PathBuf::from));
    directories.map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// Runs a program to its end, with a text as its input.
pub(super) fn run(
    program: &Path,
    arguments: &[&str],
    input: &str,
    namespace: &Namespace,
) -> Result<Output, KernelError> {
    let mut said = String::new();
    let ending = run_reading(program, arguments, input, namespace, |stdout| said = read(stdout))?;
    Ok(Output { success: ending.success, stdout: said, stderr: ending.stderr })
}

/// Runs a program to its end, and looks at its lines one by one as they come.
pub(super) fn run_lines(
    program: &Path,
    namespace: &Namespace,
    mut visit: impl FnMut(&str) + Send,
) -> Result<Ending, KernelError> {
    run_reading(program, &[], "", namespace, |stdout| {
        let mut stdout = BufReader::new(stdout);
        let mut line = Vec::new();
        // What was read so far counts.
        while let Ok(1..) = stdout.by_ref().take(LINE_LENGTH_MAX).read_until(b'\n', &mut line) {
            visit(String::from_utf8_lossy(&line).trim_end_matches('\n'));
            line.clear();
        }
    })
}

/// Runs a program to its end, while another thread reads what it says.
fn run_reading(
    program: &Path,
    arguments: &[&str],
    input: &str,
    namespace: &Namespace,
    reader: impl FnOnce(ChildStdout) + Send,
) -> Result<Ending, KernelError> {
    let doing = || format!("run {} {}", program.display(), arguments.join(" "));
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A thread's children are in its namespace; only elsewhere it has to be entered, which needs more rights.
    if !is_current(namespace)? {
        enter_on_start(&mut command, namespace)?;
    }
    let mut child = command.spawn().map_err(|error| KernelError::file(doing(), &error))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (done, ends) = mpsc::channel();
    let (stderr, late) = std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin {
                // Whoever stops reading says why on its standard error.
                let _ = stdin.write_all(input.as_bytes());
            }
        });
        let other = done.clone();
        scope.spawn(move || {
            stdout.map(reader);
            let _ = done.send(());
        });
        let stderr = scope.spawn(move || {
            let said = stderr.map(read).unwrap_or_default();
            let _ = other.send(());
            said
        });
        let deadline = Instant::now() + RUN_MAX;
        let left = || deadline.saturating_duration_since(Instant::now());
        let late = (0..2).any(|_| ends.recv_timeout(left()).is_err());
        if late {
            // It is not waited for yet, so the number is still its own.
            let _ = child.kill();
        }
        (stderr.join().unwrap_or_default(), late)
    });
    let status = child.wait().map_err(|error| KernelError::file(doing(), &error))?;
    if late {
        return Err(KernelError::system(doing(), Errno::ETIMEDOUT));
    }
    Ok(Ending { success: status.success(), stderr })
}

fn read(mut from: impl Read) -> String {
    let mut bytes = Vec::new();
    // What was read so far counts.
    let _ = from.read_to_end(&mut bytes);
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

fn is_current(namespace: &Namespace) -> Result<bool, KernelError> {
    let identity = |namespace: &Namespace| {
        nix::sys::stat::fstat(namespace.fd())
            .map(|status| (status.st_dev, status.st_ino))
            .map_err(|errno| KernelError::system(format!("look at namespace {}", namespace.fd().as_raw_fd()), errno))
    };
    Ok(identity(namespace)? == identity(&Namespace::current()?)?)
}
