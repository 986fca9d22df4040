//! The DNS role: the cluster's tables to the DNS server.

use std::collections::BTreeSet;

use portolan_dns::Config;
use portolan_intent::names::PodNames;
use portolan_net::ObjectKind;
use portolan_source::{Selection, SourceEvent};
use portolan_state::{Change, Snapshot, Writer};
use tokio::sync::{mpsc, watch};

use crate::config::DnsRoleConfig;
use crate::limits::{EVENTS_PER_CYCLE_MAX, SOURCE_QUEUE};

/// Why the DNS server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DnsRoleError {
    /// The connection to the cluster's API is misconfigured.
    #[error(transparent)]
    Source(#[from] portolan_source::SourceError),
    /// The server cannot run.
    #[error(transparent)]
    Server(#[from] portolan_dns::Error),
}

/// Runs the DNS server until `shutdown` is done.
pub async fn run(
    config: DnsRoleConfig,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), DnsRoleError> {
    let (sender, tables) = watch::channel(Snapshot::default());
    let (event_sender, events) = mpsc::channel(SOURCE_QUEUE);
    let mut source = None;
    if let Some(kubernetes) = &config.kubernetes {
        let client = kubernetes.connection().client().await?;
        let selection = Selection { tables: tables_for(&config.server), keep_other_proxies: true, pods_of: None };
        source = Some(portolan_source::start(&client, &selection, &event_sender, u64::from(std::process::id())));
    }
    let follower = tokio::spawn(follow(events, sender));
    let served = portolan_dns::serve(config.server, tables, shutdown).await;
    follower.abort();
    if let Some(source) = source {
        source.stop().await;
    }
    Ok(served?)
}

/// Only names of pods that are verified need the table of pods, which is the largest.
fn tables_for(server: &Config) -> BTreeSet<ObjectKind> {
    let mut tables = BTreeSet::from([ObjectKind::Namespace, ObjectKind::Service, ObjectKind::EndpointSlice]);
    if server.pods == PodNames::Verified {
        tables.insert(ObjectKind::Pod);
    }
    tables
}

/// Turns source events into snapshots.
async fn follow(mut events: mpsc::Receiver<SourceEvent>, sender: watch::Sender<Snapshot>) {
    let mut writer = Writer::new();
    while let Some(first) = events.recv().await {
        let mut next = Some(first);
        for _ in 0..EVENTS_PER_CYCLE_MAX {
            match next.take() {
                None => break,
                Some(SourceEvent::Changes(changes)) => apply(&mut writer, changes),
                Some(SourceEvent::Connected { .. }) => {}
                Some(SourceEvent::Disconnected { table, reason, hint }) => {
                    tracing::warn!(%table, reason, hint, "not followed; names are answered as they were");
                }
            }
            next = events.try_recv().ok();
        }
        if let Some(SourceEvent::Changes(changes)) = next {
            apply(&mut writer, changes);
        }
        let (snapshot, _) = writer.take();
        if sender.send(snapshot).is_err() {
            return;
        }
    }
}

fn apply(writer: &mut Writer, changes: Vec<Change>) {
    for change in changes {
        writer.apply(change);
    }
}
