//! The text that a person knows: `ipvsadm -S -n`, and the addresses of the dummy link as `ip address`.

use std::fmt::Write as _;
use std::net::SocketAddr;

use portolan_net::{Family, Protocol};

use super::{Change, DEVICE, Forwarding, Program, RealServer, Scheduler, ServerKey, VirtualServer};

/// The whole program: virtual servers, then addresses, then settings as comments.
pub fn render(program: &Program) -> String {
    let mut text = String::new();
    for (key, server) in &program.servers {
        text += &render_server(key, server);
    }
    if program.device {
        let _ = writeln!(text, "# ip link add {DEVICE} type dummy");
    }
    for address in &program.addresses {
        let _ = writeln!(text, "# ip address add {address}/{} dev {DEVICE}", Family::of(*address).bits());
    }
    for (path, value) in &program.sysctls {
        let _ = writeln!(text, "# sysctl {path}={value}");
    }
    text
}

/// One virtual server with its real servers, as `ipvsadm -S -n` prints them.
pub fn render_server(key: &ServerKey, server: &VirtualServer) -> String {
    let mut text = format!("-A {} -s {}", service(key), server.scheduler.name());
    if let Some(seconds) = server.persistence_seconds {
        let _ = write!(text, " -p {seconds}");
        if server.client_bits != key.family().bits() {
            let _ = write!(text, " -M {}", mask(key.family(), server.client_bits));
        }
    }
    let flags = flags(server);
    if !flags.is_empty() {
        let _ = write!(text, " -b {}", flags.join(","));
    }
    text.push('\n');
    for real in server.real.iter() {
        let _ = writeln!(text, "-a {} {}", service(key), destination(real));
    }
    text
}

/// One change, as the command that would make it.
pub fn render_change(change: &Change) -> String {
    match change {
        Change::SetSysctl(path, value) => format!("sysctl -w {path}={value}"),
        Change::SetTimeouts(timeouts) => {
            let [tcp, tcp_fin, udp] = [timeouts.tcp, timeouts.tcp_fin, timeouts.udp].map(|it| it.unwrap_or(0));
            format!("ipvsadm --set {tcp} {tcp_fin} {udp}")
        }
        Change::CreateDevice => format!("ip link add {DEVICE} type dummy"),
        Change::AddServer(key, server) => {
            let bare = VirtualServer { real: Vec::new().into(), ..(**server).clone() };
            format!("ipvsadm {}", render_server(key, &bare).trim_end())
        }
        Change::SetServer(key, server) => {
            let bare = VirtualServer { real: Vec::new().into(), ..(**server).clone() };
            format!("ipvsadm {}", render_server(key, &bare).trim_end()).replacen("-A", "-E", 1)
        }
        Change::AddReal(key, real) => format!("ipvsadm -a {} {}", service(key), destination(real)),
        Change::SetReal(key, real) => format!("ipvsadm -e {} {}", service(key), destination(real)),
        Change::AddAddress(address) => format!("ip address add {address} dev {DEVICE}"),
        Change::RemoveAddress(address) => format!("ip address delete {address} dev {DEVICE}"),
        Change::RemoveReal(key, real) => format!("ipvsadm -d {} -r {}", service(key), real.socket()),
        Change::RemoveServer(key) => format!("ipvsadm -D {}", service(key)),
        Change::DeleteDevice => format!("ip link delete {DEVICE}"),
    }
}

fn service(key: &ServerKey) -> String {
    let option = match key.protocol {
        Protocol::Udp => "-u",
        Protocol::Sctp => "--sctp-service",
        Protocol::Tcp | Protocol::Icmp => "-t",
    };
    format!("{option} {}", SocketAddr::new(key.address, key.port.get()))
}

fn destination(real: &RealServer) -> String {
    let forwarding = match real.forwarding {
        Forwarding::Masquerade => "-m",
        Forwarding::Tunnel => "-i",
        Forwarding::Local | Forwarding::Direct | Forwarding::Other(_) => "-g",
    };
    format!("-r {} {forwarding} -w {}", real.key.socket(), real.weight)
}

/// The names of the scheduler's flags, as `ipvsadm` prints them for that scheduler.
fn flags(server: &VirtualServer) -> Vec<&'static str> {
    let [fallback, port] = match server.scheduler {
        Scheduler::SourceHashing => ["sh-fallback", "sh-port"],
        Scheduler::Maglev => ["mh-fallback", "mh-port"],
        _ => ["flag-1", "flag-2"],
    };
    let set = [(server.source_hash.fallback, fallback), (server.source_hash.port, port)];
    set.into_iter().filter(|(is_set, _)| *is_set).map(|(_, name)| name).collect()
}

/// The mask of clients that count as one: dotted for IPv4, a length for IPv6.
fn mask(family: Family, bits: u8) -> String {
    match family {
        Family::V4 => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits.min(32))).unwrap_or(0);
            std::net::Ipv4Addr::from(mask).to_string()
        }
        Family::V6 => bits.to_string(),
    }
}
