//! The form of a scenario: steps, the text that checks expect, and embedded files.
//!
//! `scenarios/README.md` says how it is written. Reading is strict: a word that means nothing is an
//! error that names the line, since a check that is passed over proves nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use portolan_agent::table::TABLES;
use portolan_intent::FabricMode;
use portolan_net::{Family, IpNet, MacAddress, NodeName, ObjectKey, Packet, Protocol};
use portolan_state::ObjectRef;
use portolan_trace::Choice;

/// A scenario as it is written.
pub struct Scenario {
    /// What comes before the files, in order.
    lines: Vec<Line>,
    /// The steps.
    pub steps: Vec<Step>,
    /// The embedded files by name.
    pub files: BTreeMap<String, String>,
    /// The files as they are written.
    tail: String,
}

enum Line {
    /// A comment or an empty line.
    Plain(String),
    /// The step of this index.
    Step(usize),
}

/// One step.
pub struct Step {
    /// Where it is written.
    pub line: usize,
    /// How.
    pub text: String,
    /// What it means.
    pub verb: Verb,
    /// What a check expects.
    pub expected: String,
}

/// What a step does or looks at.
#[derive(Debug, Clone)]
pub enum Verb {
    Cluster(Settings),
    Machine(NodeName, Vec<IpNet>),
    Apply(Vec<String>),
    Delete(ObjectRef),
    Attach(ObjectKey, Vec<IpNet>, NodeName),
    Detach(ObjectKey, NodeName),
    /// With what is then different in the agent's configuration.
    Restart(NodeName, Vec<String>),
    Foreign(NodeName, Act),
    Refuse(NodeName, usize),
    Show(String, Option<NodeName>),
    Program(Room, NodeName, Vec<String>),
    Trace(TraceStep),
    Problems,
    Waiting(NodeName),
    Failures(NodeName),
    Changes(NodeName, usize),
}

/// What all agents of the cluster are configured with.
#[derive(Debug, Clone)]
pub struct Settings {
    pub fabric: FabricMode,
    /// The fields of the fabric's sections, by section and field.
    pub fabric_options: BTreeMap<(String, String), serde_json::Value>,
    pub pods: Vec<IpNet>,
    pub services: Vec<IpNet>,
    pub masquerade: bool,
}

/// A room of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    Netlink,
    Nftables,
}

/// What somebody else does to a node's kernel.
#[derive(Debug, Clone)]
pub enum Act {
    RemoveLink(String),
    RemoveRoute(IpNet),
    RemoveAddress(IpNet),
    RemoveNeighbour(IpAddr),
    RemoveForwarding(MacAddress),
    RemovePod(ObjectKey),
    RemoveTable(Family, String),
    EmptySet(Family, String),
    FlushChain(Family, String),
    SetMtu(String, u32),
    SetMac(String, MacAddress),
    Redirect(MacAddress, IpAddr),
    SetSysctl(String, String),
    AddRoute(IpNet, IpAddr, String),
    DropRoute(IpNet),
    Readdress(IpNet, IpNet),
}

/// A packet, and who sends it.
#[derive(Debug, Clone)]
pub struct TraceStep {
    pub from: String,
    pub sender: Sender,
    pub to: String,
    pub packet: Packet,
    pub choice: Choice,
}

/// Who sends a packet.
#[derive(Debug, Clone)]
pub enum Sender {
    Pod(ObjectKey),
    Node(NodeName),
    Client,
}

impl Verb {
    /// Whether the step looks and does nothing.
    pub fn is_check(&self) -> bool {
        matches!(
            self,
            Verb::Show(..)
                | Verb::Program(..)
                | Verb::Trace(_)
                | Verb::Problems
                | Verb::Waiting(_)
                | Verb::Failures(_)
                | Verb::Changes(..)
        )
    }

    /// Whether the step is about the way to a result, which differs between expansions.
    pub fn is_about_the_way(&self) -> bool {
        matches!(self, Verb::Changes(..) | Verb::Failures(_))
    }

    /// Whether the step looks at the kernel as it is, so that what came before must be done.
    pub fn needs_settled(&self) -> bool {
        matches!(self, Verb::Restart(..) | Verb::Foreign(..) | Verb::Refuse(..))
    }
}

impl Scenario {
    /// Reads a scenario.
    pub fn parse(text: &str) -> Result<Scenario, String> {
        let (head, tail) = split_files(text);
        let mut scenario = Scenario { lines: Vec::new(), steps: Vec::new(), files: files(tail)?, tail: tail.into() };
        let mut blanks = Vec::new();
        for (index, line) in head.lines().enumerate() {
            let place = |error: String| format!("{}: {error}", index + 1);
            if line.trim().is_empty() {
                blanks.push(line.to_owned());
                continue;
            }
            if let Some(expected) = line.strip_prefix("  ") {
                let step = scenario.steps.last_mut().filter(|step| step.verb.is_check());
                let step = step.ok_or_else(|| place("this is indented, but belongs to no check".into()))?;
                let gap = if step.expected.is_empty() { 0 } else { blanks.len() };
                step.expected.push_str(&"\n".repeat(gap));
                step.expected.push_str(expected);
                step.expected.push('\n');
                blanks.clear();
                continue;
            }
            scenario.lines.extend(blanks.drain(..).map(Line::Plain));
            if line.starts_with('#') {
                scenario.lines.push(Line::Plain(line.to_owned()));
                continue;
            }
            let verb = verb(line).map_err(place)?;
            scenario.lines.push(Line::Step(scenario.steps.len()));
            let (text, expected) = (line.to_owned(), String::new());
            scenario.steps.push(Step { line: index + 1, text, verb, expected });
        }
        scenario.lines.extend(blanks.into_iter().map(Line::Plain));
        Ok(scenario)
    }

    /// The scenario as text, with what its checks have found in place of what they expected.
    pub fn render(&self, found: &BTreeMap<usize, String>) -> String {
        let mut text = String::new();
        for line in &self.lines {
            match line {
                Line::Plain(plain) => text.push_str(plain),
                Line::Step(index) => {
                    let Some(step) = self.steps.get(*index) else { continue };
                    text.push_str(&step.text);
                    for line in found.get(index).unwrap_or(&step.expected).lines() {
                        let indent = if line.is_empty() { "" } else { "  " };
                        let _ = write!(text, "\n{indent}{line}");
                    }
                }
            }
            text.push('\n');
        }
        text + &self.tail
    }
}

fn split_files(text: &str) -> (&str, &str) {
    if text.starts_with("-- ") {
        return ("", text);
    }
    text.find("\n-- ").map_or((text, ""), |at| text.split_at(at + 1))
}

fn files(tail: &str) -> Result<BTreeMap<String, String>, String> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    let mut current = None;
    for line in tail.lines() {
        if let Some(name) = line.strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --")) {
            if files.insert(name.to_owned(), String::new()).is_some() {
                return Err(format!("the file {name} is there twice"));
            }
            current = Some(name.to_owned());
        } else if let Some(text) = current.as_ref().and_then(|name| files.get_mut(name)) {
            text.push_str(line);
            text.push('\n');
        } else {
            return Err(format!("`{line}` begins no file: write `-- NAME --`"));
        }
    }
    Ok(files)
}

fn verb(line: &str) -> Result<Verb, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let node = |name: &str| NodeName::from(name);
    Ok(match words.as_slice() {
        ["cluster", rest @ ..] => {
            let mut settings = Settings::default();
            settings.set(rest)?;
            Verb::Cluster(settings)
        }
        ["machine", name, prefixes @ ..] if !prefixes.is_empty() => {
            Verb::Machine(node(name), prefixes.iter().map(|it| value(it)).collect::<Result<_, _>>()?)
        }
        ["apply", names @ ..] if !names.is_empty() => Verb::Apply(names.iter().map(|&it| it.to_owned()).collect()),
        ["delete", kind, name] => Verb::Delete(reference(kind, name)?),
        ["node-local", "attach", pod, addresses, name] => {
            let addresses = addresses.split(',').map(value).collect::<Result<_, _>>()?;
            Verb::Attach(key(pod)?, addresses, node(name))
        }
        ["node-local", "detach", pod, name] => Verb::Detach(key(pod)?, node(name)),
        ["restart", name, rest @ ..] => {
            Settings::default().set(rest)?;
            Verb::Restart(node(name), rest.iter().map(|&it| it.to_owned()).collect())
        }
        ["foreign", name, rest @ ..] => Verb::Foreign(node(name), act(rest)?),
        ["refuse", name, steps] => Verb::Refuse(node(name), value(steps)?),
        ["show", table, rest @ ..] if rest.len() < 2 => {
            if !TABLES.contains(table) {
                return Err(format!("there is no table {table}; there are: {}", TABLES.join(", ")));
            }
            Verb::Show((*table).to_owned(), rest.first().map(|name| node(name)))
        }
        ["program", room, name, parts @ ..] => {
            let room = match (*room, parts) {
                ("netlink", []) => Room::Netlink,
                ("nftables", _) => Room::Nftables,
                _ => return Err("the programs are `netlink NODE` and `nftables NODE [SET-OR-CHAIN…]`".into()),
            };
            Verb::Program(room, node(name), parts.iter().map(|&it| it.to_owned()).collect())
        }
        ["trace", from, "->", to, rest @ ..] => Verb::Trace(trace(from, to, rest)?),
        ["problems"] => Verb::Problems,
        ["waiting", name] => Verb::Waiting(node(name)),
        ["failures", name] => Verb::Failures(node(name)),
        ["changes", name, count] => Verb::Changes(node(name), value(count)?),
        _ => return Err(format!("`{line}` is no step; see scenarios/README.md")),
    })
}

fn value<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error| format!("`{text}`: {error}"))
}

fn key(text: &str) -> Result<ObjectKey, String> {
    let (namespace, name) = text.split_once('/').ok_or_else(|| format!("`{text}` is not NAMESPACE/NAME"))?;
    Ok(ObjectKey::new(namespace, name))
}

fn reference(kind: &str, name: &str) -> Result<ObjectRef, String> {
    Ok(match kind {
        "node" => ObjectRef::Node(name.into()),
        "namespace" => ObjectRef::Namespace(name.into()),
        "service" => ObjectRef::Service(key(name)?),
        "endpointslice" => ObjectRef::EndpointSlice(key(name)?),
        "pod" => ObjectRef::Pod(key(name)?),
        _ => return Err(format!("`{kind}` is not node, namespace, service, endpointslice or pod")),
    })
}

impl Settings {
    /// Takes what words say, and keeps the rest.
    pub fn set(&mut self, words: &[impl AsRef<str>]) -> Result<(), String> {
        let prefixes = |text: &str| text.split(',').map(value).collect::<Result<Vec<IpNet>, _>>();
        for word in words.iter().map(AsRef::as_ref) {
            match word.split_once('=') {
                Some((field, text)) if field.contains('.') => {
                    let (section, field) = field.split_once('.').unwrap_or_default();
                    let value = serde_json::from_str(text).unwrap_or_else(|_| text.into());
                    self.fabric_options.insert((section.to_owned(), field.to_owned()), value);
                }
                Some(("fabric", mode)) => self.fabric = value(mode)?,
                Some(("pods", text)) => self.pods = prefixes(text)?,
                Some(("services", text)) => self.services = prefixes(text)?,
                Some(("masquerade", "yes")) => self.masquerade = true,
                Some(("masquerade", "no")) => self.masquerade = false,
                _ => {
                    return Err(format!(
                        "`{word}` is not fabric=…, SECTION.FIELD=…, pods=…, services=… or masquerade=yes|no"
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Default for Settings {
    fn default() -> Settings {
        let prefix = |text: &str| vec![text.parse().unwrap()];
        let (pods, services) = (prefix("10.42.0.0/16"), prefix("10.96.0.0/16"));
        let fabric_options = BTreeMap::new();
        Settings { fabric: FabricMode::Vxlan, fabric_options, pods, services, masquerade: true }
    }
}

fn act(words: &[&str]) -> Result<Act, String> {
    let family = |word: &str| match word {
        "ip" => Ok(Family::V4),
        "ip6" => Ok(Family::V6),
        _ => Err(format!("`{word}` is not ip or ip6")),
    };
    Ok(match words {
        ["remove", "link", name] => Act::RemoveLink((*name).into()),
        ["remove", "route", prefix] => Act::RemoveRoute(value(prefix)?),
        ["remove", "address", prefix] => Act::RemoveAddress(value(prefix)?),
        ["remove", "neighbour", address] => Act::RemoveNeighbour(value(address)?),
        ["remove", "forwarding", mac] => Act::RemoveForwarding(value(mac)?),
        ["remove", "pod", pod] => Act::RemovePod(key(pod)?),
        ["remove", "table", of, name] => Act::RemoveTable(family(of)?, (*name).into()),
        ["empty", "set", of, name] => Act::EmptySet(family(of)?, (*name).into()),
        ["flush", "chain", of, name] => Act::FlushChain(family(of)?, (*name).into()),
        ["set", "mtu", name, mtu] => Act::SetMtu((*name).into(), value(mtu)?),
        ["set", "mac", name, mac] => Act::SetMac((*name).into(), value(mac)?),
        ["redirect", mac, "to", address] => Act::Redirect(value(mac)?, value(address)?),
        ["set", "sysctl", path, to] => Act::SetSysctl((*path).into(), (*to).into()),
        ["add", "route", prefix, "via", gateway, "dev", device] => {
            Act::AddRoute(value(prefix)?, value(gateway)?, (*device).into())
        }
        ["drop", "route", prefix] => Act::DropRoute(value(prefix)?),
        ["readdress", from, to] => Act::Readdress(value(from)?, value(to)?),
        _ => return Err(format!("nobody can `{}`; see scenarios/README.md", words.join(" "))),
    })
}

/// The port that traces come from: any will do.
const SOURCE_PORT: u16 = 41_022;

fn trace(from: &str, to: &str, rest: &[&str]) -> Result<TraceStep, String> {
    let (end, protocol) = to.rsplit_once('/').ok_or_else(|| format!("`{to}` is not ADDRESS:PORT/PROTOCOL"))?;
    let protocol: Protocol = value(protocol)?;
    let (destination, destination_port) = if protocol.has_ports() {
        let socket: std::net::SocketAddr = value(end)?;
        (socket.ip(), socket.port())
    } else {
        (value(end)?, 0)
    };
    let unspecified = match destination {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    let (sender, source) = match from.split_once('/') {
        Some(("pod", name)) => (Sender::Pod(key(name)?), unspecified),
        Some(("node", name)) => (Sender::Node(name.into()), unspecified),
        Some(("client", address)) => (Sender::Client, value(address)?),
        _ => return Err(format!("`{from}` is not pod/NAMESPACE/NAME, node/NAME or client/ADDRESS")),
    };
    let choice = match rest {
        [] => Choice::First,
        ["choosing", endpoint] => Choice::Endpoint(value(endpoint)?),
        _ => return Err(format!("`{}` is not `choosing ADDRESS:PORT`", rest.join(" "))),
    };
    let packet = Packet { source, destination, protocol, source_port: SOURCE_PORT, destination_port, mark: 0 };
    Ok(TraceStep { from: from.to_owned(), sender, to: end.to_owned(), packet, choice })
}

#[test]
fn a_scenario_is_written_as_it_was_read() {
    let text =
        "# A comment.\n\nmachine a 192.0.2.1/24\nshow nodes\n  NAME\n\n  a\nproblems\n\n# More.\n-- x.yaml --\na: 1\n";
    let scenario = Scenario::parse(text).unwrap();
    assert_eq!(scenario.render(&BTreeMap::new()), text);
    assert_eq!(scenario.steps[1].expected, "NAME\n\na\n");
    assert_eq!(scenario.files["x.yaml"], "a: 1\n");
}

#[test]
fn what_means_nothing_is_an_error_that_names_the_line() {
    for (text, expected) in [
        ("problems\nforget everything\n", "2: `forget everything` is no step"),
        ("show sevices\n", "1: there is no table sevices"),
        ("apply a.yaml\n  row\n", "2: this is indented, but belongs to no check"),
        ("trace pod/a/b -> 10.0.0.1/tcp\n", "1: `10.0.0.1`"),
        ("foreign a paint it black\n", "1: nobody can `paint it black`"),
        ("restart\n", "1: `restart` is no step"),
    ] {
        let error = Scenario::parse(text).err().unwrap();
        assert!(error.starts_with(expected), "{error}");
    }
}
