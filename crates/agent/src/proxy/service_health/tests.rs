//! Real listeners on loopback addresses, at ports that the kernel chose.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// No test waits so long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(10);

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

async fn free_port() -> Port {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    Port::try_from(listener.local_addr().unwrap().port()).unwrap()
}

fn plan(checks: &[(&str, Port, usize)]) -> Plan {
    let checks = checks.iter().map(|(name, port, local_endpoints)| {
        (ObjectKey::new("shop", *name), HealthCheck { port: *port, local_endpoints: *local_endpoints })
    });
    Plan { checks: checks.collect(), addresses: Some(vec![HERE]) }
}

async fn ask(port: Port) -> std::io::Result<String> {
    let mut stream = TcpStream::connect((HERE, port.get())).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

fn servers() -> Servers {
    Servers { health: Arc::new(ProxyHealth::new(Duration::from_secs(30))), servers: BTreeMap::new() }
}

#[tokio::test]
async fn answers_are_kube_proxys() {
    let (mut servers, port) = (servers(), free_port().await);
    assert_eq!(servers.follow(&plan(&[("cart", port, 2)])).await, []);
    let text = ask(port).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    assert!(text.contains("content-type: application/json\r\n"), "{text}");
    assert!(text.contains("x-load-balancing-endpoint-weight: 2\r\n"), "{text}");
    let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"cart\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
    assert_eq!(text.split_once("\r\n\r\n").unwrap().1, body);
    assert_eq!(servers.follow(&plan(&[("cart", port, 0)])).await, []);
    assert!(ask(port).await.unwrap().starts_with("HTTP/1.1 503"));
}

#[tokio::test]
async fn an_unhealthy_proxy_gets_nothing() {
    let (mut servers, port) = (servers(), free_port().await);
    let now = Now::read();
    servers.health = Arc::new(ProxyHealth::new(Duration::ZERO));
    servers.health.updated(now);
    servers.health.queued(now);
    assert_eq!(servers.follow(&plan(&[("cart", port, 2)])).await, []);
    let text = ask(port).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 503") && text.contains("\"serviceProxyHealthy\": false"), "{text}");
}

#[tokio::test]
async fn listeners_follow_and_a_kept_connection_ends_with_its_service() {
    let (mut servers, port, other) = (servers(), free_port().await, free_port().await);
    assert_eq!(servers.follow(&plan(&[("cart", port, 1)])).await, []);
    let mut kept = TcpStream::connect((HERE, port.get())).await.unwrap();
    kept.write_all(b"GET / HTTP/1.1\r\nhost: node\r\n\r\n").await.unwrap();
    let mut byte = [0];
    kept.read_exact(&mut byte).await.unwrap();
    // The port passes to another Service, and the first one gets another.
    assert_eq!(servers.follow(&plan(&[("cart", other, 1), ("till", port, 1)])).await, []);
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, kept.read_to_end(&mut rest)).await.expect("the connection ends");
    assert!(ask(port).await.unwrap().contains("\"till\""));
    assert!(ask(other).await.unwrap().contains("\"cart\""));
    assert_eq!(servers.follow(&plan(&[])).await, []);
    // A listener is closed when its task is, which is soon.
    let end = Instant::now() + PATIENCE;
    while ask(port).await.is_ok() {
        assert!(Instant::now() < end, "the port is still served");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_port_in_use_is_a_problem_until_it_is_free() {
    let other = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = Port::try_from(other.local_addr().unwrap().port()).unwrap();
    let mut servers = servers();
    let problems = servers.follow(&plan(&[("cart", port, 1)])).await;
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].object, ObjectRef::Service(ObjectKey::new("shop", "cart")));
    assert!(problems[0].reason.contains("in use"), "{}", problems[0].reason);
    drop(other);
    assert_eq!(servers.follow(&plan(&[("cart", port, 1)])).await, []);
    assert!(ask(port).await.unwrap().contains("\"cart\""));
}
