//! Keeping the node's own entry in the cluster right: its end of the fabric, for the other nodes.

use std::time::Duration;

use portolan_net::NodeName;
use portolan_state::NodeTunnel;
use tokio::sync::watch;

/// What must be published; `None` while the cluster already says so.
pub(crate) type Announcement = Option<NodeTunnel>;

/// How long to wait after a write failed for good: longer than its own retries together.
const PAUSE: Duration = Duration::from_secs(5);

/// Publishes what the loop announces, until the loop is gone.
pub(crate) async fn keep_published(
    client: portolan_source::Client,
    node: NodeName,
    mut announced: watch::Receiver<Announcement>,
    seed: u64,
) {
    loop {
        let wanted = announced.borrow_and_update().clone();
        if let Some(tunnel) = wanted {
            let published = portolan_source::publish_node_tunnel(&client, &node, &tunnel, seed).await;
            let usable = match published {
                Ok(_) => portolan_source::set_network_unavailable_false(&client, &node, seed).await,
                Err(error) => Err(error),
            };
            if let Err(error) = usable {
                tracing::warn!(%error, "other nodes cannot reach this one's pods yet");
                tokio::select! {
                    () = tokio::time::sleep(PAUSE) => continue,
                    changed = announced.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return,
                    },
                }
            }
        }
        if announced.changed().await.is_err() {
            return;
        }
    }
}
