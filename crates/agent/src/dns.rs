//! The DNS role: the cluster's tables to the DNS server.

use std::collections::BTreeSet;
use std::sync::Arc;

use portolan_dns::Config;
use portolan_intent::names::PodNames;
use portolan_net::ObjectKind;
use portolan_source::{Selection, SourceEvent};
use portolan_state::{Change, Snapshot, Writer};
use tokio::sync::{mpsc, watch};

use crate::admin_socket::{self, SocketError};
use crate::config::DnsRoleConfig;
use crate::dns_administration::DnsAdministration;
use crate::limits::{EVENTS_PER_CYCLE_MAX, SOURCE_QUEUE};

/// Why the DNS server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DnsRoleError {
    /// The connection to the cluster's API is misconfigured.
    #[error(transparent)]
    Source(#[from] portolan_source::SourceError),
    /// Metrics and health cannot be served.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The server cannot run.
    #[error(transparent)]
    Server(#[from] portolan_dns::Error),
}

/// Runs the DNS server until `shutdown` is done.
pub async fn run(
    config: DnsRoleConfig,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), DnsRoleError> {
    // The sockets come first, so that a port in use is said at once.
    let (sender, tables) = watch::channel(Snapshot::default());
    let monitoring = match config.metrics_address {
        Some(address) => Some(admin_socket::bind_tcp(address).await?),
        None => None,
    };
    let needed = config.kubernetes.iter().flat_map(|_| tables_for(&config.server)).collect();
    let server = portolan_dns::Server::bind(config.server.clone(), tables.clone()).await?;
    let handler = Arc::new(DnsAdministration { metrics: server.metrics(), tables, needed });
    let (event_sender, events) = mpsc::channel(SOURCE_QUEUE);
    let mut source = None;
    if let Some(kubernetes) = &config.kubernetes {
        let client = kubernetes.connection().client().await?;
        let selection = Selection { tables: tables_for(&config.server), keep_other_proxies: true, pods_of: None };
        source = Some(portolan_source::start(&client, &selection, &event_sender, u64::from(std::process::id())));
    }
    let follower = tokio::spawn(follow(events, sender));
    let monitoring = monitoring.map(|listener| tokio::spawn(admin_socket::serve_tcp(listener, handler)));
    let served = server.run(shutdown).await;
    follower.abort();
    if let Some(monitoring) = monitoring {
        monitoring.abort();
    }
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
                Some(SourceEvent::Connected { .. } | SourceEvent::Triggered(_)) => {}
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
