//! The bounds, at the bound.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use portolan_intent::names::Names;
use portolan_state::Snapshot;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::service::{Handled, Service, Tables};
use super::tcp;
use crate::limits::FORWARDS_MAX;
use crate::metrics::Transport;
use crate::wire::{Question, RecordType, ResponseCode, encode_query};
use crate::{Config, Settings};

const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

fn service() -> Service {
    let config = Config { forward: vec!["192.0.2.1:53".parse().unwrap()], ..Config::default() };
    let names = Names::new("cluster.local".parse().unwrap());
    Service::new(Settings::try_from(config).unwrap(), Tables { snapshot: Snapshot::default(), names })
}

#[test]
fn above_the_bound_queries_are_refused_and_below_it_they_wait() {
    let service = service();
    let question = Question {
        name: "example.org".parse().unwrap(),
        record_type: RecordType::A,
        dnssec_ok: false,
        checking_disabled: false,
    };
    let query = encode_query(1, &question).unwrap();
    let mut buffer = Vec::new();
    let mut waiting = Vec::new();
    for _ in 0..FORWARDS_MAX {
        match service.handle(&query, CLIENT, Transport::Udp, &mut buffer) {
            Handled::Pending(pending) => waiting.push(pending),
            Handled::Answered | Handled::Ignored => panic!("a query below the bound waits"),
        }
    }
    assert!(matches!(service.handle(&query, CLIENT, Transport::Udp, &mut buffer), Handled::Answered));
    assert_eq!(u16::from(buffer[3] & 0x0f), ResponseCode::REFUSED.0);
    assert_eq!(service.metrics.forward_rejects.load(Ordering::Relaxed), 1);
    waiting.pop();
    assert!(matches!(service.handle(&query, CLIENT, Transport::Udp, &mut buffer), Handled::Pending(_)));
}

#[tokio::test]
async fn above_the_bound_connections_are_closed() {
    let service = Arc::new(service());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(tcp::run(listener, service.clone(), Arc::new(Semaphore::new(1))));
    let _first = TcpStream::connect(address).await.unwrap();
    let mut second = TcpStream::connect(address).await.unwrap();
    let read = timeout(Duration::from_secs(20), second.read_u8()).await.expect("it is closed at once");
    assert!(read.is_err());
    assert_eq!(service.metrics.connection_rejects.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_closed() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(tcp::run(listener, Arc::new(service()), Arc::new(Semaphore::new(1))));
    let mut stream = TcpStream::connect(address).await.unwrap();
    let read = timeout(Duration::from_mins(1), stream.read_u8()).await.expect("it is closed after a while");
    assert!(read.is_err());
}
