//! The text that `nft list table` prints, and that `nft -f` loads.

use std::fmt::Write as _;

use ipnet::IpNet;
use portolan_net::Family;

use super::{
    BaseHook, CLIENTS_MAX, Chain, Change, Element, Key, KeyExpression, Learned, Match, Program, Rejection, Rule, Set,
    SetKind, Statement, Table, TableKey,
};

/// All tables.
pub fn render(program: &Program) -> String {
    let mut text = String::new();
    for (key, table) in &program.tables {
        text.push_str(&render_table(*key, table));
    }
    text
}

/// One table.
pub fn render_table(key: TableKey, table: &Table) -> String {
    let mut text = format!("table {} {} {{\n", family_name(key.family), key.name.as_str());
    let mut is_first = true;
    for (name, set) in &table.sets {
        separate(&mut text, &mut is_first);
        write_set(&mut text, key.family, name, set);
    }
    for (name, chain) in &table.chains {
        separate(&mut text, &mut is_first);
        write_chain(&mut text, key.family, name, chain);
    }
    text.push_str("}\n");
    text
}

/// Changes as the `nft` commands that would make them.
pub fn render_changes(changes: &[Change]) -> String {
    let mut text = String::new();
    for change in changes {
        write_change(&mut text, change);
    }
    text
}

fn separate(text: &mut String, is_first: &mut bool) {
    if !std::mem::take(is_first) {
        text.push('\n');
    }
}

pub(super) fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn write_set(text: &mut String, family: Family, name: &str, set: &Set) {
    let _ = writeln!(text, "\t{} {name} {{", set_word(set.kind));
    let _ = writeln!(text, "\t\t{}", set_type(family, set.kind));
    for line in set_flags(set.kind) {
        let _ = writeln!(text, "\t\t{line}");
    }
    if !set.elements.is_empty() {
        text.push_str("\t\telements = { ");
        for (index, (key, element)) in set.elements.iter().enumerate() {
            if index > 0 {
                text.push_str(",\n\t\t\t     ");
            }
            text.push_str(&render_element(key, element));
        }
        text.push_str(" }\n");
    }
    text.push_str("\t}\n");
}

fn set_flags(kind: SetKind) -> Vec<String> {
    if kind.is_learned() {
        vec![format!("size {CLIENTS_MAX}"), "flags dynamic,timeout".to_owned()]
    } else if kind.is_interval() {
        vec!["flags interval".to_owned()]
    } else {
        Vec::new()
    }
}

fn set_word(kind: SetKind) -> &'static str {
    if kind.is_map() { "map" } else { "set" }
}

/// Slots have no type of their own in nftables, so maps with slots say which expressions they hold.
fn set_type(family: Family, kind: SetKind) -> String {
    let (ip, address) = match family {
        Family::V4 => ("ip", "ipv4_addr"),
        Family::V6 => ("ip6", "ipv6_addr"),
    };
    let slot = "numgen random mod 2";
    match kind {
        SetKind::Frontends => format!("type {address} . inet_proto . inet_service"),
        SetKind::NodePorts => "type inet_proto . inet_service".to_owned(),
        SetKind::FrontendSlots => {
            format!("typeof {ip} daddr . meta l4proto . th dport . {slot} : {ip} daddr . th dport")
        }
        SetKind::NodePortSlots => format!("typeof meta l4proto . th dport . {slot} : {ip} daddr . th dport"),
        SetKind::AddressPairs => format!("type {address} . {address}"),
        SetKind::Prefixes | SetKind::Addresses => format!("type {address}"),
        SetKind::FrontendSources => format!("type {address} . inet_proto . inet_service . {address}"),
        SetKind::NodePortSources => format!("type inet_proto . inet_service . {address}"),
        SetKind::FrontendNumbers => format!("typeof {ip} daddr . meta l4proto . th dport . {slot}"),
        SetKind::NodePortNumbers => format!("typeof meta l4proto . th dport . {slot}"),
        SetKind::FrontendEndpoints => {
            format!("type {address} . inet_proto . inet_service . {address} . inet_service")
        }
        SetKind::NodePortEndpoints => format!("type inet_proto . inet_service . {address} . inet_service"),
        SetKind::FrontendClients => {
            format!("type {address} . {address} . inet_proto . inet_service : {address} . inet_service")
        }
        SetKind::NodePortClients => format!("type {address} . inet_proto . inet_service : {address} . inet_service"),
        SetKind::Unknown => "# a type that is not ours".to_owned(),
    }
}

/// One element, as inside the braces of a set.
pub fn render_element(key: &Key, element: &Element) -> String {
    let mut text = render_key(key);
    if let Some(comment) = &element.comment {
        let _ = write!(text, " comment \"{comment}\"");
    }
    if let Some(socket) = element.value {
        let _ = write!(text, " : {} . {}", socket.ip(), socket.port());
    }
    text
}

fn render_key(key: &Key) -> String {
    match key {
        Key::Frontend(address, protocol, port) => format!("{address} . {protocol} . {port}"),
        Key::NodePort(protocol, port) => format!("{protocol} . {port}"),
        Key::FrontendSlot(address, protocol, port, slot) => format!("{address} . {protocol} . {port} . {slot}"),
        Key::NodePortSlot(protocol, port, slot) => format!("{protocol} . {port} . {slot}"),
        Key::AddressPair(first, second) => format!("{first} . {second}"),
        Key::Address(address) => address.to_string(),
        Key::Prefix(prefix) => render_prefix(prefix),
        Key::FrontendSource(address, protocol, port, prefix) => {
            format!("{address} . {protocol} . {port} . {}", render_prefix(prefix))
        }
        Key::NodePortSource(protocol, port, prefix) => format!("{protocol} . {port} . {}", render_prefix(prefix)),
        Key::FrontendEndpoint(address, protocol, port, to, to_port) => {
            format!("{address} . {protocol} . {port} . {to} . {to_port}")
        }
        Key::NodePortEndpoint(protocol, port, to, to_port) => format!("{protocol} . {port} . {to} . {to_port}"),
    }
}

/// `nft` prints a prefix of full length as an address.
fn render_prefix(prefix: &IpNet) -> String {
    if prefix.prefix_len() == prefix.max_prefix_len() { prefix.addr().to_string() } else { prefix.to_string() }
}

fn write_chain(text: &mut String, family: Family, name: &str, chain: &Chain) {
    let _ = writeln!(text, "\tchain {name} {{");
    if let Some(base) = chain.base {
        let _ = writeln!(text, "\t\t{}", render_base(base));
    }
    for rule in &chain.rules {
        let _ = writeln!(text, "\t\t{}", render_rule(family, rule));
    }
    text.push_str("\t}\n");
}

fn render_base(base: BaseHook) -> String {
    // `nft` names -100 at prerouting alone and 100 at postrouting alone.
    let priority = match (base.hook, base.priority) {
        (_, 0) => "filter".to_owned(),
        (super::Hook::Prerouting, -100) => "dstnat".to_owned(),
        (super::Hook::Postrouting, 100) => "srcnat".to_owned(),
        (_, other) => other.to_string(),
    };
    let policy = if base.accepts { "accept" } else { "drop" };
    format!("type {} hook {} priority {priority}; policy {policy};", base.kind.name(), base.hook.name())
}

/// One rule.
pub fn render_rule(family: Family, rule: &Rule) -> String {
    let mut parts: Vec<String> = Vec::new();
    let resets = rule.statements.contains(&Statement::Reject(Rejection::TcpReset));
    for condition in &rule.matches {
        // `nft` leaves out what a reset implies.
        if resets && matches!(condition, Match::Protocol(portolan_net::Protocol::Tcp)) {
            continue;
        }
        parts.push(render_match(family, condition));
    }
    parts.extend(rule.statements.iter().map(|statement| render_statement(family, statement)));
    if let Some(comment) = &rule.comment {
        parts.push(format!("comment \"{comment}\""));
    }
    parts.join(" ")
}

pub(super) fn render_match(family: Family, condition: &Match) -> String {
    let ip = family_name(family);
    match condition {
        Match::Set { key, set, inside } => {
            format!("{} {}@{set}", render_key_expression(family, *key), if *inside { "" } else { "!= " })
        }
        Match::Destination { prefix, inside } => {
            format!("{ip} daddr {}{}", if *inside { "" } else { "!= " }, render_prefix(prefix))
        }
        Match::DestinationIsLocal => "fib daddr type local".to_owned(),
        Match::SourceIsLocal { inside } => format!("fib saddr type {}local", if *inside { "" } else { "!= " }),
        Match::Interface { name, is_prefix, inside } => {
            let (not, more) = (if *inside { "" } else { "!= " }, if *is_prefix { "*" } else { "" });
            format!("iifname {not}\"{name}{more}\"")
        }
        Match::Mark(bits) => format!("meta mark & {bits:#010x} == {bits:#010x}"),
        Match::Protocol(protocol) => format!("meta l4proto {protocol}"),
        Match::DestinationTranslated => "ct status dnat".to_owned(),
        Match::NewConnection => "ct state new".to_owned(),
    }
}

fn render_key_expression(family: Family, key: KeyExpression) -> String {
    let ip = family_name(family);
    match key {
        KeyExpression::Frontend => format!("{ip} daddr . meta l4proto . th dport"),
        KeyExpression::NodePort => "meta l4proto . th dport".to_owned(),
        KeyExpression::AddressPair => format!("{ip} saddr . {ip} daddr"),
        KeyExpression::FrontendSource => format!("{ip} daddr . meta l4proto . th dport . {ip} saddr"),
        KeyExpression::NodePortSource => format!("meta l4proto . th dport . {ip} saddr"),
        KeyExpression::Source => format!("{ip} saddr"),
        KeyExpression::Destination => format!("{ip} daddr"),
    }
}

/// What must hold, the client and frontend, and the endpoint.
fn render_learned(family: Family, learned: &Learned, not: &str) -> (String, String, String) {
    let (ip, protocol) = (family_name(family), learned.protocol);
    let frontend = match learned.key {
        KeyExpression::Frontend => format!("ct original {ip} daddr . meta l4proto . ct original proto-dst"),
        _ => "meta l4proto . ct original proto-dst".to_owned(),
    };
    let endpoint = format!("{ip} daddr . {protocol} dport");
    let Learned { seconds, timeouts, endpoints, .. } = learned;
    let conditions = format!(
        "{protocol} dport != 0 {frontend} . numgen random mod 1 offset {seconds} @{timeouts} \
         {frontend} . {endpoint} {not}@{endpoints}"
    );
    (conditions, format!("{ip} saddr . {frontend}"), endpoint)
}

/// Seconds as `nft` prints them: `3h`, `1d`, `1m30s`.
fn render_seconds(seconds: u32) -> String {
    let parts = [(seconds / 86_400, 'd'), (seconds / 3600 % 24, 'h'), (seconds / 60 % 60, 'm'), (seconds % 60, 's')];
    let mut text = String::new();
    for (number, unit) in parts.into_iter().filter(|(number, _)| *number > 0) {
        let _ = write!(text, "{number}{unit}");
    }
    text
}

pub(super) fn render_statement(family: Family, statement: &Statement) -> String {
    let ip = family_name(family);
    match statement {
        Statement::Jump(chain) => format!("jump {chain}"),
        Statement::Goto(chain) => format!("goto {chain}"),
        Statement::Return => "return".to_owned(),
        Statement::SetMark(bits) => format!("meta mark set meta mark | {bits:#010x}"),
        Statement::ClearMark(bits) => format!("meta mark set meta mark & {:#010x}", !bits),
        Statement::Balance { key, slots, offset, map } => {
            let key = render_key_expression(family, *key);
            format!("dnat {ip} to {key} . numgen random mod {slots} offset {offset} map @{map}")
        }
        Statement::Drop => "drop".to_owned(),
        Statement::Keep { key, clients } => {
            format!("dnat {ip} to {ip} saddr . {} map @{clients}", render_key_expression(family, *key))
        }
        Statement::Remember(it) => {
            let (conditions, client, endpoint) = render_learned(family, it, "");
            let timeout = render_seconds(it.seconds);
            format!("{conditions} update @{} {{ {client} timeout {timeout} : {endpoint} }}", it.clients)
        }
        Statement::Forget(it) => {
            let (conditions, client, endpoint) = render_learned(family, it, "!= ");
            format!("{conditions} delete @{} {{ {client} : {endpoint} }}", it.clients)
        }
        Statement::Masquerade => "masquerade fully-random".to_owned(),
        Statement::Reject(Rejection::TcpReset) => "reject with tcp reset".to_owned(),
        Statement::Reject(Rejection::PortUnreachable) => "reject".to_owned(),
        Statement::Unknown(text) => format!("# not ours: {text}"),
    }
}

fn write_change(text: &mut String, change: &Change) {
    let key = change.table();
    let (family, table) = (family_name(key.family), key.name.as_str());
    let place = format!("{family} {table}");
    let _ = match change {
        Change::DeleteTable(_) => writeln!(text, "delete table {place}"),
        Change::CreateTable(_) => writeln!(text, "add table {place}"),
        Change::CreateSet(_, name, kind) => {
            let mut flags = set_flags(*kind);
            flags.insert(0, set_type(key.family, *kind));
            let flags = flags.join("; ");
            let word = set_word(*kind);
            writeln!(text, "add {word} {place} {name} {{ {flags}; }}")
        }
        Change::CreateChain(_, name, None) => writeln!(text, "add chain {place} {name}"),
        Change::CreateChain(_, name, Some(base)) => {
            writeln!(text, "add chain {place} {name} {{ {} }}", render_base(*base))
        }
        Change::PutElement { set, key, element, replaces, .. } => {
            if *replaces {
                let _ = writeln!(text, "delete element {place} {set} {{ {} }}", render_key(key));
            }
            writeln!(text, "add element {place} {set} {{ {} }}", render_element(key, element))
        }
        Change::RemoveElement { set, key, .. } => {
            writeln!(text, "delete element {place} {set} {{ {} }}", render_key(key))
        }
        Change::WriteRules(_, name, rules) => {
            let _ = writeln!(text, "flush chain {place} {name}");
            for rule in rules {
                let _ = writeln!(text, "add rule {place} {name} {}", render_rule(key.family, rule));
            }
            Ok(())
        }
        Change::AddRule(_, name, rule) => {
            writeln!(text, "add rule {place} {name} {}", render_rule(key.family, rule))
        }
        // `nft` deletes rules by their handle, which the kernel gives.
        Change::RemoveRule(_, name, rule) => {
            writeln!(text, "delete rule {place} {name} handle … # {}", render_rule(key.family, rule))
        }
        // `nft` has no command for it: who is remembered must be read first.
        Change::ForgetClients { clients, key, .. } => {
            writeln!(text, "delete element {place} {clients} {{ … }} # of {}", render_key(key))
        }
        Change::DeleteChain(_, name) => writeln!(text, "delete chain {place} {name}"),
        Change::DeleteSet(_, name) => writeln!(text, "delete set {place} {name}"),
    };
}
