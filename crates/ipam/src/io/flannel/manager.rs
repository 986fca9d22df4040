//! Acquiring and renewing one node's lease: single steps, each bounded in attempts and in time.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use portolan_store::{Clock, LeaseId, Store, StoreError, Transaction, TransactionResult};
use tokio::sync::{mpsc, watch};

use super::backoff::{Backoff, Random};
use super::{Held, LeaseError, Message, Renewal, Settings, follow, hold};
use crate::flannel::{
    Attributes, Decision, Layout, Me, NetworkSource, ParsedConfig, Refusal, Standing, Take, View, decide,
    parse_network_config, stand,
};
use crate::limits::{ACQUIRE_ATTEMPTS_MAX, STORE_REQUEST_MAX};

/// One node's leases in a store.
pub struct Manager {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    layout: Layout,
    settings: Settings,
    me: Me,
    random: Random,
    /// A lease that was granted and has no keys.
    spare: Option<(LeaseId, Duration)>,
}

impl Manager {
    /// A manager for one node. `seed` decides which of the free subnets it takes, and how it spreads its
    /// waits; two nodes should have two.
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>, settings: Settings, me: Me, seed: u64) -> Manager {
        let layout = Layout::new(&settings.prefix);
        Manager { store, clock, layout, settings, me, random: Random::new(seed), spare: None }
    }

    /// The network config.
    pub async fn network_config(&self) -> Result<ParsedConfig, LeaseError> {
        self.config_of(&self.look().await?)
    }

    /// Takes a subnet, or the one that this node has.
    pub async fn acquire(&mut self) -> Result<Held, LeaseError> {
        for _ in 0..ACQUIRE_ATTEMPTS_MAX {
            let view = self.look().await?;
            let config = self.config_of(&view)?;
            match decide(&self.layout, &config.config, &view, &self.me, self.random.next()) {
                Decision::Refuse(refusal) => return Err(refusal.into()),
                Decision::Delete(deletion) => drop(self.run(deletion.transaction(&self.layout)).await?),
                Decision::Take(take) => {
                    let (lease, expires) = self.lease().await?;
                    if self.take(&take, lease).await? {
                        self.me.previous = Some(take.subnet);
                        self.clean(&view, lease).await;
                        return Ok(Held { take: *take, lease, expires, config: Arc::new(config) });
                    }
                }
            }
        }
        Err(LeaseError::Contended(ACQUIRE_ATTEMPTS_MAX))
    }

    /// Renews a lease and looks whether it is as it was left. After an error nothing is known, and the
    /// lease as it was before is still good until it expires.
    pub async fn renew(&mut self, held: &mut Held) -> Result<Renewal, LeaseError> {
        let asked = self.clock.now();
        match within(self.store.lease_keep_alive(held.lease)).await {
            Ok(status) => held.expires = asked.saturating_add(status.granted.min(self.settings.time_to_live)),
            Err(LeaseError::Store(StoreError::LeaseNotFound(_))) => return Ok(Renewal::Lost),
            Err(error) => return Err(error),
        }
        self.verify(held).await
    }

    /// Looks whether a held lease is as it was left, and writes it again where it is missing.
    pub async fn verify(&mut self, held: &mut Held) -> Result<Renewal, LeaseError> {
        for _ in 0..ACQUIRE_ATTEMPTS_MAX {
            let view = self.look().await?;
            match stand(&view, &self.me, &held.take, held.lease) {
                Standing::Intact => return Ok(Renewal::Renewed),
                Standing::Gone => return Ok(Renewal::Lost),
                Standing::Superseded { by } => return Ok(Renewal::Superseded(by)),
                Standing::Contested { attributes } => return Ok(Renewal::Contested(attributes)),
                Standing::Rewrite => {
                    if self.retake(&view, held).await? {
                        return Ok(Renewal::Renewed);
                    }
                }
            }
        }
        Err(LeaseError::Contended(ACQUIRE_ATTEMPTS_MAX))
    }

    /// Writes other attributes to a held lease.
    pub async fn publish(&mut self, held: &mut Held, attributes: Attributes) -> Result<(), LeaseError> {
        self.me.attributes = attributes;
        for _ in 0..ACQUIRE_ATTEMPTS_MAX {
            let view = self.look().await?;
            if self.retake(&view, held).await? {
                return Ok(());
            }
        }
        Err(LeaseError::Contended(ACQUIRE_ATTEMPTS_MAX))
    }

    /// Whether a held subnet is one that the network config still has.
    pub async fn fits(&self, held: &Held) -> Result<bool, LeaseError> {
        Ok(self.network_config().await?.config.fits(&held.subnet()))
    }

    /// Holds the lease and follows those of others until `shutdown` is done or the reader is gone.
    /// Attributes that come later are written to the lease. The lease is kept.
    pub async fn run_until(
        mut self,
        messages: mpsc::Sender<Message>,
        attributes: watch::Receiver<Attributes>,
        shutdown: impl Future<Output = ()> + Send,
    ) {
        let (own_sender, own) = watch::channel(None);
        let (store, layout, backoff) = (Arc::clone(&self.store), self.layout.clone(), self.backoff());
        tokio::select! {
            () = shutdown => {}
            () = messages.closed() => {}
            () = hold::hold(self, &messages, attributes, own_sender) => {}
            () = follow::follow(store, layout, &messages, own, backoff) => {}
        }
    }

    pub(super) fn attributes(&self) -> &Attributes {
        &self.me.attributes
    }

    pub(super) fn set_attributes(&mut self, attributes: Attributes) {
        self.me.attributes = attributes;
    }

    pub(super) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn backoff(&mut self) -> Backoff {
        Backoff::new(self.random.next())
    }

    /// How long until the lease is to be renewed.
    pub(super) fn until_renewal(&self, held: &Held) -> Duration {
        held.expires.saturating_sub(self.settings.margin).saturating_sub(self.clock.now())
    }

    async fn look(&self) -> Result<View, LeaseError> {
        Ok(self.layout.view(&self.run(self.layout.read()).await?))
    }

    async fn run(&self, transaction: Transaction) -> Result<TransactionResult, LeaseError> {
        within(self.store.transaction(transaction)).await
    }

    fn config_of(&self, view: &View) -> Result<ParsedConfig, LeaseError> {
        let key = self.layout.config();
        let Some((text, _)) = &view.config else { return Err(Refusal::NoConfig { key }.into()) };
        parse_network_config(&String::from_utf8_lossy(text), NetworkSource::Leases)
            .map_err(|error| LeaseError::Config { key, error })
    }

    /// A lease without keys, with the time at which it could end.
    async fn lease(&mut self) -> Result<(LeaseId, Duration), LeaseError> {
        let asked = self.clock.now();
        let is_fresh = |expires: Duration| expires.saturating_sub(asked) > self.settings.time_to_live / 2;
        if let Some((lease, expires)) = self.spare.filter(|(_, expires)| is_fresh(*expires)) {
            return Ok((lease, expires));
        }
        let status = within(self.store.lease_grant(0, self.settings.time_to_live)).await?;
        let expires = asked.saturating_add(status.granted.min(self.settings.time_to_live));
        self.spare = Some((status.id, expires));
        Ok((status.id, expires))
    }

    /// Whether the taking held. A lease whose transaction was not answered is not used again: the
    /// transaction may still arrive.
    async fn take(&mut self, take: &Take, lease: LeaseId) -> Result<bool, LeaseError> {
        let spare = self.spare.take();
        match self.run(take.transaction(&self.layout, &self.me, lease)).await {
            Ok(done) if done.succeeded => Ok(true),
            Ok(_) => {
                self.spare = spare;
                Ok(false)
            }
            Err(LeaseError::Store(StoreError::LeaseNotFound(_))) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes a held lease again, with the lease that it has. `false` where it must be looked at again.
    async fn retake(&mut self, view: &View, held: &mut Held) -> Result<bool, LeaseError> {
        let config = self.config_of(view)?;
        let mut take = held.take.clone();
        let record = view.records.iter().find(|record| record.subnet.as_ref() == Ok(&take.subnet));
        take.is_reservation = record.is_some_and(|record| record.lease == 0);
        take.record = record.map(|record| record.revision);
        for (prefix, revision) in &mut take.claims {
            let claim = view.claims.get(prefix).filter(|claim| claim.claimant.as_ref() == Some(&self.me.claimant));
            // Without the claim this is no longer ours to write; the next look says so.
            let Some(claim) = claim else { return Ok(false) };
            *revision = Some(claim.revision);
        }
        take.config = view.config.as_ref().map_or(0, |(_, revision)| *revision);
        let done = self.run(take.transaction(&self.layout, &self.me, held.lease)).await?;
        if done.succeeded {
            held.take = take;
            held.config = Arc::new(config);
        }
        Ok(done.succeeded)
    }

    /// Ends the leases of earlier runs that have no keys left. Not doing so costs a day of memory in the store.
    async fn clean(&self, view: &View, lease: LeaseId) {
        let is_mine = |node: &str| *node == *self.me.claimant.node;
        let mine = view.claims.values().filter(|it| it.claimant.as_ref().is_some_and(|it| is_mine(&it.node)));
        let mut leases: Vec<LeaseId> = mine.map(|it| it.lease).filter(|it| *it != 0 && *it != lease).collect();
        leases.sort_unstable();
        leases.dedup();
        for old in leases {
            let status = within(self.store.lease_time_to_live(old)).await;
            if status.is_ok_and(|status| status.keys.is_empty()) {
                // It ends by itself where this fails.
                let _ = within(self.store.lease_revoke(old)).await;
            }
        }
    }
}

/// A request to the store, for so long.
pub(super) async fn within<T>(request: impl Future<Output = Result<T, StoreError>>) -> Result<T, LeaseError> {
    match tokio::time::timeout(STORE_REQUEST_MAX, request).await {
        Ok(answer) => answer.map_err(LeaseError::Store),
        Err(_) => Err(LeaseError::Silent(STORE_REQUEST_MAX)),
    }
}
