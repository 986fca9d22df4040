//! Starts the built binary, and takes down what a test brought up, also when it failed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A lab of a test, by a name that no other test has.
pub(crate) struct TestLab {
    program: PathBuf,
    directory: PathBuf,
    pub(crate) name: String,
}

/// Waits for something that another process does.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "not after 20 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl TestLab {
    /// A name and the binary, or nothing if this machine cannot run labs; says why then.
    pub(crate) fn new() -> Option<TestLab> {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: labs need root");
            return None;
        }
        let Some(program) = binary() else {
            println!("skipped: the binary is not built; run `cargo build -p portolan`, or set PORTOLAN_BINARY");
            return None;
        };
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // Apart from the user's own labs. Short: a socket's path has at most 107 bytes (unix(7)).
        let directory = PathBuf::from(format!("/run/portolan/test-{process}"));
        Some(TestLab { program, directory, name: format!("t{process}-{number}") })
    }

    /// Runs `portolan lab VERB --name NAME …`.
    pub(crate) fn run(&self, verb: &str, arguments: &[&str]) -> Done {
        let mut command = self.command("lab");
        command.args([verb, "--name", &self.name]).args(arguments);
        Done::of(&command.output().expect("running the binary"))
    }

    /// Starts `portolan lab VERB --name NAME …` and does not wait for it.
    pub(crate) fn start(&self, verb: &str, arguments: &[&str]) -> Child {
        let mut command = self.command("lab");
        command.args([verb, "--name", &self.name]).args(arguments);
        command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("starting the binary")
    }

    /// Runs a command in a target of the lab.
    pub(crate) fn exec(&self, target: &str, command: &[&str]) -> Done {
        let mut arguments = vec![target, "--"];
        arguments.extend(command);
        self.run("exec", &arguments)
    }

    /// Writes a manifest to a file.
    pub(crate) fn manifest(&self, text: &str) -> String {
        std::fs::create_dir_all(&self.directory).expect("creating the test's directory");
        let file = self.directory.join(format!("{}.yaml", self.name));
        std::fs::write(&file, text).expect("writing a manifest");
        file.display().to_string()
    }

    /// Brings the lab up and waits for it.
    pub(crate) fn up(&self, manifest: &str, arguments: &[&str]) {
        let file = self.manifest(manifest);
        let mut all = vec!["-f", &file, "--wait"];
        all.extend(arguments);
        let done = self.run("up", &all);
        assert_eq!(done.code, 0, "{}", done.stderr);
    }

    /// The directory of the lab.
    pub(crate) fn directory(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// The lab's namespaces that have a name.
    pub(crate) fn namespaces(&self) -> Vec<String> {
        let prefix = format!("portolan-{}-", self.name);
        let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter(|name| name.starts_with(&prefix)).collect()
    }

    /// How many processes were started for the lab.
    pub(crate) fn processes(&self) -> usize {
        let own = self.directory().display().to_string();
        let named = format!("\0{}\0", self.name);
        let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
        let commands = entries.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("cmdline")).ok());
        commands.filter(|command| command.contains(&own) || command.contains(&named)).count()
    }

    /// The number in a file of the lab.
    pub(crate) fn number(&self, file: &str) -> i32 {
        let path = self.directory().join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        text.trim().parse().expect("a number")
    }

    /// Nothing of the lab is left.
    pub(crate) fn assert_gone(&self) {
        assert_eq!(self.namespaces(), Vec::<String>::new());
        assert!(!self.directory().exists(), "{} is left", self.directory().display());
        // One that was being started when its parent ended sees that itself, and ends a moment later.
        until("no process is left", || self.processes() == 0);
    }

    fn command(&self, first: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(first).env("PORTOLAN_LAB_DIRECTORY", &self.directory);
        command
    }
}

impl Drop for TestLab {
    fn drop(&mut self) {
        if self.directory().exists() {
            if std::thread::panicking() {
                let log = std::fs::read_to_string(self.directory().join("supervisor.log")).unwrap_or_default();
                println!("the supervisor said:\n{log}");
            }
            let _ = self.run("down", &[]);
        }
        let _ = std::fs::remove_file(self.directory.join(format!("{}.yaml", self.name)));
        // Only goes when it is empty: other tests of this process share it.
        let _ = std::fs::remove_dir(&self.directory);
    }
}

impl Done {
    fn of(output: &Output) -> Done {
        Done {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The binary: `PORTOLAN_BINARY`, or the one beside the directory of the test's own executable.
fn binary() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("PORTOLAN_BINARY") {
        return Some(path.into());
    }
    let own = std::env::current_exe().ok()?;
    let built = own.parent().and_then(Path::parent)?.join("portolan");
    built.exists().then_some(built)
}
