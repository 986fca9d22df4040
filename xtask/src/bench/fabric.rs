//! The fabric's ways from node to node: TCP in one stream, and datagrams of 64 bytes, between two network namespaces.
//!
//! Each way is built by itself, measured, and taken down, by turns: a bare veth pair; VXLAN made by hand with `ip`; our
//! `udp` forwarder; and a plain forwarder of one packet a call, as Flannel's, which is the peer of the `udp` rows. It
//! needs iperf3.

use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use super::machine::{Built, NetworkNamespace, output};
use super::report::{Goal, Row};

/// Each way is measured so often; the median counts.
const ROUNDS: usize = 3;
/// How long each measurement takes, in seconds.
const SECONDS: &str = "4";
/// How long datagrams are sent: the receiver warms up for a second first.
const FLOOD_SECONDS: &str = "6";
/// Bytes of payload of a datagram.
const DATAGRAM: &str = "64";
/// No device and no server takes longer to come.
const PATIENCE: Duration = Duration::from_secs(5);

const NAMES: [&str; 2] = ["portolan-bench-fabric-a", "portolan-bench-fabric-b"];
/// The ends of the underlay, and what the ways connect.
const UNDERLAY: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
const INSIDE: [&str; 2] = ["10.42.1.0", "10.42.2.0"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Veth,
    Vxlan,
    Udp,
    Plain,
}

const WAYS: [Way; 4] = [Way::Veth, Way::Vxlan, Way::Udp, Way::Plain];

/// What one way carried: bits and datagrams a second, and what a datagram cost its forwarders.
#[derive(Debug, Clone, Copy, Default)]
struct Figures {
    bits: f64,
    datagrams: f64,
    /// Microseconds of processor time of both forwarders for each datagram that came.
    cost: f64,
}

pub(super) fn run(built: &Built) -> anyhow::Result<Vec<Row>> {
    let program = built.portolan.parent().context("a directory")?.join("examples/udp_forwarder");
    let mut figures: [Vec<Figures>; WAYS.len()] = Default::default();
    for _ in 0..ROUNDS {
        for (way, figures) in WAYS.into_iter().zip(&mut figures) {
            let world = World::create(way, &program).with_context(|| format!("building the way {way:?}"))?;
            let measured = world.measure().with_context(|| format!("measuring the way {way:?}"))?;
            super::report::progress(&format!("{way:?}: {measured:?}"));
            figures.push(measured);
        }
    }
    let [veth, vxlan, udp, plain] = figures.map(|figures| Figures {
        bits: median(figures.iter().map(|it| it.bits)),
        datagrams: median(figures.iter().map(|it| it.datagrams)),
        cost: median(figures.iter().map(|it| it.cost)),
    });
    let tcp = |what: &str, ours: Figures, peer: Figures| {
        Row::new(format!("TCP, one stream: {what}"), ours.bits / 1e9, "Gbit/s").beside(peer.bits / 1e9)
    };
    let small = |what: &str, ours: Figures, peer: Figures| {
        Row::new(format!("UDP, 64 bytes: {what}"), ours.datagrams / 1e3, "kpps").beside(peer.datagrams / 1e3)
    };
    Ok(vec![
        tcp("VXLAN by hand, beside bare veth", vxlan, veth),
        tcp("udp, beside VXLAN by hand", udp, vxlan).goal(Goal::AtLeastOfPeer(0.5)),
        tcp("udp, beside one packet a call", udp, plain),
        small("VXLAN by hand, beside bare veth", vxlan, veth),
        small("udp, beside VXLAN by hand", udp, vxlan),
        small("udp, beside one packet a call", udp, plain).goal(Goal::AtLeastOfPeer(2.0)),
        Row::new("UDP, 64 bytes: processor time of both forwarders, udp beside one packet a call", udp.cost, "µs")
            .beside(plain.cost)
            .goal(Goal::OfPeer(0.5)),
    ])
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// Two namespaces and the way between them.
struct World {
    nodes: [NetworkNamespace; 2],
    program: PathBuf,
    /// They end when their input is closed, or are killed.
    forwarders: Vec<Running>,
}

/// A process that ends with this value.
struct Running {
    child: Child,
    _input: Option<ChildStdin>,
}

impl Running {
    fn start(command: &mut Command) -> anyhow::Result<Running> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let input = child.stdin.take();
        Ok(Running { child, _input: input })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl World {
    fn create(way: Way, program: &Path) -> anyhow::Result<World> {
        let nodes = [NetworkNamespace::create(NAMES[0])?, NetworkNamespace::create(NAMES[1])?];
        let mut world = World { nodes, program: program.to_owned(), forwarders: Vec::new() };
        world.ip(0, &format!("link add eth0 type veth peer name eth0 netns {}", NAMES[1]))?;
        for index in [0, 1] {
            world.ip(index, "link set lo up")?;
            world.ip(index, &format!("address add {}/24 dev eth0", UNDERLAY[index]))?;
            world.ip(index, "link set eth0 up")?;
        }
        for index in [0, 1] {
            world.make(way, index)?;
        }
        Ok(world)
    }

    fn make(&mut self, way: Way, index: usize) -> anyhow::Result<()> {
        let (own, other) = (index, 1 - index);
        let address = format!("{}/32", INSIDE[own]);
        match way {
            Way::Veth => {
                self.ip(index, &format!("address add {address} dev eth0"))?;
                return self.ip(index, &format!("route add {}/24 via {}", INSIDE[other], UNDERLAY[other]));
            }
            Way::Vxlan => {
                let remote = format!("remote {} local {}", UNDERLAY[other], UNDERLAY[own]);
                self.ip(index, &format!("link add tunnel type vxlan id 1 dstport 8472 {remote} dev eth0"))?;
                self.ip(index, "link set tunnel mtu 1450 up")?;
            }
            Way::Udp | Way::Plain => {
                let which = if way == Way::Udp { "ours" } else { "plain" };
                let mut command = self.nodes[index].command(&self.program);
                command.args([which, "tunnel", &format!("{}:8285", UNDERLAY[own])]);
                command.arg(format!("{}/24={}:8285", INSIDE[other], UNDERLAY[other]));
                self.forwarders.push(Running::start(&mut command)?);
                until("the device", || self.ip(index, "link show tunnel").is_ok())?;
                self.ip(index, "link set tunnel mtu 1472 up")?;
            }
        }
        self.ip(index, &format!("address add {address} dev tunnel"))?;
        self.ip(index, "route add 10.42.0.0/16 dev tunnel")
    }

    fn ip(&self, index: usize, arguments: &str) -> anyhow::Result<()> {
        output(self.nodes[index].command(Path::new("ip")).args(arguments.split_whitespace())).map(drop)
    }

    fn measure(&self) -> anyhow::Result<Figures> {
        let bits = self.tcp()?;
        let before = self.processor_time();
        let (datagrams, total) = self.datagrams()?;
        let cost = (self.processor_time() - before) * 1e6 / total.max(1.0);
        Ok(Figures { bits, datagrams, cost })
    }

    fn tcp(&self) -> anyhow::Result<f64> {
        let iperf = Path::new("iperf3");
        let _server = Running::start(self.nodes[1].command(iperf).args(["-s", "-B", INSIDE[1]]))?;
        until("iperf3", || self.is_listening())?;
        let mut client = self.nodes[0].command(iperf);
        client.args(["-c", INSIDE[1], "-B", INSIDE[0], "-t", SECONDS, "-O", "1", "-J"]);
        let printed: Value = serde_json::from_str(&output(&mut client)?)?;
        printed["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 prints no rate")
    }

    fn is_listening(&self) -> bool {
        let found = output(self.nodes[1].command(Path::new("ss")).args(["-Hltn", "sport = :5201"]));
        found.is_ok_and(|text| !text.trim().is_empty())
    }

    /// Seconds that the forwarders ran so far.
    fn processor_time(&self) -> f64 {
        let of = |running: &Running| {
            let text = std::fs::read_to_string(format!("/proc/{}/stat", running.child.id())).unwrap_or_default();
            // proc_pid_stat(5): the name, which may hold anything, ends with the last parenthesis; user and system time
            // are the 12th and 13th after it, in hundredths of a second.
            let fields = text.rsplit_once(')').map(|(_, fields)| fields).unwrap_or_default();
            fields.split_whitespace().skip(11).take(2).filter_map(|it| it.parse::<f64>().ok()).sum::<f64>() / 100.0
        };
        self.forwarders.iter().map(of).sum()
    }

    /// How many datagrams came in a second, and in all.
    fn datagrams(&self) -> anyhow::Result<(f64, f64)> {
        let to = format!("{}:9000", INSIDE[1]);
        let sink = self.nodes[1].command(&self.program).args(["sink", &to, SECONDS]).stdout(Stdio::piped()).spawn()?;
        let _flood =
            Running::start(self.nodes[0].command(&self.program).args(["flood", &to, DATAGRAM, FLOOD_SECONDS]))?;
        let printed = sink.wait_with_output()?;
        let text = String::from_utf8_lossy(&printed.stdout);
        let figures =
            text.trim().split_once(' ').and_then(|(rate, total)| Some((rate.parse().ok()?, total.parse().ok()?)));
        figures.with_context(|| format!("the sink printed `{}`", text.trim()))
    }
}

fn until(what: &str, mut is_there: impl FnMut() -> bool) -> anyhow::Result<()> {
    let begin = Instant::now();
    while !is_there() {
        if begin.elapsed() > PATIENCE {
            bail!("{what} did not come");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
