//! Crashes between any two steps, torn and alien files, and what is answered.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command as Process, Stdio};

use portolan_cni::{CniError, Command, NetworkConfiguration, Parameters, Request, Response, ValidAttachment};
use portolan_state::{Attachment, AttachmentKey};
use serde_json::json;

use super::record::{self, Directory, RecordFiles};
use super::{AttachmentBook, RecordProblem, answer};

const MTU: u32 = 1450;

fn request(command: Command, container: &str) -> Request {
    Request {
        parameters: Parameters {
            command,
            container: container.to_owned(),
            namespace_path: format!("/run/netns/{container}"),
            interface: "eth0".to_owned(),
            pod: None,
            mac: None,
        },
        configuration: NetworkConfiguration { name: "pods".to_owned(), ..NetworkConfiguration::default() },
    }
}

fn add(container: &str) -> Request {
    request(Command::Add, container)
}

fn key(container: &str) -> AttachmentKey {
    AttachmentKey { container: container.into(), interface: "eth0".into() }
}

fn open(directory: &Path) -> AttachmentBook {
    let (mut book, problems) = AttachmentBook::load(directory).unwrap();
    assert!(problems.is_empty(), "{problems:?}");
    book.set_prefixes(&["10.42.1.0/24".parse().unwrap(), "fd00:42:1::/64".parse().unwrap()]);
    book
}

fn files(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory.join("attachments")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// What must hold at every moment: one file per record, no address twice.
fn assert_sound(book: &AttachmentBook, directory: &Path) {
    let expected: BTreeSet<String> =
        book.list().map(|attachment| format!("{}.json", attachment.host_interface)).collect();
    assert_eq!(files(directory), expected);
    let mut seen: BTreeMap<IpAddr, &AttachmentKey> = BTreeMap::new();
    for attachment in book.list() {
        for address in &attachment.addresses {
            assert_eq!(seen.insert(address.addr(), &attachment.key), None, "{address} has two owners");
        }
    }
    let in_use: usize = book.in_use().iter().map(|(_, count)| count).sum();
    assert_eq!(in_use, seen.len(), "an address is in use and in no record");
}

#[test]
fn a_restart_finds_every_record() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = open(directory.path());
    let made: Vec<Attachment> = ["a", "b", "c"].map(|name| book.add(&add(name), MTU).unwrap()).into();
    assert_eq!(made[0].addresses[0].to_string(), "10.42.1.2/24");
    assert_eq!(made[0].addresses[1].to_string(), "fd00:42:1::2/64");
    let removed = book.remove(&key("b")).unwrap();
    assert_eq!(removed.as_ref(), Some(&made[1]));
    assert_eq!(book.remove(&key("b")).unwrap(), None);
    drop(book);
    let mut book = open(directory.path());
    assert_eq!(book.list().collect::<Vec<_>>(), [&made[0], &made[2]]);
    assert_sound(&book, directory.path());
    // The freed address rests, also over a restart.
    assert_eq!(book.add(&add("d"), MTU).unwrap().addresses[0].to_string(), "10.42.1.5/24");
}

#[test]
fn add_twice_returns_the_same_and_refuses_another_namespace() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = open(directory.path());
    let first = book.add(&add("a"), MTU).unwrap();
    assert_eq!(book.add(&add("a"), MTU), Ok(first));
    let mut moved = add("a");
    moved.parameters.namespace_path = "/run/netns/other".to_owned();
    assert_eq!(book.add(&moved, MTU).unwrap_err().code.number(), 100);
    let mut other_network = add("a");
    other_network.configuration.name = "other".to_owned();
    assert_eq!(book.add(&other_network, MTU).unwrap_err().code.number(), 100);
    assert_sound(&book, directory.path());
}

#[test]
fn names_are_stable_and_unlike() {
    let (name, mac) = record_names("c0ffee", 0);
    assert_eq!(record_names("c0ffee", 0), (name.clone(), mac.clone()));
    assert!(name.len() == 12 && name.starts_with("veth"), "{name}");
    let names: BTreeSet<(String, String)> = (0..1000).map(|number| record_names(&format!("c{number}"), 0)).collect();
    assert_eq!(names.iter().map(|(name, _)| name).collect::<BTreeSet<_>>().len(), 1000);
    assert_eq!(names.iter().map(|(_, mac)| mac).collect::<BTreeSet<_>>().len(), 1000);
    assert_ne!(record_names("c0ffee", 1), (name, mac));
}

fn record_names(container: &str, attempt: u32) -> (String, String) {
    let (name, mac) = super::book::names(&key(container), attempt);
    (name, mac.to_string())
}

#[test]
fn what_cannot_be_honoured_is_refused_and_takes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = open(directory.path());
    let mut other_mtu = add("a");
    other_mtu.configuration.mtu = Some(9000);
    assert_eq!(book.add(&other_mtu, MTU).unwrap_err().code.number(), 2);
    let mut group = add("a");
    group.parameters.mac = Some("01:00:5e:00:00:01".parse().unwrap());
    assert_eq!(book.add(&group, MTU).unwrap_err().code.number(), 2);
    let mut wanted = add("a");
    wanted.parameters.mac = Some("02:00:00:00:00:07".parse().unwrap());
    assert_eq!(book.add(&wanted, MTU).unwrap().mac.to_string(), "02:00:00:00:00:07");
    book.set_prefixes(&[]);
    assert_eq!(book.add(&add("b"), MTU).unwrap_err().code.number(), 11);
    book.set_prefixes(&["10.42.1.0/30".parse().unwrap()]);
    let exhausted = book.add(&add("b"), MTU).unwrap_err();
    assert_eq!(exhausted.code.number(), 102);
    assert!(exhausted.message.contains("10.42.1.0/30"), "{exhausted}");
    assert_sound_of_one(&book, directory.path());
}

fn assert_sound_of_one(book: &AttachmentBook, directory: &Path) {
    assert_eq!(book.list().count(), 1);
    assert_eq!(files(directory).len(), 1);
}

#[test]
fn torn_and_alien_files_are_reported_and_stop_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = open(directory.path());
    for name in ["a", "b"] {
        book.add(&add(name), MTU).unwrap();
    }
    let records = directory.path().join("attachments");
    let content = |name: &str| fs::read_to_string(records.join(name)).unwrap();
    let names: Vec<String> = files(directory.path()).into_iter().collect();
    let whole = content(&names[0]);
    let address = book.list().next().unwrap().addresses[0].addr().to_string();
    fs::write(records.join("veth00000001.json"), &whole[..whole.len() / 2]).unwrap();
    fs::write(records.join("veth00000002.json"), "").unwrap();
    fs::write(records.join("veth00000003.json"), &whole).unwrap();
    fs::write(records.join("veth00000004.json"), whole.replace("\"version\": 1", "\"version\": 2")).unwrap();
    let stem = names[0].trim_end_matches(".json");
    let twice = whole
        .replace(stem, "veth00000005")
        .replace("\"/run/netns/", "\"/run/netns/x")
        .replace("\"sequence\": ", "\"sequence\": 9");
    fs::write(records.join("veth00000005.json"), twice).unwrap();
    fs::write(records.join("notes.txt"), "mine").unwrap();
    fs::write(records.join("notes.tmp"), "mine").unwrap();
    fs::write(records.join("veth00000006.json"), vec![b' '; 70 << 10]).unwrap();
    fs::create_dir(records.join("lost.json")).unwrap();
    fs::write(records.join("veth00000007.tmp"), "half").unwrap();

    let (mut again, problems) = AttachmentBook::load(directory.path()).unwrap();
    again.set_prefixes(&["10.42.1.0/24".parse().unwrap()]);
    assert_eq!(again.list().count(), 2);
    let kinds: Vec<String> = problems
        .iter()
        .map(|problem| {
            let kind = match problem.reason {
                RecordProblem::Unreadable(_) => "unreadable",
                RecordProblem::Torn(_) => "torn",
                RecordProblem::TooLong => "long",
                RecordProblem::Alien => "alien",
                RecordProblem::OtherVersion(2) => "version",
                RecordProblem::OtherVersion(_) => "another version",
                RecordProblem::Invalid("host_interface") => "name",
                RecordProblem::Invalid(_) => "invalid",
                RecordProblem::Conflict(_) => "conflict",
            };
            format!("{} {kind}", problem.path.file_stem().unwrap().to_str().unwrap())
        })
        .collect();
    assert_eq!(
        kinds,
        [
            "lost alien",
            "notes alien",
            "notes alien",
            "veth00000001 torn",
            "veth00000002 torn",
            "veth00000003 name",
            "veth00000004 version",
            "veth00000005 conflict",
            "veth00000006 long",
        ]
    );
    assert!(!records.join("veth00000007.tmp").exists());
    assert!(records.join("notes.txt").exists());
    let fresh = again.add(&add("c"), MTU).unwrap();
    assert_ne!(fresh.addresses[0].addr().to_string(), address);
}

#[test]
fn records_of_an_earlier_boot_are_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let (mut book, _) = AttachmentBook::load_in_boot(directory.path(), "before").unwrap();
    book.set_prefixes(&["10.42.1.0/24".parse().unwrap()]);
    book.add(&add("a"), MTU).unwrap();
    let (same, _) = AttachmentBook::load_in_boot(directory.path(), "before").unwrap();
    assert_eq!(same.list().count(), 1);
    let (after, problems) = AttachmentBook::load_in_boot(directory.path(), "after").unwrap();
    assert_eq!((after.list().count(), problems.len(), files(directory.path()).len()), (0, 0, 0));
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_a_record_or_refused(bytes: Vec<u8>, cut in 0usize..600) {
        let _ = record::parse("veth00000001", &bytes);
        let attachment = json!({
            "key": {"container": "a", "interface": "eth0"}, "namespace_path": "/n", "pod": null,
            "addresses": ["10.0.0.2/24"], "host_interface": "veth00000001", "mac": "02:00:00:00:00:01",
        });
        let whole = json!({"version": 1, "boot": "b", "sequence": 1, "network": "n", "attachment": attachment}).to_string();
        proptest::prop_assert!(record::parse("veth00000001", whole.as_bytes()).is_ok());
        if cut < whole.len() {
            proptest::prop_assert!(record::parse("veth00000001", &whole.as_bytes()[..cut]).is_err());
        }
    }
}

thread_local! {
    /// How many more steps on disk succeed before the process "dies".
    static STEPS_LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The real directory, until the crash; the step at which it comes is done by half.
#[derive(Debug)]
struct Crashing(Directory);

impl Crashing {
    fn step() -> bool {
        STEPS_LEFT.with(|left| {
            let alive = left.get() > 0;
            left.set(left.get().saturating_sub(1));
            alive
        })
    }
}

impl RecordFiles for Crashing {
    fn write_temporary(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        if Crashing::step() {
            return self.0.write_temporary(name, content);
        }
        self.0.write_temporary(name, &content[..content.len() / 2])?;
        Err(io::Error::other("killed"))
    }

    fn publish(&mut self, name: &str) -> io::Result<()> {
        if Crashing::step() { self.0.publish(name) } else { Err(io::Error::other("killed")) }
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        if Crashing::step() { self.0.remove(name) } else { Err(io::Error::other("killed")) }
    }
}

/// Kills the agent at every step of a run of ADDs and DELs, restarts it from disk, lets the runtime
/// repeat what was not answered, and looks for leaks and double owners.
#[test]
fn no_crash_point_leaks_an_address_or_gives_it_twice() {
    let script: [(Command, &str); 8] = [
        (Command::Add, "a"),
        (Command::Add, "b"),
        (Command::Del, "a"),
        (Command::Add, "c"),
        (Command::Del, "b"),
        (Command::Add, "a"),
        (Command::Del, "c"),
        (Command::Del, "c"),
    ];
    let mut crashes = 0;
    for crash_at in 0..32 {
        let directory = tempfile::tempdir().unwrap();
        let records = directory.path().join("attachments");
        let mut book = open(directory.path());
        book.set_files(Box::new(Crashing(Directory(records.clone()))));
        STEPS_LEFT.set(crash_at);
        let mut answered: BTreeMap<&str, Attachment> = BTreeMap::new();
        for (command, container) in script {
            let outcome = run(&mut book, command, container);
            let result = outcome.or_else(|_| {
                // Killed: nobody was answered. A new process reads the disk, the runtime tries again.
                crashes += 1;
                STEPS_LEFT.set(usize::MAX);
                book = open(directory.path());
                assert_sound(&book, directory.path());
                for (name, attachment) in &answered {
                    let found = book.get(&key(name));
                    assert!(found == Some(attachment) || (command, *name) == (Command::Del, container));
                }
                run(&mut book, command, container)
            });
            match result.unwrap() {
                Some(attachment) => drop(answered.insert(container, attachment)),
                None => drop(answered.remove(container)),
            }
            assert_sound(&book, directory.path());
            assert!(book.list().eq(answered.values()), "after {command} {container}, killed at {crash_at}");
        }
    }
    assert!(crashes >= 11, "every step on disk is a crash point: {crashes}");
}

fn run(book: &mut AttachmentBook, command: Command, container: &str) -> Result<Option<Attachment>, CniError> {
    if command == Command::Add {
        return book.add(&add(container), MTU).map(Some);
    }
    book.remove(&key(container)).map(|_| None)
}

const CHILD_DIRECTORY: &str = "PORTOLAN_TEST_BOOK_DIRECTORY";

/// Not a test of its own: the process that [`a_killed_process_leaves_a_sound_book`] kills.
#[test]
fn child_that_adds_and_removes_until_it_is_killed() {
    let Some(directory) = std::env::var_os(CHILD_DIRECTORY) else { return };
    let mut book = open(Path::new(&directory));
    let mut out = io::stdout().lock();
    for round in 0u32.. {
        let container = format!("c{}", round.wrapping_mul(2_654_435_761) >> 28);
        let line = if book.get(&key(&container)).is_some() {
            writeln!(out, "deleting {container}").unwrap();
            book.remove(&key(&container)).unwrap();
            format!("deleted {container}")
        } else {
            let attachment = book.add(&add(&container), MTU).unwrap();
            format!("added {container} {}", attachment.addresses[0].addr())
        };
        writeln!(out, "{line}").unwrap();
    }
}

#[test]
fn a_killed_process_leaves_a_sound_book() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..12 {
        let before: BTreeMap<String, IpAddr> =
            open(directory.path()).list().map(|had| (had.key.container.to_string(), had.addresses[0].addr())).collect();
        let mut child = Process::new(std::env::current_exe().unwrap())
            .args(["--exact", "attachments::tests::child_that_adds_and_removes_until_it_is_killed", "--nocapture"])
            .env(CHILD_DIRECTORY, directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut said: Vec<String> =
            lines.by_ref().filter(|line| line.contains("add") || line.contains("delet")).take(40 + round * 7).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said between the last line read and its death; the last line may be torn.
        said.extend(lines);
        let book = open(directory.path());
        assert_sound(&book, directory.path());
        let mut expected: BTreeMap<String, Option<IpAddr>> =
            before.into_iter().map(|(container, address)| (container, Some(address))).collect();
        for line in &said {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["added", container, address] if address.parse::<IpAddr>().is_ok() => {
                    expected.insert(container.to_owned(), address.parse().ok());
                }
                // Being deleted: it may be there or not.
                ["deleting", container] => drop(expected.insert(container.to_owned(), None)),
                _ => {}
            }
        }
        let certain = expected.iter().filter_map(|(container, address)| Some((container, (*address)?)));
        for (container, address) in certain {
            // The last word may be torn on its way out; all others were answered.
            let found = book.get(&key(container)).map(|found| found.addresses[0].addr());
            assert_eq!(found, Some(address), "{container} was answered for");
        }
        // At most the one call that was under way is more than what was said.
        let unknown = book.list().filter(|had| !expected.contains_key(&*had.key.container)).count();
        assert!(unknown <= 1, "{unknown} records that nobody was told of");
    }
}

#[test]
fn garbage_is_what_the_runtime_does_not_name_in_this_network() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = open(directory.path());
    for name in ["a", "b", "c"] {
        book.add(&add(name), MTU).unwrap();
    }
    let mut other = add("d");
    other.configuration.name = "other".to_owned();
    book.add(&other, MTU).unwrap();
    let mut configuration = request(Command::Gc, "").configuration;
    assert_eq!(book.collect_garbage(&configuration).unwrap_err().code.number(), 7);
    configuration.valid_attachments =
        Some(vec![ValidAttachment { container: "b".to_owned(), interface: "eth0".to_owned() }]);
    assert_eq!(book.collect_garbage(&configuration), Ok(vec![key("a"), key("c")]));
}

#[test]
fn add_is_answered_with_what_was_made_and_check_compares_it() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = open(directory.path());
    let attachment = book.add(&add("a"), MTU).unwrap();
    let Response::Added(result) = answer::added(&add("a"), &attachment, MTU).unwrap() else { panic!("no result") };
    let rendered = result.render(portolan_cni::Version::V1_1_0);
    assert_eq!(
        rendered,
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": &*attachment.host_interface, "mtu": 1450},
                {"name": "eth0", "mac": attachment.mac.to_string(), "mtu": 1450, "sandbox": "/run/netns/a"},
            ],
            "ips": [
                {"address": "10.42.1.2/24", "gateway": "10.42.1.1", "interface": 1},
                {"address": "fd00:42:1::2/64", "gateway": "fd00:42:1::1", "interface": 1},
            ],
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.42.1.1"}, {"dst": "::/0", "gw": "fd00:42:1::1"}],
            "dns": {},
        })
    );

    let mut check = request(Command::Check, "a");
    assert_eq!(answer::check(&book, &check).unwrap_err().code.number(), 7);
    check.configuration.prev_result = Some(result.render(portolan_cni::Version::V0_4_0));
    assert_eq!(answer::check(&book, &check), Ok(&attachment));
    let mut lied = rendered.clone();
    lied["ips"][0]["address"] = json!("10.42.1.99/24");
    check.configuration.prev_result = Some(lied);
    let error = answer::check(&book, &check).unwrap_err();
    assert_eq!(error.code.number(), 101);
    assert!(error.message.contains("no address 10.42.1.2/24"), "{error}");
    assert_eq!(answer::check(&book, &request(Command::Check, "z")).unwrap_err().code.number(), 3);
}

#[test]
fn status_says_why_add_would_not_be_served() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = open(directory.path());
    assert_eq!(answer::status(&book, true), Ok(Response::Done));
    assert_eq!(answer::status(&book, false).unwrap_err().code.number(), 50);
    book.set_prefixes(&[]);
    assert!(answer::status(&book, true).unwrap_err().message.contains("no pod prefix"));
    book.set_prefixes(&["10.42.1.0/30".parse().unwrap()]);
    book.add(&add("a"), MTU).unwrap();
    let full = answer::status(&book, true).unwrap_err();
    assert_eq!(full.code.number(), 50);
    assert!(full.message.contains("1 are in use"), "{full}");
}
