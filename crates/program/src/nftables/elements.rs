//! One frontend as elements: which sets it is in, and with which endpoints.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use portolan_intent::services::{Backend, Frontend, FrontendKey, Masquerade};
use portolan_net::{Family, Origin, Port, Protocol};
use portolan_state::TrafficPolicy;

use super::layout::{Scope, Settings};
use super::{Element, Key};

/// The most backends that one frontend uses; the first ones by address serve.
///
/// A frontend with N backends uses the slots from N × 10,000 on, so that a person can read a slot:
/// 30002 is the last of three.
pub const BACKENDS_MAX: u32 = 10_000;

/// Where slots for clients that only endpoints of this node serve begin: 1,000,030,002 is the last of three.
const LOCAL_SLOTS: u32 = 1_000_000_000;

/// The longest comment, in bytes: what `nft` reads back without complaint (`NFTNL_UDATA_COMMENT_MAXLEN`).
const COMMENT_LENGTH_MAX: usize = 127;

/// The first slot of frontends with that many backends.
pub fn slot_offset(backends: u32) -> u32 {
    backends.saturating_mul(BACKENDS_MAX)
}

/// The first slot of frontends with that many backends of this node.
pub(super) fn local_slot_offset(backends: u32) -> u32 {
    slot_offset(backends).saturating_add(LOCAL_SLOTS)
}

/// Which element, in which set of the Services table.
pub(super) type Place = (&'static str, Key);

/// A frontend's endpoints, as its rules tell them apart.
pub(super) struct Lists<'a> {
    /// Those of all clients, or of those inside the cluster where others have their own.
    pub(super) main: Vec<&'a Backend>,
    /// Those of clients outside, where they have their own.
    pub(super) outside: Option<Vec<&'a Backend>>,
}

impl<'a> Lists<'a> {
    pub(super) fn of(key: &FrontendKey, frontend: &'a Frontend) -> Lists<'a> {
        if !frontend.endpoints.anywhere {
            return Lists { main: Vec::new(), outside: None };
        }
        let family = key.family();
        // Those of the frontend's family, and no more than fit.
        let list = |policy| {
            let backends = frontend.endpoints.of(policy).iter();
            backends.filter(|it| Family::of(it.address) == family).take(BACKENDS_MAX as usize).collect()
        };
        if frontend.kind.is_external() && frontend.policy == TrafficPolicy::Local {
            Lists { main: list(TrafficPolicy::Cluster), outside: Some(list(TrafficPolicy::Local)) }
        } else {
            Lists { main: list(frontend.policy), outside: None }
        }
    }

    /// How many there are in each list.
    pub(super) fn counts(&self) -> [u32; 2] {
        let count = |list: &[&Backend]| u32::try_from(list.len()).unwrap_or(BACKENDS_MAX);
        [count(&self.main), self.outside.as_deref().map_or(0, count)]
    }
}

pub(super) fn scope_of(key: &FrontendKey) -> Scope {
    match key {
        FrontendKey::Address { .. } => Scope::Address,
        FrontendKey::NodePort { .. } => Scope::NodePort,
    }
}

/// The keys that belong to a frontend.
#[derive(Clone, Copy)]
struct Keys<'a>(&'a FrontendKey);

impl Keys<'_> {
    fn make(
        self,
        address: impl FnOnce(IpAddr, Protocol, Port) -> Key,
        port: impl FnOnce(Protocol, Port) -> Key,
    ) -> Key {
        match *self.0 {
            FrontendKey::Address { address: it, protocol, port } => address(it, protocol, port),
            FrontendKey::NodePort { protocol, port: it, .. } => port(protocol, it),
        }
    }

    fn plain(self) -> Key {
        self.make(Key::Frontend, Key::NodePort)
    }

    fn number(self, number: u32) -> Key {
        self.make(
            |address, protocol, port| Key::FrontendSlot(address, protocol, port, number),
            |protocol, port| Key::NodePortSlot(protocol, port, number),
        )
    }

    fn source(self, prefix: IpNet) -> Key {
        self.make(
            |address, protocol, port| Key::FrontendSource(address, protocol, port, prefix),
            |protocol, port| Key::NodePortSource(protocol, port, prefix),
        )
    }

    fn endpoint(self, backend: &Backend) -> Key {
        self.make(
            |address, protocol, port| Key::FrontendEndpoint(address, protocol, port, backend.address, backend.port),
            |protocol, port| Key::NodePortEndpoint(protocol, port, backend.address, backend.port),
        )
    }
}

/// All elements that one frontend needs and no other frontend shares.
pub(super) fn elements_of(key: &FrontendKey, frontend: &Frontend, settings: &Settings) -> BTreeMap<Place, Element> {
    let names = scope_of(key).names();
    let keys = Keys(key);
    let named = Element { value: None, comment: Some(comment_of(frontend)), origin: Some(frontend.origin.clone()) };
    let bare = |origin: &Origin| Element { origin: Some(origin.clone()), ..Element::default() };
    if !frontend.endpoints.anywhere {
        return BTreeMap::from([((names.refused, keys.plain()), named)]);
    }
    let lists = Lists::of(key, frontend);
    let mut elements = BTreeMap::new();
    if let Some(set) = masquerade_set(frontend.masquerade, key, settings) {
        elements.insert((set, keys.plain()), bare(&frontend.origin));
    }
    if lists.outside.is_some() {
        elements.insert((names.local, keys.plain()), bare(&frontend.origin));
    }
    if let Some(sources) = &frontend.sources {
        elements.insert((names.restricted, keys.plain()), named.clone());
        for prefix in joined(sources, key.family()) {
            elements.insert((names.sources, keys.source(prefix)), named.clone());
        }
    }
    if let Some(timeout) = frontend.affinity {
        elements.insert((names.affinity, keys.plain()), named.clone());
        elements.insert((names.affinity_timeouts, keys.number(timeout.seconds())), bare(&frontend.origin));
        let outside = lists.outside.as_ref().unwrap_or(&lists.main);
        for (set, list) in [(names.affinity_endpoints, &lists.main), (names.affinity_outside_endpoints, outside)] {
            elements.extend(list.iter().map(|it| ((set, keys.endpoint(it)), bare(&it.origin))));
        }
    }
    let has_policy = lists.outside.is_some() || frontend.sources.is_some() || frontend.affinity.is_some();
    elements.insert((if has_policy { names.policies } else { names.services }, keys.plain()), named);
    let [main, outside] = lists.counts();
    let own = lists.outside.iter().flatten();
    let slots = (slot_offset(main)..).zip(&lists.main).chain((local_slot_offset(outside)..).zip(own));
    for (slot, backend) in slots {
        elements.insert(
            (names.endpoints, keys.number(slot)),
            Element { value: Some(backend.socket()), ..bare(&backend.origin) },
        );
    }
    elements
}

/// The set that says whose address is replaced; none where the rules do it without being told.
fn masquerade_set(masquerade: Masquerade, key: &FrontendKey, settings: &Settings) -> Option<&'static str> {
    let names = scope_of(key).names();
    match masquerade {
        Masquerade::Always => Some(names.masquerade),
        Masquerade::Node => Some(names.masquerade_node),
        // Where nobody counts as a pod, everyone is off the cluster.
        Masquerade::OffCluster if settings.tells_pods() => None,
        Masquerade::OffCluster => Some(names.masquerade),
        Masquerade::Never => settings.tells_pods().then_some(names.masquerade_never),
    }
}

/// The Service and its port, as a person writes them: `default/cart:http`.
fn comment_of(frontend: &Frontend) -> Arc<str> {
    let mut text = frontend.origin.key.to_string();
    if !frontend.port_name.is_empty() {
        let _ = write!(text, ":{}", frontend.port_name);
    }
    comment(text)
}

/// A text as a comment: not too long, and without what would end it in what `nft list` prints.
pub(super) fn comment(mut text: String) -> Arc<str> {
    let mut length = text.len().min(COMMENT_LENGTH_MAX);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    text.truncate(length);
    if text.contains('"') { text.replace('"', "'").into() } else { text.into() }
}

/// The prefixes of a family. The kernel refuses intervals that overlap, so they are joined.
fn joined(prefixes: &[IpNet], family: Family) -> Vec<IpNet> {
    let own: Vec<IpNet> = prefixes.iter().filter(|it| Family::of_prefix(it) == family).map(IpNet::trunc).collect();
    IpNet::aggregate(&own)
}

/// Prefixes as elements.
pub(super) fn prefix_elements(prefixes: &[IpNet], family: Family, origin: &Origin) -> OrdMap<Key, Element> {
    let element = Element { origin: Some(origin.clone()), ..Element::default() };
    joined(prefixes, family).into_iter().map(|prefix| (Key::Prefix(prefix), element.clone())).collect()
}
