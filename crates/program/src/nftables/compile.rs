//! Intent to program. The cost of an update follows what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use portolan_intent::NodeView;
use portolan_intent::masquerade::MasqueradeIntent;
use portolan_intent::services::{Backend, Frontend, FrontendKey, FrontendUpdate, Masquerade, ServicesIntent};
use portolan_net::{Family, Origin};

use super::layout::{
    BALANCE, BALANCE_NODEPORTS, CLUSTER_PREFIXES, ENDPOINTS, HAIRPIN, MASQUERADE_IPS, MASQUERADE_NODEPORTS,
    NO_ENDPOINT_NODEPORTS, NO_ENDPOINT_SERVICES, NODEPORT_ENDPOINTS, POD_PREFIXES, SERVICE_IPS, SERVICE_NODEPORTS,
    balance_head, skeleton,
};
use super::{Change, Element, Key, KeyExpression, Program, Rule, Set, Statement, TableKey, TableName};

/// The most backends that one frontend uses; the first ones by address serve.
///
/// A frontend with N backends uses the slots from N × 10,000 on, so that a person can read a slot:
/// 30002 is the last of three.
pub const BACKENDS_MAX: u32 = 10_000;

/// Numbers of backends that have their rule even if no frontend has so many, so that the common changes
/// touch no rule: with one they take the kernel 6 ms, without 0.03 ms. A new connection to a Service
/// looks at most at so many rules more, at less than 0.1 µs each.
const COMMON_BACKENDS_MAX: u32 = 16;

/// The longest comment, in bytes: what `nft` reads back without complaint (`NFTNL_UDATA_COMMENT_MAXLEN`).
const COMMENT_LENGTH_MAX: usize = 127;

/// The first slot of frontends with that many backends.
pub fn slot_offset(backends: u32) -> u32 {
    backends.saturating_mul(BACKENDS_MAX)
}

/// The families of a cluster: those that it has prefixes of.
pub fn families_of(view: &NodeView) -> Vec<Family> {
    let has = |family: Family| {
        view.cluster_prefixes.iter().chain(&view.service_prefixes).any(|prefix| Family::of_prefix(prefix) == family)
    };
    Family::ALL.into_iter().filter(|family| has(*family)).collect()
}

/// The program of an intent, from nothing.
pub fn compile(services: &ServicesIntent, masquerade: &MasqueradeIntent, view: &NodeView) -> Program {
    let mut compiler = Compiler::new(view, &families_of(view));
    let updates: Vec<FrontendUpdate> = services
        .iter()
        .map(|(key, frontend)| FrontendUpdate { key: *key, old: None, new: Some(frontend.clone()) })
        .collect();
    compiler.update_services(&updates);
    compiler.set_masquerade(masquerade);
    compiler.program
}

/// Keeps the program current.
#[derive(Debug, Clone)]
pub struct Compiler {
    program: Program,
    families: Vec<Family>,
    /// How many frontends have that many backends: each number has one rule.
    counts: BTreeMap<(Family, Scope, u32), usize>,
    /// How many frontends have this backend of this node.
    local_backends: BTreeMap<IpAddr, usize>,
}

/// Which of the two balancing chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Scope {
    Address,
    NodePort,
}

/// Which element, in which set of the Services table.
type Place = (&'static str, Key);

impl Compiler {
    /// The program of a node without Services and without masquerading, in these families. Frontends
    /// of other families have no effect.
    pub fn new(view: &NodeView, families: &[Family]) -> Compiler {
        Compiler::with_prefixes(&view.cluster_prefixes, families)
    }

    pub(super) fn with_prefixes(cluster_prefixes: &[IpNet], families: &[Family]) -> Compiler {
        let mut program = Program::default();
        for family in families.iter().copied() {
            for name in TableName::ALL {
                let key = TableKey { family, name };
                program.tables.insert(key, skeleton(key));
            }
            let prefixes = prefix_elements(cluster_prefixes, family, &Origin::configuration("clusterPrefixes"));
            if let Some(set) = program.set_mut(services_table(family), CLUSTER_PREFIXES) {
                set.elements = prefixes;
            }
        }
        let (counts, local_backends) = (BTreeMap::new(), BTreeMap::new());
        let mut compiler = Compiler { program, families: families.to_vec(), counts, local_backends };
        for family in families.iter().copied() {
            compiler.write_balance(family, Scope::Address, &mut Vec::new());
            compiler.write_balance(family, Scope::NodePort, &mut Vec::new());
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
        let mut touched = BTreeSet::new();
        let mut moved = BTreeSet::new();
        for update in updates {
            if !self.families.contains(&update.key.family()) {
                continue;
            }
            let old = update.old.as_deref().map(|it| elements_of(&update.key, it)).unwrap_or_default();
            let new = update.new.as_deref().map(|it| elements_of(&update.key, it)).unwrap_or_default();
            self.replace_elements(update.key.family(), &old, new, &mut changes);
            self.follow_counts(update, &mut touched);
            self.follow_local_backends(update, &mut moved);
        }
        for address in moved {
            self.write_hairpin(address, &mut changes);
        }
        for (family, scope) in touched {
            self.write_balance(family, scope, &mut changes);
        }
        changes.sort_by_key(Change::phase);
        changes
    }

    /// Follows the masquerade intent, and returns what the kernel must change.
    pub fn set_masquerade(&mut self, intent: &MasqueradeIntent) -> Vec<Change> {
        let mut changes = Vec::new();
        for family in self.families.clone() {
            let table = TableKey { family, name: TableName::Masquerade };
            for (name, prefixes) in [(POD_PREFIXES, &intent.sources), (CLUSTER_PREFIXES, &intent.except)] {
                let new = prefix_elements(prefixes, family, &intent.origin);
                let Some(set) = self.program.set_mut(table, name) else { continue };
                super::diff::elements(table, &name.into(), &set.elements, &new, &mut changes);
                set.elements = new;
            }
        }
        // An interval that shrinks must be gone before one that overlaps it comes.
        changes.sort_by_key(|change| matches!(change, Change::PutElement { .. }));
        changes
    }

    fn replace_elements(
        &mut self,
        family: Family,
        old: &BTreeMap<Place, Element>,
        new: BTreeMap<Place, Element>,
        changes: &mut Vec<Change>,
    ) {
        let table = services_table(family);
        for (set, key) in old.keys().filter(|place| !new.contains_key(*place)) {
            self.remove(table, set, *key, changes);
        }
        for (place, element) in new {
            let before = old.get(&place);
            let (name, key) = place;
            let Some(set) = self.program.set_mut(table, name) else { continue };
            if before.is_none_or(|before| !before.is_same(&element)) {
                let (element, replaces) = (element.clone(), before.is_some());
                changes.push(Change::PutElement { table, set: name.into(), key, element, replaces });
            }
            if before != Some(&element) {
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

    fn follow_counts(&mut self, update: &FrontendUpdate, touched: &mut BTreeSet<(Family, Scope)>) {
        let (family, scope) = (update.key.family(), scope_of(&update.key));
        let count = |frontend: &Arc<Frontend>| u32::try_from(backends_of(&update.key, frontend).count()).unwrap_or(0);
        let old = update.old.as_ref().map(count).filter(|count| *count > 0);
        let new = update.new.as_ref().map(count).filter(|count| *count > 0);
        if old == new {
            return;
        }
        if let Some(users) = new.map(|new| self.counts.entry((family, scope, new)).or_insert(0)) {
            *users += 1;
            if *users == 1 {
                touched.insert((family, scope));
            }
        }
        if let Some(old) = old
            && let Some(users) = self.counts.get_mut(&(family, scope, old))
        {
            *users = users.saturating_sub(1);
            if *users == 0 {
                self.counts.remove(&(family, scope, old));
                touched.insert((family, scope));
            }
        }
    }

    fn follow_local_backends(&mut self, update: &FrontendUpdate, moved: &mut BTreeSet<IpAddr>) {
        let local = |frontend: Option<&Frontend>| -> BTreeSet<IpAddr> {
            let backends = frontend.into_iter().flat_map(|frontend| backends_of(&update.key, frontend));
            backends.filter(|backend| backend.local).map(|backend| backend.address).collect()
        };
        let (old, new) = (local(update.old.as_deref()), local(update.new.as_deref()));
        for address in new.difference(&old) {
            *self.local_backends.entry(*address).or_insert(0) += 1;
            moved.insert(*address);
        }
        for address in old.difference(&new) {
            if let Some(users) = self.local_backends.get_mut(address) {
                *users = users.saturating_sub(1);
            }
            moved.insert(*address);
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

    fn write_balance(&mut self, family: Family, scope: Scope, changes: &mut Vec<Change>) {
        let (name, map, key) = match scope {
            Scope::Address => (BALANCE, ENDPOINTS, KeyExpression::Frontend),
            Scope::NodePort => (BALANCE_NODEPORTS, NODEPORT_ENDPOINTS, KeyExpression::NodePort),
        };
        let mut rules = balance_head(key);
        let first = (family, scope, COMMON_BACKENDS_MAX + 1);
        let rare = self.counts.range(first..=(family, scope, u32::MAX)).map(|((.., slots), _)| *slots);
        for slots in (1..=COMMON_BACKENDS_MAX).chain(rare) {
            let statement = Statement::Balance { key, slots, offset: slot_offset(slots), map: map.into() };
            rules.push(Rule { statements: vec![statement], ..Rule::default() });
        }
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

fn services_table(family: Family) -> TableKey {
    TableKey { family, name: TableName::Services }
}

fn scope_of(key: &FrontendKey) -> Scope {
    match key {
        FrontendKey::Address { .. } => Scope::Address,
        FrontendKey::NodePort { .. } => Scope::NodePort,
    }
}

/// The backends that serve: of the frontend's family, and no more than fit.
fn backends_of<'a>(key: &FrontendKey, frontend: &'a Frontend) -> impl Iterator<Item = &'a Backend> {
    let family = key.family();
    frontend
        .endpoints
        .of(frontend.policy)
        .iter()
        .filter(move |it| Family::of(it.address) == family)
        .take(BACKENDS_MAX as usize)
}

/// All elements that one frontend needs and no other frontend shares.
fn elements_of(key: &FrontendKey, frontend: &Frontend) -> BTreeMap<Place, Element> {
    let (gate, refused, masqueraded, element_key) = match *key {
        FrontendKey::Address { address, protocol, port } => {
            (SERVICE_IPS, NO_ENDPOINT_SERVICES, MASQUERADE_IPS, Key::Frontend(address, protocol, port))
        }
        FrontendKey::NodePort { protocol, port, .. } => {
            (SERVICE_NODEPORTS, NO_ENDPOINT_NODEPORTS, MASQUERADE_NODEPORTS, Key::NodePort(protocol, port))
        }
    };
    let element = Element { value: None, comment: Some(comment_of(frontend)), origin: Some(frontend.origin.clone()) };
    let backends: Vec<&Backend> = backends_of(key, frontend).collect();
    if backends.is_empty() {
        return BTreeMap::from([((refused, element_key), element)]);
    }
    let mut elements = BTreeMap::new();
    if frontend.masquerade == Masquerade::Always {
        let origin = Some(frontend.origin.clone());
        elements.insert((masqueraded, element_key), Element { origin, ..Element::default() });
    }
    elements.insert((gate, element_key), element);
    let first = slot_offset(u32::try_from(backends.len()).unwrap_or(BACKENDS_MAX));
    for (slot, backend) in (first..).zip(backends) {
        let place = match *key {
            FrontendKey::Address { address, protocol, port } => {
                (ENDPOINTS, Key::FrontendSlot(address, protocol, port, slot))
            }
            FrontendKey::NodePort { protocol, port, .. } => {
                (NODEPORT_ENDPOINTS, Key::NodePortSlot(protocol, port, slot))
            }
        };
        let origin = Some(backend.origin.clone());
        elements.insert(place, Element { value: Some(backend.socket()), comment: None, origin });
    }
    elements
}

/// The Service and its port, as a person writes them: `default/cart:http`.
fn comment_of(frontend: &Frontend) -> Arc<str> {
    let mut text = frontend.origin.key.to_string();
    if !frontend.port_name.is_empty() {
        let _ = write!(text, ":{}", frontend.port_name);
    }
    let mut length = text.len().min(COMMENT_LENGTH_MAX);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    text.truncate(length);
    // A quote would end the comment in what `nft list` prints.
    if text.contains('"') { text.replace('"', "'").into() } else { text.into() }
}

/// Prefixes as elements. The kernel refuses intervals that overlap, so they are joined first.
fn prefix_elements(prefixes: &[IpNet], family: Family, origin: &Origin) -> OrdMap<Key, Element> {
    let own: Vec<IpNet> = prefixes.iter().filter(|it| Family::of_prefix(it) == family).map(IpNet::trunc).collect();
    let element = Element { origin: Some(origin.clone()), ..Element::default() };
    IpNet::aggregate(&own).into_iter().map(|prefix| (Key::Prefix(prefix), element.clone())).collect()
}

/// Whether a set has an element that a key stands in: for tests and the interpreter.
pub(super) fn contains<'a>(set: &'a Set, key: &Key) -> Option<&'a Element> {
    match key {
        Key::Prefix(inner) => set.elements.iter().find_map(|(key, element)| match key {
            Key::Prefix(prefix) if prefix.contains(inner) => Some(element),
            _ => None,
        }),
        Key::Frontend(..)
        | Key::NodePort(..)
        | Key::FrontendSlot(..)
        | Key::NodePortSlot(..)
        | Key::AddressPair(..) => set.elements.get(key),
    }
}
