//! A client that opens connections one after the other, and the server that ends them.
#![expect(clippy::print_stdout, reason = "what runs inside a namespace answers by its output")]

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

/// Connections to each target whose opening is timed.
pub(super) const ROUNDS: usize = 2000;
const WARM_UP: usize = 100;

/// How long connections are counted; in turns, so that a busy machine slows all targets.
const TURNS: u32 = 5;
const TURN: Duration = Duration::from_millis(300);

/// What the server says once it listens.
const LISTENING: &str = "listening";

/// What a target's connections cost.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speed {
    /// The time of `connect`, in the middle.
    pub(super) p50_us: f64,
    /// Connections opened and ended, one after the other.
    pub(super) per_second: f64,
}

/// Accepts connections, and ends each at once: the client's ports are free again.
pub(super) fn serve() -> anyhow::Result<()> {
    let listener = TcpListener::bind("0.0.0.0:8080")?;
    println!("{LISTENING}");
    for stream in listener.incoming() {
        drop(stream);
    }
    Ok(())
}

/// Waits until the server listens.
pub(super) fn await_server(child: &mut Child) -> anyhow::Result<()> {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().context("the server has no output")?).read_line(&mut line)?;
    ensure!(line.trim() == LISTENING, "the server does not listen");
    Ok(())
}

/// Measures all targets by turns, and prints what came of it. A target is one address, or several that take turns.
pub(super) fn inside(rounds: usize, targets: &[&str]) -> anyhow::Result<()> {
    let mut targets: Vec<Target> = targets.iter().map(|text| Target::parse(text)).collect::<anyhow::Result<_>>()?;
    for round in 0..WARM_UP + rounds {
        for target in &mut targets {
            let time = target.open()?;
            if round >= WARM_UP {
                target.times.push(time);
            }
        }
    }
    for _ in 0..TURNS {
        for target in &mut targets {
            let begin = Instant::now();
            while begin.elapsed() < TURN {
                target.open()?;
                target.count += 1;
            }
        }
    }
    let seconds = (TURN * TURNS).as_secs_f64();
    let speed = |target: &mut Target| {
        target.times.sort_unstable();
        let middle = target.times.get(target.times.len() / 2).copied().unwrap_or_default();
        json!({"p50_us": middle.as_secs_f64() * 1e6, "per_second": f64::from(target.count) / seconds})
    };
    println!("{}", targets.iter_mut().map(speed).collect::<Value>());
    Ok(())
}

/// What a client connects to, and what that cost.
struct Target {
    addresses: Vec<SocketAddr>,
    next: usize,
    times: Vec<Duration>,
    count: u32,
}

impl Target {
    fn parse(text: &str) -> anyhow::Result<Target> {
        let addresses = text.split(',').map(str::parse).collect::<Result<_, _>>()?;
        Ok(Target { addresses, next: 0, times: Vec::new(), count: 0 })
    }

    /// Opens a connection and waits for its end; returns how long the opening took.
    fn open(&mut self) -> anyhow::Result<Duration> {
        let address = self.addresses.get(self.next % self.addresses.len()).context("no address")?;
        self.next += 1;
        let begin = Instant::now();
        let mut stream = TcpStream::connect(address).with_context(|| format!("no connection to {address}"))?;
        let time = begin.elapsed();
        // The server ends it, with or without a reset.
        let _ = stream.read(&mut [0; 1]);
        Ok(time)
    }
}

/// Reads what [`inside`] printed.
pub(super) fn read(text: &str) -> anyhow::Result<Vec<Speed>> {
    let values: Vec<Value> = serde_json::from_str(text)?;
    let speed = |value: &Value| {
        let get = |name: &str| value[name].as_f64().with_context(|| format!("no {name}"));
        Ok(Speed { p50_us: get("p50_us")?, per_second: get("per_second")? })
    };
    values.iter().map(speed).collect()
}
