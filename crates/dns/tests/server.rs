//! The server on loopback, asked by `dig` and by hand.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "the helpers are part of the test")]

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use portolan_dns::{Config, Error, Server};
use portolan_net::{ObjectKey, ObjectKind, Port, Protocol};
use portolan_state::{
    Change, Endpoint, EndpointSlice, Namespace, Object, ObjectRef, Service, ServicePort, ServiceType, Snapshot, Writer,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// No answer takes as long.
const PATIENCE: Duration = Duration::from_secs(20);

struct Running {
    address: SocketAddr,
    tables: watch::Sender<Snapshot>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), Error>>,
}

async fn start(listen: &str, snapshot: Snapshot) -> Running {
    let (tables, receiver) = watch::channel(snapshot);
    let config = Config { listen: vec![listen.parse().unwrap()], ..Config::default() };
    let server = Server::bind(config, receiver).await.expect("a free port");
    let address = server.addresses()[0];
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(server.run(async move {
        let _ = stopped.await;
    }));
    Running { address, tables, stop, server }
}

fn service(name: &str, addresses: &[&str]) -> Object {
    Object::Service(Service {
        key: ObjectKey::new("default", name),
        service_type: ServiceType::ClusterIp,
        cluster_addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
        headless: addresses.is_empty(),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: Port::try_from(80u16).unwrap(),
            node_port: None,
        }],
        publish_not_ready: false,
        traffic: portolan_state::ServiceTraffic::default(),
    })
}

/// A Service `web`, and a headless one, `many`, with 200 endpoints.
fn cluster() -> Writer {
    let mut writer = Writer::new();
    let all = |objects: Vec<Object>| objects.into_iter().map(|object| (object, Vec::new())).collect::<Vec<_>>();
    let namespace = Object::Namespace(Namespace { name: "default".into() });
    writer.apply(Change::Replace(ObjectKind::Namespace, all(vec![namespace]), Vec::new()));
    let services = vec![service("web", &["10.96.0.10", "fd00:96::10"]), service("many", &[])];
    writer.apply(Change::Replace(ObjectKind::Service, all(services), Vec::new()));
    let endpoint = |index: u8| Endpoint {
        address: IpAddr::from([10, 42, 0, index]),
        ready: true,
        serving: true,
        terminating: false,
        node: None,
        hostname: None,
        hints: None,
    };
    let slice = Object::EndpointSlice(EndpointSlice {
        key: ObjectKey::new("default", "many-1"),
        service: ObjectKey::new("default", "many"),
        family: portolan_net::Family::V4,
        ports: Vec::new(),
        endpoints: (1..=200).map(endpoint).collect(),
        headless: false,
    });
    writer.apply(Change::Replace(ObjectKind::EndpointSlice, all(vec![slice]), Vec::new()));
    writer.apply(Change::Replace(ObjectKind::Pod, Vec::new(), Vec::new()));
    writer
}

fn query(name: &str, record_type: RecordType) -> Vec<u8> {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), record_type));
    message.to_vec().unwrap()
}

async fn ask_udp(server: SocketAddr, bytes: &[u8]) -> Message {
    let any = if server.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
    let socket = UdpSocket::bind(any).await.unwrap();
    socket.send_to(bytes, server).await.unwrap();
    let mut answer = vec![0; 4096];
    let length = timeout(PATIENCE, socket.recv(&mut answer)).await.expect("an answer in time").unwrap();
    Message::from_vec(&answer[..length]).expect("an answer that can be read")
}

/// `dig`'s short output, sorted; `None` where it is not installed.
async fn dig(server: SocketAddr, arguments: &[&str]) -> Option<Vec<String>> {
    let mut command = Command::new("dig");
    command.arg(format!("@{}", server.ip())).args(["-p", &server.port().to_string(), "+time=5", "+tries=1"]);
    command.args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().ok()?;
    let mut lines: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    Some(lines)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dig_agrees() {
    let running = start("127.0.0.1:0", cluster().take().0).await;
    let Some(answer) = dig(running.address, &["+short", "web.default.svc.cluster.local", "A"]).await else {
        println!("skipped: `dig` is not installed (package dnsutils)");
        return;
    };
    assert_eq!(answer, ["10.96.0.10"]);
    let ask = async |arguments: &[&str]| dig(running.address, arguments).await.unwrap_or_default();
    assert_eq!(ask(&["+short", "web.default.svc.cluster.local", "AAAA"]).await, ["fd00:96::10"]);
    assert_eq!(ask(&["+short", "+tcp", "web.default.svc.cluster.local", "A"]).await, ["10.96.0.10"]);
    assert_eq!(ask(&["+short", "-x", "fd00:96::10"]).await, ["web.default.svc.cluster.local."]);
    let ports = ask(&["+short", "_http._tcp.web.default.svc.cluster.local", "SRV"]).await;
    assert_eq!(ports, ["0 100 80 web.default.svc.cluster.local."]);
    assert_eq!(ask(&["+short", "dns-version.cluster.local", "TXT"]).await, ["\"1.1.0\""]);
    // 200 addresses do not fit: dig asks again over TCP by itself.
    assert_eq!(ask(&["+short", "many.default.svc.cluster.local", "A"]).await.len(), 200);
    let whole = async |arguments: &[&str]| ask(arguments).await.join("\n");
    let denial = whole(&["none.default.svc.cluster.local", "A"]).await;
    assert!(denial.contains("status: NXDOMAIN") && denial.contains("SOA\tns.dns.cluster.local."), "{denial}");
    assert!(denial.contains("flags: qr aa rd ra;"), "{denial}");
    let empty = whole(&["default.svc.cluster.local", "A"]).await;
    assert!(empty.contains("status: NOERROR") && empty.contains("ANSWER: 0, AUTHORITY: 1"), "{empty}");
    let cut = whole(&["+ignore", "+noedns", "many.default.svc.cluster.local", "A"]).await;
    assert!(cut.contains("flags: qr aa tc rd ra;"), "{cut}");
    for (arguments, status) in [
        (&["example.org", "A"][..], "REFUSED"),
        (&["version.bind", "CH", "TXT"][..], "REFUSED"),
        (&["+opcode=NOTIFY", "cluster.local", "SOA"][..], "NOTIMP"),
        (&["+edns=1", "+noednsneg", "cluster.local", "SOA"][..], "BADVERS"),
    ] {
        let answer = whole(arguments).await;
        assert!(answer.contains(&format!("status: {status}")), "{arguments:?} {answer}");
    }
}

#[tokio::test]
async fn answers_follow_the_tables() {
    let mut writer = cluster();
    let running = start("127.0.0.1:0", writer.take().0).await;
    let asked = query("web.default.svc.cluster.local.", RecordType::A);
    assert_eq!(ask_udp(running.address, &asked).await.answers.len(), 1);
    writer.apply(Change::Delete(ObjectRef::Service(ObjectKey::new("default", "web"))));
    running.tables.send_replace(writer.take().0);
    let follows = async {
        while !ask_udp(running.address, &asked).await.answers.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, follows).await.expect("the server follows the tables");
    running.stop.send(()).unwrap();
    timeout(PATIENCE, running.server).await.expect("the server stops").unwrap().unwrap();
    // Its sockets are free at once.
    start(&running.address.to_string(), Snapshot::default()).await;
}

#[tokio::test]
async fn ipv6_is_answered() {
    if UdpSocket::bind("[::1]:0").await.is_err() {
        println!("skipped: this machine has no ::1");
        return;
    }
    let running = start("[::1]:0", cluster().take().0).await;
    let answer = ask_udp(running.address, &query("web.default.svc.cluster.local.", RecordType::AAAA)).await;
    assert_eq!(answer.answers.len(), 1);
}

#[tokio::test]
async fn one_connection_carries_several_queries() {
    let running = start("127.0.0.1:0", cluster().take().0).await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    for record_type in [RecordType::A, RecordType::AAAA] {
        let bytes = query("web.default.svc.cluster.local.", record_type);
        // Byte by byte: framing does not depend on segments.
        for byte in (bytes.len() as u16).to_be_bytes().into_iter().chain(bytes) {
            stream.write_all(&[byte]).await.unwrap();
        }
        let length = timeout(PATIENCE, stream.read_u16()).await.unwrap().unwrap();
        let mut answer = vec![0; usize::from(length)];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(Message::from_vec(&answer).unwrap().answers[0].record_type(), record_type);
    }
}

#[tokio::test]
async fn addresses_of_a_headless_service_are_spread() {
    let running = start("127.0.0.1:0", cluster().take().0).await;
    let asked = query("many.default.svc.cluster.local.", RecordType::A);
    let mut first = std::collections::BTreeSet::new();
    for _ in 0..20 {
        first.insert(ask_udp(running.address, &asked).await.answers[0].data.to_string());
    }
    assert!(first.len() > 5, "{first:?}");
}

#[tokio::test]
async fn a_port_in_use_is_named_with_its_holder() {
    let running = start("127.0.0.1:0", cluster().take().0).await;
    let config = Config { listen: vec![running.address], ..Config::default() };
    let (_tables, receiver) = watch::channel(Snapshot::default());
    let error = Server::bind(config, receiver).await.expect_err("the port is taken");
    let text = error.to_string();
    assert!(text.contains(&running.address.to_string()) && text.contains("`listen`"), "{text}");
    assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
}
