//! The servers at `healthCheckNodePort`: a load balancer asks there whether this node has endpoints of a
//! Service whose external traffic stays on the node.
//!
//! Answers are kube-proxy's, byte by byte. A port in use is a problem and is tried again; a Service that goes
//! away takes its listeners and their connections with it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::StatusCode;
use imbl::OrdMap;
use portolan_intent::services::HealthCheck;
use portolan_net::{ObjectKey, Port};
use portolan_state::{ObjectRef, Problem};
use tokio::sync::watch;

use super::board::ProblemBoard;
use super::health::{Now, ProxyHealth};
use super::http::{Answer, Handler, Task, bind, serve};
use super::limits::{HEALTH_CHECKS_MAX, LISTEN_RETRY};

/// The part's name on the board.
const PART: &str = "health checks";

/// What must be served.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Plan {
    /// By Service.
    pub(super) checks: OrdMap<ObjectKey, HealthCheck>,
    /// At these addresses; at every one where it is `None`.
    pub(super) addresses: Option<Vec<IpAddr>>,
}

/// Serves what the plan says until nobody can change it any more.
pub(super) async fn run(mut plans: watch::Receiver<Plan>, health: Arc<ProxyHealth>, board: Arc<ProblemBoard>) {
    let mut servers = Servers { health, servers: BTreeMap::new() };
    loop {
        let plan = plans.borrow_and_update().clone();
        let problems = servers.follow(&plan).await;
        let is_retried = !problems.is_empty();
        board.set(PART, problems);
        tokio::select! {
            changed = plans.changed() => if changed.is_err() { break },
            () = tokio::time::sleep(LISTEN_RETRY), if is_retried => {}
        }
    }
    board.set(PART, Vec::new());
}

struct Servers {
    health: Arc<ProxyHealth>,
    servers: BTreeMap<ObjectKey, Server>,
}

/// One Service's listeners.
struct Server {
    port: Port,
    local_endpoints: Arc<AtomicUsize>,
    listeners: BTreeMap<SocketAddr, Task>,
}

impl Servers {
    /// Opens and closes listeners, and returns what cannot be opened.
    async fn follow(&mut self, plan: &Plan) -> Vec<Problem> {
        self.close(plan).await;
        let mut problems = Vec::new();
        for (count, (key, check)) in plan.checks.iter().enumerate() {
            if count >= HEALTH_CHECKS_MAX {
                problems.push(problem(key, check.port, &format!("{HEALTH_CHECKS_MAX} ports are served, and no more")));
                continue;
            }
            let server = self.servers.entry(key.clone()).or_insert_with(|| Server {
                port: check.port,
                local_endpoints: Arc::default(),
                listeners: BTreeMap::new(),
            });
            server.local_endpoints.store(check.local_endpoints, Ordering::Relaxed);
            if let Err(error) = open(server, key, plan, &self.health).await {
                problems.push(problem(key, check.port, &error));
            }
        }
        problems
    }

    /// Closing comes first: a port may pass from one Service to another.
    async fn close(&mut self, plan: &Plan) {
        for (key, mut server) in std::mem::take(&mut self.servers) {
            let stays = plan.checks.get(&key).is_some_and(|check| check.port == server.port);
            let wanted = addresses(plan, server.port);
            for (address, task) in std::mem::take(&mut server.listeners) {
                if stays && wanted.iter().any(|list| list.contains(&address)) {
                    server.listeners.insert(address, task);
                } else {
                    task.end().await;
                }
            }
            if stays {
                self.servers.insert(key, server);
            }
        }
    }
}

/// The addresses to listen at: all of the first list, or else of the next.
fn addresses(plan: &Plan, port: Port) -> Vec<Vec<SocketAddr>> {
    let at = |address: IpAddr| SocketAddr::new(address, port.get());
    match &plan.addresses {
        // One socket hears both families, where there are two.
        None => vec![vec![at(Ipv6Addr::UNSPECIFIED.into())], vec![at(Ipv4Addr::UNSPECIFIED.into())]],
        Some(addresses) => vec![addresses.iter().copied().map(at).collect()],
    }
}

async fn open(server: &mut Server, key: &ObjectKey, plan: &Plan, health: &Arc<ProxyHealth>) -> Result<(), String> {
    let lists = addresses(plan, server.port);
    if lists.iter().any(|list| !list.is_empty() && list.iter().all(|it| server.listeners.contains_key(it))) {
        return Ok(());
    }
    let mut outcome = Ok(());
    for list in lists {
        outcome = Ok(());
        for address in list {
            if server.listeners.contains_key(&address) {
                continue;
            }
            match bind(address).await {
                Ok(listener) => {
                    let handler = handler(key.clone(), server.local_endpoints.clone(), health.clone());
                    server.listeners.insert(address, Task::spawn(serve(listener, handler)));
                }
                Err(error) => outcome = Err(format!("{address}: {error}")),
            }
        }
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

fn handler(key: ObjectKey, local_endpoints: Arc<AtomicUsize>, health: Arc<ProxyHealth>) -> Handler {
    Arc::new(move |_path| answer(&key, local_endpoints.load(Ordering::Relaxed), health.is_healthy(Now::read())))
}

/// kube-proxy's answer, to any path.
fn answer(key: &ObjectKey, local_endpoints: usize, is_healthy: bool) -> Answer {
    let status = if local_endpoints > 0 && is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    // Names of objects hold nothing that JSON would escape.
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{}\",\n\t\t\"name\": \"{}\"\n\t}},\n\
         \t\"localEndpoints\": {local_endpoints},\n\t\"serviceProxyHealthy\": {is_healthy}\n}}",
        key.namespace, key.name,
    );
    Answer::json(status, body)
        .with("x-content-type-options", "nosniff")
        .with("x-load-balancing-endpoint-weight", local_endpoints.to_string())
}

fn problem(key: &ObjectKey, port: Port, reason: &str) -> Problem {
    Problem {
        object: ObjectRef::Service(key.clone()),
        field: "spec.healthCheckNodePort".into(),
        reason: format!("load balancers cannot ask at port {port}: {reason}").into(),
        hint: "it is tried again; stop what uses the port (`ss -ltnp`), or give the Service another".into(),
    }
}

#[cfg(test)]
mod tests;
