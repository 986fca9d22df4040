//! Parts of the benchmark of the `udp` fabric, each a process in a network namespace.
//!
//! ```text
//!  udp_forwarder ours DEVICE LOCAL PREFIX=PEER    our forwarder, until it is killed
//!  udp_forwarder plain DEVICE LOCAL PREFIX=PEER   one packet a call, as Flannel's
//!  udp_forwarder flood TO BYTES SECONDS           one datagram a call, as fast as it goes
//!  udp_forwarder sink LOCAL SECONDS               counts datagrams, prints how many came in a second, and how many in all
//! ```

#![expect(clippy::print_stdout, reason = "this is the measurement's output")]

#[path = "../tests/udp_packets/baseline.rs"]
mod baseline;

use std::error::Error;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use baseline::Baseline;
use nix::sys::socket::{setsockopt, sockopt};
use portolan_kernel::udp::UdpRoom;
use portolan_net::{IpNet, Origin};
use portolan_program::udp::{Program, Route, Tunnel, diff};

type Outcome = Result<(), Box<dyn Error>>;

/// Before it counts, in seconds: caches fill, and processors speed up.
const WARM_UP: Duration = Duration::from_secs(1);
/// Datagrams between two looks at the clock.
const BETWEEN_LOOKS: u32 = 64;
/// What the receiver holds that it did not read yet, in bytes.
const SINK_BUFFER_BYTES: usize = 16 << 20;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["ours", device, local, way] => ours(device, local.parse()?, way),
        ["plain", device, local, way] => plain(device, local.parse()?, way),
        ["flood", to, bytes, seconds] => flood(to.parse()?, bytes.parse()?, seconds.parse()?),
        ["sink", local, seconds] => sink(local.parse()?, seconds.parse()?),
        _ => Err("usage: udp_forwarder ours | plain | flood | sink …".into()),
    }
}

fn way(text: &str) -> Result<(IpNet, SocketAddr), Box<dyn Error>> {
    let (prefix, peer) = text.split_once('=').ok_or("a way is PREFIX=PEER")?;
    Ok((prefix.parse()?, peer.parse()?))
}

fn ours(device: &str, local: SocketAddr, text: &str) -> Outcome {
    let (prefix, peer) = way(text)?;
    let origin = || Origin::configuration("bench");
    let tunnel = Tunnel {
        device: device.to_owned(),
        local: vec![local.ip()],
        port: local.port().try_into()?,
        mtu: 1472,
        origin: origin(),
    };
    let routes = [(prefix, Route { peer, origin: origin() })].into_iter().collect();
    let mut room = UdpRoom::new();
    let desired = Program { tunnel: Some(tunnel), routes };
    let changes = diff(&room.observe(), &desired);
    if let Some((_, error)) = room.apply(&changes).failed.first() {
        return Err(error.to_string().into());
    }
    wait_for_end()?;
    println!("{:?}", room.counters());
    Ok(())
}

/// Until whoever started it closes its input, also by dying.
fn wait_for_end() -> std::io::Result<()> {
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).map(drop)
}

fn plain(device: &str, local: SocketAddr, text: &str) -> Outcome {
    let (prefix, peer) = way(text)?;
    let (IpNet::V4(prefix), SocketAddr::V4(peer)) = (prefix, peer) else { return Err("it knows IPv4 only".into()) };
    let mut plain = Baseline::open(device, local, vec![(prefix.network(), prefix.prefix_len(), peer)])?;
    static STOP: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(|| {
        let _ = wait_for_end();
        STOP.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    Ok(plain.run(&STOP)?)
}

fn flood(to: SocketAddr, bytes: usize, seconds: u64) -> Outcome {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(to)?;
    let datagram = vec![0x2a; bytes];
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        for _ in 0..BETWEEN_LOOKS {
            // What does not go is lost, as on any path.
            let _ = socket.send(&datagram);
        }
    }
    Ok(())
}

fn sink(local: SocketAddr, seconds: u64) -> Outcome {
    let socket = UdpSocket::bind(local)?;
    // What is measured is the way, and not how often the scheduler lets this process run.
    setsockopt(&socket, sockopt::RcvBufForce, &SINK_BUFFER_BYTES)?;
    let mut buffer = [0; 2048];
    socket.recv(&mut buffer)?;
    let warm = Instant::now() + WARM_UP;
    let mut before = 1u32;
    while Instant::now() < warm {
        socket.recv(&mut buffer)?;
        before += 1;
    }
    let begin = Instant::now();
    let end = begin + Duration::from_secs(seconds);
    let mut count = 0u32;
    while Instant::now() < end {
        for _ in 0..BETWEEN_LOOKS {
            socket.recv(&mut buffer)?;
        }
        count += BETWEEN_LOOKS;
    }
    println!("{:.0} {}", f64::from(count) / begin.elapsed().as_secs_f64(), before + count);
    Ok(())
}
