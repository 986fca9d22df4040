//! Intent to program. The cost of an update follows what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use portolan_intent::NodeView;
use portolan_intent::masquerade::MasqueradeIntent;
use portolan_intent::services::{
    DetectLocal, Frontend, FrontendKey, FrontendKind, FrontendUpdate, NodePortAddresses, ProxySettings, ServicesIntent,
};
use portolan_net::{Family, ObjectKey, ObjectKind, Origin, Port, Protocol};
use portolan_state::by_halves;

use super::chains::{learn, learn_head, rule};
use super::elements::{Lists, Place, comment, elements_of, local_slot_offset, prefix_elements, scope_of, slot_offset};
use super::layout::{
    CLUSTER_IPS, CLUSTER_PREFIXES, HAIRPIN, LEARN, LEARN_OUTSIDE, NODE_PREFIXES, NODEPORT_IPS, Names, POD_PREFIXES,
    Scope, Settings, skeleton,
};
use super::{Change, Element, Key, Program, Rule, Statement, TableKey, TableName};

/// Numbers of backends that have their rule even if no frontend has so many, so that the common changes
/// touch no rule: with one they take the kernel 6 ms, without 0.03 ms. A new connection to a Service
/// looks at most at so many rules more, at less than 0.1 µs each.
const COMMON_BACKENDS_MAX: u32 = 16;

/// The program of an intent, from nothing, on a node with these addresses and pod prefixes.
pub fn compile(
    services: &ServicesIntent,
    masquerade: &MasqueradeIntent,
    node_addresses: &[IpAddr],
    node_prefixes: &[IpNet],
    view: &NodeView,
) -> Program {
    let mut compiler = Compiler::new(view, &view.families());
    compiler.update_services(&FrontendUpdate::everything(services));
    compiler.set_masquerade(masquerade);
    compiler.set_node_addresses(node_addresses);
    compiler.set_node_prefixes(node_prefixes);
    compiler.program
}

/// Keeps the program current.
#[derive(Debug, Clone)]
pub struct Compiler {
    program: Program,
    /// Those whose Services it serves, and those that it masquerades in.
    served: Vec<Family>,
    families: Vec<Family>,
    settings: Settings,
    /// How many frontends have that many backends: each number has one rule.
    counts: BTreeMap<(Balance, u32), usize>,
    /// How many frontends keep their clients for so many seconds: each number has its rules.
    timeouts: BTreeMap<(Family, Scope, Protocol, u32), usize>,
    /// How many frontends have this backend of this node.
    local_backends: BTreeMap<IpAddr, usize>,
    /// How many frontends of a Service have this cluster address.
    cluster_addresses: BTreeMap<(IpAddr, ObjectKey), usize>,
}

/// Elements that are to be put where there were none.
type Fresh = Vec<(TableKey, &'static str, Key, Element)>;

/// One of the balancing chains of a family: of a scope, for all clients or for those outside.
type Balance = (Family, Scope, bool);

/// What an update touched beside the frontend's own elements.
#[derive(Default)]
struct Touched {
    fresh: Fresh,
    balances: BTreeSet<Balance>,
    affinities: BTreeSet<Family>,
    hairpins: BTreeSet<IpAddr>,
    cluster_addresses: BTreeSet<IpAddr>,
}

impl Compiler {
    /// The program of a node without Services and without masquerading, in these families. Frontends
    /// of other families have no effect.
    pub fn new(view: &NodeView, families: &[Family]) -> Compiler {
        Compiler::with_settings(&view.proxy, &view.cluster_prefixes, families)
    }

    /// The program of a node whose Services another mode serves: masquerading of pods alone. Frontends have
    /// no effect, and a Services table that is observed goes.
    pub fn without_services(view: &NodeView, families: &[Family]) -> Compiler {
        let mut compiler = Compiler::new(view, families);
        compiler.program.tables.retain(|key, _| key.name != TableName::Services);
        compiler.served.clear();
        compiler
    }

    pub(super) fn with_settings(proxy: &ProxySettings, cluster_prefixes: &[IpNet], families: &[Family]) -> Compiler {
        let settings = Settings::of(proxy);
        let mut program = Program::default();
        for family in families.iter().copied() {
            for name in TableName::ALL {
                let key = TableKey { family, name };
                program.tables.insert(key, skeleton(key, &settings));
            }
        }
        let mut compiler = Compiler {
            program,
            served: families.to_vec(),
            families: families.to_vec(),
            settings,
            counts: BTreeMap::new(),
            timeouts: BTreeMap::new(),
            local_backends: BTreeMap::new(),
            cluster_addresses: BTreeMap::new(),
        };
        compiler.set_prefixes(CLUSTER_PREFIXES, cluster_prefixes, &Origin::configuration("clusterPrefixes"));
        compiler.set_node_addresses(&[]);
        for family in families.iter().copied() {
            for scope in Scope::ALL {
                compiler.write_balance((family, scope, false), &mut Vec::new());
                compiler.write_balance((family, scope, true), &mut Vec::new());
            }
        }
        compiler
    }

    /// The program as of the last update.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Follows frontends that changed, and returns what the kernel must change, in order.
    pub fn update_services(&mut self, updates: &[FrontendUpdate]) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut touched = Touched::default();
        for update in updates {
            if !self.served.contains(&update.key.family()) {
                continue;
            }
            let elements = |frontend: Option<&Frontend>| {
                frontend.map(|it| elements_of(&update.key, it, &self.settings)).unwrap_or_default()
            };
            let (old, new) = (elements(update.old.as_deref()), elements(update.new.as_deref()));
            if !old.is_empty() {
                self.settle(&mut touched.fresh);
            }
            self.replace_elements(update.key.family(), &old, new, &mut touched.fresh, &mut changes);
            self.follow_counts(update, &mut touched);
            self.follow_timeouts(update, &mut touched);
            self.follow_local_backends(update, &mut touched);
            self.follow_cluster_address(update, &mut touched);
        }
        for address in touched.hairpins {
            self.write_hairpin(address, &mut changes);
        }
        for address in touched.cluster_addresses {
            self.write_cluster_address(address, &mut touched.fresh, &mut changes);
        }
        self.settle(&mut touched.fresh);
        for balance in touched.balances {
            self.write_balance(balance, &mut changes);
        }
        for family in touched.affinities {
            self.write_affinity(family, &mut changes);
        }
        changes.sort_by_key(Change::phase);
        changes
    }

    /// Follows the masquerade intent, and returns what the kernel must change.
    pub fn set_masquerade(&mut self, intent: &MasqueradeIntent) -> Vec<Change> {
        let mut changes = Vec::new();
        for (name, prefixes) in [(POD_PREFIXES, &intent.sources), (CLUSTER_PREFIXES, &intent.except)] {
            for family in self.families.clone() {
                let table = TableKey { family, name: TableName::Masquerade };
                self.write_prefixes(table, name, prefixes, &intent.origin, &mut changes);
            }
        }
        sort_removals_first(&mut changes);
        changes
    }

    /// Follows the ports at which load balancers ask for this node's health. This room filters nothing that
    /// would have to let them in.
    pub fn set_health_ports(&mut self, _ports: &BTreeSet<Port>) -> Vec<Change> {
        Vec::new()
    }

    /// Follows this node's addresses, the first of each family being its primary one, and returns what the
    /// kernel must change: nothing where node ports answer at all of them, or at prefixes.
    pub fn set_node_addresses(&mut self, addresses: &[IpAddr]) -> Vec<Change> {
        let prefixes = match &self.settings.node_port_addresses {
            NodePortAddresses::All => return Vec::new(),
            NodePortAddresses::Primary => {
                let first = |family| addresses.iter().find(move |it| Family::of(**it) == family);
                Family::ALL.into_iter().filter_map(first).map(|address| IpNet::from(*address)).collect()
            }
            NodePortAddresses::Within(prefixes) => prefixes.clone(),
        };
        self.set_prefixes(NODEPORT_IPS, &prefixes, &Origin::configuration("nodePortAddresses"))
    }

    /// Follows this node's pod prefixes, and returns what the kernel must change: nothing unless pods are told
    /// by them.
    pub fn set_node_prefixes(&mut self, prefixes: &[IpNet]) -> Vec<Change> {
        if self.settings.detect_local != DetectLocal::NodePrefixes {
            return Vec::new();
        }
        self.set_prefixes(NODE_PREFIXES, prefixes, &Origin::configuration("detectLocalMode"))
    }

    fn set_prefixes(&mut self, set: &'static str, prefixes: &[IpNet], origin: &Origin) -> Vec<Change> {
        let mut changes = Vec::new();
        for family in self.served.clone() {
            self.write_prefixes(services_table(family), set, prefixes, origin, &mut changes);
        }
        sort_removals_first(&mut changes);
        changes
    }

    fn write_prefixes(
        &mut self,
        table: TableKey,
        name: &'static str,
        prefixes: &[IpNet],
        origin: &Origin,
        changes: &mut Vec<Change>,
    ) {
        let new = prefix_elements(prefixes, table.family, origin);
        let Some(set) = self.program.set_mut(table, name) else { return };
        super::diff::elements(table, &name.into(), &set.elements, &new, changes);
        set.elements = new;
    }

    fn replace_elements(
        &mut self,
        family: Family,
        old: &BTreeMap<Place, Element>,
        new: BTreeMap<Place, Element>,
        fresh: &mut Fresh,
        changes: &mut Vec<Change>,
    ) {
        let table = services_table(family);
        for (set, key) in old.keys().filter(|place| !new.contains_key(*place)) {
            self.remove(table, set, *key, changes);
            if let Some(clients) = clients_of(set, key) {
                // Those outside may have had it when those inside had not, and the other way round.
                let change = Change::ForgetClients { table, clients: clients.into(), key: *key };
                if !changes.contains(&change) {
                    changes.push(change);
                }
            }
        }
        for ((set, key), element) in new {
            let before = old.get(&(set, key));
            self.put((table, set, key, element), before, fresh, changes);
        }
    }

    /// Puts an element where there was another one before, or none. Then it is only noted.
    fn put(
        &mut self,
        (table, name, key, element): (TableKey, &'static str, Key, Element),
        before: Option<&Element>,
        fresh: &mut Fresh,
        changes: &mut Vec<Change>,
    ) {
        let Some(set) = self.program.set_mut(table, name) else { return };
        if before.is_none_or(|before| !before.is_same(&element)) {
            let (element, replaces) = (element.clone(), before.is_some());
            changes.push(Change::PutElement { table, set: name.into(), key, element, replaces });
        }
        if before.is_none() {
            fresh.push((table, name, key, element));
        } else if before != Some(&element) {
            set.elements.insert(key, element);
        }
    }

    /// Puts what was noted, in an order that fills maps well.
    fn settle(&mut self, fresh: &mut Fresh) {
        fresh.sort_unstable_by_key(|(table, name, key, _)| (*table, *name, *key));
        for (table, name, key, element) in by_halves(fresh.drain(..)) {
            if let Some(set) = self.program.set_mut(table, name) {
                set.elements.insert(key, element);
            }
        }
    }

    fn remove(&mut self, table: TableKey, name: &str, key: Key, changes: &mut Vec<Change>) {
        if let Some(set) = self.program.set_mut(table, name)
            && set.elements.remove(&key).is_some()
        {
            changes.push(Change::RemoveElement { table, set: name.into(), key });
        }
    }

    fn follow_counts(&mut self, update: &FrontendUpdate, touched: &mut Touched) {
        let (family, scope) = (update.key.family(), scope_of(&update.key));
        let counts = |frontend: Option<&Frontend>| frontend.map_or([0; 2], |it| Lists::of(&update.key, it).counts());
        let (old, new) = (counts(update.old.as_deref()), counts(update.new.as_deref()));
        for ((old, new), is_outside) in old.into_iter().zip(new).zip([false, true]) {
            let balance = (family, scope, is_outside);
            let place = |count: u32| (count > 0).then_some((balance, count));
            if move_count(&mut self.counts, place(old), place(new)) {
                touched.balances.insert(balance);
            }
        }
    }

    fn follow_timeouts(&mut self, update: &FrontendUpdate, touched: &mut Touched) {
        let (family, scope) = (update.key.family(), scope_of(&update.key));
        let place = |frontend: Option<&Frontend>| {
            // Where nobody serves, nobody is remembered.
            let frontend = frontend.filter(|it| it.endpoints.anywhere)?;
            frontend.affinity.map(|timeout| (family, scope, update.key.protocol(), timeout.seconds()))
        };
        if move_count(&mut self.timeouts, place(update.old.as_deref()), place(update.new.as_deref())) {
            touched.affinities.insert(family);
        }
    }

    fn follow_local_backends(&mut self, update: &FrontendUpdate, touched: &mut Touched) {
        let local = |frontend: Option<&Frontend>| -> BTreeSet<IpAddr> {
            let Some(lists) = frontend.map(|it| Lists::of(&update.key, it)) else { return BTreeSet::new() };
            let all = lists.main.into_iter().chain(lists.outside.into_iter().flatten());
            all.filter(|backend| backend.local).map(|backend| backend.address).collect()
        };
        let (old, new) = (local(update.old.as_deref()), local(update.new.as_deref()));
        for address in new.difference(&old) {
            *self.local_backends.entry(*address).or_insert(0) += 1;
            touched.hairpins.insert(*address);
        }
        for address in old.difference(&new) {
            if let Some(users) = self.local_backends.get_mut(address) {
                *users = users.saturating_sub(1);
            }
            touched.hairpins.insert(*address);
        }
    }

    fn follow_cluster_address(&mut self, update: &FrontendUpdate, touched: &mut Touched) {
        let FrontendKey::Address { address, .. } = update.key else { return };
        let place = |frontend: Option<&Frontend>| {
            let frontend = frontend.filter(|it| it.kind == FrontendKind::ClusterIp)?;
            Some((address, frontend.origin.key.clone()))
        };
        if move_count(&mut self.cluster_addresses, place(update.old.as_deref()), place(update.new.as_deref())) {
            touched.cluster_addresses.insert(address);
        }
    }

    /// Brings the pairs up to date. It comes after all updates, since a backend may leave one frontend
    /// and enter another in the same step.
    fn write_hairpin(&mut self, address: IpAddr, changes: &mut Vec<Change>) {
        let table = services_table(Family::of(address));
        let key = Key::AddressPair(address, address);
        if self.local_backends.get(&address).is_some_and(|users| *users > 0) {
            let Some(set) = self.program.set_mut(table, HAIRPIN) else { return };
            if set.elements.insert(key, Element::default()).is_none() {
                let (set, element) = (HAIRPIN.into(), Element::default());
                changes.push(Change::PutElement { table, set, key, element, replaces: false });
            }
        } else {
            self.local_backends.remove(&address);
            self.remove(table, HAIRPIN, key, changes);
        }
    }

    /// An address that belongs to a Service, so that ports which it does not serve are refused. If several
    /// Services claim it, it carries the name of the first.
    fn write_cluster_address(&mut self, address: IpAddr, fresh: &mut Fresh, changes: &mut Vec<Change>) {
        let table = services_table(Family::of(address));
        let key = Key::Address(address);
        let first = (address, ObjectKey::new("", ""));
        let holder = self.cluster_addresses.range(first..).next().filter(|((it, _), _)| *it == address);
        let Some(((_, service), _)) = holder else { return self.remove(table, CLUSTER_IPS, key, changes) };
        let origin = Origin::field(ObjectKind::Service, service.clone(), "spec.clusterIPs");
        let element = Element { value: None, comment: Some(comment(service.to_string())), origin: Some(origin) };
        let before = self.program.set_mut(table, CLUSTER_IPS).and_then(|set| set.elements.get(&key).cloned());
        self.put((table, CLUSTER_IPS, key, element), before.as_ref(), fresh, changes);
    }

    fn write_balance(&mut self, balance: Balance, changes: &mut Vec<Change>) {
        let (family, scope, is_outside) = balance;
        let names = scope.names();
        let chain = if is_outside { names.balance_local } else { names.balance };
        let offset = if is_outside { local_slot_offset } else { slot_offset };
        let first = (balance, COMMON_BACKENDS_MAX + 1);
        let rare = self.counts.range(first..=(balance, u32::MAX)).map(|((_, slots), _)| *slots);
        let rules = (1..=COMMON_BACKENDS_MAX).chain(rare).map(|slots| {
            let map = names.endpoints.into();
            rule(Statement::Balance { key: names.key, slots, offset: offset(slots), map })
        });
        let rules = rules.collect();
        self.write_rules(family, chain, rules, changes);
    }

    /// What remembers clients is there while a Service asks for it.
    fn write_affinity(&mut self, family: Family, changes: &mut Vec<Change>) {
        let rules = |is_outside| -> Vec<Rule> {
            let used = self.timeouts.keys().filter(|(it, ..)| *it == family);
            used.flat_map(|(_, scope, protocol, seconds)| learn(scope.names(), *protocol, *seconds, is_outside))
                .collect()
        };
        let (mut inside, outside) = (rules(false), rules(true));
        if !inside.is_empty() {
            inside.insert(0, learn_head(&self.settings));
        }
        self.write_rules(family, LEARN_OUTSIDE, outside, changes);
        self.write_rules(family, LEARN, inside, changes);
    }

    fn write_rules(&mut self, family: Family, name: &'static str, rules: Vec<Rule>, changes: &mut Vec<Change>) {
        let table = services_table(family);
        let chain = self.program.tables.get_mut(&table).and_then(|table| table.chains.get_mut(name));
        if let Some(chain) = chain
            && chain.rules != rules
        {
            super::change::rule_changes(table, &name.into(), &chain.rules, &rules, changes);
            chain.rules = rules;
        }
    }
}

/// The map of clients that an endpoint's end is told to.
fn clients_of(set: &str, key: &Key) -> Option<&'static str> {
    if !matches!(key, Key::FrontendEndpoint(..) | Key::NodePortEndpoint(..)) {
        return None;
    }
    let ends = |names: &Names| [names.affinity_endpoints, names.affinity_outside_endpoints].contains(&set);
    Scope::ALL.map(Scope::names).into_iter().find(|names| ends(names)).map(|names| names.affinity_clients)
}

fn services_table(family: Family) -> TableKey {
    TableKey { family, name: TableName::Services }
}

/// An interval that shrinks must be gone before one that overlaps it comes.
fn sort_removals_first(changes: &mut [Change]) {
    changes.sort_by_key(|change| matches!(change, Change::PutElement { .. }));
}

/// Counts one user less of one thing and one more of another, and says whether a first one came or a last
/// one went.
fn move_count<K: Ord + Clone>(counts: &mut BTreeMap<K, usize>, old: Option<K>, new: Option<K>) -> bool {
    if old == new {
        return false;
    }
    let mut is_turn = false;
    if let Some(new) = new {
        let users = counts.entry(new).or_insert(0);
        *users += 1;
        is_turn |= *users == 1;
    }
    if let Some(old) = old
        && let Some(users) = counts.get_mut(&old)
    {
        *users = users.saturating_sub(1);
        if *users == 0 {
            counts.remove(&old);
            is_turn = true;
        }
    }
    is_turn
}
