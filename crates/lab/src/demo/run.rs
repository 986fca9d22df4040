//! Tries one way, and judges the answer.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};

use anyhow::Context as _;

use super::Path;
use crate::Layout;
use crate::Result;
use crate::description::Description;
use crate::probe::Reply;

/// A way that was tried, as it is shown.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Where it started.
    pub from: String,
    /// Where it went.
    pub to: String,
    /// Who answered.
    pub answered: String,
    /// On which node.
    pub on: String,
    /// The source address that the server saw.
    pub source: String,
    /// How long it took.
    pub latency_us: u64,
    /// What is not right about it.
    pub problem: Option<String>,
}

/// Tries a way from where it starts.
pub(super) fn run(layout: &Layout, description: &Description, path: Path) -> Result<Outcome> {
    let entry = path.from.entry(layout, description)?;
    let mut child = Command::new(&description.program)
        .args(["lab", "probe"])
        .args(entry.arguments())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting a probe")?;
    if let Some(mut input) = child.stdin.take() {
        let questions = serde_json::to_vec(&[&path.question]).context("writing a question")?;
        input.write_all(&questions).context("writing a question")?;
    }
    let output = child.wait_with_output().context("waiting for a probe")?;
    let replies: Vec<Reply> = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("a probe from {}: {}", path.from, String::from_utf8_lossy(&output.stderr).trim()))?;
    Ok(outcome(path, &replies.into_iter().next().unwrap_or_default()))
}

fn outcome(path: Path, reply: &Reply) -> Outcome {
    let sources: BTreeSet<IpAddr> =
        reply.answers.iter().filter_map(|answer| Some(answer.client.parse::<SocketAddr>().ok()?.ip())).collect();
    let answered: BTreeSet<&str> = reply.answers.iter().map(|answer| answer.identity.pod.as_str()).collect();
    let nodes: BTreeSet<&str> = reply.answers.iter().map(|answer| answer.identity.node.as_str()).collect();
    let text = |words: Vec<String>| if words.is_empty() { "-".to_owned() } else { words.join(",") };
    let shown = |words: &BTreeSet<&str>| {
        text(words.iter().filter(|word| !word.is_empty()).map(|word| (*word).to_owned()).collect())
    };
    Outcome {
        from: path.from.to_string().replace("pod/default/", "pod/"),
        answered: if answered.len() > 1 { format!("{} pods", answered.len()) } else { shown(&answered) },
        on: shown(&nodes),
        source: text(sources.iter().map(ToString::to_string).collect()),
        latency_us: reply.latency_us,
        problem: problem(&path, reply, &answered, &sources),
        to: path.to,
    }
}

fn problem(path: &Path, reply: &Reply, answered: &BTreeSet<&str>, sources: &BTreeSet<IpAddr>) -> Option<String> {
    if let Some(error) = &reply.error {
        return Some(error.clone());
    }
    let expected: BTreeSet<&str> = path.expected.answers.iter().map(String::as_str).collect();
    if answered.is_empty() || !answered.is_subset(&expected) {
        return Some(format!("expected an answer of {}", path.expected.answers.join(" or ")));
    }
    if path.expected.all && *answered != expected {
        return Some(format!("{} of {} answered", answered.len(), expected.len()));
    }
    if sources.is_empty() || !sources.iter().all(|source| path.expected.sources.contains(source)) {
        let wanted: Vec<String> = path.expected.sources.iter().map(ToString::to_string).collect();
        return Some(format!("expected the source {}", wanted.join(" or ")));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::Expectation;
    use crate::echo::{Answer, Identity};
    use crate::probe::Question;
    use crate::target::Target;
    use portolan_net::Protocol;

    fn judge(pods: &[&str], source: &str, all: bool) -> Option<String> {
        let path = Path {
            from: Target::Node("node-1".into()),
            to: "cart".into(),
            question: Question { host: "cart".into(), port: 1, protocol: Protocol::Tcp, each: all },
            expected: Expectation {
                answers: vec!["cart-1".into(), "cart-2".into()],
                all,
                sources: vec!["10.42.0.7".parse().unwrap()],
            },
        };
        let answer = |pod: &&str| Answer {
            identity: Identity { pod: (*pod).to_owned(), ..Identity::default() },
            client: format!("{source}:4000"),
            host: String::new(),
            path: String::new(),
            port: 1,
        };
        outcome(path, &Reply { answers: pods.iter().map(answer).collect(), ..Reply::default() }).problem
    }

    #[test]
    fn right_is_the_right_pod_that_saw_the_right_source() {
        assert_eq!(judge(&["cart-1"], "10.42.0.7", false), None);
        assert_eq!(judge(&["cart-1", "cart-2"], "10.42.0.7", true), None);
        assert_eq!(judge(&["cart-1"], "10.42.0.7", true).as_deref(), Some("1 of 2 answered"));
        assert_eq!(judge(&["cart-1"], "10.42.0.1", false).as_deref(), Some("expected the source 10.42.0.7"));
        assert_eq!(judge(&["moon-1"], "10.42.0.7", false).as_deref(), Some("expected an answer of cart-1 or cart-2"));
        assert!(judge(&[], "10.42.0.7", false).is_some());
    }
}
