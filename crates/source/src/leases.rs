//! Leases of Flannel's subnets, as changes of the table of subnets.
//!
//! ```text
//!   ipam::io::flannel::Manager ──▶ Message ──▶ here ──▶ SourceEvent of ObjectKind::Subnet
//!                                               └─────▶ OwnLease: this node's subnet and its problems
//! ```
//!
//! This node's own subnet is no row of the table. A key that is no usable lease is a problem of that key.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;

use portolan_ipam::flannel::{
    Attributes, Change as LeaseChange, Lease, LeaseProblem, Tunnel, VxlanData, WireguardData,
};
use portolan_ipam::io::flannel::{Held, Manager, Message, OwnProblem};
use portolan_ipam::limits::LEASE_EVENTS_MAX;
use portolan_net::{Family, ObjectKind, Vni};
use portolan_state::{Change, NodeTunnel, Object, ObjectRef, Problem, Subnet};
use tokio::sync::{mpsc, watch};

use crate::SourceEvent;

/// This node's own lease.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnLease {
    /// The subnet, once there is one. While it cannot be renewed it stays.
    pub held: Option<Held>,
    /// What is wrong.
    pub problems: Vec<OwnProblem>,
}

/// Holds this node's lease and follows those of others, until `shutdown` is done or the receiver is gone.
/// Attributes that come later are written to the lease. The lease is kept.
pub async fn run_leases(
    manager: Manager,
    attributes: watch::Receiver<Attributes>,
    sender: mpsc::Sender<SourceEvent>,
    own: watch::Sender<OwnLease>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let (messages, mut received) = mpsc::channel(LEASE_EVENTS_MAX);
    let translate = async {
        let mut translator = Translator::default();
        while let Some(message) = received.recv().await {
            for event in translator.take(message, &own) {
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        }
    };
    tokio::select! {
        () = manager.run_until(messages, attributes, shutdown) => {}
        () = translate => {}
        () = sender.closed() => {}
    }
}

#[derive(Debug, Default)]
struct Translator {
    is_listed: bool,
    /// Keys that are listed with a problem.
    wrong: BTreeSet<Arc<str>>,
}

impl Translator {
    fn take(&mut self, message: Message, own: &watch::Sender<OwnLease>) -> Vec<SourceEvent> {
        let table = ObjectKind::Subnet;
        match message {
            Message::Held(held) => own.send_modify(|own| own.held = Some(*held)),
            Message::Own(problems) => own.send_modify(|own| own.problems = problems),
            Message::Following(None) => return vec![SourceEvent::Connected { table }],
            Message::Following(Some(reason)) => {
                let hint = "look whether the store of the leases runs and can be reached".to_owned();
                return vec![SourceEvent::Disconnected { table, reason, hint }];
            }
            Message::Leases { changes, problems } => return self.take_leases(&changes, problems),
        }
        Vec::new()
    }

    fn take_leases(&mut self, changes: &[LeaseChange], problems: Option<Vec<LeaseProblem>>) -> Vec<SourceEvent> {
        let table = ObjectKind::Subnet;
        if !std::mem::replace(&mut self.is_listed, true) {
            let objects = changes.iter().filter_map(|change| match change {
                LeaseChange::Added(lease) | LeaseChange::Changed(lease) => Some((object(lease), Vec::new())),
                LeaseChange::Removed(_) => None,
            });
            let problems = problems.unwrap_or_default();
            self.wrong = problems.iter().map(|problem| Arc::clone(&problem.name)).collect();
            let replace = Change::Replace(table, objects.collect(), problems.into_iter().map(row).collect());
            return vec![SourceEvent::Connected { table }, SourceEvent::Changes(vec![replace])];
        }
        let mut told: Vec<Change> = Vec::new();
        let mut is_there = BTreeSet::new();
        for change in changes {
            told.push(match change {
                LeaseChange::Added(lease) | LeaseChange::Changed(lease) => {
                    is_there.insert(Arc::<str>::from(lease.subnet.to_string()));
                    Change::Upsert(object(lease), Vec::new())
                }
                LeaseChange::Removed(subnet) => Change::Delete(ObjectRef::Subnet(subnet.to_string().into())),
            });
        }
        if let Some(problems) = problems {
            let wrong: BTreeSet<Arc<str>> = problems.iter().map(|problem| Arc::clone(&problem.name)).collect();
            let mended = self.wrong.iter().filter(|name| !wrong.contains(*name) && !is_there.contains(*name));
            told.extend(mended.map(|name| Change::Delete(ObjectRef::Subnet(Arc::clone(name)))));
            told.extend(problems.into_iter().map(|problem| Change::Reject(row(problem))));
            self.wrong = wrong;
        }
        if told.is_empty() { Vec::new() } else { vec![SourceEvent::Changes(told)] }
    }
}

fn row(problem: LeaseProblem) -> Problem {
    let LeaseProblem { name, text, hint } = problem;
    Problem { object: ObjectRef::Subnet(name), field: "lease".into(), reason: text.into(), hint: hint.into() }
}

fn object(lease: &Lease) -> Object {
    let (mut vni, mut macs, mut keys) = (None, [None, None], [None, None]);
    let backend = match &lease.tunnel {
        Tunnel::Vxlan { v4, v6 } => {
            let number = v4.iter().chain(v6).find_map(|data: &VxlanData| data.vni);
            vni = number.and_then(|number| Vni::new(number.into()));
            macs = [v4, v6].map(|data| data.map(|data| data.vtep_mac));
            "vxlan"
        }
        Tunnel::Wireguard { v4, v6 } => {
            let key = |data: &Option<WireguardData>| data.as_ref().map(|data| Arc::clone(&data.public_key));
            keys = [key(v4), key(v6)];
            "wireguard"
        }
        Tunnel::HostGateway => "host-gw",
        Tunnel::Ipip => "ipip",
        Tunnel::Udp => "udp",
        Tunnel::Extension { .. } => "extension",
    };
    let public_addresses: Vec<IpAddr> =
        Family::ALL.into_iter().filter_map(|family| lease.attributes.public(family)).collect();
    let [vtep_mac_v4, vtep_mac_v6] = macs;
    let [public_key_v4, public_key_v6] = keys;
    Object::Subnet(Subnet {
        key: lease.subnet.to_string().into(),
        prefixes: lease.subnet.prefixes().collect(),
        tunnel: NodeTunnel { backend: backend.into(), public_addresses, vni, vtep_mac_v4, vtep_mac_v6 },
        public_key_v4,
        public_key_v6,
        is_reservation: lease.is_reservation,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use portolan_ipam::flannel::{Claimant, Me};
    use portolan_ipam::io::flannel::Settings;
    use portolan_state::{Snapshot, Writer};
    use portolan_store::{Embedded, KeyRange, Location, Operation, Options, Store, SystemClock, Transaction};

    use super::*;

    const SUBNETS: &str = "/coreos.com/network/subnets/";

    async fn put(store: &Embedded, key: &str, value: &str) {
        let put = Operation::Put { key: key.into(), value: value.into(), lease: 0 };
        store.transaction(Transaction::default().then(put)).await.unwrap();
    }

    async fn until(
        receiver: &mut mpsc::Receiver<SourceEvent>,
        writer: &mut Writer,
        wanted: impl Fn(&Snapshot) -> bool,
    ) {
        while !wanted(writer.snapshot()) {
            let event = tokio::time::timeout(Duration::from_secs(30), receiver.recv()).await.unwrap().unwrap();
            if let SourceEvent::Changes(changes) = event {
                changes.into_iter().for_each(|change| writer.apply(change));
            }
        }
    }

    #[tokio::test]
    async fn the_table_follows_the_store() {
        let store = Arc::new(Embedded::open(Options::new(Location::Memory)).unwrap());
        put(&store, "/coreos.com/network/config", r#"{"Network":"10.5.0.0/16"}"#).await;
        let vxlan =
            r#"{"PublicIP":"192.168.0.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}"#;
        put(&store, &format!("{SUBNETS}10.5.9.0-24"), vxlan).await;
        put(&store, &format!("{SUBNETS}10.5.8.0-24"), "{").await;
        let attributes = Attributes::new(Some([192, 168, 0, 1].into()), None, &Tunnel::Udp);
        let claimant = Claimant { node: "node-1".into(), instance: "1".into() };
        let me = Me { claimant, attributes: attributes.clone(), previous: None };
        let manager = Manager::new(store.clone(), Arc::new(SystemClock::default()), Settings::default(), me, 1);
        let (_attributes, changed) = watch::channel(attributes);
        let (sender, mut receiver) = mpsc::channel(4);
        let (own, mut own_lease) = watch::channel(OwnLease::default());
        let task = tokio::spawn(run_leases(manager, changed, sender, own, std::future::pending()));
        let mut writer = Writer::new();
        until(&mut receiver, &mut writer, |it| it.is_in_sync(&[ObjectKind::Subnet])).await;
        let held = own_lease.wait_for(|own| own.held.is_some()).await.unwrap().held.clone().unwrap();
        let snapshot = writer.snapshot().clone();
        assert!(!snapshot.subnets.contains_key(held.subnet().to_string().as_str()), "one's own is no row");
        let subnet = &snapshot.subnets["10.5.9.0-24"];
        assert_eq!((&*subnet.tunnel.backend, subnet.is_reservation), ("vxlan", true));
        assert_eq!(subnet.tunnel.vtep_mac_v4.unwrap().to_string(), "02:00:00:00:00:09");
        assert_eq!(subnet.prefix(Family::V4), "10.5.9.0/24".parse().ok());
        assert!(snapshot.problems.contains_key(&ObjectRef::Subnet("10.5.8.0-24".into())));
        // A key that is mended becomes a row, one that breaks a problem, one that goes neither.
        put(&store, &format!("{SUBNETS}10.5.8.0-24"), vxlan).await;
        until(&mut receiver, &mut writer, |it| it.subnets.contains_key("10.5.8.0-24") && it.problems.is_empty()).await;
        put(&store, &format!("{SUBNETS}10.5.9.0-24"), "{").await;
        until(&mut receiver, &mut writer, |it| !it.subnets.contains_key("10.5.9.0-24") && it.problems.len() == 1).await;
        let gone = Transaction::delete(KeyRange::key(format!("{SUBNETS}10.5.9.0-24")));
        store.transaction(gone).await.unwrap();
        until(&mut receiver, &mut writer, |it| it.problems.is_empty()).await;
        assert_eq!(writer.snapshot().subnets.len(), 1);
        drop(receiver);
        tokio::time::timeout(Duration::from_secs(30), task).await.unwrap().unwrap();
    }
}
