//! Flows that are cut, flows that stay, and that following changes judges as knowing everything would.

use portolan_intent::services::{Endpoints, FrontendKind, Masquerade};
use portolan_kernel::conntrack::Tuple;
use portolan_net::{ObjectKey, ObjectKind, Origin};
use portolan_state::TrafficPolicy;
use proptest::prelude::*;

use super::*;

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn frontend(serving: &[&str]) -> Arc<Frontend> {
    let key = ObjectKey::new("default", "dns");
    let backend = |text: &&str| Backend {
        address: socket(text).ip(),
        port: Port::try_from(socket(text).port()).unwrap(),
        local: false,
        origin: Origin::object(ObjectKind::EndpointSlice, key.clone()),
    };
    let mut serving: Vec<Backend> = serving.iter().map(backend).collect();
    serving.sort();
    let endpoints = Endpoints { serving: serving.into(), ..Endpoints::default() };
    Arc::new(Frontend {
        origin: Origin::object(ObjectKind::Service, key.clone()),
        port_name: "dns".into(),
        kind: FrontendKind::ClusterIp,
        policy: TrafficPolicy::Cluster,
        masquerade: Masquerade::OffCluster,
        affinity: None,
        sources: None,
        endpoints: Arc::new(endpoints),
    })
}

fn address_key(text: &str) -> FrontendKey {
    keys_of(socket(text)).unwrap()[0]
}

fn node_port_key(port: u16) -> FrontendKey {
    keys_of(SocketAddr::new("0.0.0.0".parse().unwrap(), port)).unwrap()[1]
}

/// A flow to a destination that somebody answers, who is the destination itself where nothing is translated.
fn flow(destination: &str, answered_by: &str) -> Entry {
    let client = socket("10.42.1.7:41022");
    let original = Tuple { source: client, destination: socket(destination) };
    let reply = Tuple { source: socket(answered_by), destination: client };
    Entry { original, reply, is_answered: true, id: 1, zone: 0 }
}

fn node() -> BTreeSet<IpAddr> {
    ["192.0.2.1".parse().unwrap()].into_iter().collect()
}

/// The judge after a first state and then another.
fn after(states: &[&[(FrontendKey, &[&str])]]) -> Option<Judge> {
    let mut tracker = Tracker { pending: Judge::default() };
    let mut held = ServicesIntent::new();
    let mut judge = None;
    for state in states {
        let next: ServicesIntent = state.iter().map(|(key, serving)| (*key, frontend(serving))).collect();
        follow_all(&mut tracker, &held, &next);
        held = next;
        judge = tracker.take(&held);
    }
    judge
}

fn follow_all(tracker: &mut Tracker, old: &ServicesIntent, new: &ServicesIntent) {
    for key in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
        if old.get(key) != new.get(key) {
            tracker.follow(key, old.get(key), new.get(key));
        }
    }
}

const DNS: &str = "10.96.0.10:53";
const ONE: &str = "10.42.1.2:5353";
const TWO: &str = "10.42.2.2:5353";

#[test]
fn a_flow_to_an_endpoint_that_serves_no_more_is_cut_and_others_stay() {
    let dns = address_key(DNS);
    let judge = after(&[&[(dns, &[ONE, TWO])], &[(dns, &[TWO])]]).unwrap();
    assert!(judge.is_stale(&flow(DNS, ONE), &node()));
    assert!(!judge.is_stale(&flow(DNS, TWO), &node()));
    assert!(judge.is_stale(&flow(DNS, "10.42.2.2:53"), &node()), "another port is another endpoint");
    assert!(!judge.is_stale(&flow("10.96.0.10:54", ONE), &node()), "no frontend is there");
    assert!(!judge.is_stale(&flow(ONE, ONE), &node()), "nor where the endpoint itself is asked");
    assert_eq!(judge.families().len(), 1);
}

#[test]
fn flows_are_cut_also_where_no_endpoint_is_left() {
    let dns = address_key(DNS);
    let judge = after(&[&[(dns, &[ONE])], &[(dns, &[])]]).unwrap();
    assert!(judge.is_stale(&flow(DNS, ONE), &node()), "kubernetes/kubernetes#139628");
}

#[test]
fn a_flow_that_began_before_its_frontend_is_cut() {
    let dns = address_key(DNS);
    let judge = after(&[&[], &[(dns, &[ONE])]]).unwrap();
    assert!(judge.is_stale(&flow(DNS, DNS), &node()));
    let judge = after(&[&[(dns, &[])], &[(dns, &[ONE])]]).unwrap();
    assert!(judge.is_stale(&flow(DNS, DNS), &node()));
}

#[test]
fn a_node_port_is_one_at_this_nodes_addresses_only() {
    let key = node_port_key(30_053);
    let judge = after(&[&[(key, &[ONE])], &[(key, &[TWO])]]).unwrap();
    assert!(judge.is_stale(&flow("192.0.2.1:30053", ONE), &node()));
    assert!(judge.is_stale(&flow("192.0.2.1:30053", "192.0.2.1:30053"), &node()));
    assert!(!judge.is_stale(&flow("192.0.2.1:30053", TWO), &node()));
    assert!(!judge.is_stale(&flow("198.51.100.1:30053", "198.51.100.1:30053"), &node()), "another host's port");
}

#[test]
fn flows_of_a_frontend_that_went_away_are_cut_and_only_those() {
    let judge = after(&[&[(address_key(DNS), &[ONE]), (node_port_key(30_053), &[ONE])], &[]]).unwrap();
    assert!(judge.is_stale(&flow(DNS, ONE), &node()));
    assert!(judge.is_stale(&flow("192.0.2.1:30053", ONE), &node()));
    assert!(!judge.is_stale(&flow(DNS, TWO), &node()), "somebody else translates it");
    assert!(!judge.is_stale(&flow(DNS, DNS), &node()), "nobody translates it");
}

#[test]
fn an_endpoint_more_is_no_reason_to_look() {
    let dns = address_key(DNS);
    assert!(after(&[&[(dns, &[ONE])], &[(dns, &[ONE, TWO])]]).is_none());
    assert!(after(&[&[(dns, &[ONE])], &[(dns, &[ONE])]]).is_none());
}

#[test]
fn after_a_start_flows_to_service_addresses_that_are_gone_are_cut_and_the_rest_stays() {
    let mut tracker = Tracker::new(vec!["10.96.0.0/16".parse().unwrap()]);
    let held: ServicesIntent = [(address_key(DNS), frontend(&[ONE]))].into_iter().collect();
    let judge = tracker.take(&held).unwrap();
    assert!(!judge.is_stale(&flow(DNS, ONE), &node()));
    assert!(judge.is_stale(&flow(DNS, TWO), &node()));
    assert!(judge.is_stale(&flow("10.96.0.99:53", TWO), &node()));
    assert!(!judge.is_stale(&flow("10.96.0.99:53", "10.96.0.99:53"), &node()));
    assert!(!judge.is_stale(&flow("203.0.113.1:53", TWO), &node()), "another's translation");
    assert!(tracker.take(&held).is_none(), "once");
}

#[test]
fn what_was_not_judged_is_judged_with_what_comes_later() {
    let dns = address_key(DNS);
    let first = after(&[&[(dns, &[ONE])], &[]]).unwrap();
    let both = first.clone().followed_by(after(&[&[(node_port_key(30_053), &[TWO])], &[]]).unwrap());
    assert!(both.is_stale(&flow(DNS, ONE), &node()) && both.is_stale(&flow("192.0.2.1:30053", TWO), &node()));
    let back = first.followed_by(after(&[&[], &[(dns, &[ONE])]]).unwrap());
    assert!(!back.is_stale(&flow(DNS, ONE), &node()), "it is there again, and the endpoint serves");
}

const DESTINATIONS: [&str; 4] = [DNS, "10.96.0.11:53", "192.0.2.1:30053", "198.51.100.1:30053"];
const ENDPOINTS: [&str; 3] = [ONE, TWO, "10.42.2.3:5353"];

fn any_state() -> impl Strategy<Value = Vec<(FrontendKey, Vec<&'static str>)>> {
    let serving = || prop::option::of(prop::sample::subsequence(ENDPOINTS.to_vec(), 0..=3));
    (serving(), serving(), serving()).prop_map(|(one, two, three)| {
        let keys = [address_key(DNS), address_key("10.96.0.11:53"), node_port_key(30_053)];
        keys.into_iter().zip([one, two, three]).filter_map(|(key, serving)| Some((key, serving?))).collect()
    })
}

proptest! {
    /// A flow that the rules of one of the states made is cut by the last, or by one between, exactly if its
    /// frontend is gone or its endpoint serves there no more.
    #[test]
    fn following_changes_cuts_what_the_last_state_would_not_have_made(states in prop::collection::vec(any_state(), 2..6)) {
        let mut tracker = Tracker { pending: Judge::default() };
        let mut held = ServicesIntent::new();
        let mut flows: BTreeSet<Entry> = BTreeSet::new();
        for state in states {
            let next: ServicesIntent = state.iter().map(|(key, serving)| (*key, frontend(serving))).collect();
            follow_all(&mut tracker, &held, &next);
            held = next;
            if let Some(judge) = tracker.take(&held) {
                flows.retain(|flow| !judge.is_stale(flow, &node()));
            }
            for flow in &flows {
                let [at_address, at_node_port] = keys_of(flow.original.destination).unwrap();
                let is_here = node().contains(&flow.original.destination.ip());
                let frontend = held.get(&at_address).or_else(|| held.get(&at_node_port).filter(|_| is_here));
                let is_translated = flow.reply.source != flow.original.destination;
                prop_assert_eq!(frontend.is_some(), is_translated, "{:?}", flow);
                prop_assert!(frontend.is_none_or(|it| serves(it, flow.reply.source)), "{:?}", flow);
            }
            // What clients begin now.
            for destination in DESTINATIONS {
                let [at_address, at_node_port] = keys_of(socket(destination)).unwrap();
                let is_here = node().contains(&socket(destination).ip());
                match held.get(&at_address).or_else(|| held.get(&at_node_port).filter(|_| is_here)) {
                    Some(frontend) => flows.extend(
                        frontend.endpoints.serving.iter().map(|it| flow(destination, &it.socket().to_string())),
                    ),
                    None => drop(flows.insert(flow(destination, destination))),
                }
            }
        }
    }
}
