//! Measures queries per second for the A record of a cluster IP over UDP on loopback.
//!
//! `flood [QUERIES] [CLIENTS]`: so many queries in all (at most a million), from so many sockets,
//! each with a few queries on the way at a time; it ends after ten seconds at the latest.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use portolan_dns::wire::{Question, RecordType, encode_query};
use portolan_dns::{Config, Server};
use portolan_net::{ObjectKey, ObjectKind};
use portolan_state::{Change, Namespace, Object, Service, ServiceType, Writer};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::timeout;

/// Queries on the way at a time, of each client.
const WINDOW: usize = 32;
const QUERIES_MAX: u64 = 1_000_000;
const TIME_MAX: Duration = Duration::from_secs(10);
/// Services in the tables.
const SERVICES: u32 = 10_000;

fn tables() -> Writer {
    let mut writer = Writer::new();
    let namespace = Object::Namespace(Namespace { name: "default".into() });
    let service = |index: u32| {
        Object::Service(Service {
            key: ObjectKey::new("default", format!("service-{index}")),
            service_type: ServiceType::ClusterIp,
            cluster_addresses: vec![std::net::Ipv4Addr::from(0x0a60_0000 + index).into()],
            headless: false,
            ports: Vec::new(),
            publish_not_ready: false,
            traffic: portolan_state::ServiceTraffic::default(),
        })
    };
    let services = (0..SERVICES).map(|index| (service(index), Vec::new())).collect();
    writer.apply(Change::Replace(ObjectKind::Namespace, vec![(namespace, Vec::new())], Vec::new()));
    writer.apply(Change::Replace(ObjectKind::Service, services, Vec::new()));
    writer.apply(Change::Replace(ObjectKind::EndpointSlice, Vec::new(), Vec::new()));
    writer
}

/// Takes a window out of what is left.
fn take(left: &AtomicU64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |it| it.checked_sub(WINDOW as u64)).is_ok()
}

async fn flood(server: SocketAddr, left: Arc<AtomicU64>, query: Vec<u8>) -> Result<u64, std::io::Error> {
    let socket = UdpSocket::bind("127.0.0.1:0").await?;
    socket.connect(server).await?;
    let mut bytes = vec![0; 1500];
    let mut answered = 0;
    let end = Instant::now() + TIME_MAX;
    while take(&left) && Instant::now() < end {
        for _ in 0..WINDOW {
            socket.send(&query).await?;
        }
        for _ in 0..WINDOW {
            // A lost answer is left out of the count, and ends the window.
            match timeout(Duration::from_millis(200), socket.recv(&mut bytes)).await {
                Ok(received) => answered += u64::from(received? > 12 && bytes[3].is_multiple_of(16)),
                Err(_) => break,
            }
        }
    }
    Ok(answered)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let queries = arguments.next().map_or(Ok(200_000), |it| it.parse::<u64>())?.min(QUERIES_MAX);
    let clients = arguments.next().map_or(Ok(2), |it| it.parse::<u64>())?.clamp(1, 64);
    let (_tables, receiver) = watch::channel(tables().take().0);
    let config = Config { listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))], ..Config::default() };
    let server = Server::bind(config, receiver).await?;
    let (address, metrics) = (server.addresses()[0], server.metrics());
    tokio::spawn(server.run(std::future::pending()));
    let question = Question {
        name: "service-4711.default.svc.cluster.local".parse()?,
        record_type: RecordType::A,
        dnssec_ok: false,
        checking_disabled: false,
    };
    let query = encode_query(1, &question).ok_or("the name is too long")?;
    let left = Arc::new(AtomicU64::new(queries));
    let started = Instant::now();
    let tasks: Vec<_> = (0..clients).map(|_| tokio::spawn(flood(address, left.clone(), query.clone()))).collect();
    let mut answered = 0;
    for task in tasks {
        answered += task.await??;
    }
    let seconds = started.elapsed().as_secs_f64();
    let sum = metrics.samples().into_iter().find(|it| it.name == "coredns_dns_request_duration_seconds_sum");
    let answers = f64::from(u32::try_from(answered)?);
    let microseconds = sum.map_or(0.0, |sum| sum.value * 1e6 / answers.max(1.0));
    let rate = answers / seconds;
    writeln!(
        std::io::stdout(),
        "{answered} answers in {seconds:.2} s: {rate:.0} queries/s, {microseconds:.1} µs of the server's time each"
    )?;
    Ok(())
}
