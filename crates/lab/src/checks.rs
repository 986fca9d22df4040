//! What a lab needs of the machine, looked at before anything is made.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;
use portolan_kernel::nftables::NftablesRoom;
use portolan_net::Family;

use crate::description::Description;
use crate::limits::SOCKET_PATH_LENGTH_MAX;
use crate::topology::namespace;
use crate::{DIRECTORY_VARIABLE, LabError, Layout, Result};

/// The capabilities that are used, by their number in linux/capability.h.
const CAPABILITIES: [(u32, &str); 4] =
    [(21, "CAP_SYS_ADMIN"), (12, "CAP_NET_ADMIN"), (5, "CAP_KILL"), (13, "CAP_NET_RAW")];

/// Checks everything that can be known beforehand.
///
/// # Errors
/// With the first thing that is missing, and how to get it.
pub(crate) fn check(layout: &Layout, description: &Description) -> Result<()> {
    check_name(layout)?;
    check_paths(layout, description)?;
    check_rights()?;
    check_files()?;
    check_features(description)?;
    for member in description.topology.namespaces() {
        let name = layout.namespace(member);
        if namespace::path(&name).exists() {
            return Err(LabError::environment(
                format!("the network namespace `{name}` exists already, and lab `{}` would need it", layout.name()),
                format!("choose another --name, or remove it with `ip netns del {name}`"),
            ));
        }
    }
    Ok(())
}

pub(crate) fn check_name(layout: &Layout) -> Result<()> {
    if layout.directory().exists() {
        let name = layout.name();
        return Err(LabError::environment(
            format!("a lab named `{name}` is up already"),
            format!("choose another --name, or take it down with `portolan lab down --name {name}`"),
        ));
    }
    Ok(())
}

fn check_paths(layout: &Layout, description: &Description) -> Result<()> {
    let nodes = description.topology.nodes.iter().map(|node| node.name.as_str());
    let longest = layout.longest_socket(nodes);
    let length = longest.as_os_str().len();
    if length <= SOCKET_PATH_LENGTH_MAX {
        return Ok(());
    }
    Err(LabError::environment(
        format!("{} has {length} bytes, and a socket's path at most {SOCKET_PATH_LENGTH_MAX}", longest.display()),
        format!("choose a shorter --name, or a shorter directory in {DIRECTORY_VARIABLE}"),
    ))
}

fn check_rights() -> Result<()> {
    if !geteuid().is_root() {
        return Err(LabError::environment(
            "a lab needs root: it makes network namespaces",
            "run the command with sudo",
        ));
    }
    let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    for (number, name) in CAPABILITIES {
        if !has_capability(&status, number) {
            return Err(LabError::environment(
                format!("this process lacks the capability {name}"),
                "run on the machine itself or in a privileged container (`--privileged`)",
            ));
        }
    }
    Ok(())
}

fn has_capability(status: &str, number: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).is_some_and(|set| set >> number & 1 == 1)
}

fn check_files() -> Result<()> {
    for file in ["/etc/resolv.conf", "/etc/hosts"] {
        if !Path::new(file).exists() {
            return Err(LabError::environment(
                format!("{file} does not exist, so a pod's own cannot be mounted over it"),
                format!("create it: `touch {file}`"),
            ));
        }
    }
    Ok(())
}

/// Tries what the lab will make, in a namespace that is gone afterwards.
fn check_features(description: &Description) -> Result<()> {
    let mut links = vec![
        ("bridge", "link add name trial0 type bridge"),
        ("veth", "link add name trial1 type veth peer name trial2"),
    ];
    let beyond = description.fabric_options.get("hostGw").and_then(|section| section.get("beyond"));
    let uses = |fabric: &str| description.fabric == fabric || beyond.is_some_and(|beyond| beyond == fabric);
    if uses("vxlan") {
        links.push(("vxlan", "link add name trial3 type vxlan id 1 dstport 8472"));
    }
    if uses("ipip") && description.ip_families.has(Family::V4) {
        links.push(("ipip", "link add name trial4 type ipip local 192.0.2.1"));
    }
    if uses("ipip") && description.ip_families.has(Family::V6) {
        links.push(("ip6_tunnel", "link add name trial5 type ip6tnl local fd00::1"));
    }
    let batch = links.iter().map(|(_, line)| *line).collect::<Vec<_>>().join("\n");
    let (ok, said) = std::thread::scope(|scope| {
        scope.spawn(|| try_batch(&batch)).join().unwrap_or_else(|_| Err(anyhow::anyhow!("the trial panicked").into()))
    })?;
    if ok {
        return Ok(());
    }
    // `ip` names the line that failed: "Command failed -:2".
    let line = said.rsplit_once("-:").and_then(|(_, number)| number.trim().parse::<usize>().ok()).unwrap_or(1);
    let feature = links.get(line.saturating_sub(1)).map_or("link", |(feature, _)| feature);
    Err(LabError::environment(
        format!("this kernel makes no interface of type {feature}: {}", said.lines().next().unwrap_or_default()),
        format!("load its module: `modprobe {feature}`"),
    ))
}

fn try_batch(batch: &str) -> Result<(bool, String)> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| {
        LabError::environment(
            format!("the kernel gives no network namespace: {error}"),
            "run on the machine itself or in a privileged container (`--privileged`)",
        )
    })?;
    NftablesRoom::open().map_err(|error| {
        LabError::environment(
            format!("this kernel lacks what the Service rules need: {error}"),
            "load its module: `modprobe nf_tables`",
        )
    })?;
    let spawned = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    // Without iproute2 nothing is known beforehand; the lab itself does without it.
    let Ok(mut child) = spawned else { return Ok((true, String::new())) };
    if let Some(mut input) = child.stdin.take() {
        // A child that ended early says why on its standard error.
        let _ = input.write_all(batch.as_bytes());
    }
    let output = child.wait_with_output().context("waiting for `ip`")?;
    Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_status() {
        let status = "Name:\tx\nCapEff:\t0000000000200000\n";
        assert!(has_capability(status, 21));
        assert!(!has_capability(status, 12));
        assert!(!has_capability("", 12));
    }
}
