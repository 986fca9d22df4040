//! The lab's API server, in a thread of the supervisor with a runtime of its own, so that a busy
//! kubelet never delays an answer.

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};
use portolan_apiserver::admission::NodePrefixLengths;
use portolan_apiserver::{Config, Server, StoreLocation};
use portolan_net::Family;

use crate::Layout;
use crate::description::Description;

/// The range of node ports: Kubernetes' default.
pub(crate) const NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;

/// How much memory the API's data may take.
const DATA_MOUNT_OPTIONS: &str = "size=256m,mode=0700";

/// Starts the API server and returns once it serves.
pub(crate) fn start(layout: &Layout, description: &Description) -> anyhow::Result<()> {
    let data = layout.api_data();
    std::fs::create_dir_all(&data).with_context(|| format!("creating {}", data.display()))?;
    // A lab's objects end with the lab: they need no disk, and fsync costs nothing in memory.
    mount(Some("portolan-lab"), &data, Some("tmpfs"), MsFlags::empty(), Some(DATA_MOUNT_OPTIONS))
        .with_context(|| format!("mounting memory at {}", data.display()))?;
    let (report, started) = std::sync::mpsc::channel();
    let (layout, description) = (layout.clone(), description.clone());
    std::thread::Builder::new()
        .name("api".to_owned())
        .spawn(move || serve(&layout, &description, &report))
        .context("starting the API's thread")?;
    started.recv().context("the API's thread ended before it served")?
}

fn serve(layout: &Layout, description: &Description, report: &std::sync::mpsc::Sender<anyhow::Result<()>>) {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = report.send(Err(error).context("starting the API's runtime"));
            return;
        }
    };
    runtime.block_on(async {
        let server = match launch(layout, description).await {
            Ok(server) => server,
            Err(error) => {
                let _ = report.send(Err(error));
                return;
            }
        };
        let _ = report.send(Ok(()));
        // The server lives as long as this handle, and this thread as long as the supervisor.
        std::future::pending::<()>().await;
        drop(server);
    });
}

async fn launch(layout: &Layout, description: &Description) -> anyhow::Result<Server> {
    let length = |family: Family| {
        let both = description.cluster_prefixes.iter().zip(&description.node_prefix_lengths);
        both.filter(|(prefix, _)| Family::of_prefix(prefix) == family).map(|(_, length)| *length).next()
    };
    let store = description.store_location()?;
    // A lab of this name that was not taken down may have left its objects.
    portolan_apiserver::clear(&store).await?;
    let usual = NodePrefixLengths::default();
    let config = Config {
        store,
        unix_socket: layout.api_socket(),
        service_prefixes: description.service_prefixes.clone(),
        cluster_prefixes: description.cluster_prefixes.clone(),
        node_port_range: NODE_PORTS,
        node_prefix_lengths: NodePrefixLengths {
            ipv4: length(Family::V4).unwrap_or(usual.ipv4),
            ipv6: length(Family::V6).unwrap_or(usual.ipv6),
        },
        ..Config::new(layout.api_data())
    };
    let server = portolan_apiserver::start(config).await?;
    std::fs::copy(server.kubeconfig(), layout.kubeconfig()).context("copying the kubeconfig")?;
    Ok(server)
}

/// Removes the objects of a lab that is down from the etcd that held them.
pub(crate) fn clear(description: &Description) -> anyhow::Result<()> {
    let store = description.store_location()?;
    if store == StoreLocation::Embedded {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    runtime.block_on(portolan_apiserver::clear(&store)).context("removing the lab's objects from etcd")
}
