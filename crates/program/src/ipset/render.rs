//! The text that a person knows: `ipset save`.

use std::fmt::Write as _;

use portolan_net::Family;

use super::{Change, Entry, Program, SetKey, SetKind};

/// All sets, each as `ipset save` prints it, without sizes of tables.
pub fn render(program: &Program) -> String {
    let mut text = String::new();
    for (key, set) in &program.sets {
        let _ = writeln!(text, "{}", create(*key, &set.kind));
        for entry in set.entries.keys() {
            let _ = writeln!(text, "add {key} {}", render_entry(entry));
        }
    }
    text
}

/// An entry, as `ipset save` prints it.
pub fn render_entry(entry: &Entry) -> String {
    match entry {
        Entry::Ip(address) => address.to_string(),
        Entry::IpPort(address, protocol, port) => format!("{address},{protocol}:{port}"),
        Entry::IpPortIp(address, protocol, port, second) => format!("{address},{protocol}:{port},{second}"),
        Entry::IpPortNet(address, protocol, port, prefix) if prefix.prefix_len() == prefix.max_prefix_len() => {
            format!("{address},{protocol}:{port},{}", prefix.addr())
        }
        Entry::IpPortNet(address, protocol, port, prefix) => format!("{address},{protocol}:{port},{prefix}"),
        Entry::Port(port) => port.to_string(),
    }
}

/// One change, as the command that would make it.
pub fn render_change(change: &Change) -> String {
    match change {
        Change::Clear(key) | Change::Destroy(key) => format!("ipset destroy {key}"),
        Change::Create(key, kind) => format!("ipset {}", create(*key, kind)),
        Change::Add(key, entry) => format!("ipset add {key} {}", render_entry(entry)),
        Change::Remove(key, entry) => format!("ipset del {key} {}", render_entry(entry)),
        Change::Flush(key) => format!("ipset flush {key}"),
    }
}

fn create(key: SetKey, kind: &SetKind) -> String {
    match kind {
        SetKind::BitmapPort => format!("create {key} bitmap:port range 0-65535"),
        kind => {
            let family = if key.family == Family::V4 { "inet" } else { "inet6" };
            format!("create {key} {} family {family}", kind.name())
        }
    }
}
