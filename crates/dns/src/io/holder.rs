//! Who holds a port: read from `/proc`, for the one error message that needs it.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

/// The process that holds a port, as `name (process 123)`, where it can be told: a process of
/// another network namespace, or of a user whose files we may not read, cannot.
pub(super) fn holder_of(address: SocketAddr, protocol: &str) -> Option<String> {
    let sockets: Vec<String> = ["", "6"]
        .iter()
        .filter_map(|suffix| fs::read_to_string(format!("/proc/thread-self/net/{protocol}{suffix}")).ok())
        .flat_map(|table| inodes(&table, address.port()))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let path = process.path();
        // Besides processes there are links to them, such as `self`.
        let is_process = process.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit());
        if is_process && holds_any(&path, &sockets) {
            let name = fs::read_to_string(path.join("comm")).ok()?;
            return Some(format!("{} (process {})", name.trim(), process.file_name().to_string_lossy()));
        }
    }
    None
}

fn holds_any(process: &Path, sockets: &[String]) -> bool {
    let Ok(files) = fs::read_dir(process.join("fd")) else { return false };
    files.flatten().filter_map(|file| fs::read_link(file.path()).ok()).any(|target| {
        let target = target.to_string_lossy();
        sockets.iter().any(|socket| *socket == target)
    })
}

/// The inodes of the sockets that are bound to a port and wait for others, from proc(5)'s
/// `net/tcp` or `net/udp`: state 0A is "listen", and 07 an unconnected datagram socket.
fn inodes(table: &str, port: u16) -> Vec<String> {
    let port = format!("{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
            let waits = matches!(*fields.get(3)?, "0A" | "07");
            (local_port == port && waits).then(|| fields.get(9).map(|inode| (*inode).to_owned()))?
        })
        .collect()
}
