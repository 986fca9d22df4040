//! The program `portolan-cni` as `make plugin` builds it, called as a container runtime calls it.
#![expect(clippy::expect_used, reason = "a test that cannot build or call the plugin has failed")]
#![expect(clippy::print_stdout, reason = "a test that was skipped says so")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread::{self, JoinHandle};

use portolan_cni::limits::{CONFIGURATION_BYTES_MAX, LINE_BYTES_MAX};
use portolan_cni::{AddResult, Interface, Request, Response};
use serde_json::{Value, json};
use tempfile::TempDir;

fn musl() -> String {
    format!("{}-linux-musl-gcc", std::env::consts::ARCH)
}

/// The program, built when it is first asked for. `None`, and said, where what builds it is not there.
fn program() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        for tool in ["make", "cc", &musl()] {
            Command::new(tool).arg("--version").output().ok()?;
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the crate lies in the workspace");
        let built = Command::new("make").arg("plugin").current_dir(root).output().expect("make");
        assert!(built.status.success(), "make plugin: {}", String::from_utf8_lossy(&built.stderr));
        let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        Some(root.join(target).join("plugin/portolan-cni"))
    });
    if program.is_none() {
        println!("skipped: make plugin needs make, cc and {}", musl());
    }
    program.as_deref()
}

/// A call for one verb.
fn command(program: &Path, verb: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", "c0ffee").env("CNI_NETNS", "/run/netns/a");
    command.env("CNI_IFNAME", "eth0").env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart");
    command
}

/// Runs a call to its end with this on standard input.
fn finish(mut command: Command, stdin: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the plugin starts");
    // One that reads only so much of its input is right to close it.
    let _ = child.stdin.take().expect("a pipe").write_all(stdin.as_bytes());
    child.wait_with_output().expect("the plugin ends")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("the plugin exits")
}

fn printed(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("JSON on standard output")
}

/// The error that a call ended with.
fn refused(output: &Output) -> (u64, String) {
    let error = printed(output);
    assert_eq!(code(output), 1, "{error}");
    (error["code"].as_u64().expect("a code"), error["msg"].as_str().expect("a message").to_owned())
}

/// An agent that gives each caller the next of its answers, and returns what it was asked.
struct Agent {
    directory: TempDir,
    served: JoinHandle<Vec<String>>,
}

impl Agent {
    fn start(answers: Vec<Vec<u8>>) -> Agent {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(directory.path().join("cni.sock")).expect("a socket");
        let served = thread::spawn(move || {
            let serve = |answer: Vec<u8>| {
                let (stream, _) = listener.accept().expect("a caller");
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).expect("a line");
                // A caller that has read enough may be gone.
                let _ = (&stream).write_all(&answer);
                line
            };
            answers.into_iter().map(serve).collect()
        });
        Agent { directory, served }
    }

    fn configuration(&self, version: &str) -> String {
        configuration(version, &self.directory.path().join("cni.sock"))
    }

    fn asked(self) -> Vec<Request> {
        let lines = self.served.join().expect("the agent served every call");
        lines.iter().map(|line| Request::decode(line.as_bytes()).expect("a request")).collect()
    }
}

fn configuration(version: &str, socket: &Path) -> String {
    json!({"cniVersion": version, "name": "pods", "type": "portolan-cni", "socket": socket}).to_string()
}

fn result() -> AddResult {
    let interface = Interface { name: "eth0".into(), sandbox: "/run/netns/a".into(), ..Interface::default() };
    let ips = serde_json::from_value(json!([{"address": "10.42.1.7/24", "gateway": "10.42.1.1", "interface": 0}]));
    AddResult { interfaces: vec![interface], ips: ips.expect("addresses"), ..AddResult::default() }
}

#[test]
fn version_is_answered_alone() {
    let Some(program) = program() else { return };
    for (stdin, version) in [("", "1.1.0"), (r#"{"cniVersion":"0.4.0"}"#, "0.4.0")] {
        let output = finish(command(program, "VERSION"), stdin);
        let all = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
        assert_eq!(printed(&output), json!({"cniVersion": version, "supportedVersions": all}));
        assert_eq!((code(&output), output.stderr.as_slice()), (0, &b""[..]));
    }
}

#[test]
fn add_asks_the_agent_and_prints_its_answer() {
    let Some(program) = program() else { return };
    let agent = Agent::start(vec![Response::Added(result()).encode().expect("a line"); 2]);
    for version in ["0.4.0", "1.1.0"] {
        let output = finish(command(program, "ADD"), &agent.configuration(version));
        let result = printed(&output);
        assert_eq!((code(&output), &result["cniVersion"]), (0, &json!(version)), "{result}");
        assert_eq!(result["ips"][0]["address"], "10.42.1.7/24");
        assert_eq!(result["ips"][0].get("version").is_some(), version == "0.4.0");
        let first = String::from_utf8_lossy(&output.stdout);
        assert!(first.starts_with(r#"{"cniVersion":"#) && first.ends_with("}\n"), "{first}");
    }
    for request in agent.asked() {
        let parameters = request.parameters;
        assert_eq!((parameters.container.as_str(), parameters.interface.as_str()), ("c0ffee", "eth0"));
        assert_eq!(parameters.namespace_path, "/run/netns/a");
        assert_eq!(parameters.pod.map(|pod| pod.to_string()), Some("shop/cart".to_owned()));
    }
}

#[test]
fn del_says_nothing_and_a_failure_is_the_agent_s() {
    let Some(program) = program() else { return };
    let failed = Response::Failed(portolan_cni::CniError::addresses_exhausted("no address").with_details("scale down"));
    let agent = Agent::start(vec![b"\"done\"\n".to_vec(), failed.encode().expect("a line")]);
    let done = finish(command(program, "DEL"), &agent.configuration("1.0.0"));
    assert_eq!((code(&done), done.stdout.as_slice(), done.stderr.as_slice()), (0, &b""[..], &b""[..]));
    let full = finish(command(program, "ADD"), &agent.configuration("1.0.0"));
    assert_eq!(refused(&full), (102, "no address".to_owned()));
    assert_eq!(printed(&full)["details"], "scale down");
    agent.asked();
}

#[test]
fn an_agent_that_is_away_is_worth_another_try() {
    let Some(program) = program() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let absent = directory.path().join("cni.sock");
    let dead = directory.path().join("dead.sock");
    drop(UnixListener::bind(&dead).expect("a socket"));
    let long = directory.path().join("x".repeat(120));
    for (socket, words) in [
        (absent, "No such file or directory (os error 2)"),
        (dead, "Connection refused (os error 111)"),
        (Path::new("/etc/passwd/cni.sock").to_owned(), "Not a directory (os error 20)"),
        (long, "File name too long (os error 36)"),
    ] {
        let (code, message) = refused(&finish(command(program, "ADD"), &configuration("1.0.0", &socket)));
        assert!(message.contains(socket.to_str().expect("text")) && message.ends_with(words), "{message}");
        assert_eq!(code, 11, "{message}");
    }
}

#[test]
fn an_answer_without_an_end_is_no_answer() {
    let Some(program) = program() else { return };
    let endless = vec![b' '; LINE_BYTES_MAX + 10];
    let agent = Agent::start(vec![b"\"do".to_vec(), Vec::new(), b"nonsense\n".to_vec(), endless]);
    for (code, words) in [
        (11, "closed before the answer was complete"),
        (11, "closed before the answer was complete"),
        (6, "the agent's answer cannot be read"),
        (6, "the agent's answer is longer than"),
    ] {
        let error = refused(&finish(command(program, "DEL"), &agent.configuration("1.0.0")));
        assert!(error.0 == code && error.1.contains(words), "{error:?}");
    }
    agent.asked();
}

#[test]
fn standard_input_is_read_to_its_bound() {
    let Some(program) = program() else { return };
    let agent = Agent::start(vec![b"\"done\"\n".to_vec()]);
    let padded = |length: usize| {
        let text = agent.configuration("1.0.0");
        format!("{text}{}", " ".repeat(length - text.len()))
    };
    let fits = finish(command(program, "DEL"), &padded(CONFIGURATION_BYTES_MAX));
    assert_eq!(code(&fits), 0, "{}", String::from_utf8_lossy(&fits.stdout));
    let (code, message) = refused(&finish(command(program, "DEL"), &padded(CONFIGURATION_BYTES_MAX * 2)));
    assert!(code == 6 && message.contains("longer than 1048576 bytes"), "{code} {message}");
    assert_eq!(refused(&finish(command(program, "DEL"), "")).0, 6);
    agent.asked();
}

#[test]
fn a_large_configuration_goes_through_whole() {
    let Some(program) = program() else { return };
    let agent = Agent::start(vec![b"\"done\"\n".to_vec()]);
    let valid: Vec<Value> =
        (0..10_000).map(|index| json!({"containerID": format!("{index:064}"), "ifname": "eth0"})).collect();
    let mut configuration: Value = serde_json::from_str(&agent.configuration("1.1.0")).expect("JSON");
    configuration["cni.dev/valid-attachments"] = Value::Array(valid);
    let output = finish(command(program, "GC"), &configuration.to_string());
    assert_eq!(code(&output), 0, "{}", String::from_utf8_lossy(&output.stdout));
    let asked = agent.asked();
    let attachments = asked[0].configuration.valid_attachments.as_ref().expect("attachments");
    assert_eq!((attachments.len(), &attachments[9_999].container), (10_000, &format!("{:064}", 9_999)));
}

#[test]
fn a_person_is_told_what_it_is_for() {
    let Some(program) = program() else { return };
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/bin").env("CNI_PATH", "/opt/cni/bin");
    let output = finish(command, "");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!((code(&output), output.stdout.as_slice()), (1, &b""[..]));
    assert!(text.starts_with("portolan-cni: CNI_COMMAND is missing\nhint: "), "{text}");
}

#[test]
fn an_answer_that_no_one_reads_is_a_failure() {
    let Some(program) = program() else { return };
    let mut command = command(program, "VERSION");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let status = command.stdin(Stdio::null()).stdout(writer).status().expect("the plugin starts");
    assert_eq!(status.code(), Some(1), "{status}");
}

#[test]
fn bad_variables_are_all_named() {
    let Some(program) = program() else { return };
    let mut command = command(program, "ADD");
    command.env_remove("CNI_NETNS").env("CNI_IFNAME", "..");
    let (code, message) = refused(&finish(command, "{}"));
    assert!(code == 4 && message.contains("CNI_NETNS is missing") && message.contains("CNI_IFNAME=`..`"), "{message}");
}
