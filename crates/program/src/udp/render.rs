//! Text for people: as `ip` would print it, had the kernel such a tunnel.

use std::fmt::Write as _;

use super::{Change, Program, Route, Tunnel};

/// The tunnel and its routes, one a line.
pub fn render(program: &Program) -> String {
    let mut text = String::new();
    if let Some(tunnel) = &program.tunnel {
        let _ = writeln!(text, "tunnel {}", render_tunnel(tunnel));
    }
    for (prefix, route) in &program.routes {
        let _ = writeln!(text, "{prefix} {}", render_route(route));
    }
    text
}

/// One change, as a person would say it.
pub fn render_change(change: &Change) -> String {
    match change {
        Change::Stop => "tunnel stop".to_owned(),
        Change::Start(tunnel) => format!("tunnel start {}", render_tunnel(tunnel)),
        Change::Update(tunnel) => format!("tunnel change {}", render_tunnel(tunnel)),
        Change::SetRoute(prefix, route) => format!("route replace {prefix} {}", render_route(route)),
        Change::RemoveRoute(prefix) => format!("route del {prefix}"),
    }
}

fn render_tunnel(tunnel: &Tunnel) -> String {
    let local: Vec<String> = tunnel.local.iter().map(ToString::to_string).collect();
    format!("{} local {} port {} mtu {}", tunnel.device, local.join(" "), tunnel.port, tunnel.mtu)
}

fn render_route(route: &Route) -> String {
    format!("encap udp to {}", route.peer)
}
