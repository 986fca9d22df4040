//! Intent to program. The cost of an update follows the ports that changed, and the chains that all Services
//! share only where a rule of them changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_intent::NodeView;
use portolan_intent::services::{FrontendUpdate, ServicesIntent};
use portolan_net::{Family, Port};

use super::base::{self, NODE_PORTS, SERVICES, Settings};
use super::port::{Built, Dispatch, Frontends, PortKey, build, endpoint_count};
use super::rules::PortEndpoints;
use super::{Chain, ChainName, Change, Program, Rule, Rules, TableKey, TableName};

/// With more endpoints than this, rules of endpoints have no comments, as with kube-proxy
/// (`largeClusterEndpointsThreshold`).
pub const COMMENTED_ENDPOINTS_MAX: usize = 1000;

/// The comment of the rule that kube-proxy, the kubelet and we have in `KUBE-FIREWALL`.
pub(super) const MARTIAN_COMMENT: &str = "block incoming localnet connections";

/// The program of an intent, from nothing.
pub fn compile(
    services: &ServicesIntent,
    health_ports: &BTreeSet<Port>,
    node_addresses: &[IpAddr],
    view: &NodeView,
) -> Program {
    let mut compiler = Compiler::new(view, &view.families());
    compiler.set_node_addresses(node_addresses);
    compiler.set_health_ports(health_ports);
    compiler.update_services(&FrontendUpdate::everything(services));
    compiler.program
}

/// Keeps the program current.
#[derive(Debug, Clone)]
pub struct Compiler {
    program: Program,
    families: Vec<Family>,
    settings: Settings,
    ports: BTreeMap<PortKey, PortState>,
    /// How many endpoints each family has.
    endpoints: BTreeMap<Family, usize>,
}

/// What is known of a port.
#[derive(Debug, Clone, Default)]
struct PortState {
    frontends: Frontends,
    /// The names of its own chains, without those of its endpoints.
    chains: Box<[ChainName]>,
    reachable: Option<Arc<PortEndpoints>>,
    dispatch: Box<[(Dispatch, Rule)]>,
    endpoints: usize,
}

/// Shared chains that have to be written again.
type Stale = BTreeSet<(Family, Dispatch)>;

impl Compiler {
    /// The program of a node without Services, in these families. Frontends of other families have no effect.
    pub fn new(view: &NodeView, families: &[Family]) -> Compiler {
        let settings = Settings::new(view);
        let mut program = Program::default();
        for family in families.iter().copied() {
            let tables = base::tables(family, &settings);
            program.tables.extend(tables.into_iter().map(|(name, table)| (TableKey { family, name }, table)));
        }
        let families = families.to_vec();
        Compiler { program, families, settings, ports: BTreeMap::new(), endpoints: BTreeMap::new() }
    }

    /// The program as of the last update.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Follows frontends that changed, and returns what the kernel must change, in order.
    pub fn update_services(&mut self, updates: &[FrontendUpdate]) -> Vec<Change> {
        let mut touched = BTreeSet::new();
        for update in updates.iter().filter(|update| self.families.contains(&update.key.family())) {
            if let Some(old) = &update.old {
                let port = PortKey::of(&update.key, old);
                if let Some(state) = self.ports.get_mut(&port) {
                    state.frontends.retain(|(key, _)| *key != update.key);
                }
                touched.insert(port);
            }
            if let Some(new) = &update.new {
                let port = PortKey::of(&update.key, new);
                let frontends = &mut self.ports.entry(port.clone()).or_default().frontends;
                match frontends.binary_search_by_key(&update.key, |(key, _)| *key) {
                    Ok(position) => frontends[position].1 = new.clone(),
                    Err(position) => {
                        frontends.reserve_exact(1);
                        frontends.insert(position, (update.key, new.clone()));
                    }
                }
                touched.insert(port);
            }
        }
        let flipped = self.count_endpoints(&touched);
        touched.extend(self.ports.keys().filter(|port| flipped.contains(&port.family)).cloned());
        self.rebuild(touched)
    }

    /// Lets health checks of load balancers in at these ports.
    pub fn set_health_ports(&mut self, ports: &BTreeSet<Port>) -> Vec<Change> {
        let rules = Rules::from(base::health_rules(ports));
        let mut changes = Vec::new();
        for family in self.families.clone() {
            self.fill(TableKey { family, name: TableName::Filter }, NODE_PORTS.into(), rules.clone(), &mut changes);
        }
        changes
    }

    /// Follows the addresses of this node; node ports answer at some of them.
    pub fn set_node_addresses(&mut self, addresses: &[IpAddr]) -> Vec<Change> {
        let before = self.settings.clone();
        self.settings.node_addresses = addresses.to_vec();
        let differs =
            |family: &Family| before.node_port_destinations(*family) != self.settings.node_port_destinations(*family);
        let families: BTreeSet<Family> = self.families.iter().copied().filter(differs).collect();
        self.rebuild_families(&families)
    }

    /// Follows the prefixes of this node's pods (`Node.spec.podCIDRs`), by which `detectLocalMode: NodeCIDR` tells
    /// pods.
    pub fn set_node_prefixes(&mut self, prefixes: &[IpNet]) -> Vec<Change> {
        let before = self.settings.clone();
        self.settings.node_prefixes = prefixes.to_vec();
        let differs = |family: &Family| before.is_pod(*family, true) != self.settings.is_pod(*family, true);
        let families: BTreeSet<Family> = self.families.iter().copied().filter(differs).collect();
        self.rebuild_families(&families)
    }

    fn rebuild_families(&mut self, families: &BTreeSet<Family>) -> Vec<Change> {
        let touched = self.ports.keys().filter(|port| families.contains(&port.family)).cloned().collect();
        let mut changes = self.rebuild(touched);
        for family in families {
            self.write_dispatch(*family, Dispatch::NatServices, &mut changes);
        }
        changes
    }

    /// Counts endpoints anew, and returns the families that have become large or small.
    fn count_endpoints(&mut self, touched: &BTreeSet<PortKey>) -> BTreeSet<Family> {
        let before = self.endpoints.clone();
        for port in touched {
            let Some(state) = self.ports.get_mut(port) else { continue };
            let count = endpoint_count(&state.frontends);
            let total = self.endpoints.entry(port.family).or_default();
            *total = *total + count - state.endpoints;
            state.endpoints = count;
        }
        let is_large = |counts: &BTreeMap<Family, usize>, family: &Family| {
            counts.get(family).is_some_and(|count| *count > COMMENTED_ENDPOINTS_MAX)
        };
        let flipped = |family: &Family| is_large(&before, family) != is_large(&self.endpoints, family);
        self.families.iter().copied().filter(flipped).collect()
    }

    /// Builds ports anew: first what comes, then the chains that lead there, then what goes.
    fn rebuild(&mut self, ports: BTreeSet<PortKey>) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut removed = Vec::new();
        let mut stale = Stale::new();
        for port in ports {
            let Some(mut state) = self.ports.remove(&port) else { continue };
            let comments = self.endpoints.get(&port.family).is_none_or(|count| *count <= COMMENTED_ENDPOINTS_MAX);
            let built = build(&port, &state.frontends, &self.settings, comments);
            let table = TableKey { family: port.family, name: TableName::Nat };
            self.replace(table, &mut state, built, port.family, &mut stale, &mut changes, &mut removed);
            if !state.frontends.is_empty() {
                self.ports.insert(port, state);
            }
        }
        for (family, dispatch) in stale {
            self.write_dispatch(family, dispatch, &mut changes);
        }
        for change in &removed {
            self.program.apply(change);
        }
        changes.extend(removed);
        changes
    }

    #[expect(clippy::too_many_arguments, reason = "they are all of one port, and of one list of changes")]
    fn replace(
        &mut self,
        table: TableKey,
        state: &mut PortState,
        built: Built,
        family: Family,
        stale: &mut Stale,
        changes: &mut Vec<Change>,
        removed: &mut Vec<Change>,
    ) {
        for dispatch in Dispatch::ALL {
            let of = |list: &[(Dispatch, Rule)]| -> Vec<Rule> {
                list.iter().filter(|(it, _)| *it == dispatch).map(|(_, rule)| rule.clone()).collect()
            };
            if of(&state.dispatch) != of(&built.dispatch) {
                stale.insert((family, dispatch));
            }
        }
        state.dispatch = built.dispatch.into();
        let of_endpoints = |port: &Option<Arc<PortEndpoints>>| -> BTreeSet<ChainName> {
            port.iter().flat_map(|port| port.backends.iter().map(|backend| port.chain(backend))).collect()
        };
        let mut old = of_endpoints(&state.reachable);
        old.extend(state.chains.iter().cloned());
        let gone = old.into_iter().filter(|name| !built.chains.contains_key(name));
        removed.extend(gone.map(|name| Change::DeleteChain(table, name)));
        let endpoints = of_endpoints(&built.endpoints);
        state.chains = built.chains.keys().filter(|name| !endpoints.contains(*name)).cloned().collect();
        state.reachable = built.endpoints;
        for (name, rules) in built.chains {
            self.fill(table, name, rules, changes);
        }
    }

    /// Writes a chain that all Services share.
    fn write_dispatch(&mut self, family: Family, dispatch: Dispatch, changes: &mut Vec<Change>) {
        let mut rules: Vec<Rule> = self
            .ports
            .iter()
            .filter(|(port, _)| port.family == family)
            .flat_map(|(_, state)| &*state.dispatch)
            .filter(|(it, _)| *it == dispatch)
            .map(|(_, rule)| rule.clone())
            .collect();
        let (name, chain) = dispatch.chain();
        if (name, chain) == (TableName::Nat, SERVICES) {
            rules.extend(self.settings.node_port_rules(family));
        }
        self.fill(TableKey { family, name }, chain.into(), rules.into(), changes);
    }

    /// Gives a chain its rules, if it has others.
    fn fill(&mut self, table: TableKey, chain: ChainName, rules: Rules, changes: &mut Vec<Change>) {
        let Some(chains) = self.program.tables.get_mut(&table).map(|table| &mut table.chains) else { return };
        if !chains.get(&chain).is_some_and(|found| found.rules.is_same(&rules)) {
            changes.push(Change::FillChain(table, chain.clone(), rules.clone()));
        }
        // Also where they are the same: what they were made of may go then.
        chains.insert(chain, Chain::of(rules));
    }
}
