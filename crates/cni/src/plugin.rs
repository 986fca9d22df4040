//! The plugin process, without its input and output.
//!
//! ```text
//!   environment ─┐                       ┌─ Answer(output): the agent need not be asked
//!                ├─▶ prepare ─▶ Step ────┤
//!   stdin ───────┘                       └─ Ask(question) ─▶ socket ─▶ answered / unreachable ─▶ Output
//! ```

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde_json::{Value, json};

use crate::limits::CONFIGURATION_BYTES_MAX;
use crate::{CniError, Command, NetworkConfiguration, Parameters, Request, Response, Version};

/// What the process prints, and its exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// For standard output: a result, an error, or nothing.
    pub text: String,
    /// 0, or 1 with an error on standard output ("Error": "plugins must exit with a non-zero code").
    pub exit_code: u8,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Print this and exit.
    Answer(Output),
    /// Ask the agent.
    Ask(Question),
}

/// A line for the agent, and what is needed to print its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// The path of the agent's socket.
    pub socket: String,
    /// What to write to it.
    pub line: Vec<u8>,
    command: Command,
    version: Version,
}

/// Reads one call. `environment` needs only [`Parameters::VARIABLES`].
pub fn prepare(environment: &BTreeMap<String, String>, stdin: &[u8]) -> Step {
    let mut asked_version = None;
    match try_prepare(environment, stdin, &mut asked_version) {
        Ok(step) => step,
        Err(error) => Step::Answer(failed(&error, asked_version.as_deref().unwrap_or(Version::NEWEST.as_str()))),
    }
}

fn try_prepare(
    environment: &BTreeMap<String, String>,
    stdin: &[u8],
    asked_version: &mut Option<String>,
) -> Result<Step, CniError> {
    let parameters = Parameters::from_environment(environment)?;
    if stdin.len() > CONFIGURATION_BYTES_MAX {
        return Err(CniError::decode(format!(
            "the network configuration is longer than {CONFIGURATION_BYTES_MAX} bytes"
        )));
    }
    let command = parameters.command;
    // Runtimes before 0.2.0 asked for the version with nothing on standard input.
    let nothing = command == Command::Version && stdin.trim_ascii().is_empty();
    let configuration = if nothing { NetworkConfiguration::default() } else { NetworkConfiguration::parse(stdin)? };
    asked_version.clone_from(&configuration.cni_version);
    if command == Command::Version {
        return Ok(Step::Answer(versions(asked_version.as_deref())));
    }
    let version = configuration.validate(command)?;
    let socket = configuration.socket().to_owned();
    let line = Request { parameters, configuration }.encode()?;
    Ok(Step::Ask(Question { socket, line, command, version }))
}

impl Question {
    /// What to print after the agent's answer.
    pub fn answered(&self, line: &[u8]) -> Output {
        match (Response::decode(line), self.command) {
            (Ok(Response::Added(result)), Command::Add) => succeeded(Some(&result.render(self.version))),
            (Ok(Response::Done), Command::Del | Command::Check | Command::Gc | Command::Status) => succeeded(None),
            (Ok(Response::Failed(error)) | Err(error), _) => self.failed(&error),
            (Ok(Response::Added(_) | Response::Done), command) => {
                self.failed(&CniError::decode(format!("the agent's answer is not one to {command}")))
            }
        }
    }

    /// What to print when the agent cannot be reached.
    ///
    /// DEL fails too, although it should be forgiving: the agent alone knows what is to be removed,
    /// and a runtime that is told "done" never asks again, which would leak the address.
    pub fn unreachable(&self, problem: &str) -> Output {
        let message = format!("the portolan agent does not answer at {}: {problem}", self.socket);
        let error = match self.command {
            Command::Status => CniError::not_available(message),
            Command::Add | Command::Del | Command::Check | Command::Gc | Command::Version => {
                CniError::try_again_later(message)
            }
        };
        self.failed(&error.with_details(
            "start `portolan agent` on this node, and see that its CNI socket is the network configuration's `socket`",
        ))
    }

    fn failed(&self, error: &CniError) -> Output {
        failed(error, self.version.as_str())
    }
}

/// What VERSION answers, with the version that the runtime asked in.
fn versions(asked: Option<&str>) -> Output {
    succeeded(Some(&json!({
        "cniVersion": asked.unwrap_or(Version::NEWEST.as_str()),
        "supportedVersions": Version::ALL,
    })))
}

fn succeeded(value: Option<&Value>) -> Output {
    Output { text: value.map(|value| format!("{value}\n")).unwrap_or_default(), exit_code: 0 }
}

fn failed(error: &CniError, version: &str) -> Output {
    Output { text: format!("{}\n", error.render(version)), exit_code: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AddResult;
    use proptest::prelude::*;

    fn environment(verb: &str) -> BTreeMap<String, String> {
        [("CNI_COMMAND", verb), ("CNI_CONTAINERID", "c0ffee"), ("CNI_NETNS", "/run/netns/a"), ("CNI_IFNAME", "eth0")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    }

    fn ask(verb: &str, version: &str) -> Question {
        let stdin = format!(r#"{{"cniVersion":"{version}","name":"pods","type":"portolan-cni"}}"#);
        match prepare(&environment(verb), stdin.as_bytes()) {
            Step::Ask(question) => question,
            Step::Answer(output) => panic!("answered without the agent: {output:?}"),
        }
    }

    fn answer(verb: &str, stdin: &str) -> (Value, u8) {
        match prepare(&environment(verb), stdin.as_bytes()) {
            Step::Answer(output) => (serde_json::from_str(&output.text).unwrap(), output.exit_code),
            Step::Ask(question) => panic!("asks the agent: {question:?}"),
        }
    }

    #[test]
    fn version_is_answered_without_the_agent() {
        let all = json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
        let expected = json!({"cniVersion": "0.4.0", "supportedVersions": all});
        assert_eq!(answer("VERSION", r#"{"cniVersion":"0.4.0"}"#), (expected, 0));
        assert_eq!(answer("VERSION", "").0["cniVersion"], "1.1.0");
    }

    #[test]
    fn errors_echo_the_version_that_was_asked_for() {
        let (error, code) = answer("ADD", r#"{"cniVersion":"0.2.0","name":"pods"}"#);
        assert_eq!((&error["cniVersion"], &error["code"], code), (&json!("0.2.0"), &json!(1), 1));
        assert_eq!(answer("ADD", "not json").0["code"], 6);
        assert_eq!(answer("EAT", "{}").0["code"], 4);
        assert_eq!(answer("STATUS", r#"{"cniVersion":"1.0.0","name":"pods"}"#).0["code"], 1);
    }

    #[test]
    fn a_configuration_that_is_too_long_is_refused_at_the_bound() {
        let text = r#"{"cniVersion":"1.0.0","name":"pods"}"#;
        let padded = |length: usize| format!("{text}{}", " ".repeat(length - text.len()));
        let fits = prepare(&environment("ADD"), padded(CONFIGURATION_BYTES_MAX).as_bytes());
        assert!(matches!(fits, Step::Ask(_)));
        assert_eq!(answer("ADD", &padded(CONFIGURATION_BYTES_MAX + 1)).0["code"], 6);
    }

    #[test]
    fn the_answer_is_printed_for_the_version_that_was_asked_for() {
        let result = AddResult {
            ips: vec![crate::IpConfiguration {
                address: "10.42.1.7/24".parse().unwrap(),
                gateway: None,
                interface: None,
            }],
            ..AddResult::default()
        };
        let line = Response::Added(result).encode().unwrap();
        let output = ask("ADD", "0.3.1").answered(&line);
        let printed: Value = serde_json::from_str(&output.text).unwrap();
        assert_eq!(printed["ips"][0], json!({"version": "4", "address": "10.42.1.7/24"}));
        assert_eq!(ask("DEL", "0.3.1").answered(&line).exit_code, 1);
        let done = Response::Done.encode().unwrap();
        assert_eq!(ask("DEL", "0.3.1").answered(&done), Output { text: String::new(), exit_code: 0 });
        assert_eq!(ask("ADD", "0.3.1").answered(&done).exit_code, 1);
    }

    #[test]
    fn without_the_agent_the_runtime_is_told_to_come_back() {
        for (verb, code) in [("ADD", 11), ("DEL", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)] {
            let output = ask(verb, "1.1.0").unreachable("No such file or directory");
            let printed: Value = serde_json::from_str(&output.text).unwrap();
            assert_eq!((&printed["code"], output.exit_code), (&json!(code), 1), "{verb}");
            assert!(printed["msg"].as_str().unwrap().contains("/run/portolan/cni.sock"));
        }
    }

    #[test]
    fn the_agent_reads_what_the_plugin_wrote() {
        let request = Request::decode(&ask("ADD", "1.0.0").line).unwrap();
        assert_eq!(request.parameters.container, "c0ffee");
        assert_eq!(request.configuration.plugin_type, "portolan-cni");
    }

    proptest! {
        #[test]
        fn any_input_ends_in_an_answer_or_a_question(
            verb in "(ADD|DEL|CHECK|GC|STATUS|VERSION|x)", stdin: Vec<u8>, line: Vec<u8>,
        ) {
            if let Step::Answer(output) = prepare(&environment(&verb), &stdin) {
                prop_assert!(serde_json::from_str::<Value>(&output.text).is_ok());
            }
            let output = ask("ADD", "1.1.0").answered(&line);
            prop_assert_eq!(output.exit_code, 1);
        }
    }
}
