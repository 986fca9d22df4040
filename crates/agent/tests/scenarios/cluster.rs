//! A cluster without machines: one engine per node, each over a kernel in memory, and the objects that
//! an API server would hold.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use portolan_agent::AgentConfig;
use portolan_agent::metrics::Metrics;
use portolan_agent::node::engine::{Engine, Outcome, Waiting};
use portolan_agent::node::table;
use portolan_agent::table::TABLES;
use portolan_kernel::FakeKernel;
use portolan_net::{Family, IpNet, MacAddress, NodeName, ObjectKey, ObjectKind};
use portolan_program::netlink::Surroundings;
use portolan_program::{netlink, nftables};
use portolan_state::{Attachment, AttachmentKey, Change, Object, ObjectRef};
use serde_json::{Value, json};

use super::format::{Act, Settings};
use super::kernel::{FakePort, perform, underlay};

/// Rounds of cycles after which a cluster that still changes is broken: a node's announcement takes
/// one round to be published and one to be followed, and each refusal takes one more.
const ROUNDS_MAX: usize = 60;

/// Tables that a source lists, in the order in which a restarted agent is given them here.
const LISTED: &[ObjectKind] =
    &[ObjectKind::Pod, ObjectKind::Service, ObjectKind::Namespace, ObjectKind::EndpointSlice, ObjectKind::Node];

/// The tables that show objects, and nothing that follows from them.
const TABLES_OF_OBJECTS: &[&str] = &["nodes", "pods", "attachments", "names"];

/// The cluster.
pub struct Cluster {
    settings: Settings,
    /// What the API server holds.
    objects: BTreeMap<ObjectRef, Value>,
    pub machines: BTreeMap<NodeName, Machine>,
}

/// One node's machine.
pub struct Machine {
    pub engine: Engine<FakePort>,
    settings: Settings,
    config: AgentConfig,
    attachments: BTreeMap<AttachmentKey, Attachment>,
    /// What is somebody else's, as it must stay.
    theirs: Surroundings,
    /// Changes made since the last step that does something.
    pub changes: usize,
    /// What the kernel refused since then.
    pub failures: Vec<String>,
}

/// What a step changes.
#[derive(Debug, Clone)]
pub enum Event {
    Put(ObjectRef, Value),
    Delete(ObjectRef),
    Attach(NodeName, Attachment),
    Detach(NodeName, AttachmentKey),
}

/// What a node has come to. Equal whatever the way.
#[derive(PartialEq)]
pub struct Outlook {
    waiting: Option<Waiting>,
    netlink: Option<netlink::Program>,
    nftables: Option<nftables::Program>,
    tables: Vec<(&'static str, Vec<Vec<String>>)>,
}

impl Cluster {
    pub fn new(settings: Settings) -> Cluster {
        Cluster { settings, objects: BTreeMap::new(), machines: BTreeMap::new() }
    }

    /// Starts an agent on a machine that has only its underlay.
    pub fn add_machine(&mut self, node: &NodeName, prefixes: &[IpNet]) -> Result<(), String> {
        let theirs = underlay(prefixes);
        let port = FakePort { kernel: FakeKernel::new(theirs.clone()), ..FakePort::default() };
        let (settings, attachments) = (self.settings.clone(), BTreeMap::new());
        let config = config_of(node, &settings)?;
        let engine = Engine::new(config.clone(), port, Arc::new(Metrics::new()));
        let machine = Machine { engine, settings, config, attachments, theirs, changes: 0, failures: Vec::new() };
        self.machines.insert(node.clone(), machine);
        self.restart(node)
    }

    /// Changes the configuration of a node's agent, for when it starts anew.
    pub fn configure(&mut self, node: &NodeName, words: &[String]) -> Result<(), String> {
        let machine = self.machine(node)?;
        machine.settings.set(words)?;
        machine.config = config_of(node, &machine.settings)?;
        Ok(())
    }

    fn machine(&mut self, node: &NodeName) -> Result<&mut Machine, String> {
        self.machines.get_mut(node).ok_or_else(|| format!("there is no machine {node}"))
    }

    /// What the object is now, as an event; `None` if there is none.
    pub fn current(&self, reference: &ObjectRef) -> Option<Event> {
        self.objects.get(reference).map(|value| Event::Put(reference.clone(), value.clone()))
    }

    /// All objects that there are.
    pub fn references(&self) -> Vec<ObjectRef> {
        self.objects.keys().cloned().collect()
    }

    /// What the API server and the runtimes hold after an event, without telling anyone.
    pub fn store(&mut self, event: &Event) -> Result<(), String> {
        match event {
            Event::Put(reference, value) => drop(self.objects.insert(reference.clone(), value.clone())),
            Event::Delete(reference) => drop(self.objects.remove(reference)),
            Event::Attach(node, attachment) => {
                let machine = self.machine(node)?;
                machine.attachments.insert(attachment.key.clone(), attachment.clone());
            }
            Event::Detach(node, key) => {
                let known = self.machine(node)?.attachments.remove(key);
                known.ok_or_else(|| format!("{node} has no attachment {key}"))?;
            }
        }
        Ok(())
    }

    /// Tells the agents of an event.
    pub fn tell(&mut self, event: &Event) -> Result<(), String> {
        let everyone = |machines: &mut BTreeMap<NodeName, Machine>, change: &Change| {
            machines.values_mut().for_each(|machine| machine.engine.write(change.clone()));
        };
        match event {
            Event::Put(_, value) => everyone(&mut self.machines, &change_of(value)?),
            Event::Delete(reference) => everyone(&mut self.machines, &Change::Delete(reference.clone())),
            Event::Attach(node, attachment) => {
                let change = Change::Upsert(Object::Attachment(attachment.clone()), Vec::new());
                self.machine(node)?.engine.write(change);
            }
            Event::Detach(node, key) => {
                self.machine(node)?.engine.write(Change::Delete(ObjectRef::Attachment(key.clone())));
            }
        }
        Ok(())
    }

    /// The event of a manifest: the annotations that agents wrote stay, as `kubectl apply` leaves them.
    pub fn put(&self, mut value: Value) -> Result<Event, String> {
        let reference = match change_of(&value)? {
            Change::Upsert(object, _) => object.reference(),
            Change::Delete(reference) => reference,
            Change::Reject(problem) => problem.object,
            Change::Replace(..) => return Err("one object is no table".into()),
        };
        if let Some(known) = self.objects.get(&reference).and_then(|it| it["metadata"]["annotations"].as_object()) {
            let known = known.clone();
            let metadata = value["metadata"].as_object_mut().ok_or("no metadata")?;
            let annotations = metadata.entry("annotations").or_insert_with(|| json!({}));
            for (name, text) in known {
                if annotations.get(&name).is_none() {
                    annotations[name] = text;
                }
            }
        }
        Ok(Event::Put(reference, value))
    }

    /// One cycle on every node. Returns whether anything is still to be done.
    pub fn cycle(&mut self) -> bool {
        let mut is_busy = false;
        for machine in self.machines.values_mut() {
            // The time of the next attempt has come.
            if machine.engine.wants_retry() {
                machine.engine.retry();
            }
            let outcome = machine.cycle();
            is_busy |= outcome.changes > 0 || !outcome.failures.is_empty();
            // An agent whose node is gone tries nothing, whatever was refused before.
            is_busy |= machine.engine.wants_retry() && machine.engine.waiting().is_none();
            is_busy |= matches!(machine.engine.waiting(), Some(Waiting::Kernel(_)));
        }
        is_busy
    }

    /// Cycles until nothing changes any more, and publishes what agents announce.
    pub fn settle(&mut self) -> Result<(), String> {
        for _ in 0..ROUNDS_MAX {
            let is_busy = self.cycle();
            if !self.publish()? && !is_busy {
                return Ok(());
            }
        }
        let failures: Vec<&String> = self.machines.values().filter_map(|machine| machine.failures.last()).collect();
        Err(format!("it does not settle within {ROUNDS_MAX} rounds; last failures: {failures:?}"))
    }

    fn publish(&mut self) -> Result<bool, String> {
        let mut events = Vec::new();
        for (node, machine) in &self.machines {
            let Some(tunnel) = machine.engine.announcement() else { continue };
            let reference = ObjectRef::Node(node.clone());
            let Some(mut value) = self.objects.get(&reference).cloned() else { continue };
            let metadata = value["metadata"].as_object_mut().ok_or("no metadata")?;
            let annotations = metadata.entry("annotations").or_insert_with(|| json!({}));
            let annotations = annotations.as_object_mut().ok_or("annotations are no map")?;
            for (name, text) in portolan_source::tunnel_annotations(&tunnel) {
                match text {
                    Some(text) => drop(annotations.insert(name.to_owned(), text.into())),
                    None => drop(annotations.remove(name)),
                }
            }
            events.push(Event::Put(reference, value));
        }
        for event in &events {
            self.store(event)?;
            self.tell(event)?;
        }
        Ok(!events.is_empty())
    }

    /// Starts the node's agent anew. Nothing may happen before every table that is needed was listed.
    pub fn restart(&mut self, node: &NodeName) -> Result<(), String> {
        let lists = self.lists()?;
        let machine = self.machine(node)?;
        let port = machine.engine.port.clone();
        let before = port.kernel.clone();
        machine.engine = Engine::new(machine.config.clone(), port, Arc::new(Metrics::new()));
        let attachments = machine.attachments.values().map(|it| (Object::Attachment(it.clone()), Vec::new()));
        let attachments = Change::Replace(ObjectKind::Attachment, attachments.collect(), Vec::new());
        let count = lists.len();
        for (index, list) in std::iter::once(attachments).chain(lists).enumerate() {
            machine.engine.write(list);
            if index < count {
                let outcome = machine.cycle();
                if outcome.ran || machine.engine.port.kernel != before {
                    return Err(format!("{node} touched the kernel before its tables were in sync"));
                }
            }
        }
        machine.cycle();
        Ok(())
    }

    fn lists(&self) -> Result<Vec<Change>, String> {
        let mut lists = Vec::new();
        for kind in LISTED {
            let (mut objects, mut rejected) = (Vec::new(), Vec::new());
            for value in self.objects.iter().filter(|(it, _)| it.kind() == *kind).map(|(_, value)| value) {
                match change_of(value)? {
                    Change::Upsert(object, problems) => objects.push((object, problems)),
                    Change::Reject(problem) => rejected.push(problem),
                    Change::Delete(_) | Change::Replace(..) => {}
                }
            }
            lists.push(Change::Replace(*kind, objects, rejected));
        }
        Ok(lists)
    }

    pub fn foreign(&mut self, node: &NodeName, act: &Act) -> Result<(), String> {
        let machine = self.machine(node)?;
        machine.engine.port.kernel.decide_next([]);
        let event = perform(act, &mut machine.engine.port.kernel, &mut machine.theirs)?;
        machine.engine.noticed(&event);
        Ok(())
    }

    /// What must be so whenever nothing is left to do.
    pub fn check(&self) -> Result<(), String> {
        let lists = self.lists()?;
        for (node, machine) in &self.machines {
            let place = |error: String| format!("on {node}: {error}");
            machine.check_others_untouched().map_err(place)?;
            if machine.engine.waiting().is_none() {
                machine.check_from_scratch(&lists).map_err(place)?;
            }
        }
        Ok(())
    }

    pub fn outlook(&self) -> BTreeMap<NodeName, Outlook> {
        self.machines.iter().map(|(node, machine)| (node.clone(), machine.outlook())).collect()
    }

    /// The attachments of a node, as the events that end them.
    pub fn detachments(&self) -> Vec<Event> {
        let of = |(node, machine): (&NodeName, &Machine)| -> Vec<Event> {
            machine.attachments.keys().map(|key| Event::Detach(node.clone(), key.clone())).collect()
        };
        self.machines.iter().flat_map(of).collect()
    }

    pub fn attachment_of(&self, pod: &ObjectKey) -> Option<(&NodeName, &Attachment)> {
        self.machines.iter().find_map(|(node, machine)| {
            let mut attachments = machine.attachments.values();
            attachments.find(|it| it.pod.as_ref() == Some(pod)).map(|attachment| (node, attachment))
        })
    }
}

impl Machine {
    fn cycle(&mut self) -> Outcome {
        let outcome = self.engine.cycle();
        self.changes += outcome.changes;
        self.failures.extend(outcome.failures.iter().cloned());
        outcome
    }

    pub fn check_others_untouched(&self) -> Result<(), String> {
        let others = self.engine.port.kernel.observe_netlink().others;
        if others == self.theirs { Ok(()) } else { Err(format!("what is not ours changed: {others:?}")) }
    }

    /// An engine that knows nothing but the tables comes to the same programs, and finds the kernel
    /// as it must be.
    fn check_from_scratch(&self, lists: &[Change]) -> Result<(), String> {
        let mut port = self.engine.port.clone();
        port.unreadable.clear();
        let before = port.kernel.clone();
        let mut engine = Engine::new(self.config.clone(), port, Arc::new(Metrics::new()));
        let attachments = self.attachments.values().map(|it| (Object::Attachment(it.clone()), Vec::new())).collect();
        engine.write(Change::Replace(ObjectKind::Attachment, attachments, Vec::new()));
        engine.write_all(lists.to_vec());
        let outcome = engine.cycle();
        let fresh = Outlook::of(&engine);
        if let Some(difference) = Outlook::of(&self.engine).difference(&fresh) {
            return Err(format!("kept up to date and made from nothing differ (- is from nothing):\n{difference}"));
        }
        if outcome.changes > 0 || engine.port.kernel != before {
            engine.port.kernel = before;
            let plan = engine.plan().map_err(|error| error.to_string())?;
            return Err(format!("the kernel is not as it must be; due is:\n{plan}"));
        }
        Ok(())
    }

    fn outlook(&self) -> Outlook {
        Outlook::of(&self.engine)
    }

    /// Whether the kernel holds nothing but what it held before the agent came.
    pub fn check_clean(&mut self) -> Result<(), String> {
        let port = &mut self.engine.port;
        portolan_agent::node::clean_kernel(port).map_err(|error| format!("clean: {error}"))?;
        let held = port.kernel.observe_netlink().ours;
        // Sysctls stay.
        let nothing = netlink::Program { sysctls: held.sysctls.clone(), ..netlink::Program::default() };
        if held != nothing {
            return Err(format!("clean leaves behind:\n{}", netlink::render(&held)));
        }
        let tables = port.kernel.observe_nftables();
        if tables != nftables::Program::default() {
            return Err(format!("clean leaves behind:\n{}", nftables::render(&tables)));
        }
        self.check_others_untouched()
    }
}

impl Outlook {
    fn of(engine: &Engine<FakePort>) -> Outlook {
        let rows = |name: &&'static str| (*name, table(engine, name).map(|it| it.rows).unwrap_or_default());
        // An agent that waits may still know what it wanted, or have been started since.
        let works = engine.waiting().is_none();
        let is_known = |name: &&&str| works || TABLES_OF_OBJECTS.contains(*name);
        Outlook {
            waiting: engine.waiting().cloned(),
            netlink: engine.netlink_program().filter(|_| works).cloned(),
            nftables: engine.nftables_program().filter(|_| works).cloned(),
            tables: TABLES.iter().filter(is_known).map(rows).collect(),
        }
    }

    /// The first difference, in the words of the part that differs.
    pub fn difference(&self, other: &Outlook) -> Option<String> {
        if self == other {
            return None;
        }
        let text = |outlook: &Outlook| {
            let mut text = format!("waiting: {:?}\n", outlook.waiting);
            for (name, rows) in &outlook.tables {
                for row in rows {
                    let _ = writeln!(text, "{name}: {}", row.join(" | "));
                }
            }
            text.push_str(&outlook.netlink.as_ref().map(netlink::render).unwrap_or_default());
            text.push_str(&outlook.nftables.as_ref().map(nftables::render).unwrap_or_default());
            text
        };
        let difference = line_difference(&text(other), &text(self));
        Some(if difference.is_empty() { "only in what is not printed, such as origins".into() } else { difference })
    }
}

/// The lines that one text has and the other has not.
pub fn line_difference(expected: &str, found: &str) -> String {
    let only = |sign: &str, a: &str, b: &str| -> String {
        let b: Vec<&str> = b.lines().collect();
        let lines = a.lines().filter(|line| !b.contains(line)).map(|line| format!("  {sign} {line}\n"));
        lines.collect::<Vec<_>>().concat()
    };
    only("-", expected, found) + &only("+", found, expected)
}

fn config_of(node: &NodeName, settings: &Settings) -> Result<AgentConfig, String> {
    let mut config = json!({
        "node": node, "kubernetes": {}, "fabric": settings.fabric, "clusterPrefixes": settings.pods,
        "servicePrefixes": settings.services, "masquerade": settings.masquerade,
    });
    for ((section, field), value) in &settings.fabric_options {
        config[section][field] = value.clone();
    }
    serde_json::from_value(config).map_err(|error| error.to_string())
}

/// What an API server's word about an object changes.
fn change_of(value: &Value) -> Result<Change, String> {
    portolan_source::change_from_json(value).map_err(|error| error.to_string())
}

/// The attachment of a pod's interface, as the CNI verbs make it.
pub fn attachment(pod: &ObjectKey, addresses: &[IpNet]) -> Attachment {
    let container = format!("{}-{}", pod.namespace, pod.name);
    // Any stable number will do; the first address tells pods apart.
    let octets = match addresses.first().map(IpNet::addr) {
        Some(std::net::IpAddr::V4(address)) => address.octets(),
        Some(std::net::IpAddr::V6(address)) => {
            let [.., a, b, c, d] = address.octets();
            [a, b, c, d]
        }
        None => [0; 4],
    };
    let [a, b, c, d] = octets;
    Attachment {
        key: AttachmentKey { container: container.as_str().into(), interface: "eth0".into() },
        namespace_path: format!("/run/netns/{container}").into(),
        pod: Some(pod.clone()),
        addresses: addresses.to_vec(),
        host_interface: format!("veth{a:02x}{b:02x}{c:02x}{d:02x}").into(),
        mac: MacAddress([0x02, 0, a, b, c, d]),
    }
}

/// The address of a family.
pub fn address_of(attachment: &Attachment, family: Family) -> Option<std::net::IpAddr> {
    attachment.addresses.iter().map(IpNet::addr).find(|address| Family::of(*address) == family)
}
