//! The client against a scripted server.

use super::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;

/// A server that gives each request the next of these answers and hangs up.
fn serve(directory: &Path, answers: Vec<String>) -> (Client, tokio::task::JoinHandle<Vec<String>>) {
    let socket = directory.join("api.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let requests = tokio::spawn(async move {
        let mut requests = Vec::new();
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = vec![0; 4096];
            let length = stream.read(&mut buffer).await.unwrap();
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            requests.push(text.lines().next().unwrap().to_owned());
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
        requests
    });
    (Client::new(socket), requests)
}

fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

#[tokio::test]
async fn a_refusal_carries_the_servers_words() {
    let directory = tempfile::tempdir().unwrap();
    let body = r#"{"kind":"Status","reason":"NotFound","message":"pods \"a\" not found","code":404}"#;
    let (client, _) = serve(directory.path(), vec![answer("404 Not Found", body)]);
    let error = client.get("/api/v1/namespaces/default/pods/a").await.unwrap_err();
    assert!(error.is(StatusCode::NOT_FOUND));
    assert_eq!(error.to_string(), "pods \"a\" not found (404 NotFound)");
}

#[tokio::test]
async fn a_list_follows_its_pages() {
    let directory = tempfile::tempdir().unwrap();
    let first = r#"{"metadata":{"resourceVersion":"7","continue":"a/b"},"items":[1]}"#;
    let second = r#"{"metadata":{"resourceVersion":"7"},"items":[2]}"#;
    let (client, requests) = serve(directory.path(), vec![answer("200 OK", first), answer("200 OK", second)]);
    assert_eq!(client.list("/api/v1/pods").await.unwrap(), [json!(1), json!(2)]);
    let requests = requests.await.unwrap();
    assert_eq!(requests[1], format!("GET /api/v1/pods?limit={LIST_PAGE}&continue=a%2Fb HTTP/1.1"));
}

#[tokio::test]
async fn a_watch_resumes_where_it_ended_and_lists_again_when_that_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let list =
        |version: u32| answer("200 OK", &format!(r#"{{"metadata":{{"resourceVersion":"{version}"}},"items":[]}}"#));
    let added = "{\"type\":\"ADDED\",\"object\":{\"metadata\":{\"resourceVersion\":\"8\"}}}\n";
    let bookmark = "{\"type\":\"BOOKMARK\",\"object\":{\"metadata\":{\"resourceVersion\":\"9\"}}}\n";
    let gone = "{\"type\":\"ERROR\",\"object\":{\"code\":410}}\n";
    let (client, requests) = serve(
        directory.path(),
        vec![list(7), answer("200 OK", &format!("{added}{bookmark}")), answer("200 OK", gone), list(20)],
    );
    let mut events = client.watch("/api/v1/pods");
    assert!(matches!(events.recv().await, Some(Event::Replace(_))));
    assert!(matches!(events.recv().await, Some(Event::Upsert(_))));
    assert!(matches!(events.recv().await, Some(Event::Replace(_))));
    let requests = requests.await.unwrap();
    assert!(requests[1].contains("resourceVersion=7"), "{requests:?}");
    assert!(requests[2].contains("resourceVersion=9"), "{requests:?}");
    assert!(requests[3].contains("limit="), "{requests:?}");
}
