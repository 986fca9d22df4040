//! The text of a scenario as a cluster and checks.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::SocketAddr;
use std::str::FromStr;

use portolan_intent::services::{DetectLocal, NodePortAddresses, ProxySettings};
use portolan_net::{Family, NodeName, ObjectKey, Port, Protocol};
use portolan_state::{
    AffinityTimeout, Endpoint, EndpointHints, EndpointPort, EndpointSlice, Node, Service, ServicePort, ServiceTraffic,
    ServiceType, TrafficPolicy,
};

use super::{Check, Scenario, Stage};
use crate::answer::{Answer, From, Question};
use crate::cluster::Cluster;

/// What is wrong with a line.
type Told<T> = Result<T, String>;

/// Reads a scenario, or says which line means nothing.
pub(crate) fn parse(text: &str) -> Told<Scenario> {
    let mut reader = Reader { cluster: Cluster::new(Vec::new()), stages: Vec::new(), last: Last::Nothing };
    for (index, line) in text.lines().enumerate() {
        let words: Vec<&str> = line.split('#').next().unwrap_or_default().split_whitespace().collect();
        let told = match (words.is_empty(), line.starts_with(' ')) {
            (true, _) => Ok(()),
            (false, true) => reader.part(&words),
            (false, false) => reader.whole(index + 1, &words),
        };
        told.map_err(|why| format!("line {}: `{}`: {why}", index + 1, line.trim()))?;
    }
    let Reader { cluster, mut stages, .. } = reader;
    if cluster.nodes.is_empty() {
        return Err("there is no node".to_owned());
    }
    if stages.last().is_none_or(|stage| stage.cluster != cluster) {
        stages.push(Stage { cluster, checks: Vec::new() });
    }
    Ok(Scenario { stages })
}

/// What an indented line belongs to.
enum Last {
    Nothing,
    Service(ObjectKey),
    Slice(ObjectKey),
    Answer,
}

struct Reader {
    cluster: Cluster,
    stages: Vec<Stage>,
    last: Last,
}

impl Reader {
    fn whole(&mut self, number: usize, words: &[&str]) -> Told<()> {
        self.last = Last::Nothing;
        match words {
            ["node", name, values @ ..] => self.node(name, values),
            ["settings", values @ ..] => {
                self.cluster.settings = settings(values)?;
                Ok(())
            }
            ["service", key, service_type, addresses @ ..] => {
                let service = service(object_key(key)?, service_type, addresses)?;
                self.last = Last::Service(service.key.clone());
                self.cluster.services.insert(service.key.clone(), service);
                Ok(())
            }
            ["slice", key, "of", service, family, flags @ ..] => {
                let slice = slice(object_key(key)?, service, family, flags)?;
                self.last = Last::Slice(slice.key.clone());
                self.cluster.slices.insert(slice.key.clone(), slice);
                Ok(())
            }
            ["delete", "service", key] => {
                self.cluster.services.remove(&object_key(key)?).map(|_| ()).ok_or("there is no such Service".into())
            }
            ["delete", "slice", key] => {
                self.cluster.slices.remove(&object_key(key)?).map(|_| ()).ok_or("there is no such slice".into())
            }
            _ => {
                let check = check(words)?;
                if matches!(check, Check::Answer(..)) {
                    self.last = Last::Answer;
                }
                self.check(number, check)
            }
        }
    }

    fn check(&mut self, number: usize, check: Check) -> Told<()> {
        if self.cluster.nodes.is_empty() {
            return Err("there is no node yet".to_owned());
        }
        if self.stages.last().is_none_or(|stage| stage.cluster != self.cluster) {
            self.stages.push(Stage { cluster: self.cluster.clone(), checks: Vec::new() });
        }
        let stage = self.stages.last_mut().ok_or("there is no stage")?;
        stage.checks.push((number, check));
        Ok(())
    }

    fn node(&mut self, name: &str, values: &[&str]) -> Told<()> {
        let mut node = Node {
            name: NodeName::from(name),
            addresses: Vec::new(),
            pod_prefixes: Vec::new(),
            tunnel: None,
            zone: None,
            leaving: false,
        };
        for word in values {
            match word.split_once('=') {
                Some(("zone", zone)) => node.zone = Some(zone.into()),
                Some(("addresses", list)) => node.addresses = all(list)?,
                Some(("pods", list)) => node.pod_prefixes = all(list)?,
                _ => return unknown(word),
            }
        }
        match self.cluster.nodes.iter_mut().find(|known| known.name == node.name) {
            Some(known) => *known = node,
            None => self.cluster.nodes.push(node),
        }
        Ok(())
    }

    fn part(&mut self, words: &[&str]) -> Told<()> {
        match &self.last {
            Last::Nothing => Err("it belongs to nothing".to_owned()),
            Last::Service(key) => {
                service_part(self.cluster.services.get_mut(key).ok_or("there is no such Service")?, words)
            }
            Last::Slice(key) => slice_part(self.cluster.slices.get_mut(key).ok_or("there is no such slice")?, words),
            Last::Answer => {
                let checks = self.stages.last_mut().map(|stage| &mut stage.checks);
                let Some((_, Check::Answer(_, _, exceptions))) = checks.and_then(|checks| checks.last_mut()) else {
                    return Err("it belongs to no answer".to_owned());
                };
                let ["except", modes, answer @ ..] = words else { return Err("it is no exception".to_owned()) };
                let answer = parse_answer(answer)?;
                let modes = modes.trim_end_matches(':').split(',');
                exceptions.extend(modes.map(|mode| (mode.to_owned(), answer.clone())));
                Ok(())
            }
        }
    }
}

fn unknown<T>(word: &str) -> Told<T> {
    Err(format!("`{word}` means nothing here"))
}

fn one<T: FromStr<Err: Display>>(text: &str) -> Told<T> {
    text.parse().map_err(|error| format!("`{text}`: {error}"))
}

fn all<T: FromStr<Err: Display>>(text: &str) -> Told<Vec<T>> {
    text.split(',').map(one).collect()
}

fn port(text: &str) -> Told<Port> {
    Port::try_from(one::<u16>(text)?).map_err(|error| error.to_string())
}

fn port_and_protocol(text: &str) -> Told<(Port, Protocol)> {
    let (number, protocol) = text.split_once('/').ok_or("a port is NUMBER/PROTOCOL")?;
    Ok((port(number)?, one(protocol)?))
}

fn object_key(text: &str) -> Told<ObjectKey> {
    let (namespace, name) = text.split_once('/').ok_or("an object is NAMESPACE/NAME")?;
    Ok(ObjectKey::new(namespace, name))
}

fn settings(words: &[&str]) -> Told<ProxySettings> {
    let mut settings = ProxySettings::default();
    for word in words {
        match word.split_once('=').unwrap_or((word, "")) {
            ("masqueradeAll", "") => settings.masquerade_all = true,
            ("externalIPs", "") => settings.external_ips = true,
            ("localhostNodePorts", "") => settings.localhost_node_ports = true,
            ("detectLocal", "ClusterCIDR") => settings.detect_local = DetectLocal::ClusterPrefixes,
            ("detectLocal", "NodeCIDR") => settings.detect_local = DetectLocal::NodePrefixes,
            ("detectLocal", "none") => settings.detect_local = DetectLocal::Nothing,
            ("detectLocal", value) => {
                settings.detect_local = match value.split_once(':') {
                    Some(("BridgeInterface", name)) => DetectLocal::Bridge(name.to_owned()),
                    Some(("InterfaceNamePrefix", prefix)) => DetectLocal::InterfacePrefix(prefix.to_owned()),
                    _ => return unknown(word),
                }
            }
            ("nodePortAddresses", "all") => settings.node_port_addresses = NodePortAddresses::All,
            ("nodePortAddresses", "primary") => settings.node_port_addresses = NodePortAddresses::Primary,
            ("nodePortAddresses", list) => settings.node_port_addresses = NodePortAddresses::Within(all(list)?),
            _ => return unknown(word),
        }
    }
    Ok(settings)
}

fn service(key: ObjectKey, service_type: &str, addresses: &[&str]) -> Told<Service> {
    let service_type = match service_type.split_once('=').unwrap_or((service_type, "")) {
        ("ClusterIP", _) => ServiceType::ClusterIp,
        ("NodePort", _) => ServiceType::NodePort,
        ("LoadBalancer", _) => ServiceType::LoadBalancer,
        ("ExternalName", name) => ServiceType::ExternalName(name.into()),
        (other, _) => return unknown(other),
    };
    let (headless, cluster_addresses) = match addresses {
        [] => (false, Vec::new()),
        ["None"] => (true, Vec::new()),
        [list] => (false, all(list)?),
        [_, more, ..] => return unknown(more),
    };
    Ok(Service {
        key,
        service_type,
        cluster_addresses,
        headless,
        ports: Vec::new(),
        publish_not_ready: false,
        traffic: ServiceTraffic::default(),
    })
}

fn policy(text: &str) -> Told<TrafficPolicy> {
    match text {
        "Cluster" => Ok(TrafficPolicy::Cluster),
        "Local" => Ok(TrafficPolicy::Local),
        _ => unknown(text),
    }
}

fn service_part(service: &mut Service, words: &[&str]) -> Told<()> {
    let traffic = &mut service.traffic;
    match words {
        ["publishNotReadyAddresses"] => service.publish_not_ready = true,
        ["internalTrafficPolicy", value] => traffic.internal_policy = policy(value)?,
        ["externalTrafficPolicy", value] => traffic.external_policy = policy(value)?,
        ["sessionAffinity", seconds] => {
            let timeout = AffinityTimeout::new(one(seconds)?).ok_or("a timeout has 1 to 86400 seconds")?;
            traffic.affinity = Some(timeout);
        }
        ["externalIPs", list] => traffic.external_addresses = all(list)?,
        ["loadBalancer", list] => traffic.load_balancer_addresses = all(list)?,
        ["loadBalancerSourceRanges", "none"] => traffic.load_balancer_sources = Some(Vec::new()),
        ["loadBalancerSourceRanges", list] => traffic.load_balancer_sources = Some(all(list)?),
        ["healthCheckNodePort", number] => traffic.health_check_port = Some(port(number)?),
        ["port", rest @ ..] => {
            let (rest, node_port) = match rest {
                [rest @ .., last] if last.starts_with("nodePort=") => (rest, Some(port(&last["nodePort=".len()..])?)),
                _ => (rest, None),
            };
            let (name, number) = name_and_number(rest)?;
            let (port, protocol) = port_and_protocol(number)?;
            service.ports.push(ServicePort { name: name.into(), protocol, port, node_port });
        }
        _ => return Err("a Service has no such part".to_owned()),
    }
    Ok(())
}

fn name_and_number<'a>(words: &[&'a str]) -> Told<(&'a str, &'a str)> {
    match words {
        [number] => Ok(("", number)),
        [name, number] => Ok((name, number)),
        _ => Err("a port is `port [NAME] NUMBER/PROTOCOL`".to_owned()),
    }
}

fn slice(key: ObjectKey, service: &str, family: &str, flags: &[&str]) -> Told<EndpointSlice> {
    let family = match family {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        other => return unknown(other),
    };
    let headless = match flags {
        [] => false,
        ["headless"] => true,
        [other, ..] => return unknown(other),
    };
    let service = ObjectKey::new(key.namespace.clone(), service);
    Ok(EndpointSlice { key, service, family, ports: Vec::new(), endpoints: Vec::new(), headless })
}

fn slice_part(slice: &mut EndpointSlice, words: &[&str]) -> Told<()> {
    match words {
        ["port", rest @ ..] => {
            let (name, number) = name_and_number(rest)?;
            let (port, protocol) = port_and_protocol(number)?;
            slice.ports.push(EndpointPort { name: name.into(), protocol, port });
        }
        ["endpoint", address, "on", node, rest @ ..] => {
            slice.endpoints.push(endpoint(address, Some(NodeName::from(*node)), rest)?);
        }
        ["endpoint", address, rest @ ..] => slice.endpoints.push(endpoint(address, None, rest)?),
        _ => return Err("a slice has no such part".to_owned()),
    }
    Ok(())
}

fn endpoint(address: &str, node: Option<NodeName>, words: &[&str]) -> Told<Endpoint> {
    let address = one(address)?;
    let ready = !words.contains(&"unready");
    let mut endpoint =
        Endpoint { address, ready, serving: ready, terminating: false, node, hostname: None, hints: None };
    for word in words {
        match word.split_once('=').unwrap_or((word, "")) {
            ("unready", "") => {}
            ("serving", "") => endpoint.serving = true,
            ("terminating", "") => endpoint.terminating = true,
            ("hints", "") => endpoint.hints = Some(Box::default()),
            ("nodes", list) => hints(&mut endpoint).nodes = list.split(',').map(NodeName::from).collect(),
            ("zones", list) => hints(&mut endpoint).zones = list.split(',').map(Into::into).collect(),
            _ => return unknown(word),
        }
    }
    Ok(endpoint)
}

fn hints(endpoint: &mut Endpoint) -> &mut EndpointHints {
    endpoint.hints.get_or_insert_default()
}

fn destination(text: &str) -> Told<(SocketAddr, Port, Protocol)> {
    let (socket, protocol) = text.rsplit_once('/').ok_or("a destination is ADDRESS:PORT/PROTOCOL")?;
    let socket: SocketAddr = one(socket)?;
    Ok((socket, Port::try_from(socket.port()).map_err(|error| error.to_string())?, one(protocol)?))
}

fn question(from: From, source: &str, to: &str) -> Told<Question> {
    let (socket, port, protocol) = destination(to)?;
    let question = Question { from, source: one(source)?, destination: socket.ip(), port, protocol };
    let is_one_family = question.source.is_ipv4() == question.destination.is_ipv4();
    is_one_family.then_some(question).ok_or("source and destination are of different families".to_owned())
}

fn check(words: &[&str]) -> Told<Check> {
    match words {
        ["from", way, source, "to", to, "=>", answer @ ..] => {
            let way = From::ALL.into_iter().find(|it| it.name() == *way).ok_or("a way is pod, node or outside")?;
            Ok(Check::Answer(question(way, source, to)?, parse_answer(answer)?, Vec::new()))
        }
        ["flow", source, "to", to, "at", endpoint, "=>", kept] => {
            let kept = match *kept {
                "kept" => true,
                "cut" => false,
                other => return unknown(other),
            };
            Ok(Check::Flow(question(From::Outside, source, to)?, one(endpoint)?, kept))
        }
        ["health", service, "=>", "none"] => Ok(Check::Health(object_key(service)?, None)),
        ["health", service, "=>", count, "at", port] => {
            Ok(Check::Health(object_key(service)?, Some((one(port)?, one(count)?))))
        }
        ["affinity", to, "=>", seconds] => {
            let source = if destination(to)?.0.is_ipv4() { "0.0.0.0" } else { "::" };
            let seconds = if *seconds == "none" { None } else { Some(one(seconds)?) };
            Ok(Check::Affinity(question(From::Outside, source, to)?, seconds))
        }
        _ => Err("it is neither an object nor a check".to_owned()),
    }
}

fn parse_answer(words: &[&str]) -> Told<Answer> {
    let (list, masquerade) = match words {
        ["untouched"] => return Ok(Answer::Untouched),
        ["reject"] => return Ok(Answer::Reject),
        ["drop"] => return Ok(Answer::Drop),
        ["forward", list] => (list, false),
        ["forward", list, "masquerade"] => (list, true),
        _ => {
            return Err("an answer is untouched, reject, drop or forward ENDPOINT,… [masquerade]".to_owned());
        }
    };
    let mut endpoints = BTreeMap::new();
    for word in list.split(',') {
        let own = word.strip_suffix("(masquerade)");
        endpoints.insert(one(own.unwrap_or(word))?, masquerade || own.is_some());
    }
    Ok(Answer::Forward(endpoints))
}
