//! The text that `nft list table` prints, and that `nft -f` loads.

use std::fmt::Write as _;

use ipnet::IpNet;
use portolan_net::Family;

use super::{
    BaseHook, Chain, Change, Element, Key, KeyExpression, Match, Program, Rejection, Rule, Set, SetKind, Statement,
    Table, TableKey,
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
    if set.kind == SetKind::Prefixes {
        text.push_str("\t\tflags interval\n");
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
        SetKind::Prefixes => format!("type {address}"),
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
        Key::Prefix(prefix) => render_prefix(prefix),
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
        KeyExpression::Source => format!("{ip} saddr"),
        KeyExpression::Destination => format!("{ip} daddr"),
    }
}

pub(super) fn render_statement(family: Family, statement: &Statement) -> String {
    match statement {
        Statement::Jump(chain) => format!("jump {chain}"),
        Statement::Goto(chain) => format!("goto {chain}"),
        Statement::Return => "return".to_owned(),
        Statement::SetMark(bits) => format!("meta mark set meta mark | {bits:#010x}"),
        Statement::ClearMark(bits) => format!("meta mark set meta mark & {:#010x}", !bits),
        Statement::Balance { key, slots, offset, map } => {
            let key = render_key_expression(family, *key);
            let ip = family_name(family);
            format!("dnat {ip} to {key} . numgen random mod {slots} offset {offset} map @{map}")
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
            let flags = if *kind == SetKind::Prefixes { "; flags interval" } else { "" };
            let word = set_word(*kind);
            writeln!(text, "add {word} {place} {name} {{ {}{flags}; }}", set_type(key.family, *kind))
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
        Change::DeleteChain(_, name) => writeln!(text, "delete chain {place} {name}"),
        Change::DeleteSet(_, name) => writeln!(text, "delete set {place} {name}"),
    };
}
