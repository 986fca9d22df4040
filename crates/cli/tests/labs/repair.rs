//! What others damage is mended at once; what is theirs is left alone.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use crate::common::{CART, Done, PROGRAM, TestLab, has, within_time};
use crate::traffic::{Kind, Stream};

/// How long a repair may take: far less than the 90 s after which the kernel is read anyway. It takes
/// some milliseconds, but the machine that runs the tests may be very busy.
const REPAIR_TIME_MAX: Duration = Duration::from_secs(20);

/// A damage, how it shows in the kernel, and that it is gone again.
struct Damage {
    what: &'static str,
    harm: String,
    /// Prints what must be as it was.
    look: String,
}

fn damage(what: &'static str, harm: impl Into<String>, look: impl Into<String>) -> Damage {
    Damage { what, harm: harm.into(), look: look.into() }
}

#[test]
fn damage_by_others_is_mended_at_once() {
    let Some(lab) = TestLab::new() else { return };
    if !has("nft", "nftables") {
        return;
    }
    lab.up(CART, &["--nodes", "2", "--ip-family", "dual"]);
    let (pod, other) = (lab.pod_on("node-1", "cart"), lab.pod_on("node-2", "cart"));
    let veth = &pod.host_interface;
    let fdb = "bridge fdb show dev flannel.1 | grep 192.168.64.12 | sort";
    let neighbours = "ip neigh show dev flannel.1 nud permanent | sort";
    // Without order: tables stand in the order of their making, elements in that of their hashes.
    let ruleset = "nft list ruleset | sed 's/counter packets [0-9]* bytes [0-9]*//; s/elements = {//; s/}$//' \
                   | tr ',' '\\n' | tr -d ' \\t' | sort";
    let damages = [
        damage("a route", "ip route del 10.42.1.0/24 || ip route del 10.42.0.0/24 via 10.42.0.0", routes(4)),
        damage("an IPv6 route", "ip -6 route flush proto 144", routes(6)),
        damage(
            "an FDB entry",
            "bridge fdb del $(bridge fdb show dev flannel.1 | grep -o -m 1 '^[0-9a-f:]*') dev flannel.1 dst 192.168.64.12",
            fdb,
        ),
        damage("all neighbours", "ip neigh flush dev flannel.1 nud permanent", neighbours),
        damage("a table", "nft delete table ip portolan-services", ruleset),
        damage("a table's rules", "nft flush table ip6 portolan-services", ruleset),
        damage("every table", "nft flush ruleset", ruleset),
        damage("the tunnel", "ip link del flannel.1", format!("{}; {}; {fdb}; {neighbours}", routes(4), routes(6))),
        damage("a down tunnel", "ip link set flannel.1 down", format!("{}; {}", routes(4), routes(6))),
        damage(
            "a bridge port",
            format!("ip link set {veth} nomaster"),
            format!("ip -o link show {veth} | grep -o 'master cni0'"),
        ),
        damage(
            "a down interface",
            format!("ip link set {veth} down"),
            format!("ip -o link show {veth} | grep -o 'state UP'"),
        ),
        damage(
            "a pod's interface",
            format!("ip link del {veth}"),
            format!("ip -o link show {veth} | grep -o 'master cni0'"),
        ),
        damage(
            "the bridge's addresses",
            "ip addr flush dev cni0",
            "ip -o addr show dev cni0 scope global | awk '{print $4}'",
        ),
        damage(
            "a down bridge",
            "ip link set cni0 down",
            format!("ip -o link show cni0 | grep -o ',UP'; {}", routes(4)),
        ),
        damage(
            "the bridge",
            "ip link del cni0",
            format!("ip -o link show {veth} | grep -o 'master cni0'; {}", routes(4)),
        ),
    ];
    for Damage { what, harm, look } in &damages {
        let before = lab.shell("node-1", look);
        assert!(!before.is_empty(), "{what}: {look}");
        lab.shell("node-1", harm);
        within_time(what, REPAIR_TIME_MAX, || lab.try_shell("node-1", look).stdout == before);
        within_time(what, REPAIR_TIME_MAX, || lab.ask("plan", &["--node", "node-1"]).code == 0);
        for address in other.addresses.iter().copied().chain(lab.service("cart")) {
            let stream = Stream::start(Kind::Connections, &pod.network, SocketAddr::new(address, 7070));
            stream.await_more(3);
            drop(stream);
        }
    }
}

/// Prints our routes of a family.
fn routes(family: u8) -> String {
    format!("ip -{family} route show table all proto 144 | sort")
}

/// Makes things of other software on a node, of every sort that is ours too.
const FOREIGN: &str = "
ip link add other0 type bridge
ip link add other1 type veth peer name other2
ip link set other1 master other0
ip link set other0 up
ip addr add 172.31.0.1/24 dev other0
ip -6 addr add fd00:31::1/64 dev other0 nodad
ip route add 203.0.113.0/24 via 192.168.64.1 proto static
ip -6 route add 2001:db8:1::/48 dev other0 proto static
ip route add 198.51.100.0/24 dev other0 table 77
ip rule add from 172.31.0.0/24 table 77
ip neigh add 172.31.0.9 lladdr 02:00:00:00:00:09 dev other0 nud permanent
bridge fdb add 02:00:00:00:00:0a dev other1 master
nft add table inet other
nft add chain inet other input '{ type filter hook input priority 5; }'
nft add rule inet other input tcp dport 9999 counter drop
nft add table ip portolanish
ip link add veth0123abcd type veth peer name other3
";

/// Prints what `FOREIGN` made.
const FOREIGN_SHOWN: &str = "
for link in other0 other1 other2 other3 veth0123abcd; do ip -o link show $link | cut -d ' ' -f 1-3; done
ip -o addr show dev other0 scope global
ip route show 203.0.113.0/24; ip -6 route show 2001:db8:1::/48; ip route show table 77; ip rule show
ip neigh show dev other0 nud permanent; bridge fdb show br other0 | grep 02:00:00:00:00:0a
nft list table inet other; nft list table ip portolanish
";

#[test]
fn what_others_own_survives_a_restart_and_clean_removes_only_what_is_ours() {
    let Some(lab) = TestLab::new() else { return };
    if !has("nft", "nftables") {
        return;
    }
    lab.up(CART, &["--nodes", "2", "--ip-family", "dual"]);
    let links = lab.shell("node-1", "ip -o link show");
    assert!(links.contains("flannel.1") && links.contains("cni0") && links.contains("veth"), "{links}");
    lab.shell("node-1", FOREIGN);
    let foreign = lab.shell("node-1", FOREIGN_SHOWN);
    assert_eq!(foreign.lines().count(), 24, "{foreign}");

    let killed = lab.kill_agent("node-1");
    lab.await_agent_after("node-1", killed);
    within_time("nothing is to change", REPAIR_TIME_MAX, || lab.ask("plan", &[]).code == 0);
    assert_eq!(lab.shell("node-1", FOREIGN_SHOWN), foreign);

    // While an agent runs, it would make everything again.
    let configuration = lab.node_directory("node-1").join("agent.yaml");
    let clean = || {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", lab.namespace("node-1").display()));
        Done::of(command.args([PROGRAM, "clean", "--config"]).arg(&configuration))
    };
    let refused = clean();
    assert_eq!(refused.code, 3, "{}{}", refused.stdout, refused.stderr);
    assert!(refused.stderr.contains("agent.sock"), "{}", refused.stderr);

    // The agents end with the supervisor, and are not started again.
    lab.crash();
    let cleaned = clean();
    assert_eq!(cleaned.code, 0, "{}{}", cleaned.stdout, cleaned.stderr);
    assert!(cleaned.stdout.contains("flannel.1"), "{}", cleaned.stdout);
    assert_eq!(lab.shell("node-1", FOREIGN_SHOWN), foreign);

    let mut names: Vec<String> = lab
        .shell("node-1", "ip -o link show")
        .lines()
        .filter_map(|line| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned()))
        .collect();
    names.sort();
    assert_eq!(names, ["eth0", "lo", "other0", "other1", "other2", "other3", "veth0123abcd"]);
    assert_eq!(lab.shell("node-1", "nft list tables"), "table inet other\ntable ip portolanish\n");
    assert_eq!(lab.shell("node-1", "ip -4 route show table all proto 144; ip -6 route show table all proto 144"), "");
    assert_eq!(lab.shell("node-1", "ls /proc/sys/net/ipv4/conf | grep -c cni0 || true"), "0\n");
    let again = clean();
    assert_eq!((again.code, again.stdout.as_str()), (0, ""), "{}", again.stderr);
}
