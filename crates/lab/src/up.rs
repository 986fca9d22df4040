//! Brings a lab up: checks, description, supervisor, and the wait for it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

use anyhow::Context as _;
use serde_json::Value;

use crate::description::{Description, IpFamilies};
use crate::interrupt::Guard;
use crate::limits::{LOG_TAIL_LINES, MANIFEST_BYTES_MAX, START_TIME_MAX, UNDERLAYS_MAX};
use crate::manifest::{self, Manifests};
use crate::report::Report;
use crate::topology::Topology;
use crate::{LabError, Layout, Result, checks, wait};

/// What `portolan lab up` is asked for.
#[derive(Debug, Clone)]
pub struct UpOptions {
    /// The lab's name.
    pub name: String,
    /// The manifests to apply; `-` is the standard input.
    pub manifests: Vec<PathBuf>,
    /// How many nodes the standard topology has.
    pub nodes: usize,
    /// How many segments the nodes of the standard topology are on.
    pub segments: usize,
    /// A file with another topology.
    pub topology: Option<PathBuf>,
    /// How pods reach pods on other nodes.
    pub fabric: String,
    /// What is set for the fabric: `SECTION.FIELD=VALUE`, as in an agent's configuration.
    pub fabric_options: Vec<String>,
    /// How Services are proxied.
    pub services: String,
    /// The cluster's families.
    pub ip_families: IpFamilies,
    /// The socket of an API server that is there already.
    pub api_socket: Option<PathBuf>,
    /// The etcd that the lab's API server keeps its objects in, as `etcd=URL`; memory if none.
    pub store: Option<String>,
    /// Whether to wait until everything answers.
    pub wait: bool,
    /// Whether to leave a lab that did not come up, to look at it.
    pub keep: bool,
}

impl UpOptions {
    /// The defaults for a lab of this name.
    pub fn new(name: &str) -> UpOptions {
        UpOptions {
            name: name.to_owned(),
            manifests: Vec::new(),
            nodes: 3,
            segments: 1,
            topology: None,
            fabric: "vxlan".to_owned(),
            fabric_options: Vec::new(),
            services: "nftables".to_owned(),
            ip_families: IpFamilies::Ipv4,
            api_socket: None,
            store: None,
            wait: false,
            keep: false,
        }
    }
}

/// The fabrics that a lab can be built with.
pub const FABRICS: [&str; 3] = ["vxlan", "host-gw", "ipip"];

/// What a field of an agent's configuration holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FieldKind {
    Number,
    YesNo,
    Tunnel,
}

impl FieldKind {
    fn expected(self) -> &'static str {
        match self {
            FieldKind::Number => "a number",
            FieldKind::YesNo => "true or false",
            FieldKind::Tunnel => "vxlan or ipip",
        }
    }
}

/// The fields of an agent's configuration that are the fabric's, by section.
const FABRIC_FIELDS: [(&str, &str, FieldKind); 8] = [
    ("vxlan", "vni", FieldKind::Number),
    ("vxlan", "port", FieldKind::Number),
    ("vxlan", "gbp", FieldKind::YesNo),
    ("vxlan", "learning", FieldKind::YesNo),
    ("vxlan", "directRouting", FieldKind::YesNo),
    ("vxlan", "mtu", FieldKind::Number),
    ("ipip", "directRouting", FieldKind::YesNo),
    ("hostGw", "beyond", FieldKind::Tunnel),
];

/// The Service proxies that a lab can be built with, by the names that the agent knows.
pub const SERVICES: [&str; 3] = ["nftables", "iptables", "ipvs"];

/// Brings a lab up. `progress` hears what is being done, and warnings.
///
/// # Errors
/// If it does not come up. Nothing of it is left then, unless `keep` is set.
pub fn up(options: &UpOptions, progress: &mut dyn FnMut(&str)) -> Result<()> {
    guarded(options, progress).map(drop)
}

/// The same. Interrupted while the returned guard lives, the lab is taken down; with `keep` there is none.
pub(crate) fn guarded(options: &UpOptions, progress: &mut dyn FnMut(&str)) -> Result<Option<Guard>> {
    let layout = Layout::new(&options.name)?;
    checks::check_name(&layout)?;
    let manifests = read_manifests(&options.manifests)?;
    let description = describe(options)?;
    checks::check(&layout, &description)?;
    for warning in &manifests.warnings {
        progress(&format!("warning: {warning}"));
    }
    // From here on there is something to take down. Not before: the lab of this name might be another's.
    create_directory(&layout)?;
    let guard = match (!options.keep).then(|| Guard::new(layout.name())).transpose() {
        Ok(guard) => guard,
        Err(error) => {
            let _ = crate::down::down(&options.name);
            return Err(error.into());
        }
    };
    let result = bring_up(&layout, &description, &manifests, options, guard.as_ref(), progress);
    if let Err(error) = result {
        // Waits, where the lab is being taken down already.
        drop(guard);
        if !options.keep {
            let _ = crate::down::down(&options.name);
        }
        return Err(error);
    }
    Ok(guard)
}

fn bring_up(
    layout: &Layout,
    description: &Description,
    manifests: &Manifests,
    options: &UpOptions,
    guard: Option<&Guard>,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    description.save(layout)?;
    let objects = serde_json::to_vec(&manifests.objects).context("writing the manifests")?;
    fs::write(layout.manifests(), objects).context("writing the manifests")?;
    let start = || start_supervisor(layout, &description.program);
    let mut supervisor = guard.map_or_else(start, |guard| guard.start(start))?;
    follow(&mut supervisor, layout, guard, progress)?;
    if !options.wait {
        return Ok(());
    }
    wait::wait(layout, description, progress)
}

/// The manifests of these files, checked.
pub(crate) fn read_manifests(files: &[PathBuf]) -> Result<Manifests> {
    let mut texts = Vec::new();
    for file in files {
        texts.push((file.display().to_string(), read_file(file)?));
    }
    manifest::parse(&texts)
}

fn read_file(file: &Path) -> Result<String> {
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin().take(MANIFEST_BYTES_MAX + 1).read_to_string(&mut text)
    } else {
        File::open(file).and_then(|opened| opened.take(MANIFEST_BYTES_MAX + 1).read_to_string(&mut text))
    };
    let shown = file.display();
    read.map_err(|error| LabError::usage(format!("{shown}: {error}"), "name a file of YAML manifests"))?;
    if text.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(LabError::usage(
            format!("{shown}: it is longer than {MANIFEST_BYTES_MAX} bytes"),
            "split the file",
        ));
    }
    Ok(text)
}

fn describe(options: &UpOptions) -> Result<Description> {
    let known = |word: &str, value: &str, values: &[&str]| {
        if values.contains(&value) {
            return Ok(());
        }
        Err(LabError::usage(format!("--{word} {value}: this is not known"), format!("use {}", values.join(" or "))))
    };
    known("fabric", &options.fabric, &FABRICS)?;
    known("services", &options.services, &SERVICES)?;
    let topology = if let Some(file) = &options.topology {
        Topology::parse(&file.display().to_string(), &read_file(file)?)?
    } else {
        if !(1..=UNDERLAYS_MAX).contains(&options.segments) {
            let what = format!("--segments {}: a lab's nodes are on 1 to {UNDERLAYS_MAX}", options.segments);
            return Err(LabError::usage(what, "describe more with --topology"));
        }
        Topology::segmented(options.nodes, options.segments)
    };
    topology.check().map_err(|what| LabError::usage(what, "change --nodes or --topology"))?;
    let program = std::env::current_exe().context("finding this program's file")?;
    let mut description =
        Description::new(&options.name, program, topology, &options.fabric, &options.services, options.ip_families)?;
    description.fabric_options = fabric_options(&options.fabric_options)?;
    description.api_socket.clone_from(&options.api_socket);
    description.store.clone_from(&options.store);
    // What cannot be meant is said before anything is made.
    description.store_location().map_err(|error| LabError::usage(format!("{error:#}"), "change --store"))?;
    description.check().map_err(|what| LabError::usage(what, "change --ip-family or --topology"))?;
    Ok(description)
}

/// The sections of an agent's configuration that these words come to.
fn fabric_options(words: &[String]) -> Result<serde_json::Map<String, Value>> {
    let mut sections = serde_json::Map::new();
    for word in words {
        let wrong = |what: &str, hint: String| LabError::usage(format!("--fabric-option {word}: {what}"), hint);
        let Some((key, text)) = word.split_once('=') else {
            let hint = "write, for example, vxlan.directRouting=true or hostGw.beyond=vxlan";
            return Err(wrong("this is not SECTION.FIELD=VALUE", hint.to_owned()));
        };
        let known = FABRIC_FIELDS.iter().find_map(|(section, field, kind)| {
            (key.split_once('.') == Some((section, field))).then_some((*section, *field, *kind))
        });
        let Some((section, field, kind)) = known else {
            let all: Vec<String> =
                FABRIC_FIELDS.iter().map(|(section, field, _)| format!("{section}.{field}")).collect();
            return Err(wrong("there is no such field", format!("use {}", all.join(", "))));
        };
        let value = match kind {
            FieldKind::Number => text.parse::<u32>().ok().map(Value::from),
            FieldKind::YesNo => text.parse::<bool>().ok().map(Value::from),
            FieldKind::Tunnel => ["vxlan", "ipip"].contains(&text).then(|| Value::from(text)),
        };
        let value = value.ok_or_else(|| wrong("this is no value of the field", format!("use {}", kind.expected())))?;
        let section = sections.entry(section).or_insert_with(|| Value::Object(serde_json::Map::new()));
        if let Some(fields) = section.as_object_mut() {
            fields.insert(field.to_owned(), value);
        }
    }
    Ok(sections)
}

/// Makes the lab's directory; it is the claim to the name. Only its owner may look into it: it holds
/// the manifests, with their Secrets, and the sockets.
fn create_directory(layout: &Layout) -> Result<()> {
    let labs = Layout::labs();
    fs::create_dir_all(&labs).with_context(|| format!("creating {}", labs.display()))?;
    match fs::DirBuilder::new().mode(0o700).create(layout.directory()) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => checks::check_name(layout),
        result => Ok(result.with_context(|| format!("creating {}", layout.directory().display()))?),
    }
}

fn start_supervisor(layout: &Layout, program: &Path) -> Result<Child> {
    let log = File::create(layout.supervisor_log()).context("creating the supervisor's log")?;
    let child = Command::new(program)
        .args(["lab", "supervise", "--name", layout.name()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    Ok(child)
}

/// Reads the supervisor's reports until it is ready.
fn follow(
    supervisor: &mut Child,
    layout: &Layout,
    guard: Option<&Guard>,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let started = || {
        if let Some(guard) = guard {
            guard.has_started();
        }
    };
    let (sender, lines) = mpsc::channel();
    let Some(output) = supervisor.stdout.take() else {
        return Err(anyhow::anyhow!("the supervisor has no output").into());
    };
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let until = Instant::now() + START_TIME_MAX;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left) {
            Ok(line) => match serde_json::from_str(&line) {
                Ok(Report::Progress(text)) => progress(&text),
                Ok(Report::Ready) => {
                    started();
                    return Ok(());
                }
                Ok(Report::Failed { what, hint, code }) => {
                    started();
                    let _ = supervisor.wait();
                    return Err(Report::error(what, hint, code));
                }
                Err(error) => return Err(anyhow::anyhow!("the supervisor said `{line}`: {error}").into()),
            },
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let what = format!("the lab was not up after {} s", START_TIME_MAX.as_secs());
                return Err(LabError::negative(what, tail(&layout.supervisor_log())));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                started();
                let status = supervisor.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                let log = tail(&layout.supervisor_log());
                return Err(anyhow::anyhow!("the lab's supervisor ended with {status}:\n{log}").into());
            }
        }
    }
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(LOG_TAIL_LINES);
    lines.get(skipped..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_for_the_fabric_is_checked_before_anything_is_made() {
        let read = |words: &[&str]| fabric_options(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let sections = read(&["vxlan.directRouting=true", "vxlan.vni=7", "hostGw.beyond=ipip"]).unwrap();
        let expected = serde_json::json!({"vxlan": {"directRouting": true, "vni": 7}, "hostGw": {"beyond": "ipip"}});
        assert_eq!(Value::Object(sections), expected);
        for (word, expected) in [
            ("vxlan", "this is not SECTION.FIELD=VALUE"),
            ("vxlan.colour=red", "there is no such field"),
            ("geneve.vni=1", "there is no such field"),
            ("vxlan.vni=one", "this is no value of the field"),
            ("ipip.directRouting=yes", "this is no value of the field"),
            ("hostGw.beyond=bgp", "this is no value of the field"),
        ] {
            let error = read(&[word]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
