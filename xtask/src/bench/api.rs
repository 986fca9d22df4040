//! The embedded API server: how fast Services are created, the first thousand and the tenth.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use serde_json::json;

use super::machine::{Built, Scratch};
use super::report::{Goal, Row};

const SERVICES: u32 = 10_000;
const PART: u32 = 1000;
const PATIENCE: Duration = Duration::from_secs(20);

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn run(built: &Built) -> anyhow::Result<Vec<Row>> {
    let scratch = Scratch::create("api")?;
    let socket = scratch.0.join("api.sock");
    let log = fs::File::create(scratch.0.join("log"))?;
    let child = Command::new(&built.portolan)
        .arg("apiserver")
        .arg("--socket")
        .arg(&socket)
        .arg("--data-directory")
        .arg(scratch.0.join("data"))
        .args(["--listen", "127.0.0.1:0"])
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?;
    let mut server = Server(child);
    let begin = Instant::now();
    let stream = loop {
        if let Ok(stream) = UnixStream::connect(&socket) {
            break stream;
        }
        if server.0.try_wait()?.is_some() || begin.elapsed() > PATIENCE {
            bail!("the API server does not start: {}", fs::read_to_string(scratch.0.join("log")).unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut connection = BufReader::new(stream);
    let mut rates = Vec::new();
    for part in 0..SERVICES / PART {
        let begin = Instant::now();
        for index in part * PART..(part + 1) * PART {
            create(&mut connection, index)?;
        }
        rates.push(f64::from(PART) / begin.elapsed().as_secs_f64());
    }
    let row = |what: &str, rate: Option<&f64>| {
        Row::new(format!("API server, Services created per second, {what}"), rate.copied().unwrap_or(0.0), "/s")
            .goal(Goal::Above(1000.0))
    };
    Ok(vec![row("the first 1,000", rates.first()), row("from 9,000 to 10,000", rates.last())])
}

fn create(connection: &mut BufReader<UnixStream>, index: u32) -> anyhow::Result<()> {
    let body = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("service-{index}"), "namespace": "default"},
        "spec": {"selector": {"app": format!("service-{index}")}, "ports": [{"port": 80}]},
    })
    .to_string();
    write!(
        connection.get_mut(),
        "POST /api/v1/namespaces/default/services HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut status = String::new();
    connection.read_line(&mut status)?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        connection.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    let mut answer = vec![0; length];
    connection.read_exact(&mut answer)?;
    ensure!(status.contains(" 201 "), "Service {index}: {} {}", status.trim(), String::from_utf8_lossy(&answer));
    Ok(())
}
