//! Questions of the administration socket that need the engine.

use hyper::StatusCode;
use portolan_program::{ipvs, netlink, nftables};
use portolan_trace::NodePrograms;

use super::engine::Engine;
use super::port::KernelPort;
use crate::admin_socket::AdminAnswer;
use crate::api::{NodeInformation, TraceQuestion};
use crate::config::AgentConfig;
use crate::table::{self, RouteRow, Sources, TABLES, Table};

/// A question that the loop answers.
#[derive(Debug)]
pub(crate) enum Question {
    Alive,
    Node,
    Ready,
    Table(String),
    Plan,
    Program(String),
    Trace(TraceQuestion),
    /// The network namespace path of the pod that holds this address, for a probe.
    NamespaceOf(std::net::IpAddr),
}

/// Answers a question from what the engine knows now.
pub(crate) fn answer<P: KernelPort>(engine: &mut Engine<P>, config: &AgentConfig, question: Question) -> AdminAnswer {
    match question {
        Question::Alive => AdminAnswer::text(StatusCode::OK, "ok\n"),
        Question::Node => AdminAnswer::json(&information(engine, config)),
        Question::Ready => match engine.waiting() {
            None => AdminAnswer::text(StatusCode::OK, "ok\n"),
            Some(waiting) => AdminAnswer::text(StatusCode::SERVICE_UNAVAILABLE, waiting.to_string()),
        },
        Question::Table(name) => show(engine, &name),
        Question::Plan => match engine.plan() {
            Ok(text) => AdminAnswer::text(StatusCode::OK, text),
            Err(error) => AdminAnswer::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        Question::Program(room) => program(engine, &room),
        Question::Trace(question) => trace(engine, config, &question),
        Question::NamespaceOf(address) => {
            let program = engine.netlink_program();
            match program.and_then(|program| program.pod_of(address)) {
                Some(pod) => AdminAnswer::text(StatusCode::OK, pod.namespace_path.to_string()),
                None => AdminAnswer::text(StatusCode::NOT_FOUND, format!("no pod of this node holds {address}")),
            }
        }
    }
}

fn information<P: KernelPort>(engine: &Engine<P>, config: &AgentConfig) -> NodeInformation {
    // The dummy link's addresses are the Services', and on every node.
    let foreign = engine.surroundings().addresses.iter().filter(|(link, _)| link != ipvs::DEVICE);
    let foreign = foreign.map(|(_, prefix)| prefix.addr());
    let own =
        engine.netlink_program().into_iter().flat_map(|program| program.addresses.keys().map(|(_, it)| it.addr()));
    // The node's own address comes first: that is the one that people mean.
    let named = engine.snapshot().nodes.get(&config.node).map(|node| node.addresses.clone()).unwrap_or_default();
    let mut addresses = named;
    for address in foreign.chain(own).filter(|address| !address.is_loopback()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    NodeInformation {
        name: config.node.clone(),
        view: engine.view().cloned(),
        addresses,
        ready: engine.waiting().is_none(),
        revision: engine.snapshot().revision,
    }
}

fn show<P: KernelPort>(engine: &Engine<P>, name: &str) -> AdminAnswer {
    let Some(table) = table(engine, name) else {
        let known = TABLES.join(", ");
        return AdminAnswer::text(StatusCode::NOT_FOUND, format!("there is no table {name}; there are: {known}"));
    };
    AdminAnswer::json(&table)
}

/// One of the [`TABLES`], from what the engine knows now; `None` if there is none of that name.
pub fn table<P: KernelPort>(engine: &Engine<P>, name: &str) -> Option<Table> {
    let nothing = portolan_intent::services::ServicesIntent::new();
    let sources = Sources {
        snapshot: engine.snapshot(),
        services: engine.services().unwrap_or(&nothing),
        routes: routes(engine),
        problems: engine.problems(),
    };
    table::table(name, &sources)
}

fn routes<P: KernelPort>(engine: &Engine<P>) -> Vec<RouteRow> {
    let ours = engine.netlink_program().into_iter().flat_map(|program| program.routes.values()).map(|route| RouteRow {
        prefix: route.destination.to_string(),
        way: format!("via {} dev {}{}", route.gateway, route.device, if route.onlink { " onlink" } else { "" }),
        origin: route.origin.to_string(),
    });
    let others = engine.surroundings().routes.iter().map(|route| RouteRow {
        prefix: route.destination.to_string(),
        way: match route.gateway {
            Some(gateway) => format!("via {gateway} dev {}", route.device),
            None => format!("dev {}", route.device),
        },
        origin: String::new(),
    });
    ours.chain(others).collect()
}

fn program<P: KernelPort>(engine: &Engine<P>, room: &str) -> AdminAnswer {
    let text = match room {
        "netlink" => engine.netlink_program().map(netlink::render),
        "nftables" => engine.nftables_program().map(nftables::render),
        "iptables" | "ipset" | "ipvs" => Some(engine.render_room(room).unwrap_or_default()),
        _ => return AdminAnswer::text(StatusCode::NOT_FOUND, "there are netlink, nftables, iptables, ipset and ipvs"),
    };
    AdminAnswer::text(StatusCode::OK, text.unwrap_or_default())
}

fn trace<P: KernelPort>(engine: &Engine<P>, config: &AgentConfig, question: &TraceQuestion) -> AdminAnswer {
    let (Some(netlink), Some(nftables)) = (engine.netlink_program(), engine.nftables_program()) else {
        let reason = engine.waiting().map(ToString::to_string).unwrap_or_default();
        return AdminAnswer::text(StatusCode::SERVICE_UNAVAILABLE, reason);
    };
    let programs = NodePrograms {
        node: &config.node,
        netlink,
        nftables,
        services: engine.services_programs(),
        surroundings: engine.surroundings(),
    };
    AdminAnswer::json(&portolan_trace::trace_node(&programs, question.packet, &question.ingress, question.choice))
}
