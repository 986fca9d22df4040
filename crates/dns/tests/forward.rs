//! Forwarding to upstreams that misbehave, each a script on loopback.
//!
//! Time-outs run on a paused clock, which jumps to the next timer when nothing else can go on: what is
//! sent on loopback has arrived before that.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "the helpers are part of the test")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use portolan_dns::metrics::Metrics;
use portolan_dns::{Config, Server};
use portolan_state::Snapshot;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

const PATIENCE: Duration = Duration::from_secs(20);

/// The answer to a query: one address, kept for a minute.
fn answer(query: &[u8], last_octet: u8) -> Message {
    let query = Message::from_vec(query).expect("a query");
    let mut message = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
    message.metadata.recursion_available = true;
    let question = query.queries[0].clone();
    message.answers.push(Record::from_rdata(question.name.clone(), 60, RData::A(A::new(192, 0, 2, last_octet))));
    message.queries.push(question);
    message
}

/// An upstream: for each query, what it sends back, in order. Counts the queries.
async fn upstream(script: impl Fn(&[u8]) -> Vec<Message> + Send + 'static) -> (SocketAddr, Arc<AtomicUsize>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    tokio::spawn(async move {
        let mut bytes = vec![0; 4096];
        while let Ok((length, client)) = socket.recv_from(&mut bytes).await {
            counted.fetch_add(1, Ordering::SeqCst);
            for message in script(&bytes[..length]) {
                socket.send_to(&message.to_vec().unwrap(), client).await.unwrap();
            }
        }
    });
    (address, count)
}

/// A server with these upstreams and no cluster.
async fn server(forward: Vec<SocketAddr>) -> (SocketAddr, Arc<Metrics>, watch::Sender<Snapshot>) {
    let (tables, receiver) = watch::channel(Snapshot::default());
    let config = Config { listen: vec!["127.0.0.1:0".parse().unwrap()], forward, ..Config::default() };
    let server = Server::bind(config, receiver).await.expect("a free port");
    let (address, metrics) = (server.addresses()[0], server.metrics());
    tokio::spawn(server.run(std::future::pending()));
    (address, metrics, tables)
}

async fn ask(server: SocketAddr, name: &str) -> Message {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&message.to_vec().unwrap(), server).await.unwrap();
    let mut bytes = vec![0; 4096];
    let length = timeout(PATIENCE, socket.recv(&mut bytes)).await.expect("an answer in time").unwrap();
    let answer = Message::from_vec(&bytes[..length]).unwrap();
    assert_eq!(answer.metadata.id, 77);
    answer
}

fn last_octet(message: &Message) -> Option<u8> {
    match &message.answers.first()?.data {
        RData::A(address) => Some(address.octets()[3]),
        _ => None,
    }
}

#[tokio::test]
async fn an_answer_is_passed_on_and_kept() {
    let (upstream, count) = upstream(|query| vec![answer(query, 1)]).await;
    let (server, _metrics, _tables) = server(vec![upstream]).await;
    let first = ask(server, "example.org.").await;
    assert_eq!(last_octet(&first), Some(1));
    assert!(!first.metadata.authoritative && first.metadata.recursion_available);
    // The cache does not mind the spelling; the client sees its own.
    let second = ask(server, "Example.ORG.").await;
    assert_eq!(last_octet(&second), Some(1));
    assert!(second.answers[0].name.eq_case(&Name::from_ascii("Example.ORG.").unwrap()));
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn answers_to_other_queries_are_passed_over() {
    let (upstream, _) = upstream(|query| {
        let mut wrong_number = answer(query, 66);
        wrong_number.metadata.id = wrong_number.metadata.id.wrapping_add(1);
        let mut wrong_name = answer(query, 67);
        wrong_name.queries[0].name = Name::from_ascii("example.com.").unwrap();
        let mut no_answer = answer(query, 68);
        no_answer.metadata.message_type = MessageType::Query;
        vec![wrong_number, wrong_name, no_answer, answer(query, 1)]
    })
    .await;
    let (server, _metrics, _tables) = server(vec![upstream]).await;
    assert_eq!(last_octet(&ask(server, "example.org.").await), Some(1));
}

#[tokio::test]
async fn an_upstream_without_edns_is_asked_without_it() {
    let (upstream, count) = upstream(|query| {
        let mut reply = answer(query, 5);
        if Message::from_vec(query).unwrap().edns.is_some() {
            reply.metadata.response_code = ResponseCode::FormErr;
            reply.answers.clear();
            reply.queries.clear();
        }
        vec![reply]
    })
    .await;
    let (server, _metrics, _tables) = server(vec![upstream]).await;
    assert_eq!(last_octet(&ask(server, "example.org.").await), Some(5));
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_cut_answer_is_asked_for_over_tcp() {
    let (address, _) = upstream(|query| {
        let mut cut = answer(query, 66);
        cut.metadata.truncation = true;
        cut.answers.clear();
        vec![cut]
    })
    .await;
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut query = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut query).await.unwrap();
        let answer = answer(&query, 2).to_vec().unwrap();
        stream.write_u16(answer.len() as u16).await.unwrap();
        stream.write_all(&answer).await.unwrap();
    });
    let (server, _metrics, _tables) = server(vec![address]).await;
    assert_eq!(last_octet(&ask(server, "example.org.").await), Some(2));
}

#[tokio::test]
async fn a_port_that_nobody_listens_on_is_passed_at_once() {
    // Port 1, tcpmux, which nobody has served for decades.
    let closed = "127.0.0.1:1".parse().unwrap();
    let (living, _) = upstream(|query| vec![answer(query, 3)]).await;
    let (server, _metrics, _tables) = server(vec![closed, living]).await;
    let started = Instant::now();
    assert_eq!(last_octet(&ask(server, "example.org.").await), Some(3));
    assert!(started.elapsed() < Duration::from_secs(2), "the refusal is heard, not waited out");
}

#[tokio::test(start_paused = true)]
async fn a_silent_upstream_is_passed_and_then_asked_last() {
    let (silent, silent_count) = upstream(|_| Vec::new()).await;
    let (living, _) = upstream(|query| vec![answer(query, 4)]).await;
    let (server, metrics, _tables) = server(vec![silent, living]).await;
    // Two at once, so that the test waits for one time-out only.
    let (one, two) = tokio::join!(ask(server, "a.example.org."), ask(server, "b.example.org."));
    assert_eq!((last_octet(&one), last_octet(&two)), (Some(4), Some(4)));
    assert_eq!(silent_count.load(Ordering::SeqCst), 2);
    assert_eq!(last_octet(&ask(server, "c.example.org.").await), Some(4));
    assert_eq!(silent_count.load(Ordering::SeqCst), 2, "after two failures it is asked last");
    assert_eq!(metrics.forward_failures.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn when_nobody_answers_the_client_is_told_before_it_gives_up() {
    let (silent, count) = upstream(|_| Vec::new()).await;
    let (server, _metrics, _tables) = server(vec![silent]).await;
    let started = Instant::now();
    let failure = ask(server, "example.org.").await;
    assert_eq!(failure.metadata.response_code, ResponseCode::ServFail);
    assert!(started.elapsed() < Duration::from_secs(5), "resolv.conf(5): the client waits for 5 s");
    assert_eq!(count.load(Ordering::SeqCst), 2, "a lost datagram is sent once more");
}
