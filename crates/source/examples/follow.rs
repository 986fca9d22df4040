//! Follows a cluster and prints what it costs: `follow SOCKET|KUBECONFIG [NODE]`.
//!
//! With a node's name only that node's pods are followed, as an agent does.

#![expect(clippy::print_stdout, reason = "this is the example's output")]

use std::path::PathBuf;
use std::time::Instant;

use portolan_net::ObjectKind;
use portolan_source::{Connection, Selection, SourceEvent};
use portolan_state::Writer;
use tokio::sync::mpsc;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("usage: follow SOCKET|KUBECONFIG [NODE]")?);
    let connection = if path.is_file() { Connection::Kubeconfig(path) } else { Connection::Socket(path) };
    let client = connection.client().await?;
    let selection = Selection { pods_of: arguments.next().map(Into::into), ..Selection::default() };
    let tables: Vec<ObjectKind> = selection.tables.iter().copied().collect();
    let (sender, mut events) = mpsc::channel(16);
    let begin = Instant::now();
    let _handle = portolan_source::start(&client, &selection, &sender, 1);
    let mut writer = Writer::new();
    let mut was_in_sync = false;
    while let Some(event) = events.recv().await {
        match event {
            SourceEvent::Changes(changes) => changes.into_iter().for_each(|change| writer.apply(change)),
            other => println!("{other:?}"),
        }
        let now = writer.snapshot();
        if !was_in_sync && now.is_in_sync(&tables) {
            was_in_sync = true;
            let counts = (now.services.len(), now.endpoint_slices.len(), now.pods.len());
            println!("in sync after {:?}: (Services, slices, pods) {counts:?}; {}", begin.elapsed(), peak_memory());
        }
    }
    Ok(())
}

/// The line of proc(5) that says how much memory was resident at most.
fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM unknown").to_owned()
}
