//! A trace as people read it: one line per hop, and what changed in it.

use std::fmt::Write as _;

use portolan_net::Packet;

use crate::hop::{End, Hop, Stage, Trace};

/// The trace as text. `from` and `to` are what the user typed.
pub fn render(trace: &Trace, from: &str, to: &str) -> String {
    let rows: Vec<[String; 4]> =
        trace
            .hops
            .iter()
            .enumerate()
            .map(|(index, hop)| [format!("{:>2} {}", index + 1, hop.node), stage(hop), what(hop), why(hop)])
            .chain(trace.reply.iter().map(|hop| {
                ["   reply".to_owned(), String::new(), rewrite(&hop.before, &hop.after), hop.detail.clone()]
            }))
            .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let mut text = format!("{from} → {to} ({})  {}\n", trace.sent.destination_text(), trace.sent.protocol);
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths.iter().copied().chain([0])) {
            let padding = width.saturating_sub(cell.chars().count());
            let _ = write!(line, "{cell}{}  ", " ".repeat(padding));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    match &trace.end {
        End::Delivered { .. } => {}
        End::Refused { node, reason } => {
            let _ = writeln!(text, "   not delivered: {reason} (on {node})");
        }
    }
    text
}

fn stage(hop: &Hop) -> String {
    let name = match hop.stage {
        Stage::PodEgress | Stage::PodIngress => "pod",
        Stage::NodeEgress | Stage::NodeIngress => "node",
        Stage::Outside | Stage::Delivered => "outside",
        Stage::Services => "services",
        Stage::Route => "route",
        Stage::Masquerade => "masquerade",
        Stage::Refused => "refused",
    };
    match hop.stage {
        Stage::Services | Stage::Masquerade => format!("{name} ({})", hop.by),
        _ if hop.by.is_empty() => name.to_owned(),
        _ => format!("{name} {}", hop.by),
    }
}

fn what(hop: &Hop) -> String {
    match hop.stage {
        Stage::Route => hop.detail.clone(),
        Stage::Services => rewrite(&hop.before, &hop.after),
        // The kernel chooses the port, so none is promised.
        Stage::Masquerade => format!("src {} ⇒ {}", hop.before.source, hop.after.source),
        _ => hop.after.to_string(),
    }
}

fn why(hop: &Hop) -> String {
    let origins = hop.origins.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match hop.stage {
        Stage::Route => origins,
        Stage::Services | Stage::Masquerade => {
            [origins, hop.detail.clone()].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
        }
        _ => hop.detail.clone(),
    }
}

/// What differs between two packets, in the words of the field.
pub(crate) fn rewrite(before: &Packet, after: &Packet) -> String {
    let mut parts = Vec::new();
    if (before.source, before.source_port) != (after.source, after.source_port) {
        parts.push(format!("src {} ⇒ {}", before.source_text(), after.source_text()));
    }
    if (before.destination, before.destination_port) != (after.destination, after.destination_port) {
        parts.push(format!("dst {} ⇒ {}", before.destination_text(), after.destination_text()));
    }
    if parts.is_empty() { "unchanged".to_owned() } else { parts.join(", ") }
}
