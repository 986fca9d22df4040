//! The loop: it waits for events, gathers them, and lets the engine run a cycle.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use hyper::{Method, StatusCode};
use portolan_kernel::KernelError;
use portolan_kernel::monitor::{Event as KernelEvent, Monitor};
use portolan_program::iptables;
use portolan_program::layout::is_our_chain;
use portolan_source::{Client, Connection, Selection, SourceEvent};
use portolan_state::Change;
use tokio::sync::{mpsc, oneshot, watch as signal};
use tokio::task::LocalSet;
use tokio::time::sleep_until;

use super::answers::{self, Question};
use super::engine::{Engine, Outcome};
use super::port::{KernelPort, RealKernel};
use super::{verbs, watch};
use crate::admin_socket::{self, AdminAnswer, AdminHandler, AdminRequest, SocketError};
use crate::api::{ObserveQuestion, ProbeQuestion};
use crate::attachments::{AttachmentBook, BookError};
use crate::cni_socket::{CniCall, CniSocket, CniSocketError};
use crate::config::{AgentConfig, ServicesMode};
use crate::limits::{
    ADMIN_QUEUE, CNI_QUEUE, EVENTS_PER_CYCLE_MAX, HEALTH_TIMEOUT, LOOK_INTERVAL, MONITOR_WAIT_MILLISECONDS,
    NOTIFICATION_QUEUE, REPAIR_DELAY, REPAIR_EVENTS_MAX, RESYNC_INTERVAL, RESYNCS_PER_FULL, RETRY_DELAY_MAX,
    RETRY_DELAY_MIN, SOURCE_QUEUE,
};
use crate::metrics::Metrics;
use crate::proxy::{Attendant, Synced};
use crate::publish::{self, Announcement};

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The kernel lacks something, or the process may not use it.
    #[error("the kernel cannot be used: {0}; the agent needs root, or CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN")]
    Kernel(#[from] KernelError),
    /// A socket cannot be served.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The CNI socket cannot be served.
    #[error(transparent)]
    Cni(#[from] CniSocketError),
    /// The records of pod interfaces cannot be used.
    #[error(transparent)]
    Book(#[from] BookError),
    /// The connection to the cluster's API is misconfigured.
    #[error(transparent)]
    Source(#[from] portolan_source::SourceError),
    /// A fault of ours: without the loop the agent would be there and do nothing.
    #[error("the agent's loop ended by itself, which is a fault of it: the log says where; start the agent again")]
    LoopEnded,
    /// The operating system refuses.
    #[error("the agent's loop could not be started: {0}")]
    System(#[from] std::io::Error),
}

/// Runs the node's agent until `shutdown` is done. The data plane goes on forwarding afterwards.
pub async fn run(config: AgentConfig, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
    // The sockets come first: a second agent on the node ends here, before it touches anything.
    let admin = admin_socket::bind_unix(&config.runtime_directory.join("agent.sock"))?;
    let metrics_listener = match config.metrics_address {
        Some(address) => Some(admin_socket::bind_tcp(address).await?),
        None => None,
    };
    let (question_sender, questions) = mpsc::channel(ADMIN_QUEUE);
    let (call_sender, calls) = mpsc::channel(CNI_QUEUE);
    let (event_sender, events) = mpsc::channel(SOURCE_QUEUE);
    let _cni = CniSocket::listen(&config.runtime_directory.join("cni.sock"), move |call| {
        // A loop that is gone drops the call, and with it the connection: the runtime tries again.
        let _ = call_sender.blocking_send(call);
    })?;

    let client = connection(&config).client().await?;
    let selection = Selection { pods_of: Some(config.node.clone()), ..Selection::default() };
    let source = portolan_source::start(&client, &selection, &event_sender, seed(&config));
    let (tunnel, announced) = signal::channel(None);

    let metrics = Arc::new(Metrics::new());
    let (book, unreadable) = AttachmentBook::load(&config.state_directory)?;
    for problem in unreadable {
        tracing::warn!(%problem, "a record of a pod interface has no effect");
    }
    let kernel = RealKernel::open()?;
    let mut monitor = Monitor::open()?;
    for port in kernel.ports() {
        monitor.ignore_port(port);
    }
    let attendant = Attendant::start(&config, metrics.clone()).await?;
    let mut engine = Engine::new(config.clone(), kernel, metrics.clone());
    engine.board = attendant.board();
    let (notification_sender, notifications) = mpsc::channel(NOTIFICATION_QUEUE);
    std::thread::Builder::new().name("monitor".to_owned()).spawn(move || listen(monitor, &notification_sender))?;
    let (stop, stopped) = oneshot::channel();
    let node_loop = NodeLoop {
        look_at: (config.services_mode() != ServicesMode::Nftables).then(|| Instant::now() + LOOK_INTERVAL),
        config: config.clone(),
        engine,
        attendant,
        book,
        tunnel,
        retry: None,
        repair: Repair::default(),
        resyncs: 0,
    };
    // Dropped when the thread ends, also by a panic.
    let (alive, ended) = oneshot::channel::<()>();
    let thread = std::thread::Builder::new().name("node".to_owned()).spawn(move || {
        let _alive = alive;
        let inputs = Inputs { events, calls, questions, notifications, stopped };
        node_loop.run_thread(inputs, client, announced);
    })?;

    let handler = Arc::new(Administration { config: config.clone(), questions: question_sender, metrics });
    let administration = tokio::spawn(admin_socket::serve_unix(admin, handler.clone()));
    let monitoring = metrics_listener.map(|listener| tokio::spawn(admin_socket::serve_tcp(listener, handler)));
    tracing::info!(node = %config.node, fabric = %config.fabric, "the agent runs");
    let outcome = tokio::select! {
        () = shutdown => Ok(()),
        _ = ended => Err(RunError::LoopEnded),
    };
    tracing::info!("the agent stops; the data plane goes on forwarding");
    let _ = stop.send(());
    source.stop().await;
    administration.abort();
    if let Some(monitoring) = monitoring {
        monitoring.abort();
    }
    // The loop ends at its next event, so joining it does not wait for long.
    let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    outcome
}

/// Removes what is ours from the kernel of this network namespace; returns what was done, as text.
pub fn clean(config: &AgentConfig) -> Result<Vec<String>, RunError> {
    let socket = config.runtime_directory.join("agent.sock");
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        return Err(SocketError::InUse(socket).into());
    }
    let lines = clean_kernel(&mut RealKernel::open()?)?;
    remove_records(&config.state_directory.join("attachments"))?;
    Ok(lines)
}

/// Removes what is ours from a kernel; returns what was done, as text.
pub fn clean_kernel<P: KernelPort>(kernel: &mut P) -> Result<Vec<String>, KernelError> {
    use portolan_program::{netlink, nftables};
    let observed = kernel.observe_netlink()?;
    let tables = kernel.observe_nftables()?;
    // Sysctls stay: other software on the node may have come to rely on them.
    let nothing = netlink::Program { sysctls: observed.ours.sysctls.clone(), ..netlink::Program::default() };
    // Traffic is let go of first, then what carried it.
    let changes = nftables::diff(&nftables::Program::default(), &tables);
    let mut lines: Vec<String> = nftables::render_changes(&changes).lines().map(str::to_owned).collect();
    let failed = kernel.apply_nftables(&changes).failed;
    if let Some((_, error)) = failed.into_iter().next() {
        return Err(error);
    }
    for mut room in kernel.unused_rooms(None) {
        lines.extend(room.plan(kernel)?.lines().map(str::to_owned));
        if let Some((_, error)) = room.compare(kernel)?.failed.into_iter().next() {
            return Err(error);
        }
    }
    let changes = netlink::diff(&nothing, &observed.ours, &observed.others);
    lines.extend(changes.iter().map(ToString::to_string));
    if let Some((_, error)) = kernel.apply_netlink(&changes).failed.into_iter().next() {
        return Err(error);
    }
    Ok(lines)
}

/// Pod interfaces that were removed hold no addresses.
fn remove_records(directory: &Path) -> Result<(), std::io::Error> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn connection(config: &AgentConfig) -> Connection {
    config.connection()
}

/// Spreads waits between nodes; any stable number will do.
fn seed(config: &AgentConfig) -> u64 {
    config
        .node
        .as_str()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Where events come from.
struct Inputs {
    events: mpsc::Receiver<SourceEvent>,
    calls: mpsc::Receiver<CniCall>,
    questions: mpsc::Receiver<(Question, oneshot::Sender<AdminAnswer>)>,
    notifications: mpsc::Receiver<KernelEvent>,
    stopped: oneshot::Receiver<()>,
}

/// Hands the kernel's notifications to the loop, until the loop is gone.
fn listen(mut monitor: Monitor, sender: &mpsc::Sender<KernelEvent>) {
    while !sender.is_closed() {
        monitor.wait(MONITOR_WAIT_MILLISECONDS);
        while let Some(event) = monitor.next_event() {
            // A full queue means that everything is read again anyway.
            if let Err(mpsc::error::TrySendError::Full(_)) = sender.try_send(event) {
                let _ = sender.blocking_send(KernelEvent::Overrun);
            }
        }
    }
}

/// When the kernel is read again after others changed it.
///
/// The first change is mended at once. Where reading finds nothing to mend, time after time, the delay
/// grows: a busy neighbour table must not keep the agent busy.
#[derive(Debug)]
struct Repair {
    at: Option<Instant>,
    delay: std::time::Duration,
    /// What others changed since.
    events: BTreeSet<KernelEvent>,
}

impl Default for Repair {
    fn default() -> Self {
        Repair { at: None, delay: REPAIR_DELAY, events: BTreeSet::new() }
    }
}

impl Repair {
    fn wanted(&mut self, event: KernelEvent) {
        // Chains of others come and go by their own.
        if let KernelEvent::Rules(name) = &event
            && !iptables::is_built_in(&name.chain)
            && !is_our_chain(name.table.as_str(), &name.chain)
        {
            return;
        }
        self.at.get_or_insert(Instant::now() + self.delay);
        // Links and chains are told apart by name and nothing else is, so that beyond the bound one link stands for
        // all links, and a look at what is always there for all chains.
        let is_room_left = self.events.len() < REPAIR_EVENTS_MAX;
        match event {
            KernelEvent::Link(_) if !is_room_left => {}
            KernelEvent::Rules(_) if !is_room_left => drop(self.events.insert(KernelEvent::Ruleset)),
            event => drop(self.events.insert(event)),
        }
    }

    fn done(&mut self, changed: bool) {
        self.at = None;
        self.events.clear();
        self.delay = if changed { REPAIR_DELAY } else { (self.delay * 2).min(REPAIR_DELAY * 10) };
    }
}

/// When what failed is tried again.
struct Retry {
    at: Instant,
    delay: std::time::Duration,
}

struct NodeLoop {
    config: AgentConfig,
    engine: Engine<RealKernel>,
    attendant: Attendant,
    book: AttachmentBook,
    tunnel: signal::Sender<Announcement>,
    retry: Option<Retry>,
    repair: Repair,
    /// How often the kernel was read because it was time.
    resyncs: u32,
    /// When that is looked at which the kernel does not tell of.
    look_at: Option<Instant>,
}

impl NodeLoop {
    fn run_thread(self, inputs: Inputs, client: Client, announced: signal::Receiver<Announcement>) {
        let publisher = publish::keep_published(client, self.config.node.clone(), announced, seed(&self.config));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match runtime {
            Ok(runtime) => runtime.block_on(LocalSet::new().run_until(async {
                // It waits for the API server most of the time, and ends with the loop.
                tokio::task::spawn_local(publisher);
                self.run(inputs).await;
            })),
            Err(error) => tracing::error!(%error, "the agent's loop has no runtime"),
        }
    }

    async fn run(mut self, mut inputs: Inputs) {
        verbs::announce(&mut self.engine, &self.book);
        let mut resync_at = Instant::now() + RESYNC_INTERVAL;
        loop {
            let wake = [self.look_at, self.repair.at, self.retry.as_ref().map(|retry| retry.at), Some(resync_at)];
            let wake = wake.into_iter().flatten().min().unwrap_or(resync_at);
            tokio::select! {
                biased;
                _ = &mut inputs.stopped => return,
                // What is due comes first, and what is noticed is only noted: no stream of events can put
                // off repairs for ever.
                () = sleep_until(wake.into()) => self.tick(&mut resync_at),
                Some(event) = inputs.notifications.recv() => self.notice(event),
                Some(call) = inputs.calls.recv() => self.call(call),
                Some((question, reply)) = inputs.questions.recv() => {
                    let _ = reply.send(answers::answer(&mut self.engine, &self.config, question));
                }
                Some(event) = inputs.events.recv() => self.follow(event, &mut inputs.events),
            }
        }
    }

    /// Does what is due.
    fn tick(&mut self, resync_at: &mut Instant) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_due(Some(*resync_at)) {
            *resync_at = now + RESYNC_INTERVAL;
            self.engine.request_resync();
            self.resyncs += 1;
            if self.resyncs.is_multiple_of(RESYNCS_PER_FULL) {
                self.engine.request_full_resync();
            }
        }
        if is_due(self.look_at) {
            self.look_at = Some(now + LOOK_INTERVAL);
            self.engine.look_after_services();
            self.engine.settle();
        }
        if is_due(self.retry.as_ref().map(|retry| retry.at)) {
            self.engine.retry();
        }
        let is_repair = is_due(self.repair.at);
        if is_repair {
            self.repair.events.iter().for_each(|event| self.engine.noticed(event));
        }
        let outcome = self.cycle();
        if is_repair {
            self.repair.done(outcome.changes > outcome.failures.len());
        }
    }

    fn call(&mut self, call: CniCall) {
        let response = verbs::answer_call(&mut self.engine, &mut self.book, &call.request);
        call.reply.send(response);
        self.schedule_retry();
        self.announce();
    }

    fn follow(&mut self, first: SourceEvent, events: &mut mpsc::Receiver<SourceEvent>) {
        let mut next = Some(first);
        for _ in 0..EVENTS_PER_CYCLE_MAX {
            match next.take() {
                None => break,
                Some(SourceEvent::Changes(changes)) => self.write_all(changes),
                Some(SourceEvent::Triggered(triggers)) => self.attendant.triggered(&triggers),
                Some(SourceEvent::Connected { table }) => tracing::debug!(%table, "followed"),
                Some(SourceEvent::Disconnected { table, reason, hint }) => {
                    tracing::warn!(%table, reason, hint, "not followed; the data plane stays as it is");
                }
            }
            next = events.try_recv().ok();
        }
        // One was taken out beyond the bound: it belongs to this cycle as well.
        if let Some(SourceEvent::Changes(changes)) = next {
            self.write_all(changes);
        }
        self.cycle();
    }

    fn write_all(&mut self, changes: Vec<Change>) {
        self.attendant.queued(&changes);
        self.engine.write_all(changes);
    }

    /// Tells what lies around the data plane of a cycle that ran.
    fn attend(&mut self, outcome: &Outcome) {
        let node = self.engine.snapshot().nodes.get(&self.config.node);
        let known = (self.engine.services(), self.engine.health_checks(), node);
        if let (true, (Some(frontends), Some(health_checks), Some(node))) = (outcome.ran, known) {
            self.attendant.synced(&Synced {
                frontends,
                health_checks,
                node,
                link_addresses: &self.engine.surroundings().addresses,
                changes: outcome.changes,
                failures: outcome.failures.len(),
            });
        }
    }

    fn notice(&mut self, event: KernelEvent) {
        tracing::trace!(?event, "the kernel was changed by others");
        self.repair.wanted(event);
    }

    fn cycle(&mut self) -> Outcome {
        let begin = Instant::now();
        let outcome = self.engine.cycle();
        self.attend(&outcome);
        self.schedule_retry();
        if outcome.ran {
            let problems = self.engine.problem_count();
            self.engine.metrics.cycle(begin.elapsed(), self.engine.snapshot().revision, problems);
        }
        self.announce();
        outcome
    }

    /// What failed for the first time is tried again soon, and what fails time after time ever later.
    fn schedule_retry(&mut self) {
        let now = Instant::now();
        let is_news = self.engine.take_news();
        if !self.engine.wants_retry() {
            self.retry = None;
            return;
        }
        let delay = match &self.retry {
            Some(retry) if !is_news && retry.at > now => return,
            Some(retry) if !is_news => (retry.delay * 2).min(RETRY_DELAY_MAX),
            _ => RETRY_DELAY_MIN,
        };
        self.retry = Some(Retry { at: now + delay, delay });
    }

    /// Tells the publisher what the Node object should say of this node's end of the fabric.
    fn announce(&self) {
        let announcement = self.engine.announcement();
        self.tunnel.send_if_modified(|current| {
            let differs = *current != announcement;
            *current = announcement;
            differs
        });
    }
}

/// Carries requests of the administration socket to the loop.
struct Administration {
    config: AgentConfig,
    questions: mpsc::Sender<(Question, oneshot::Sender<AdminAnswer>)>,
    metrics: Arc<Metrics>,
}

impl AdminHandler for Administration {
    async fn handle(&self, request: AdminRequest) -> AdminAnswer {
        let path = request.path.as_str();
        match (&request.method, path) {
            (&Method::GET, "/healthz" | "/livez") => self.alive().await,
            (&Method::GET, "/readyz") => self.ask(Question::Ready).await,
            (&Method::GET, "/metrics") => AdminAnswer::text(StatusCode::OK, self.metrics.render()),
            _ if !request.trusted => AdminAnswer::text(StatusCode::NOT_FOUND, "only /healthz, /readyz and /metrics"),
            (&Method::GET, "/node") => self.ask(Question::Node).await,
            (&Method::GET, "/plan") => self.ask(Question::Plan).await,
            (&Method::POST, "/trace") => match serde_json::from_slice(&request.body) {
                Ok(question) => self.ask(Question::Trace(question)).await,
                Err(error) => AdminAnswer::text(StatusCode::BAD_REQUEST, error.to_string()),
            },
            (&Method::POST, "/probe") => self.probe(&request.body).await,
            (&Method::POST, "/observe") => self.observe(&request.body),
            (&Method::GET, _) => match (path.strip_prefix("/tables/"), path.strip_prefix("/programs/")) {
                (Some(table), _) => self.ask(Question::Table(table.to_owned())).await,
                (None, Some(room)) => self.ask(Question::Program(room.to_owned())).await,
                (None, None) => AdminAnswer::text(StatusCode::NOT_FOUND, format!("there is nothing at {path}")),
            },
            _ => AdminAnswer::text(StatusCode::NOT_FOUND, format!("there is nothing at {path}")),
        }
    }
}

impl Administration {
    async fn ask(&self, question: Question) -> AdminAnswer {
        let (reply, answer) = oneshot::channel();
        let gone = || AdminAnswer::text(StatusCode::SERVICE_UNAVAILABLE, "the agent's loop has ended");
        if self.questions.send((question, reply)).await.is_err() {
            return gone();
        }
        answer.await.unwrap_or_else(|_| gone())
    }

    /// An agent whose loop hangs is not healthy, however well its sockets answer.
    async fn alive(&self) -> AdminAnswer {
        tokio::time::timeout(HEALTH_TIMEOUT, self.ask(Question::Alive)).await.unwrap_or_else(|_| {
            let reason = format!("the agent's loop has not answered for {HEALTH_TIMEOUT:?}");
            AdminAnswer::text(StatusCode::SERVICE_UNAVAILABLE, reason)
        })
    }

    async fn probe(&self, body: &[u8]) -> AdminAnswer {
        let question: ProbeQuestion = match serde_json::from_slice(body) {
            Ok(question) => question,
            Err(error) => return AdminAnswer::text(StatusCode::BAD_REQUEST, error.to_string()),
        };
        let namespace = match question.from {
            portolan_trace::Ingress::Pod => match self.ask(Question::NamespaceOf(question.packet.source)).await {
                AdminAnswer::Whole(StatusCode::OK, _, path) => Some(String::from_utf8_lossy(&path).into_owned()),
                other => return other,
            },
            portolan_trace::Ingress::Node | portolan_trace::Ingress::Network => None,
        };
        let sent = tokio::task::spawn_blocking(move || watch::send_probe(namespace.as_deref(), &question)).await;
        match sent {
            Ok(Ok(answer)) => AdminAnswer::json(&answer),
            Ok(Err(reason)) => AdminAnswer::text(StatusCode::UNPROCESSABLE_ENTITY, reason),
            Err(error) => AdminAnswer::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }

    fn observe(&self, body: &[u8]) -> AdminAnswer {
        let question: ObserveQuestion = match serde_json::from_slice(body) {
            Ok(question) => question,
            Err(error) => return AdminAnswer::text(StatusCode::BAD_REQUEST, error.to_string()),
        };
        match watch::watch(self.config.node.clone(), question) {
            Ok(lines) => AdminAnswer::Lines(lines),
            Err(error) => AdminAnswer::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
}
