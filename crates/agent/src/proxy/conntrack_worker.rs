//! The thread that lists flows and cuts the stale ones, beside the loop: a table of many flows must not hold
//! rules back.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use portolan_intent::services::{NodePortAddresses, ProxySettings};
use portolan_kernel::KernelError;
use portolan_kernel::conntrack::{Conntrack, Entry, local_addresses};
use portolan_net::{Family, NodeName};
use portolan_state::{ObjectRef, Problem};

use super::board::ProblemBoard;
use super::conntrack::Judge;
use super::limits::{CONNTRACK_ATTEMPTS_MAX, CONNTRACK_RETRY};
use crate::metrics::Metrics;

/// The part's name on the board.
const PART: &str = "conntrack";

/// The kernel's table of flows, as the worker sees it.
pub trait FlowTable {
    /// The UDP flows of a family that are asked for.
    fn select(&mut self, family: Family, wanted: &mut dyn FnMut(&Entry) -> bool) -> Result<Vec<Entry>, KernelError>;
    /// Cuts flows; returns how many there still were, and what was refused.
    fn delete(&mut self, flows: &[Entry]) -> (usize, Vec<(Entry, KernelError)>);
    /// Every address of this node.
    fn addresses(&mut self) -> Result<BTreeSet<IpAddr>, KernelError>;
}

impl FlowTable for Conntrack {
    fn select(&mut self, family: Family, wanted: &mut dyn FnMut(&Entry) -> bool) -> Result<Vec<Entry>, KernelError> {
        self.select_udp(family, wanted)
    }

    fn delete(&mut self, flows: &[Entry]) -> (usize, Vec<(Entry, KernelError)>) {
        Conntrack::delete(self, flows)
    }

    fn addresses(&mut self) -> Result<BTreeSet<IpAddr>, KernelError> {
        local_addresses()
    }
}

/// Where node ports answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodePortPlaces {
    /// The configuration.
    pub settings: ProxySettings,
    /// The addresses of the Node object; the first of a family is the primary.
    pub node: Vec<IpAddr>,
}

impl NodePortPlaces {
    /// Those of this node's addresses at which node ports answer.
    pub fn among(&self, local: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        let answers = |address: &IpAddr| match &self.settings.node_port_addresses {
            _ if address.is_loopback() => {
                self.settings.localhost_node_ports && *address == IpAddr::V4(Ipv4Addr::LOCALHOST)
            }
            NodePortAddresses::All => true,
            NodePortAddresses::Primary => {
                let primary = self.node.iter().find(|it| Family::of(**it) == Family::of(*address));
                primary == Some(address)
            }
            NodePortAddresses::Within(prefixes) => prefixes.iter().any(|prefix| prefix.contains(address)),
        };
        local.iter().copied().filter(|address| answers(address)).collect()
    }
}

/// Looks through the flows of each family once, and cuts what is stale. Returns how many flows that were.
pub fn reconcile(
    table: &mut impl FlowTable,
    judge: &Judge,
    places: &NodePortPlaces,
    metrics: &Metrics,
) -> Result<usize, KernelError> {
    let node_addresses = places.among(&table.addresses()?);
    let mut cut = 0;
    for family in judge.families() {
        let begin = Instant::now();
        let stale = table.select(*family, &mut |flow| judge.is_stale(flow, &node_addresses))?;
        let (deleted, refused) = table.delete(&stale);
        cut += deleted;
        metrics.proxy.conntrack_reconciled(*family, begin.elapsed(), deleted);
        if let Some((_, error)) = refused.into_iter().next() {
            return Err(error);
        }
    }
    Ok(cut)
}

#[derive(Debug, Default)]
struct Mailbox {
    work: Option<(Judge, NodePortPlaces)>,
    is_closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    mailbox: Mutex<Mailbox>,
    wake: Condvar,
}

impl Shared {
    /// What a thread left behind that ended early is still true.
    fn lock(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The worker's handle. The thread ends when it is dropped.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
}

impl Worker {
    /// Starts the thread, in the network namespace of the caller.
    pub(super) fn start(
        node: NodeName,
        metrics: Arc<Metrics>,
        board: Arc<ProblemBoard>,
    ) -> Result<Worker, std::io::Error> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        std::thread::Builder::new()
            .name("conntrack".to_owned())
            .spawn(move || Worker::run(&theirs, &node, &metrics, &board))?;
        Ok(Worker { shared })
    }

    /// Hands work over. What waits already is done together with it, so that at most one waits.
    pub(super) fn judge(&self, judge: Judge, places: NodePortPlaces) {
        let mut mailbox = self.shared.lock();
        let judge = match mailbox.work.take() {
            Some((earlier, _)) => earlier.followed_by(judge),
            None => judge,
        };
        mailbox.work = Some((judge, places));
        self.shared.wake.notify_one();
    }

    fn run(shared: &Shared, node: &NodeName, metrics: &Metrics, board: &ProblemBoard) {
        let mut attempts = 0;
        while let Some((judge, places)) = next(shared) {
            match Conntrack::open().and_then(|mut table| reconcile(&mut table, &judge, &places, metrics)) {
                Ok(cut) => {
                    tracing::debug!(cut, "stale UDP flows were cut");
                    attempts = 0;
                    board.set(PART, Vec::new());
                }
                Err(error) => {
                    attempts += 1;
                    board.set(PART, vec![problem(node, &error)]);
                    if attempts < CONNTRACK_ATTEMPTS_MAX {
                        give_back(shared, judge, places);
                    } else {
                        attempts = 0;
                    }
                }
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.wake.notify_one();
    }
}

/// Waits for work; `None` when no more comes.
fn next(shared: &Shared) -> Option<(Judge, NodePortPlaces)> {
    let mut mailbox = shared.lock();
    loop {
        if mailbox.is_closed {
            return None;
        }
        if let Some(work) = mailbox.work.take() {
            return Some(work);
        }
        mailbox = shared.wake.wait(mailbox).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Keeps work for another attempt, after a while or with what comes next.
fn give_back(shared: &Shared, judge: Judge, places: NodePortPlaces) {
    let mailbox = shared.lock();
    let waited = shared.wake.wait_timeout_while(mailbox, CONNTRACK_RETRY, |it| it.work.is_none() && !it.is_closed);
    let (mut mailbox, _) = waited.unwrap_or_else(PoisonError::into_inner);
    let work = match mailbox.work.take() {
        Some((later, places)) => (judge.followed_by(later), places),
        None => (judge, places),
    };
    mailbox.work = Some(work);
}

fn problem(node: &NodeName, error: &KernelError) -> Problem {
    Problem {
        object: ObjectRef::Node(node.clone()),
        field: "conntrack".into(),
        reason: format!("stale UDP flows cannot be cut, and go on to endpoints that are gone: {error}").into(),
        hint: "it is tried again; load the module nf_conntrack_netlink, and give the agent CAP_NET_ADMIN".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::Tracker;
    use ipnet::IpNet;
    use portolan_intent::services::ServicesIntent;

    fn addresses(texts: &[&str]) -> BTreeSet<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn node_ports_answer_where_the_configuration_says() {
        let local = addresses(&["127.0.0.1", "::1", "192.0.2.1", "198.51.100.1", "10.42.1.1", "2001:db8::1"]);
        let places = |node_port_addresses, localhost_node_ports| NodePortPlaces {
            settings: ProxySettings { node_port_addresses, localhost_node_ports, ..ProxySettings::default() },
            node: vec!["192.0.2.1".parse().unwrap(), "198.51.100.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        };
        let among = |addresses, localhost| places(addresses, localhost).among(&local);
        let all = ["192.0.2.1", "198.51.100.1", "10.42.1.1", "2001:db8::1"];
        assert_eq!(among(NodePortAddresses::All, false), addresses(&all));
        assert_eq!(among(NodePortAddresses::Primary, false), addresses(&["192.0.2.1", "2001:db8::1"]));
        let prefixes: Vec<IpNet> = vec!["198.51.100.0/24".parse().unwrap(), "127.0.0.0/8".parse().unwrap()];
        assert_eq!(among(NodePortAddresses::Within(prefixes.clone()), false), addresses(&["198.51.100.1"]));
        assert_eq!(among(NodePortAddresses::Within(prefixes), true), addresses(&["127.0.0.1", "198.51.100.1"]));
    }

    /// A table of flows in memory.
    #[derive(Default)]
    struct Table {
        flows: Vec<Entry>,
        is_unreadable: bool,
        is_refusing: bool,
    }

    impl FlowTable for Table {
        fn select(
            &mut self,
            family: Family,
            wanted: &mut dyn FnMut(&Entry) -> bool,
        ) -> Result<Vec<Entry>, KernelError> {
            let is_of_family = |flow: &&Entry| Family::of(flow.original.source.ip()) == family;
            if self.is_unreadable {
                return Err(KernelError::Overrun);
            }
            Ok(self.flows.iter().filter(is_of_family).filter(|flow| wanted(flow)).copied().collect())
        }

        fn delete(&mut self, flows: &[Entry]) -> (usize, Vec<(Entry, KernelError)>) {
            if self.is_refusing {
                return (0, flows.iter().map(|flow| (*flow, KernelError::Overrun)).collect());
            }
            self.flows.retain(|flow| !flows.contains(flow));
            (flows.len(), Vec::new())
        }

        fn addresses(&mut self) -> Result<BTreeSet<IpAddr>, KernelError> {
            Ok(addresses(&["192.0.2.1"]))
        }
    }

    /// A flow to a Service address that was translated, with that number.
    fn flow(id: u32, client: &str, service: &str, endpoint: &str) -> Entry {
        use portolan_kernel::conntrack::Tuple;
        let socket = |text: &str| text.parse().unwrap();
        let original = Tuple { source: socket(client), destination: socket(service) };
        let reply = Tuple { source: socket(endpoint), destination: socket(client) };
        Entry { original, reply, is_answered: true, id, zone: 0 }
    }

    /// A judge that has just started: all that is translated in the Services' prefixes is stale.
    fn judge() -> Judge {
        let prefixes = ["10.96.0.0/16", "fd96::/64"].map(|prefix| prefix.parse().unwrap());
        Tracker::new(prefixes.to_vec()).take(&ServicesIntent::new()).unwrap()
    }

    fn table() -> Table {
        let flows = vec![
            flow(1, "10.42.1.7:1024", "10.96.0.10:53", "10.42.1.2:53"),
            flow(2, "[fd42::7]:1024", "[fd96::10]:53", "[fd42::2]:53"),
            flow(3, "10.42.1.7:1024", "203.0.113.1:53", "10.42.1.2:53"),
        ];
        Table { flows, ..Table::default() }
    }

    #[test]
    fn both_families_are_cut_and_counted() {
        let (mut table, metrics) = (table(), Metrics::new());
        assert_eq!(reconcile(&mut table, &judge(), &NodePortPlaces::default(), &metrics), Ok(2));
        assert_eq!(table.flows.iter().map(|flow| flow.id).collect::<Vec<_>>(), [3]);
        let text = metrics.render();
        for family in ["IPv4", "IPv6"] {
            let line = format!("kubeproxy_conntrack_reconciler_deleted_entries_total{{ip_family=\"{family}\"}} 1");
            assert!(text.contains(&line), "{text}");
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error_and_can_be_tried_again() {
        let (mut table, judge, metrics) = (table(), judge(), Metrics::new());
        let places = NodePortPlaces::default();
        table.is_unreadable = true;
        assert_eq!(reconcile(&mut table, &judge, &places, &metrics), Err(KernelError::Overrun));
        (table.is_unreadable, table.is_refusing) = (false, true);
        assert_eq!(reconcile(&mut table, &judge, &places, &metrics), Err(KernelError::Overrun));
        table.is_refusing = false;
        assert_eq!(reconcile(&mut table, &judge, &places, &metrics), Ok(2));
    }

    #[test]
    fn what_waits_is_done_together_and_a_closed_mailbox_ends_the_thread() {
        let worker = Worker { shared: Arc::default() };
        let shared = worker.shared.clone();
        worker.judge(judge(), NodePortPlaces::default());
        worker.judge(Tracker::new(Vec::new()).take(&ServicesIntent::new()).unwrap(), NodePortPlaces::default());
        let (merged, _) = next(&shared).unwrap();
        assert!(merged.is_stale(&table().flows[0], &BTreeSet::new()), "what the first knew is not lost");
        assert!(shared.lock().work.is_none(), "at most one waits");
        drop(worker);
        assert!(next(&shared).is_none());
    }
}
