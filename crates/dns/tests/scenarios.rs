//! The rules as data: every file of `scenarios/dns` is a cluster, and questions with the answers
//! that they must have. `scenarios/dns/README.md` says how they are written.
//!
//! Each scenario runs through the whole pure path, from bytes to bytes, and runs again with its
//! tables filled in reverse, each object twice, with deletes in between.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "the helpers are part of the test")]

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use hickory_proto::op::Message;
use hickory_proto::rr::Record as WireRecord;
use portolan_dns::chain::{self, Context, Outcome};
use portolan_dns::metrics::Metrics;
use portolan_dns::plugins::cache::Cache;
use portolan_dns::wire::{self, Question, RecordType, Request, Response, ResponseCode};
use portolan_dns::{Config, Settings};
use portolan_intent::names::{Names, PodNames};
use portolan_net::{Family, ObjectKey, ObjectKind, Port, Protocol};
use portolan_state::{
    Change, Endpoint, EndpointPort, EndpointSlice, Namespace, Object, Pod, Service, ServicePort, ServiceType, Writer,
};

/// A scenario as it is read.
struct Scenario {
    config: Config,
    in_sync: bool,
    objects: Vec<Object>,
    questions: Vec<Expectation>,
}

struct Expectation {
    line: usize,
    question: Question,
    expected: Vec<String>,
}

#[test]
fn every_scenario_holds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scenarios/dns");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    assert!(files.len() > 10, "the scenarios are not where they should be");
    let mut wrong = Vec::new();
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let scenario = read(&fs::read_to_string(&file).unwrap(), &name);
        assert!(!scenario.questions.is_empty(), "{name} asks nothing");
        for reversed in [false, true] {
            wrong.extend(run(&scenario, reversed).into_iter().map(|it| format!("{name}{it}")));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn run(scenario: &Scenario, reversed: bool) -> Vec<String> {
    let settings = Settings::try_from(scenario.config.clone()).unwrap();
    let mut names = Names::new(scenario.config.zone.parse().unwrap()).with_pods(scenario.config.pods);
    let mut writer = Writer::new();
    if scenario.in_sync {
        for kind in [ObjectKind::Namespace, ObjectKind::Service, ObjectKind::EndpointSlice, ObjectKind::Pod] {
            writer.apply(Change::Replace(kind, Vec::new(), Vec::new()));
        }
    }
    let mut objects: Vec<&Object> = scenario.objects.iter().collect();
    if reversed {
        objects.reverse();
        for object in objects.clone() {
            writer.apply(Change::Upsert(object.clone(), Vec::new()));
            names.update(writer.snapshot());
            writer.apply(Change::Delete(object.reference()));
        }
    }
    for object in objects {
        writer.apply(Change::Upsert(object.clone(), Vec::new()));
    }
    names.update(writer.snapshot());
    let (cache, metrics) = (Cache::default(), Metrics::default());
    let context = Context {
        settings: &settings,
        names: &names,
        snapshot: writer.snapshot(),
        cache: &cache,
        metrics: &metrics,
        now: Instant::now(),
        seed: u64::from(reversed),
    };
    let differs = |it: &Expectation| {
        let (mut actual, mut expected) = (ask(&it.question, &context), it.expected.clone());
        actual.sort();
        expected.sort();
        (actual != expected).then(|| {
            let (expected, actual) = (expected.join("\n    "), actual.join("\n    "));
            format!(":{}: {}\n  expected:\n    {expected}\n  got:\n    {actual}", it.line, it.question.name)
        })
    };
    scenario.questions.iter().filter_map(differs).collect()
}

/// The answer as lines, read back from its bytes.
fn ask(question: &Question, context: &Context<'_>) -> Vec<String> {
    let Request::Query(query) = wire::decode_request(&wire::encode_query(1, question).unwrap()) else {
        panic!("{question:?} is no query");
    };
    let response = match chain::answer(&query.question, context) {
        Outcome::Answer(response) => response,
        Outcome::Refuse => Response::empty(ResponseCode::REFUSED),
        Outcome::Forward { question, aliases } => {
            let mut lines: Vec<String> = aliases.iter().map(|record| format!("answer {}", record.text())).collect();
            lines.push(format!("forward {} {}", question.name, question.record_type.0));
            return lines;
        }
    };
    let mut bytes = Vec::new();
    wire::encode_response(&query, &response, 65_535, &mut bytes);
    let message = Message::from_vec(&bytes).expect("an answer that can be read");
    assert_eq!(message.metadata.authoritative, response.authoritative);
    let mut lines = vec![response.code.name().to_owned()];
    let sections =
        [("answer", &message.answers), ("authority", &message.authorities), ("additional", &message.additionals)];
    for (section, records) in sections {
        lines.extend(records.iter().map(|record| format!("{section} {}", text(record))));
    }
    lines
}

/// A record; of SOA the name only, since the serial number counts the writes.
fn text(record: &WireRecord) -> String {
    match record.record_type() {
        hickory_proto::rr::RecordType::SOA => format!("{} SOA", record.name),
        other => format!("{} {other} {}", record.name, record.data).trim_end().to_owned(),
    }
}

fn read(text: &str, file: &str) -> Scenario {
    let mut scenario =
        Scenario { config: Config::default(), in_sync: true, objects: Vec::new(), questions: Vec::new() };
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => {}
            ["?", name, kind] => scenario.questions.push(Expectation {
                line: index + 1,
                question: Question {
                    name: name.parse().unwrap(),
                    record_type: record_type(kind),
                    dnssec_ok: false,
                    checking_disabled: false,
                },
                expected: Vec::new(),
            }),
            ["not-in-sync"] => scenario.in_sync = false,
            ["pods", "disabled"] => scenario.config.pods = PodNames::Disabled,
            ["pods", "insecure"] => scenario.config.pods = PodNames::Insecure,
            ["upstream", address] => scenario.config.forward.push(address.parse().unwrap()),
            ["host", name, address] => {
                scenario.config.hosts.push(((*name).to_owned(), address.parse().unwrap()));
            }
            ["namespace", name] => {
                scenario.objects.push(Object::Namespace(Namespace { name: (*name).into() }));
            }
            ["service", key, rest @ ..] => scenario.objects.push(Object::Service(service(key, rest))),
            ["slice", key, "of", service, rest @ ..] => {
                scenario.objects.push(Object::EndpointSlice(slice(key, service, rest)));
            }
            ["pod", key, addresses @ ..] => scenario.objects.push(Object::Pod(Pod {
                key: object_key(key),
                node: None,
                addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
                host_network: false,
            })),
            _ => match scenario.questions.last_mut() {
                Some(question) => question.expected.push(words.join(" ")),
                None => panic!("{file}:{}: `{line}` is neither an object nor an answer", index + 1),
            },
        }
    }
    scenario
}

fn object_key(text: &str) -> ObjectKey {
    let (namespace, name) = text.split_once('/').expect("namespace/name");
    ObjectKey::new(namespace, name)
}

fn record_type(name: &str) -> RecordType {
    match name {
        "A" => RecordType::A,
        "AAAA" => RecordType::AAAA,
        "ANY" => RecordType::ANY,
        "CNAME" => RecordType::CNAME,
        "NS" => RecordType::NS,
        "PTR" => RecordType::PTR,
        "SOA" => RecordType::SOA,
        "SRV" => RecordType::SRV,
        "TXT" => RecordType::TXT,
        number => RecordType(number.parse().expect("a record type")),
    }
}

/// `http/tcp=80` as name, protocol and number; `80` as a port without a name.
fn port(text: &str) -> (String, Protocol, Port) {
    let (name, number) = text.split_once('=').unwrap_or(("/tcp", text));
    let (name, protocol) = name.split_once('/').expect("name/protocol=number");
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => Protocol::Sctp,
    };
    (name.to_owned(), protocol, Port::try_from(number.parse::<u16>().expect("a port")).unwrap())
}

fn service(key: &str, words: &[&str]) -> Service {
    let mut service = Service {
        key: object_key(key),
        service_type: ServiceType::ClusterIp,
        cluster_addresses: Vec::new(),
        headless: false,
        ports: Vec::new(),
        publish_not_ready: false,
        traffic: portolan_state::ServiceTraffic::default(),
    };
    for word in words {
        if let Ok(address) = word.parse::<IpAddr>() {
            service.cluster_addresses.push(address);
        } else if *word == "headless" {
            service.headless = true;
        } else if *word == "publish-not-ready" {
            service.publish_not_ready = true;
        } else if let Some(target) = word.strip_prefix("external=") {
            service.service_type = ServiceType::ExternalName(target.into());
        } else {
            let (name, protocol, port) = port(word);
            service.ports.push(ServicePort { name: name.into(), protocol, port, node_port: None });
        }
    }
    service
}

/// Ports, then endpoints: `10.42.0.2`, `10.42.0.3:not-ready`-like marks after a comma, `@hostname`.
fn slice(key: &str, service: &str, words: &[&str]) -> EndpointSlice {
    let key = object_key(key);
    let mut slice = EndpointSlice {
        service: ObjectKey::new(key.namespace.clone(), service),
        key,
        family: Family::V4,
        ports: Vec::new(),
        endpoints: Vec::new(),
        headless: false,
    };
    for word in words {
        if word.contains('=') {
            let (name, protocol, port) = port(word);
            slice.ports.push(EndpointPort { name: name.into(), protocol, port });
            continue;
        }
        let (word, ready) = word.strip_suffix(",not-ready").map_or((*word, true), |word| (word, false));
        let (address, hostname) = word.split_once('@').map_or((word, None), |(it, name)| (it, Some(name)));
        let address: IpAddr = address.parse().expect("an endpoint's address");
        slice.family = Family::of(address);
        slice.endpoints.push(Endpoint {
            address,
            ready,
            serving: ready,
            terminating: false,
            node: None,
            hostname: hostname.map(Into::into),
            hints: None,
        });
    }
    slice
}
